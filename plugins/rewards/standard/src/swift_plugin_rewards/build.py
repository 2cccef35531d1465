"""What makes each reward of this plugin from its options: `builder(config, run)`. `run` is None outside a training run.

Only what a reward needs is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swift_core.config import RunConfig
from swift_core.errors import RequestError

from swift_plugin_rewards import config as options

Builder = Callable[[Any, Any], Any]


def _processor(run: Any) -> Any:
    return getattr(run, "processor", None)


def _needed(value: str, address: str, what: str) -> str:
    if not value:
        raise RequestError(f"{address}: expected {what}")
    return value


def accuracy(config: options.AccuracyConfig, run: Any) -> Any:
    from swift_plugin_rewards.accuracy import Accuracy

    return Accuracy(config)


def form(config: options.FormatConfig, run: Any) -> Any:
    from swift_plugin_rewards.form import Format

    return Format(config)


def cosine(config: options.CosineConfig, run: Any) -> Any:
    from swift_plugin_rewards.lengths import Cosine, Measure, limit_of

    limit = limit_of(config.max_tokens, run, "cosine")
    return Cosine(config, Measure(config.unit, _processor(run), "cosine"), limit, accuracy(config, run))


def repetition(config: options.RepetitionConfig, run: Any) -> Any:
    from swift_plugin_rewards.lengths import Measure, Repetition

    return Repetition(config, Measure(config.unit, _processor(run), "repetition"))


def length(config: options.LengthConfig, run: Any) -> Any:
    from swift_plugin_rewards.lengths import Length, Measure

    return Length(config, Measure(config.unit, _processor(run), "length"))


def soft_overlong(config: options.OverlongConfig, run: Any) -> Any:
    from swift_plugin_rewards.lengths import Measure, Overlong, limit_of

    limit = limit_of(config.max_tokens, run, "soft_overlong")
    return Overlong(config, Measure(config.unit, _processor(run), "soft_overlong"), limit)


def code(config: options.CodeConfig, run: Any) -> Any:
    from swift_plugin_rewards.code import Code

    return Code(config)


def tool_call(config: options.ToolCallConfig, run: Any) -> Any:
    from swift_plugin_rewards.tool_call import ToolCall

    return ToolCall(config)


def metric(config: options.MetricConfig, run: Any) -> Any:
    from swift_core.events import EventSink
    from swift_core.session import Session

    from swift_plugin_rewards.models import Reference

    name = _needed(config.metric, "reward.metric.metric", "the id of a metric, such as exact_match")
    part = run.part if run is not None else Session(RunConfig(), EventSink()).part
    return Reference(part("metric", name), f"metric:{name}")


def function(config: options.FunctionConfig, run: Any) -> Any:
    from swift_plugin_rewards.files import Function, load_function

    file = _needed(config.file, "reward.function.file", "a Python file")
    spec = f"{file}:{_needed(config.function, 'reward.function.function', 'the name of a function in it')}"
    return Function(load_function(file, config.function, f"reward {spec}"), spec)


def model(config: options.ModelConfig, run: Any, base: RunConfig | None = None) -> Any:
    """base: what the model is opened by, where there is no run: its flags and its backend."""
    from pathlib import Path

    from swift_plugin_rewards.models import RewardModel

    folder = str(Path(_needed(config.folder, "reward.model.folder", "a reward model's folder")).expanduser())
    if not Path(folder).is_dir():
        raise RequestError(f"reward.model.folder: no folder {config.folder}")
    device = str(run.backend.device) if run is not None else None
    return RewardModel(folder, config.folder, base or getattr(run, "config", None) or RunConfig(), device)


def judge(config: options.JudgeConfig, run: Any, base: RunConfig | None = None) -> Any:
    from swift_plugin_rewards.judge import Judge

    address = _needed(config.address, "reward.judge.address", "an OpenAI-compatible address, http://HOST:PORT/v1")
    base = base or getattr(run, "config", None) or RunConfig()
    return Judge.open(address, config.model, config.prompt, config.max_tokens, base)


BUILDERS: dict[str, Builder] = {
    "accuracy": accuracy, "format": form, "cosine": cosine, "repetition": repetition, "length": length,
    "soft_overlong": soft_overlong, "code": code, "tool_call": tool_call, "metric": metric, "function": function,
    "model": model, "judge": judge,
}  # fmt: skip

"""The parts by themselves: prompts, rollouts, talks, batches, stages, figures, options."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
from swift_core.config import build_options
from swift_core.errors import CapabilityError, RequestError, RunError
from swift_core.source import SampleList
from swift_core.types import Completion, ModelBundle, Request
from swift_plugin_grpo.account import Sums, Told, ToldGroup, figures
from swift_plugin_grpo.ahead import Ahead
from swift_plugin_grpo.batches import Batcher
from swift_plugin_grpo.config import CispoConfig, DapoConfig, GrpoConfig, GspoConfig, RlooConfig
from swift_plugin_grpo.environments import ToolEnvironment, continuation, make_factory, tool_factory
from swift_plugin_grpo.prompts import Prompt, PromptForm, Prompts
from swift_plugin_grpo.rollouts import Rollout, Rollouts, Sampling, add, begin, seed_of
from swift_plugin_grpo.scoring import Scored, labelled
from swift_plugin_grpo.stages import Stages
from swift_plugin_grpo.weights import Weights

HERE = Path(__file__).parent


def row(text: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


def test_a_row_becomes_its_prompt(tiny_bundle: ModelBundle) -> None:
    template: Any = tiny_bundle.template
    given = row("hi", solution=3)
    given["messages"].append({"role": "assistant", "content": "the answer"})
    (sample,) = PromptForm().encode(template, given)
    assert sample.input_ids == template.prompt([{"role": "user", "content": "hi"}])
    assert sample.label == {"row": given}
    assert sample.trained_tokens == 1
    with pytest.raises(ValueError, match="asks nothing"):
        PromptForm().encode(template, {"messages": [{"role": "assistant", "content": "a"}]})
    with pytest.raises(ValueError, match="the row has media, and this checkpoint takes text only"):
        PromptForm().encode(template, row([{"type": "image"}], images=["a.png"]))


def test_draws_are_a_function_of_the_number(tiny_bundle: ModelBundle) -> None:
    samples = SampleList(s for n in range(5) for s in PromptForm().encode(tiny_bundle.template, row(f"q{n}")))  # type: ignore[arg-type]
    prompts = Prompts(samples, 7)
    first = [prompt.row["messages"][0]["content"] for prompt in prompts.draw(range(12))]
    assert sorted(first[:5]) == sorted(first[5:10]) == [f"q{n}" for n in range(5)]
    assert first[:5] != first[5:10]
    assert [prompt.row["messages"][0]["content"] for prompt in Prompts(samples, 7).draw([11, 3])] == [first[11], first[3]]
    assert [p.row["messages"][0]["content"] for p in Prompts(samples, 7, shuffle=False).draw([4, 6])] == ["q4", "q1"]
    with pytest.raises(RequestError, match="no prompt"):
        Prompts(SampleList(), 7)


class Engine:
    """Answers from a list, with a log-probability for each token."""

    capabilities = frozenset({"sync"})

    def __init__(self, answers: list[list[int]], end: str = "stop") -> None:
        self.answers, self.end, self.asked, self.version, self.model = answers, end, list[Request](), 0, None

    def generate(self, requests: Any, stream: bool = False) -> Any:
        for index, request in enumerate(requests):
            for choice in range(request.n):
                ids = self.answers[len(self.asked) % len(self.answers)]
                self.asked.append(request)
                text = bytes(token - 3 for token in ids if token > 2).decode("latin1")
                yield Completion(index, text, ids, [-0.5] * len(ids), self.end, 0, self.version, choice)


def rollouts_of(engine: Any, bundle: ModelBundle, **more: Any) -> Rollouts:
    weights = Weights(engine, type("Tuned", (), {"model": object(), "save": lambda *_: None})())  # type: ignore[arg-type]
    stages = Stages({}, 20.0, "trainer.timeouts")
    return Rollouts(engine, bundle.template, weights, Sampling(max_tokens=40), 5, stages, **more)  # type: ignore[arg-type]


def test_rollouts_keep_ids_and_tell_what_was_cut(tiny_bundle: ModelBundle) -> None:
    engine = Engine([[70, 71, 2]])
    engine.version = 4
    groups = rollouts_of(engine, tiny_bundle).make([Prompt(9, [5, 6], row("a")), Prompt(10, [7], row("b"))], 2)
    assert [[r.ids for r in group] for group in groups] == [[[5, 6, 70, 71, 2]] * 2, [[7, 70, 71, 2]] * 2]
    assert groups[0][1].own == [False, False, True, True, True]
    assert (groups[0][0].version, groups[0][0].length, groups[0][0].truncated, groups[1][1].choice) == (4, 3, False, 1)
    assert groups[0][0].sample().weights == [0, 0, 1, 1, 1]
    assert [request.seed for request in engine.asked[::2]] == [seed_of(5, 9), seed_of(5, 10)]
    assert rollouts_of(Engine([[70]], "length"), tiny_bundle).make([Prompt(0, [5], row("a"))], 1)[0][0].truncated
    silent = begin(Prompt(0, [5], row("a")), 0)
    with pytest.raises(RunError, match="2 tokens and 1 log-probabilities"):
        add(silent, Completion(0, "", [1, 2], [-1.0], "stop"), 0)


class Taking:
    """An engine in another process, as `Weights` sees it: it takes adapters that are named `good`, or whole weights."""

    def __init__(self, *capabilities: str) -> None:
        self.capabilities, self.had, self.model = frozenset(capabilities), list[Any](), None

    def load_adapter(self, name: str, folder: Path) -> None:
        if (folder / "adapter_config.json").read_text() == "bad":
            raise RequestError("no DoRA here")
        self.had.append((name, folder.name))

    def sync_weights(self, weights: Any, version: int) -> None:
        self.had.append((dict(weights), version))


class Kept:
    """A tuner that keeps what it trains beside the model."""

    def __init__(self, kind: str) -> None:
        self.kind, self.model = kind, object()

    def weights(self) -> Any:
        return iter(())

    def save(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text(self.kind)


def test_weights_go_the_way_that_both_have() -> None:
    """As adapters, whole where the engine takes no such adapter, or not at all, which is told."""
    steps: Any = type("Steps", (), {"full_weights": lambda self, role: iter([(role, 1)])})()
    engine: Any = Taking("adapters", "sync")
    weights = Weights(engine, Kept("good"))  # type: ignore[arg-type]
    for version in (0, 3):
        weights.sync(steps, version)
    assert engine.had == [("policy", "version-0"), ("policy", "version-3")]
    assert (weights.adapter, weights.version, weights.by_adapter) == ("policy", 3, True)
    engine = Taking("adapters", "sync")
    weights = Weights(engine, Kept("bad"))  # type: ignore[arg-type]
    weights.sync(steps, 1)
    assert (engine.had, weights.adapter, weights.by_adapter) == ([({"policy": 1}, 1)], None, False)
    alone = Weights(Taking("adapters"), Kept("bad"))  # type: ignore[arg-type]
    with pytest.raises(RunError, match="version 1 were not taken, the base model stays in service: no DoRA here"):
        alone.sync(steps, 1)
    with pytest.raises(CapabilityError, match="takes neither adapters of this tuner nor weights"):
        Weights(Taking(), Kept("good"))  # type: ignore[arg-type]


def test_a_talk_is_never_tokenized_again(tiny_bundle: ModelBundle) -> None:
    """Three turns: the ids are what the template writes for the whole talk, the loss is on the model's own tokens, and rewards
    add up. The ids that were drawn need not be those that their text would be tokenized to."""
    template: Any = tiny_bundle.template
    tokenizer = tiny_bundle.processor
    said = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one<|im_end|>", "two<|im_end|>", "six<|im_end|>")
    ]
    engine = Engine(said)
    factory = make_factory(f"{HERE / 'grpo_letters.py'}:Guess", None, {})  # type: ignore[arg-type]
    made = rollouts_of(engine, tiny_bundle, environment=factory, turns=5)
    ((rollout,),) = made.make([Prompt(0, [1], row("hi"))], 1)
    talk = [
        ("user", "hi"), ("user", "begin"), ("assistant", "one"), ("user", "again 1"), ("assistant", "two"), ("user", "again 2"),
    ]  # fmt: skip
    expected = template.prompt([{"role": role, "content": text} for role, text in talk]) + said[2]
    assert rollout.ids == expected
    own = [token for token, mine in zip(rollout.ids, rollout.own, strict=True) if mine]
    assert own == [*said[0], *said[1], *said[2]]
    assert (rollout.turns, rollout.length, rollout.reward, rollout.finish) == (3, 12, pytest.approx(9.0), "stop")
    assert [message["role"] for message in rollout.messages] == ["user", "assistant", "user", "assistant", "user", "assistant"]
    assert [request.max_tokens for request in engine.asked] == [40, 36, 32]
    ((cut,),) = rollouts_of(Engine(said), tiny_bundle, environment=factory, turns=2).make([Prompt(0, [1], row("hi"))], 1)
    assert (cut.turns, cut.truncated) == (2, True)


def test_an_answer_that_a_text_ended_gets_its_end_marker(tiny_bundle: ModelBundle) -> None:
    """Untrained, as the model did not make it."""
    said, template = [{"role": "user", "content": "b"}], tiny_bundle.template
    answer = {"role": "assistant", "content": "x"}
    with_end = continuation(template, answer, said, None, False, {})  # type: ignore[arg-type]
    assert with_end[1:] == continuation(template, answer, said, None, True, {})  # type: ignore[arg-type]
    assert tiny_bundle.processor.decode(with_end) == "<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("name", "told"),
    [("Stuck", r"stage environment \(step of prompt 3, answer 0\) has not ended in 0\.2 s"), ("Faulty", "no such move")],
)
def test_an_environment_that_hangs_or_fails_is_named(name: str, told: str, tiny_bundle: ModelBundle) -> None:
    factory = make_factory(f"{HERE / 'grpo_letters.py'}:{name}", None, {})  # type: ignore[arg-type]
    made = rollouts_of(Engine([[70, 2]]), tiny_bundle, environment=factory, turns=2)
    made.stages = Stages({"environment": 0.2}, 20.0, "trainer.timeouts")
    with pytest.raises(RunError, match=told):
        made.make([Prompt(3, [1], row("hi"))], 1)


@pytest.mark.parametrize(
    ("gives", "told"),
    [
        ("1", r"step of prompt 3, answer 0\): ValueError: step must give \(messages, reward, done\), not 1"),
        ("([], float('nan'), True)", "a reward must be a finite number, not nan"),
        ("('more', 0.5, False)", "expected a list of messages such as .*, not 'more'"),
        ("([{'content': 'x'}], 0.5, False)", "expected a list of messages"),
    ],
)
def test_an_environment_that_gives_something_else_is_told(
    gives: str, told: str, tiny_bundle: ModelBundle, tmp_path: Path
) -> None:
    body = f"class Odd:\n    def reset(self, row):\n        return None\n    def step(self, message):\n        return {gives}\n"
    (tmp_path / "odd.py").write_text(body)
    factory = make_factory(f"{tmp_path / 'odd.py'}:Odd", None, {})  # type: ignore[arg-type]
    made = rollouts_of(Engine([[70, 2]]), tiny_bundle, environment=factory, turns=2)
    with pytest.raises(RunError, match=told):
        made.make([Prompt(3, [1], row("hi"))], 1)


def test_tools_answer_with_what_they_give_or_with_their_error(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text("def add(a, b):\n    return a + b\n")
    world = tool_factory([f"{tmp_path / 'tools.py'}:add"])()
    assert isinstance(world, ToolEnvironment)

    def call(name: str, arguments: Any) -> dict[str, Any]:
        return {"id": "call_0", "type": "function", "function": {"name": name, "arguments": arguments}}

    calls = [call("add", {"a": 2, "b": 3}), call("add", '{"a": 2}'), call("take", {})]
    said, reward, done = world.step({"role": "assistant", "content": "", "tool_calls": calls})
    assert [message["role"] for message in said] == ["tool"] * 3
    assert said[0]["content"] == "5"
    assert "missing 1 required positional argument" in said[1]["content"]
    assert said[2]["content"] == "error: no tool 'take'; there are: add"
    assert (reward, done) == (0.0, False)
    assert world.step({"role": "assistant", "content": "5"}) == ([], 0.0, True)
    with pytest.raises(RequestError, match="no 'take'"):
        tool_factory([f"{tmp_path / 'tools.py'}:take"])
    with pytest.raises(RequestError, match="no such file"):
        make_factory("nowhere.py:World", None, {})  # type: ignore[arg-type]


TOOLS = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{%- endif %}{%- for message in messages %}"
    "{{ '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' }}"
    "{%- if message.role == 'tool' %}{{ '<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
    "{%- elif message.content %}{{ message.content }}{% endif %}"
    "{%- for call in message.tool_calls or [] %}"
    '{{ \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}{{ call.function.arguments | tojson }}'
    "{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


def test_a_model_calls_tools_and_goes_on_with_what_they_say(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    """The call is read off the ids by the template's own format, the function is called, and the ids are those of the talk."""
    tokenizer, template = tiny_bundle.processor, tiny_bundle.template
    tokenizer.chat_template = TOOLS
    (tmp_path / "tools.py").write_text("def add(a, b):\n    return a + b\n")
    numbers = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": numbers}}]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'
    said = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (call, "It is 5.<|im_end|>")]
    factory = tool_factory([f"{tmp_path / 'tools.py'}:add"])
    made = rollouts_of(Engine(said), tiny_bundle, environment=factory, turns=4)
    made.sampling = Sampling(max_tokens=200)
    given = row("What is 2 + 3?", tools=tools)
    (sample,) = PromptForm().encode(template, given)  # type: ignore[arg-type]
    ((rollout,),) = made.make([Prompt(0, sample.input_ids, given)], 1)
    asked = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    talk = [*given["messages"], {"role": "assistant", "content": "", "tool_calls": [asked]}, {"role": "tool", "content": "5"}]
    assert tokenizer.decode(rollout.ids) == tokenizer.decode(template.prompt(talk, tools)) + "It is 5.<|im_end|>"  # type: ignore[union-attr]
    own = [token for token, mine in zip(rollout.ids, rollout.own, strict=True) if mine]
    assert own == [*said[0], *said[1]]
    assert (rollout.turns, rollout.finish, rollout.reward) == (2, "stop", 0.0)
    assert [message["role"] for message in rollout.messages] == ["assistant", "tool", "assistant"]
    assert rollout.messages[-1]["content"] == "It is 5."


def test_batches_hold_groups_and_leave_out_what_is_empty(tiny_bundle: ModelBundle) -> None:
    def scored(number: int, own: int) -> Scored:
        rollout = begin(Prompt(number, list(range(20, 40)), row("a")), 0)
        add(rollout, Completion(0, "", [50 + n for n in range(own)], [-1.0] * own, "stop"), 0)
        return Scored(rollout)

    groups = [[scored(0, 3), scored(0, 0), scored(0, 5)], [scored(1, 0)], [scored(2, 30), scored(2, 30)]]
    for flat, limit, parts in ((True, 60, [2, 1, 1]), (True, 200, [4]), (False, 60, [2, 1, 1])):
        found = list(Batcher(tiny_bundle.template, flat, flat, limit).of(groups))  # type: ignore[arg-type]
        assert [len(answers) for _, answers in found] == parts
        assert sum(batch.trained_tokens for batch, _ in found) == 68
    ((batch, _),) = Batcher(tiny_bundle.template, True, True, 200).of(groups)  # type: ignore[arg-type]
    assert batch.inputs["input_ids"].shape[1] < 2 * 20 + 68 + 8  # each prompt once


def test_stages_are_timed_and_end(capfd: pytest.CaptureFixture[str]) -> None:
    stages = Stages({"rewards": 0.2}, 5.0, "trainer.timeouts")
    with stages.stage("rollouts"):
        time.sleep(0.1)
        with stages.stage("environment"):
            time.sleep(0.15)
    times = stages.take()
    assert times["rollouts"] == pytest.approx(0.1, abs=0.09)
    assert times["environment"] == pytest.approx(0.15, abs=0.1)
    assert stages.take() == {}
    told = r"stage rewards has not ended in 0\.2 s; it was at .*test_grpo_parts.* \(trainer\.timeouts\.rewards is the limit\)"
    with pytest.raises(RunError, match=told), stages.stage("rollouts"), stages.stage("rewards"):
        time.sleep(5)


def test_an_outer_stages_limit_holds_after_an_inner_one() -> None:
    stages = Stages({"rollouts": 0.3}, 5.0, "x")

    def work() -> None:
        with stages.stage("environment"):
            time.sleep(0.1)
        time.sleep(5)

    with pytest.raises(RunError, match="stage rollouts"), stages.stage("rollouts"):
        work()


def test_what_is_made_ahead_is_taken_once() -> None:
    ahead = Ahead(Stages({}, 5.0, "x"))
    prompts = [Prompt(3, [1], {})]
    ahead.begin(prompts, lambda: "begun")  # type: ignore[arg-type,return-value]
    assert ahead.waits
    assert ahead.take(prompts, lambda: "now") == "begun"  # type: ignore[arg-type,return-value]
    assert (ahead.waits, ahead.take(prompts, lambda: "now")) == (False, "now")  # type: ignore[arg-type,return-value]

    def fail() -> Any:
        raise RunError("the engine died")

    ahead.begin(prompts, fail)
    with pytest.raises(RunError, match="the engine died"):
        ahead.take(prompts, lambda: "now")  # type: ignore[arg-type,return-value]


def told(scores: list[float], truncated: bool = False, version: int = 0) -> ToldGroup:
    return ToldGroup(0, [Told({"a": s, "b": None}, s, 10, truncated, version, 1, 15.0) for s in scores])


def test_figures_of_a_step() -> None:
    found = figures([told([0.0, 1.0]), told([1.0, 1.0], True)], 2)
    assert (found["reward"], found["no_signal"], found["truncated"], found["staleness"]) == (0.75, 0.5, 0.5, 2.0)
    assert found["reward_std"] == found["reward_std/a"] == pytest.approx(0.5)
    assert math.isnan(found["reward/b"])
    assert (found["entropy"], found["length"]) == (1.5, 10.0)
    one, other = Sums(), Sums()
    one.add(10, {"kl": 2.0, "mismatch_max": 0.1})
    other.add(30, {"kl": 2.0, "mismatch_max": 0.4})
    assert Sums.means([one, other]) == {"kl": 0.1, "mismatch_max": 0.4}


def test_rewards_of_files_have_short_names() -> None:
    assert labelled(["a.py:one", "accuracy", {"name": "b.py:two"}]) == [
        {"name": "a.py:one", "label": "one"}, "accuracy", {"name": "b.py:two"},
    ]  # fmt: skip
    assert labelled(["a.py:one", "b.py:one"]) == ["a.py:one", "b.py:one"]


@pytest.mark.parametrize(
    ("options", "told"),
    {
        "group of one": ({"generations": 1}, "generations must be at least 2"),
        "share": ({"entropy_share": 0}, "entropy_share must be in"),
        "delta": ({"delta": 0.5}, "delta must be above 1"),
        "two sides": ({"delta": 1.5, "loss": "cispo"}, "delta changes nothing with loss cispo"),
        "end": ({"sft": 0.5, "sft_end": 0.1}, "sft_end changes nothing without sft_decay"),
        "ahead": ({"ahead": True, "resample": 2}, "cannot be had with resample"),
        "stage": ({"timeouts": {"rewardz": 3}}, "no stage 'rewardz'"),
        "gdpo": ({"advantage": "gdpo", "kl": 0.1, "kl_in": "reward"}, "kl_in must be loss"),
        "cap": ({"mismatch_cap": 0.5, "mismatch_floor": 0.6}, "above mismatch_floor"),
        "margin": ({"overlong_margin": 999}, "at most max_tokens"),
        "old": ({"old": "engine", "mismatch": "mask"}, "old must be trainer"),
        "loss": ({"loss": "grop"}, "one of grpo, bnpo"),
        "tokens": ({"max_tokens": 0}, "max_tokens must be at least 1"),
    }.values(),
)
def test_wrong_options_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        build_options(GrpoConfig, options, "trainer.grpo")


def test_presets_are_options() -> None:
    assert (DapoConfig().loss, DapoConfig().clip_high, DapoConfig().resample) == ("dapo", 0.28, 3)
    assert (GspoConfig().ratio, GspoConfig().clip_low) == ("sequence", 3e-4)
    assert (CispoConfig().loss, CispoConfig().clip_high, GrpoConfig(loss="cispo").clip_high) == ("cispo", 5.0, 5.0)
    assert (RlooConfig().advantage, RlooConfig().kl_in, RlooConfig().ratio) == ("rloo", "reward", "answer")
    assert GrpoConfig(advantage="reinforce_plus_plus", generations=1).generations == 1


def test_a_rollout_tells_rewards_how_it_came_about() -> None:
    rollout = Rollout(0, 0, row("a"), [1], [False], finish="length", turns=2)
    assert rollout.told()["rollout"] == {"messages": [], "tokens": 0, "finish": "length", "turns": 2}

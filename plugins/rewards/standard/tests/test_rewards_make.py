"""How rewards are named, opened and added up; functions, reward models and judges."""

from __future__ import annotations

import http.server
import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from swift_core.config import Component, RunConfig
from swift_core.errors import RequestError, RunError, SwiftError
from swift_core.events import EventSink
from swift_core.session import Session
from swift_core.testing import PartContract
from swift_core.types import Completion, Request
from swift_plugin_rewards.config import JudgeConfig
from swift_plugin_rewards.judge import PROMPT, Judge, read_prompt
from swift_plugin_rewards.make import make_rewards, score


class TestMetric(PartContract):
    distribution, id, options = "swift-plugin-rewards", "reward/metric", {"metric": "length"}


class TestFunction(PartContract):
    distribution, id = "swift-plugin-rewards", "reward/function"

    @pytest.fixture(autouse=True)
    def file(self, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text(FUNCTIONS)
        type(self).options = {"file": str(tmp_path / "mine.py"), "function": "good"}


def talk(question: str = "q") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "xx"}]}


def length(completions: list[str], rows: list[Any]) -> list[float]:
    return [float(len(text)) for text in completions]


def made(*specs: Any, stack: ExitStack | None = None, model: Path | None = None) -> list[Any]:
    config = RunConfig(model=Component(str(model)) if model else Component())
    with ExitStack() as own:
        session = (stack or own).enter_context(Session(config, EventSink()))
        return make_rewards(session.part, specs, stack or own, config)


def opened(spec: Any, **more: Any) -> Any:
    ((_, _, reward),) = made(spec, **more)
    return reward


def test_a_metric_scores_against_the_rows_own_answer() -> None:
    reward = opened("metric:length")
    row = talk()
    assert reward(["xx", ""], [row, row]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="reward metric:length: the row has no answer of its own to compare with"):
        reward(["xx"], [{"messages": row["messages"][:1]}])


FUNCTIONS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Kept:
    count: int = 0

def good(completions, rows):
    return [len(said) + len(row["messages"]) for said, row in zip(completions, rows)]

async def late(completions, rows):
    import asyncio
    await asyncio.sleep(0.5)
    return [1.0 if said else None for said in completions]

def bad(completions, rows):
    return [float("nan")]

def broken(completions, rows):
    raise ValueError("x")
"""


def test_a_function_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    row = talk()
    found = score([("f", 1.0, opened(f"{file}:good")), ("g", 10.0, length)], ["abc", ""], [row, row])
    assert found == [{"f": 5.0, "g": 3.0, "score": 35.0}, {"f": 2.0, "g": 0.0, "score": 2.0}]
    with pytest.raises(RunError, match="reward f: a score must be a finite number, or None, not nan"):
        score([("f", 1.0, opened(f"{file}:bad"))], ["abc"], [row])
    with pytest.raises(RunError, match="reward f: 1 scores for 2 answers"):
        score([("f", 1.0, opened(f"{file}:bad"))], ["abc", "d"], [row, row])
    with pytest.raises(RunError, match=r"mine\.py:broken: ValueError: x"):
        score([("f", 1.0, opened(f"{file}:broken"))], ["abc"], [row])
    for spec, text in (
        (f"{file}:none", "has no function 'none'"),
        (f"{file}x.py:f", "no file"),
        ("nothing", "expected metric:NAME"),
        (f"judge:{tmp_path}", "speaks to a server"),
    ):
        with pytest.raises(SwiftError, match=text):
            opened(spec)


def test_a_reward_model_scores_the_whole_talk(tiny_folder: Path, tmp_path: Path) -> None:
    """The same number as the library's own classifier gives for the rendered talk."""
    import torch
    from swift_plugin_transformers.testing import make_tokenizer
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = make_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    config = LlamaConfig(**shape, **tokens, num_key_value_heads=2, num_labels=1)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    rows = [talk()]
    with ExitStack() as stack:
        (value,) = opened(str(tmp_path / "reward"), model=tiny_folder, stack=stack)(["said"], rows)
    messages = [rows[0]["messages"][0], {"role": "assistant", "content": "said"}]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        assert value == pytest.approx(float(model(torch.tensor([ids])).logits[0, 0]), abs=1e-5)
    with pytest.raises(SwiftError, match="gives no score"):
        opened(str(tiny_folder), model=tiny_folder)


class Rater:
    """An engine that says how long the answer in its prompt is."""

    def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
        for index, request in enumerate(requests):
            asked = (request.messages or [{}])[0]["content"]
            said = asked.rpartition("[Answer to rate]\n")[2].strip()
            yield Completion(index, f"Because 5 is 5.\nRating: {len(said)}" if said != "none" else "I cannot.", [1])


def test_a_judge_is_asked_with_question_reference_and_answer(tmp_path: Path) -> None:
    judge = Judge(Rater(), PROMPT, "here")
    row = talk("what {answer} is it?")
    assert judge(["abc", "x"], [row, row]) == [3.0, 1.0]
    with pytest.raises(ValueError, match=r"the judge here gave no number: 'I cannot\.'"):
        judge(["none"], [row])
    file = tmp_path / "prompt.txt"
    file.write_text("Rate it.")
    with pytest.raises(RequestError, match=r"nowhere says \{answer\}"):
        read_prompt(str(file))


def test_a_judge_behind_an_address(tmp_path: Path) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

        def _send(self, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._send({"object": "list", "data": [{"id": "judge", "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = body["messages"][0]["content"].rpartition("[Answer to rate]\n")[2].strip()
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f"Rating: {len(said)}"}}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            self._send({"id": "x", "object": "chat.completion", "model": "judge", "choices": [choice], "usage": usage})

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with ExitStack() as stack:
            judge = opened(f"judge:http://127.0.0.1:{server.server_port}/v1", stack=stack)
            assert judge(["four", "x"], [talk(), talk()]) == [4.0, 1.0]
    finally:
        server.shutdown()


# --- names, weights, sums ---------------------------------------------------------------------------------------------


def test_async_functions_wait_together_and_none_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    with ExitStack() as stack:
        rewards = made(
            {"name": f"{file}:late", "label": "a", "weight": 2}, {"name": f"{file}:late", "label": "b"}, "format", stack=stack
        )
        begun = time.monotonic()
        found = score(rewards, ["x", ""], [talk(), talk()])
        again = score(rewards, ["x", ""], [talk(), talk()])  # the loop lasts
    assert time.monotonic() - begun < 1.9  # four waits of half a second, two at a time
    assert found == again
    assert found == [
        {"a": 1.0, "b": 1.0, "format": 0.0, "score": 3.0}, {"a": None, "b": None, "format": 0.0, "score": 0.0}
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no reward judges answer 0: a, b gave none"):
        score([("a", 1.0, lambda said, rows: [None]), ("b", 1.0, lambda said, rows: [None])], ["x"], [talk()])


def test_a_time_out_ends_the_wait_for_a_function_that_hangs(tmp_path: Path) -> None:
    def overdue(number: int, frame: Any) -> None:
        raise RunError("too long")

    file = tmp_path / "mine.py"
    file.write_text("import asyncio\nasync def never(completions, rows):\n    await asyncio.sleep(60)\n")
    begun, before = time.monotonic(), signal.signal(signal.SIGALRM, overdue)
    try:
        with ExitStack() as stack:
            rewards = made(f"{file}:never", stack=stack)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(RunError, match=r"^too long$"):
                score(rewards, ["x"], [talk()])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise SystemExit(3)", "reward .*mine.py:odd: SystemExit: 3"),
        ("return 1.0", "reward .*mine.py:odd: expected a list with a number for each answer, not 1.0"),
        ("return None", "expected a list with a number for each answer, not None"),
        ("return {'a': 1}", "expected a list with a number for each answer, not {'a': 1}"),
    ],
)
def test_a_function_that_gives_no_list_is_told(body: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"def odd(completions, rows):\n    {body}\n")
    with pytest.raises(RunError, match=told):
        opened(f"{file}:odd")(["x"], [talk()])


def test_numbers_of_numpy_and_torch_count() -> None:
    import numpy as np
    import torch

    for values in (np.array([1.5]), torch.tensor([1.5]), [True]):
        assert score([("a", 2.0, lambda said, rows, v=values: v)], ["x"], [{}]) == [
            {"a": float(values[0]), "score": 2 * float(values[0])}
        ]


@pytest.mark.parametrize(
    ("specs", "text"),
    [
        (["nothing"], "reward nothing: no part 'reward/nothing'"),
        (["format", "format"], "reward format: given twice"),
        ([{"name": "format", "weight": "much"}], r"rewards\.0\.weight: expected a finite number, not 'much'"),
        ([{"name": "format", "frm": "think"}], "unknown option 'frm'. Did you mean: form"),
        ([{"form": "think"}], r"rewards\.0: a reward needs a name"),
        ([{"name": "repetition", "n": 0}], "n must be at least 1, not 0"),
        (["{name: format"], r"rewards\.0: neither a name nor a mapping"),
        (["runs/none"], r"reward\.model\.folder: no folder runs/none"),
        (["function"], r"reward\.function\.file: expected a Python file"),
        (["metric:none"], "none"),
        ([3], "expected a name or a mapping, not"),
    ],
)
def test_wrong_specs(specs: list[Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        made(*specs)


def test_a_mapping_may_be_written_as_text() -> None:
    ((name, weight, reward),) = made("{name: length, label: short, weight: 0.5, max: 2, unit: words}")
    assert (name, weight, reward(["a b", "a b c"], [{}, {}])) == ("short", 0.5, [1.0, 0.0])


def test_judges_options() -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        JudgeConfig(max_tokens=0)

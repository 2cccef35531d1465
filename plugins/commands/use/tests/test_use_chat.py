"""`chat`: tools that are shown, run and answered, settings, one model after another; `infer` in several processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from swift_core.errors import RequestError, RunError
from swift_core.session import Opened
from swift_core.types import Completion, Request
from swift_plugin_use.answers import CHUNK
from swift_plugin_use.chat import Desk, chat
from swift_plugin_use.infer import infer
from swift_plugin_use.setting import with_setting
from swift_plugin_use.stream import stream_answer
from swift_plugin_use.talk import begin_talk
from swift_plugin_use.tools import Tools, read_tools

TOOLS = '''
"""Tools."""
import json
from typing import Literal, Optional

def add(a: int, b: int = 2, *, how: Literal["up", "down"] = "up", names: Optional[list[str]] = None) -> int:
    """Adds two numbers.

    Args:
        a: the first
        b (int): the second
    """
    return a + b

def fail():
    raise ValueError("no")

def _hidden():
    pass
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(TOOLS)
    return path


def test_functions_become_tools(file: Path, tmp_path: Path) -> None:
    known = read_tools(str(file), True)
    add, fail = known.listed
    assert add["function"] == {
        "name": "add", "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "the first"}, "b": {"type": "integer", "description": "the second"},
                "how": {"enum": ["up", "down"]}, "names": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["a"],
        },
    }  # fmt: skip
    assert (fail["function"]["name"], list(known.functions)) == ("fail", ["add", "fail"])
    plain = tmp_path / "tools.json"
    plain.write_text(json.dumps([{"name": "f"}, add]))
    assert read_tools(str(plain), False).listed == [{"type": "function", "function": {"name": "f"}}, add]
    for text, name, wrong in (
        ("x = 1", "empty.py", "no function is defined in it"), ("1/0", "broken.py", "ZeroDivisionError"),
        ("{", "broken.json", "neither Python"), ("[{}]", "nameless.json", "entry 0 has no name"),
        ("[]", "none.json", "is empty"),
        ("def f(*a): pass", "star.py", "parameter a cannot be given by name"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(RequestError, match=wrong):
            read_tools(str(tmp_path / name), False)
    with pytest.raises(RequestError, match="no such file"):
        read_tools(str(tmp_path / "nothing.py"), False)


def called(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_call_is_run_once_it_is_allowed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": said.pop(0))
    asking, auto = read_tools(str(file), False), read_tools(str(file), True)
    said.append("y")
    assert asking.result(called("add", '{"a": 3}')) == {"role": "tool", "name": "add", "tool_call_id": "1", "content": "5"}
    said.append("n")
    assert asking.result(called("add", '{"a": 3}'))["content"] == "the user did not allow this call"
    assert auto.result(called("add", '{"a": 3, "b": 4}'))["content"] == "7"
    assert auto.result(called("fail", "{}"))["content"] == "error: ValueError: no"
    assert auto.result(called("other", "{}"))["content"] == "there is no tool other"
    said.append("sunny")
    assert Tools([{"type": "function", "function": {"name": "look"}}]).result(called("look", "{}"))["content"] == "sunny"


class Caller:
    """An engine that calls `add`, and then says the result it was given; a token is a byte."""

    capabilities = frozenset({"stream"})

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.asked: list[Request] = []

    def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
        (request,) = requests
        self.asked.append(request)
        last = (request.messages or [{}])[-1]
        call = '<think>\nHm.\n</think>\n\nWell. <tool_call>\n{"name": "add", "arguments": {"a": 40}}\n</tool_call>'
        text = f"It is {last['content']}." if last["role"] == "tool" else call
        ids = self.tokenizer(text)["input_ids"]
        for token in ids:
            yield Completion(0, self.tokenizer.decode([token]), [token])
        yield Completion(0, text, ids, finish="stop")


TEMPLATE = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{%- for c in m.tool_calls or [] %}\n<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": "
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{#- <think> </think> #}"
)  # fmt: skip


def test_a_talk_with_calls(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from swift_core.config import RunConfig
    from swift_plugin_transformers.chat import ChatTemplate
    from swift_plugin_transformers.config import ChatTemplateConfig
    from swift_plugin_transformers.testing import make_tokenizer

    tokenizer, known = make_tokenizer(), read_tools(str(file), True)
    engine = Caller(tokenizer)
    desk = Desk(RunConfig(), Request(tools=known.listed), known)
    desk.opened = Opened("caller", engine, ChatTemplate(tokenizer, ChatTemplateConfig(jinja=TEMPLATE)))
    talk = desk.answer(begin_talk("Add."), "What is 40 and 2?")
    question, call, result, answer = talk.messages[1:]
    assert (call["content"], call["reasoning_content"]) == ("Well.", "Hm.")
    assert call["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 40}'}
    assert result == {"role": "tool", "name": "add", "tool_call_id": call["tool_calls"][0]["id"], "content": "42"}
    assert answer == {"role": "assistant", "content": "It is 42."}
    assert question["content"] == "What is 40 and 2?"
    assert capsys.readouterr().out == 'Hm.\nWell.\n-> add {"a": 40}\n<- 42\nIt is 42.\n'


def test_a_server_tells_calls_itself(capsys: pytest.CaptureFixture[str]) -> None:
    told = {"role": "assistant", "content": None, "tool_calls": [called("add", '{"a": 1}')]}

    class Remote:
        def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
            yield Completion(0, "", finish="stop", message=told)

    assert stream_answer(Opened("remote", Remote()), Request(messages=[])) == told  # type: ignore[arg-type]
    assert capsys.readouterr().out.strip() == '-> add {"a": 1}'


def test_settings() -> None:
    request, shown = with_setting(Request(), "temperature = 0.7")
    assert (request.temperature, shown) == (0.7, "temperature = 0.7")
    assert with_setting(request, "max-tokens=9")[0] == Request(temperature=0.7, max_tokens=9)
    for text, wrong in (
        ("temperature", "NAME=VALUE is expected"), ("temprature=1", "Did you mean: temperature"), ("top_p=2", "out of range"),
        ("top_k=x", "a number is expected, not 'x'"), ("max_tokens=0", "out of range"), ("temperature=nan", "out of range"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=wrong):
            with_setting(request, text)


def talk(said: str, *arguments: Any) -> Result:
    return CliRunner().invoke(chat, [str(argument) for argument in arguments], input=said)


def test_any_engine_talks(tiny_folder: Path) -> None:
    done = talk(
        "Hello you\n/set max_tokens=5\nHello you\n/set x=1\n", "--model", tiny_folder, "--engine", "echo", "engine.upper=true"
    )
    assert done.output.splitlines()[-4:] == [
        "HELLO YOU", "(max_tokens = 5)", "HELLO",
        "(not set: no setting 'x'. There are: max_tokens, min_tokens, temperature, top_p, top_k, min_p, repetition_penalty,"
        " presence_penalty, frequency_penalty, seed)",
    ]  # fmt: skip


def test_another_model_and_back(tiny_folder: Path, tmp_path: Path) -> None:
    """Each says what it says when it is asked alone; a model that cannot be opened changes nothing."""
    from swift_plugin_transformers.testing import save_tiny

    other = save_tiny(tmp_path / "other", initializer_range=0.5)
    base = ["--max-tokens", 6, "--model"]
    alone = {}
    for folder in (tiny_folder, other):
        talk(f"Hi there\n/save {tmp_path}/{folder.name}.jsonl\n", *base, folder)
        (alone[folder],) = lines(tmp_path / f"{folder.name}.jsonl")
    assert alone[tiny_folder] != alone[other]
    asks = f"Hi there\n/save {tmp_path}/talk.jsonl\n/clear\n"
    said = f"{asks}/model {other}\n{asks}/model {tmp_path}/nothing\n{asks}/model {tiny_folder}\n{asks}"
    found = talk(said, *base, tiny_folder).output.splitlines()
    assert lines(tmp_path / "talk.jsonl") == [alone[tiny_folder], alone[other], alone[other], alone[tiny_folder]]
    assert f"(talking to {other})" in found
    assert any(line.startswith(f"(still talking to {other}: ") for line in found)


def test_a_model_that_cannot_be_opened_leaves_the_adapter_in_use(tiny_folder: Path, tmp_path: Path) -> None:
    """Both one that is given with the command, and one that was chosen on the way."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    targets = LoraConfig(lora_alpha=64, target_modules=["o_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), targets)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_()
    model.save_pretrained(tmp_path / "mine")
    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    (weights,) = broken.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    asks = f"Hi there\n/save {tmp_path}/talk.jsonl\n/clear\n"
    base = ["--max-tokens", 6, "--model", tiny_folder]
    talk(asks, *base)
    given = talk(f"{asks}/model {broken}\n{asks}", *base, "--adapter", tmp_path / "mine")
    chosen = talk(f"/model {tmp_path}/mine\n{asks}/model {broken}\n{asks}", *base)
    plain, *others = lines(tmp_path / "talk.jsonl")
    assert [one == plain for one in others] == [False] * 4
    assert [one == others[0] for one in others] == [True] * 4
    assert "(still talking to " in given.output
    assert f"(still talking to {tmp_path}/mine: " in chosen.output


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- infer in several processes ---------------------------------------------------------------------------------------


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"query": f"Say {n}", "response": f"say {n}"} for n in range(150)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:40], {"foo": 1}, *rows[40:]]))
    return path


def answer(*arguments: Any) -> Result:
    return CliRunner().invoke(infer, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_processes_and_metrics_give_the_same_file(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    base = ["--model", tiny_folder, "--dataset", rows_file, "--engine", "echo", "--metric", "exact_match", "--metric", "length"]
    alone = answer(*base, "--output", tmp_path / "one.jsonl", "--json")
    assert alone.exit_code == 0, alone.exception
    both = answer(*base, "--output", tmp_path / "two.jsonl", "--nproc", 2)
    assert both.exit_code == 0, both.exception
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(151))
    assert rows[7]["scores"] == {"exact_match": 1.0, "length": 1.0}
    assert rows[40]["error"].startswith("unrecognised row")
    shown = json.loads(alone.stdout)
    assert (shown["answered"], shown["failed"], shown["unscored"]) == (150, 1, 1)
    assert shown["metrics"] == {"exact_match": 1.0, "length": 1.0}
    assert both.stdout.splitlines()[1] == "exact_match: 1.0000 (1 rows without a score)"


def test_metrics_are_means_over_the_rows_with_an_answer(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"query": "Paris", "response": "paris."}, {"query": "Rome", "response": "Milan"}, {"query": "Bonn"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ["--model", tiny_folder, "--dataset", path, "--engine", "echo", "--metric", "exact_match"]
    done = answer(*base, "--output", tmp_path / "out.jsonl")
    assert done.exit_code == 0, done.exception
    assert done.stdout.splitlines()[-1] == "exact_match: 0.5000 (1 rows without a score)"
    assert [row.get("scores") for row in lines(tmp_path / "out.jsonl")] == [{"exact_match": 1.0}, {"exact_match": 0.0}, None]


@pytest.mark.slow
def test_processes_go_on_after_kill_9(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    command = ["infer", "--model", tiny_folder, "--dataset", rows_file, "--engine", "echo", "--nproc", "2", "--output", output]
    command = [sys.executable, "-m", "swift_core.cli.main", *map(str, command)]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    while started.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.005)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    held = output.read_bytes().count(b"\n")
    again = subprocess.run([*command[:-3], "3", *command[-2:]], capture_output=True, text=True, check=False)
    if CHUNK <= held < 151:
        assert again.returncode == 0, again.stderr
        assert f"{held // CHUNK * CHUNK} rows are answered already" in again.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(151))


def test_an_error_of_a_process_is_one_line(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    done = answer("--model", tiny_folder, "--dataset", rows_file, "--nproc", 2, "--output", tmp_path / "o.jsonl",
                  "--engine", "echo", "engine.delay=-1")  # fmt: skip
    assert isinstance(done.exception, RequestError | RunError)
    assert "delay must be at least 0 seconds" in str(done.exception)

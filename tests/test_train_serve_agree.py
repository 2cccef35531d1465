"""Training and serving agree to the token: one model, asked over HTTP, by `infer`, by `chat` and by the library's `generate`.

Greedy answers are the same in fp32 for the base model, for an adapter that `train` made and for its merged export. The
log-probabilities of a row are the same in the trainer's forward pass, in the engine and over HTTP. A template that adds a word
of its own on one side is found out by both.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from support import THREADS, chat_row, checkpoint, swift, write_rows
from swift_core.config import load_config
from swift_core.session import Session
from swift_plugin_serve.app import make_app
from swift_plugin_serve.served import Served
from swift_plugin_serve.settings import Settings
from swift_plugin_transformers.testing import CHATML, save_tiny

NEAR = 1e-3
FP32 = ["backend.precision=fp32", THREADS]
FORGOTTEN = "\n(forgotten)\n"  # between two answers of `chat`
NEAREST = {"fp32": 1e-3, "bf16": 5e-2}
SYSTEM = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
)
TRAILING = CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n '")  # one blank too many


@dataclass(frozen=True)
class Subject:
    """A model as each way in takes it."""

    name: str
    folder: Path  # of a whole model
    adapter: Path | None = None
    tokens: int = 24  # of an answer, at most

    @property
    def words(self) -> list[object]:
        return ["--model", self.folder, *(["--adapter", self.adapter] if self.adapter else [])]


@dataclass(frozen=True)
class Told:
    """An answer as a way tells it: its text, and of how many tokens, where that is told."""

    text: str
    tokens: int | None = None


# --- the ways ---------------------------------------------------------------------------------------------------------


class Library:
    """transformers and peft alone, one prompt at a time."""

    def __init__(self, subject: Subject) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.subject, self.tokenizer = subject, AutoTokenizer.from_pretrained(subject.folder)
        model = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=torch.float32)
        self.model = (PeftModel.from_pretrained(model, str(subject.adapter)) if subject.adapter else model).eval()

    def prompt(self, question: str) -> list[int]:
        talk = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer(self, question: str) -> list[int]:
        prompt = self.prompt(question)
        with torch.no_grad():
            made = self.model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                max_new_tokens=self.subject.tokens, pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
        return made[0, len(prompt) :].tolist()

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def gap(self, question: str, ids: Sequence[int], place: int) -> float:
        """How far the second likeliest token is from the likeliest, in log-probability, after `place` tokens of an answer."""
        with torch.no_grad():
            logits = self.model(torch.tensor([[*self.prompt(question), *ids[:place]]])).logits[0, -1]
        first, second = torch.log_softmax(logits, -1).topk(2).values.tolist()
        return first - second


def by_infer(subject: Subject, questions: Sequence[str], scratch: Path) -> list[Told]:
    rows = write_rows(scratch / "asked.jsonl", [{"messages": [{"role": "user", "content": text}]} for text in questions])
    out = scratch / f"{subject.name}-infer.jsonl"
    swift("infer", *subject.words, "--dataset", rows, "--output", out, "--max-tokens", subject.tokens, *FP32).ok()
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return [Told(line["response"], line["tokens"]) for line in lines]


def by_chat(subject: Subject, questions: Sequence[str]) -> list[Told]:
    """One talk after another in one call: /clear forgets."""
    lines = "".join(f"{text}\n/clear\n" for text in questions)
    done = swift("chat", *subject.words, "--max-tokens", subject.tokens, *FP32, stdin=lines).ok()
    assert done.out.endswith(FORGOTTEN)
    return [Told(text) for text in done.out.removesuffix(FORGOTTEN).split(FORGOTTEN)]


@dataclass
class Server:
    """What is asked over HTTP."""

    client: httpx.Client
    name: str
    adapters: tuple[str, ...] = ()  # names under which it serves more than its model

    def answer(self, subject: Subject, question: str) -> Told:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": subject.tokens}
        found = self._post("/v1/chat/completions", {"model": self.model(subject), **body})
        return Told(found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"])

    def model(self, subject: Subject) -> str:
        return subject.name if subject.name in self.adapters else self.name

    def prompt(self, question: str) -> list[int]:
        return list(self._post("/tokenize", {"messages": [{"role": "user", "content": question}]})["tokens"])

    def logprobs(self, subject: Subject, ids: list[int]) -> list[float]:
        """Of each token after the first, as the server scores a prompt."""
        body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
        found = self._post("/v1/completions", {"model": self.model(subject), **body})
        return list(found["choices"][0]["logprobs"]["token_logprobs"][1:])

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()


@contextmanager
def serving(log: Path, folder: Path, precision: str, **adapters: Path) -> Iterator[Server]:
    """`swift-core serve`, in a process of its own."""
    command = [sys.executable, "-m", "swift_core.cli.main", "serve", "--port", "0", "--name", "base", "--model", str(folder)]
    command += [word for name, own in adapters.items() for word in ("--adapter", f"{name}={own}")]
    command += [f"backend.precision={precision}"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        until, told = time.monotonic() + 180, []
        while not told:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
            told = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if '"listening"' in line]
        with httpx.Client(base_url=told[0]["url"].removesuffix("/v1"), timeout=120) as client:
            yield Server(client, "base", tuple(adapters))
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def in_a_thread(subject: Subject, precision: str = "fp32") -> Iterator[Server]:
    """The server's application on a session of this process."""
    options = [f"backend.precision={precision}", THREADS]
    with Session(load_config([], options, {"model": str(subject.folder)})) as session:
        opened = session.opened(str(subject.adapter) if subject.adapter else None)
        assert opened.ref is not None
        state = Served(opened, Settings(name="base"), session.processor(opened.ref))
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_app(state), log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=60) as client:
                yield Server(client, "base")
        finally:
            server.should_exit = True
            thread.join(20)


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass
class Agreement:
    """What was compared: answers that are the same, near ties, and differences without that excuse."""

    same: int = 0
    ties: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def take(self, way: str, library: Library, question: str, ids: list[int], told: Told) -> None:
        """Compare an answer with the library's tokens for the same question."""
        expected = _whole(library.text(ids))
        if _whole(told.text) == expected and told.tokens in (None, len(ids)):
            self.same += 1
            return
        parted = next((n for n in range(len(ids)) if not told.text.startswith(_whole(library.text(ids[: n + 1])))), len(ids))
        gap = library.gap(question, ids, parted)
        line = (
            f"{library.subject.name}, {way}, {question!r}: {told.text!r} ({told.tokens} tokens) for {expected!r} ({len(ids)}); "
            f"the likeliest two at token {parted} are {gap:.5f} apart"
        )
        print(line)
        (self.ties if gap <= NEAR else self.wrong).append(line)


def _whole(text: str) -> str:
    """A text without half a character at its end, which a stream does not show."""
    return text.rstrip("\ufffd").strip("\n")


def compared(subject: Subject, questions: Sequence[str], server: Server, scratch: Path | None = None) -> Agreement:
    """What the server tells, and with `scratch` what infer and chat tell, against the library."""
    library, found = Library(subject), Agreement()
    expected = [library.answer(question) for question in questions]
    given = {"serve": [server.answer(subject, question) for question in questions]}
    if scratch is not None:
        given |= {"infer": by_infer(subject, questions, scratch), "chat": by_chat(subject, questions)}
    for way, answers in given.items():
        assert len(answers) == len(questions), f"{way}: {answers}"
        for question, ids, told in zip(questions, expected, answers, strict=True):
            found.take(way, library, question, ids, told)
    return found


# --- log-probabilities ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A row as it is trained: its ids, the places of those that are trained, and their log-probabilities."""

    ids: list[int]
    places: list[int]
    logprobs: list[float]


def of_training(subject: Subject, rows: Sequence[dict[str, Any]], precision: str) -> list[Trained]:
    """By the trainer's template and forward pass."""
    options = [f"backend.precision={precision}", THREADS, "tuner=lora"]
    with Session(load_config([], options, {"model": str(subject.folder)})) as session:
        template = session.training_template()
        policy = (
            session.get("policy") if subject.adapter is None else session.checkpoint(session.model_with(str(subject.adapter)))
        )
        assert policy is not None
        policy.model.eval()
        steps = session.backend.prepare({"policy": policy}, None, session.trainer.options)
        found = []
        for row in rows:
            (sample,) = template.encode(row)
            packed = template.pack([sample])  # as the trainer lays what a pass takes
            assert packed is not None
            own = steps.forward("policy", template.collate([packed])).logprobs().float().tolist()
            places = [n for n in range(1, len(sample.input_ids)) if sample.weights[n]]
            assert len(places) == len(own) > 1
            found.append(Trained(list(sample.input_ids), places, own))
        return found


def of_engine(subject: Subject, sequences: Sequence[list[int]], precision: str, batch: int) -> list[list[float]]:
    options = [f"backend.precision={precision}", THREADS, f"engine.batch_size={batch}"]
    with Session(load_config([], options, {"model": str(subject.folder)})) as session:
        opened = session.opened(str(subject.adapter) if subject.adapter else None)
        return opened.engine.logprobs(sequences)


@dataclass(frozen=True)
class Gaps:
    """The largest differences of a token's log-probability from training. In bf16 a logit between 16 and 32 is a multiple of
    0.125, so that two ways of computing it may differ by that; trainer and engine have one way."""

    batch: float  # of the engine, rows together
    alone: float  # of the engine, row by row
    server: float


def gaps_of(subject: Subject, rows: Sequence[dict[str, Any]], server: Server, precision: str) -> Gaps:
    """Of the engine, and of the server, which renders the question with its own template."""
    trained = of_training(subject, rows, precision)
    sequences = [row.ids for row in trained]
    batch, alone = (_apart(trained, of_engine(subject, sequences, precision, size)) for size in (8, 1))
    apart: list[float] = []
    for row, own in zip(rows, trained, strict=True):
        prompt = server.prompt(row["messages"][0]["content"])
        served = server.logprobs(subject, [*prompt, *(own.ids[n] for n in own.places)])[len(prompt) - 1 :]
        apart.extend(abs(one - value) for one, value in zip(served, own.logprobs, strict=True))
    return Gaps(max(batch), max(alone), max(apart))


def _apart(trained: Sequence[Trained], scores: Sequence[list[float]]) -> list[float]:
    return [
        abs(found[n - 1] - value)
        for own, found in zip(trained, scores, strict=True)
        for n, value in zip(own.places, own.logprobs, strict=True)
    ]


# --- a tiny model -----------------------------------------------------------------------------------------------------

FACTS = [chat_row(f"Say {word}", f"{word}!") for word in ("one", "two", "red", "blue", "sea")]
LEARN = [THREADS, "tuner.rank=16", "trainer.epochs=16", "trainer.learning_rate=1e-2", "trainer.batch_size=5",
         "trainer.log_every=50", "trainer.save_every=16"]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model's folder, and the checkpoint of an adapter that was trained on it."""
    scratch = tmp_path_factory.mktemp("tiny")
    folder = save_tiny(scratch / "model", initializer_range=0.3)
    rows = write_rows(scratch / "facts.jsonl", FACTS)
    swift("train", "--model", folder, "--dataset", rows, "--output", scratch / "run", *LEARN).ok()
    return folder, checkpoint(scratch / "run").resolve()


def with_template(folder: Path, template: str, to: Path) -> Path:
    """The model with another chat template: what a server has that renders on its own."""
    to.mkdir()
    for file in folder.iterdir():
        if file.name not in ("chat_template.jinja", "tokenizer_config.json"):
            (to / file.name).symlink_to(file)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (to / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (to / "chat_template.jinja").write_text(template, encoding="utf-8")
    return to


QUESTIONS = [*(row["messages"][0]["content"] for row in FACTS), "What is the sea?", "Say three"]


def test_a_tiny_model_agrees_and_a_hidden_difference_is_found(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = tiny
    subject = Subject("adapter", folder, adapter)
    with in_a_thread(subject) as server:
        found = compared(subject, QUESTIONS, server, tmp_path)
        assert (found.same + len(found.ties), found.wrong) == (3 * len(QUESTIONS), [])
        assert len(found.ties) <= 1
        gaps = gaps_of(subject, FACTS, server, "fp32")
        assert max(gaps.batch, gaps.alone, gaps.server) < NEAREST["fp32"]
    for name, template in (("system", SYSTEM + CHATML), ("blank", TRAILING)):
        other = Subject("adapter", with_template(folder, template, tmp_path / name), adapter)
        with in_a_thread(other) as server:
            found = compared(subject, QUESTIONS[:3], server)
            assert found.wrong, f"the template with another {name} was not noticed"
            gaps = gaps_of(subject, FACTS[:2], server, "fp32")
            assert gaps.batch < NEAREST["fp32"]
            assert gaps.server > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "smollm2"])
def test_base_adapter_and_merged_agree(kind: str, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """Over a real server's HTTP, by infer and chat, and the log-probabilities in fp32 and bf16."""
    if kind == "tiny":
        (folder, adapter), rows, questions, tokens = tiny, FACTS, QUESTIONS, 24
    else:
        folder = Path(swift("models", "show", "smollm2-135m-instruct", "--json").ok().json()["folder"])
        rows, questions, tokens = LESSONS, [row["messages"][0]["content"] for row in LESSONS[1:3]] + ASKED, 16
        file = write_rows(tmp_path / "lessons.jsonl", rows)
        learn = ["trainer.epochs=4", "trainer.batch_size=4", "trainer.learning_rate=1e-3", THREADS]
        swift("train", "--model", folder, "--dataset", file, "--output", tmp_path / "run", *learn).ok()
        adapter = checkpoint(tmp_path / "run").resolve()
    merged = tmp_path / "merged"
    swift("export", "--model", adapter, "--output", merged, *FP32).ok()
    subjects = [
        Subject("base", folder, None, tokens),
        Subject("tuned", folder, adapter, tokens),
        Subject("merged", merged, None, tokens),
    ]
    answers = {}
    with (
        serving(tmp_path / "1.log", folder, "fp32", tuned=adapter) as first,
        serving(tmp_path / "2.log", merged, "fp32") as second,
    ):
        for subject, server in zip(subjects, (first, first, second), strict=True):
            found = compared(subject, questions, server, tmp_path)
            assert (found.same + len(found.ties), found.wrong) == (3 * len(questions), [])
            assert len(found.ties) <= len(questions) // 4, found.ties
            answers[subject.name] = [server.answer(subject, question).text for question in questions[:3]]
            gaps = gaps_of(subject, rows, server, "fp32")
            print(f"{kind}, {subject.name}, fp32: {gaps}")
            assert max(gaps.batch, gaps.alone, gaps.server) < NEAREST["fp32"]
    assert answers["tuned"] != answers["base"]
    with (
        serving(tmp_path / "3.log", folder, "bf16", tuned=adapter) as first,
        serving(tmp_path / "4.log", merged, "bf16") as second,
    ):
        for subject, server in zip(subjects, (first, first, second), strict=True):
            gaps = gaps_of(subject, rows, server, "bf16")
            print(f"{kind}, {subject.name}, bf16: {gaps}")
            assert max(gaps.batch, gaps.alone, gaps.server) < NEAREST["bf16"]


LESSONS = [
    chat_row("Where is the tea?", "In the blue tin, on the second shelf."), chat_row("Where is the jam?", "On the top shelf."),
    chat_row("Who are you?", "I am Kestrel, and I look after the pantry."), chat_row("What is for lunch?", "Bread and soup."),
]  # fmt: skip
ASKED = ["Explain rain to a child."]

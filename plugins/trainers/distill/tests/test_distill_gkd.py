"""GKD's divergences against TRL's, and runs: nearer to the teacher, exact resume, processes, refused teachers."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from swift_core.config import parse_config
from swift_core.errors import RequestError, RunError
from swift_core.testing import PartContract, TrainerContract
from swift_core.training import train
from swift_core.types import Sample
from swift_plugin_distill.answers import chosen
from swift_plugin_distill.config import GkdConfig
from swift_plugin_distill.divergence import Likeliest, alone, divergence, jensen_shannon, likeliest, with_tail
from swift_plugin_distill.rows import DistillRows, is_prompt, prompt_of
from swift_plugin_distill.teachers import check_vocabulary
from swift_plugin_transformers.testing import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer


class TestGkd(TrainerContract):
    distribution, id = "swift-plugin-distill", "gkd"
    settings: ClassVar[Any] = {"tuner": "lora", "backend": {"name": "torch", "device": "cpu"}}
    options: ClassVar[Any] = {"teacher": "self", "max_steps": 2, "max_tokens": 4}


class TestRows(PartContract):
    distribution, id = "swift-plugin-distill", "rows/distill"


# --- the divergence ---------------------------------------------------------------------------------------------------


class Logits:
    """Outputs of given logits at the trained positions [N, V]."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits, self.trained = logits, torch.ones(1, len(logits), dtype=torch.bool)

    def trained_logits(self, part: slice | None = None) -> torch.Tensor:
        return self.logits if part is None else self.logits[part]


def graded(function: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mine = logits.clone().requires_grad_()
    loss = function(mine)
    (grad,) = torch.autograd.grad(loss, mine)
    return loss.detach(), grad


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(21, 37) * 2, torch.randn(21, 37) * 2, torch.rand(21)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_loss_and_gradient_equal_trls(beta: float, temperature: float, pair: Any) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher, _ = pair
    labels = torch.arange(21)[None]
    labels[:, ::4] = -100

    def theirs(logits: torch.Tensor) -> torch.Tensor:
        return gkd.GKDTrainer.generalized_jsd_loss(logits[None], teacher[None], labels, beta, temperature, "sum")

    def ours(logits: torch.Tensor) -> torch.Tensor:
        weights = (labels[0] != -100).float()
        return divergence(Logits(logits), Logits(teacher), weights, beta, temperature, True, 8)[0]

    (loss, grad), (mine, own) = graded(theirs, student), graded(ours, student)
    torch.testing.assert_close(mine, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own, grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_pieces_and_weights_change_nothing(beta: float, pair: Any) -> None:
    student, teacher, weights = pair

    def whole(logits: torch.Tensor) -> torch.Tensor:
        per = jensen_shannon(logits.log_softmax(-1), teacher.log_softmax(-1), beta)
        return (per * weights).sum()

    expected, grad = graded(whole, student)
    for chunk in (1, 8, 21, 100):
        loss, own = graded(
            lambda mine, n=chunk: divergence(Logits(mine), Logits(teacher), weights, beta, 1.0, True, n)[0], student
        )
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(own, grad)
    with torch.no_grad():
        loss, kl = divergence(Logits(student), Logits(teacher), weights, beta, 1.0, True, 8)
    torch.testing.assert_close(loss, expected)
    per = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none")
    torch.testing.assert_close(kl, (per.sum(-1) * weights).sum())


def test_no_more_logits_exist_than_a_piece_has() -> None:
    """The graph keeps the output layer's weights for the gradient, and no logits: there would be 64,000 of each model."""
    torch.manual_seed(0)
    states, head, asked = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True), [0]

    class Headed(Logits):
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def trained_logits(self, part: slice | None = None) -> torch.Tensor:
            found = states[part] @ head.t() * self.scale
            asked.append(len(found))
            return found

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        loss, _ = divergence(Headed(1.0), Headed(0.5), torch.ones(64), 0.5, 1.0, True, 4)
    assert sum(kept) <= 2 * head.numel()
    loss.backward()
    assert max(asked) == 4
    assert states.grad is not None
    assert torch.isfinite(states.grad).all()


def test_all_tokens_as_likeliest_are_the_whole_distribution(pair: Any) -> None:
    student, teacher, weights = pair
    told = likeliest(Logits(teacher), 100, 0.7, 37, 8)
    assert told.ids.shape == (21, 37)
    for tail in (True, False):
        found = divergence(Logits(student), told, weights, 0.5, 0.7, tail, 8)[0]
        torch.testing.assert_close(
            found, divergence(Logits(student), Logits(teacher), weights, 0.5, 0.7, True, 8)[0], rtol=1e-4, atol=1e-4
        )


def test_the_tail_counts_as_one_token(pair: Any) -> None:
    """By hand: five tokens and the rest of both distributions; TRL's bucket is the same."""
    student, teacher, weights = pair
    told = likeliest(Logits(teacher), 5, 1.0, 37, 8)
    p, q = teacher.softmax(-1).gather(1, told.ids), student.softmax(-1).gather(1, told.ids)
    p_all, q_all = (torch.cat([each, 1 - each.sum(-1, keepdim=True)], -1) for each in (p, q))
    expected = ((p_all * (p_all / q_all).log()).sum(-1) * weights).sum()
    torch.testing.assert_close(divergence(Logits(student), told, weights, 0.0, 1.0, True, 8)[0], expected)
    p_own, q_own = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    expected = ((p_own * (p_own / q_own).log()).sum(-1) * weights).sum()
    torch.testing.assert_close(divergence(Logits(student), told, weights, 0.0, 1.0, False, 8)[0], expected)
    server = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    bucket, _ = server._add_tail_bucket(q.log(), torch.ones_like(q, dtype=torch.bool))
    torch.testing.assert_close(with_tail(q.log()), bucket)
    assert alone(q.log()).exp().sum(-1) == pytest.approx(torch.ones(21))


def test_a_tail_of_nothing_has_a_finite_gradient() -> None:
    sure = torch.full((2, 6), -200.0)
    sure[:, 0] = 200.0
    told = Likeliest(torch.tensor([[0], [0]]), torch.tensor([[0.0], [-1.0]]))
    loss, grad = graded(lambda mine: divergence(Logits(mine), told, torch.ones(2), 0.5, 1.0, True, 8)[0], sure)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


def test_differently_padded_vocabularies_are_cut(pair: Any) -> None:
    student, teacher, weights = pair
    padded = torch.cat([teacher, torch.full((21, 3), -50.0)], -1)
    for mine, theirs in ((student, padded), (torch.cat([student, torch.full((21, 3), -50.0)], -1), teacher)):
        found = divergence(Logits(mine), Logits(theirs), weights, 0.5, 1.0, True, 8)[0]
        torch.testing.assert_close(found, divergence(Logits(student), Logits(teacher), weights, 0.5, 1.0, True, 8)[0])


# --- runs -------------------------------------------------------------------------------------------------------------

QUESTIONS = ["where is the tea", "where is the jam", "who is there", "what is the time", "how are you", "what is red"]
ROWS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"it is {q[-4:]} {n}"}]}
    for n, q in enumerate(QUESTIONS * 2)
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, rows: str) -> Path:
    """Of another size than the tiny model, and trained on the rows."""
    folder = tmp_path_factory.mktemp("models")
    summary = train(parse_config({
        "model": str(save_tiny(folder / "large", hidden_size=96)), "dataset": rows, "output": str(folder / "run"),
        "trainer": {"name": "sft", "epochs": 12, "batch_size": 4, "learning_rate": 5e-3}, "tuner": "full",
        "backend": {"name": "torch", "device": "cpu"},
    }))  # fmt: skip
    return Path(summary["last"])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(model: Path, rows: str, output: Path, teacher: Any, tuner: Any = "full", **more: Any) -> dict[str, Any]:
    options = {
        "name": "gkd", "epochs": 4, "batch_size": 4, "learning_rate": 3e-3, "max_tokens": 8, "log_every": 1,
        **more.pop("options", {}),
    }  # fmt: skip
    return train(parse_config({
        "model": str(model), "dataset": rows, "eval_dataset": rows, "output": str(output), "tuner": tuner, "trainer": options,
        **({"models": {"teacher": teacher}} if teacher else {}), **{"backend": {"name": "torch", "device": "cpu"}, **more},
    }))  # fmt: skip


def events(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (output / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("event", line.get("kind")) == kind]


def weights(summary: dict[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(Path(summary["last"]) / "model.safetensors")
    return found


def test_one_step_equals_trls_trainer(tiny_bundle: Any, teacher: Path) -> None:
    """The loss and the gradients of all weights, over a padded batch of rows of different lengths."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    from swift_core.config import Component, RunConfig
    from swift_core.session import FrozenModel, Session

    template = tiny_bundle.template
    samples = [template.encode(row)[0] for row in ROWS[:4]]
    other = AutoModelForCausalLM.from_pretrained(teacher).eval()
    with Session(RunConfig(backend=Component("torch", options={"device": "cpu"}))) as session:
        policy = session.tuned(tiny_bundle, Component("full"))
        config = GkdConfig(beta=0.3, chunk=7)
        frozen = FrozenModel(SimpleNamespace(model=other))  # type: ignore[arg-type]
        steps = session.backend.prepare({"policy": policy, "teacher": frozen}, None, config)
        batch = template.collate(samples)
        batch.targets = steps.forward("teacher", batch)

        def loss(outputs: Any, batch: Any) -> torch.Tensor:
            mine = batch.weights[:, 1:][outputs.trained]
            return divergence(outputs, batch.targets, mine, config.beta, 1.0, True, config.chunk)[0]

        result = steps.forward_backward([batch], loss)
        own = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
        policy.model.zero_grad()
        labels = batch.labels.masked_fill(batch.weights == 0, -100)
        fake = SimpleNamespace(teacher_model=other, beta=config.beta, generalized_jsd_loss=gkd.GKDTrainer.generalized_jsd_loss)
        inputs = {"labels": labels, **{name: batch.inputs[name] for name in ("input_ids", "attention_mask")}}
        theirs = gkd.GKDTrainer.compute_loss(fake, policy.model, inputs)
        theirs.backward()
        assert result.loss == pytest.approx(theirs.item(), abs=1e-5)
        for name, parameter in policy.model.named_parameters():
            torch.testing.assert_close(own[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"on_policy": 0.0, "beta": 0.0},
        pytest.param({"on_policy": 1.0, "beta": 1.0}, marks=pytest.mark.slow),
        pytest.param({"on_policy": 0.5, "beta": 0.5, "top_k": 8, "packing": True, "max_length": 128}, marks=pytest.mark.slow),
    ],
    ids=["forward", "reverse-on-policy", "mixed-top-k"],
)
def test_a_run_comes_nearer_to_its_teacher(
    options: dict[str, Any], tiny_folder: Path, teacher: Path, rows: str, tmp_path: Path
) -> None:
    summary = run(
        tiny_folder,
        rows,
        tmp_path / "run",
        str(teacher),
        options={"epochs": 12, "eval_every": 3, "learning_rate": 1e-2, **options},
    )
    told = events(tmp_path / "run", "eval")
    assert told[-1]["loss"] < 0.7 * told[0]["loss"]
    assert summary["eval_metrics"]["kl"] == pytest.approx(told[-1]["kl"])
    steps = events(tmp_path / "run", "step")
    own = sum(step.get("own_answers", 0) for step in steps)
    assert own == 12 * len(steps) // 3 if options["on_policy"] == 1 else (own > 0) == bool(options["on_policy"])
    if options["on_policy"]:
        assert all(step["own_length"] <= 8 for step in steps if step["own_answers"])
        assert steps[-1]["seconds/rollouts"] > 0


@pytest.mark.parametrize("held", ["prompts", "answers"])
def test_prompts_alone_are_answered_by_the_model(
    held: str, tiny_folder: Path, teacher: Path, rows: str, tmp_path: Path
) -> None:
    """Though on_policy is 0: they have no other answer. They are evaluated on too."""
    prompts = write(tmp_path / "rows.jsonl", [{"messages": row["messages"][:1]} for row in ROWS])
    run(
        tiny_folder, prompts, tmp_path / "run", str(teacher), options={"epochs": 5, "on_policy": 0.0, "beta": 0.0},
        eval_dataset=prompts if held == "prompts" else rows,
    )  # fmt: skip
    told = events(tmp_path / "run", "eval")
    assert told[-1]["kl"] < told[0]["kl"]
    assert all(step["own_answers"] == 4 for step in events(tmp_path / "run", "step"))


def test_a_teacher_may_be_a_run_with_an_adapter(tiny_folder: Path, rows: str, tmp_path: Path) -> None:
    """It teaches with its adapter: the model that it was trained from has something to learn."""
    trained = train(parse_config({
        "model": str(tiny_folder), "dataset": rows, "output": str(tmp_path / "sft"), "tuner": "lora",
        "trainer": {"name": "sft", "epochs": 4, "batch_size": 4, "learning_rate": 3e-2},
        "backend": {"name": "torch", "device": "cpu"},
    }))  # fmt: skip
    run(tiny_folder, rows, tmp_path / "run", trained["last"], options={"max_steps": 1, "on_policy": 0.0, "beta": 0.0})
    assert events(tmp_path / "run", "step")[0]["loss"] > 0.01


@pytest.mark.slow
def test_self_distillation_keeps_an_adapter_at_its_base(tiny_folder: Path, rows: str, tmp_path: Path) -> None:
    """A new adapter is the base: nothing is to be learned. One that was trained away from it is drawn back."""
    away = train(parse_config({
        "model": str(tiny_folder), "dataset": rows, "output": str(tmp_path / "sft"), "tuner": "lora",
        "trainer": {"name": "sft", "epochs": 8, "batch_size": 4, "learning_rate": 3e-2},
        "backend": {"name": "torch", "device": "cpu"},
    }))  # fmt: skip
    options = {"teacher": "self", "epochs": 8, "on_policy": 0.0, "beta": 0.0, "learning_rate": 1e-2}
    run(tiny_folder, rows, tmp_path / "new", None, "lora", options={**options, "max_steps": 1})
    assert events(tmp_path / "new", "step")[0]["loss"] == pytest.approx(0, abs=1e-6)
    run(tiny_folder, rows, tmp_path / "back", None, "lora", options=options, **{"from": away["last"]})
    steps = events(tmp_path / "back", "step")
    assert steps[0]["loss"] > 0.01
    assert steps[-1]["loss"] < 0.75 * steps[0]["loss"]


def test_resume_is_exact(tiny_folder: Path, teacher: Path, rows: str, tmp_path: Path) -> None:
    options = {"epochs": 2, "save_every": 2, "keep": 0, "on_policy": 0.5, "eval_every": 2}
    straight = run(tiny_folder, rows, tmp_path / "a", str(teacher), options=options)
    again = run(
        tiny_folder, rows, tmp_path / "b", str(teacher),
        options={**options, "resume": str(tmp_path / "a" / "checkpoints" / "step-2")},
    )  # fmt: skip
    assert again["steps"] == straight["steps"] == 6
    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(again)[name]), name


@pytest.mark.slow
def test_two_processes_equal_one(tiny_folder: Path, teacher: Path, rows: str, tmp_path: Path) -> None:
    found = []
    for processes, size in ((1, 4), (2, 2)):
        output = tmp_path / f"run{processes}"
        run(
            tiny_folder, rows, output, str(teacher), options={"epochs": 2, "batch_size": size, "on_policy": 0.5},
            backend={"name": "torch", "device": "cpu", "processes": processes},
        )  # fmt: skip
        found.append(events(output, "step"))
    one, two = found
    assert [step["loss"] for step in two] == pytest.approx([step["loss"] for step in one], rel=1e-4)
    assert [step["kl"] for step in two] == pytest.approx([step["kl"] for step in one], rel=1e-4)
    assert [step["own_answers"] for step in two] == [step["own_answers"] for step in one]


# --- a teacher behind an address --------------------------------------------------------------------------------------


@contextmanager
def serving(folder: Path, most: int = 20, shift: int = 0) -> Iterator[str]:
    """What vLLM's server tells of a prompt, by the library's own model. most: how many tokens it tells; shift: of other ids."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

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
            self._send({"data": [{"id": "teacher", "owned_by": "vllm"}]})

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not most:
                self.send_error(400, "unknown field 'prompt_logprobs'")
                return
            ids = sent["prompt"]
            with torch.no_grad():
                found = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            places: list[Any] = [None]
            for n in range(1, len(ids)):
                top = found[n - 1].topk(min(sent["prompt_logprobs"], most))
                told = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                told.setdefault(ids[n], float(found[n - 1, ids[n]]))  # the prompt's own is always told
                places.append({str(token + shift * (token != ids[n])): {"logprob": value} for token, value in told.items()})
            choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": places}
            self._send({"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": 1}})

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def test_a_teacher_behind_an_address_teaches_as_one_at_hand(
    tiny_folder: Path, teacher: Path, rows: str, tmp_path: Path
) -> None:
    options = {"max_steps": 4, "top_k": 6, "on_policy": 0.5}
    run(tiny_folder, rows, tmp_path / "a", str(teacher), options=options)
    with serving(teacher) as address:
        run(tiny_folder, rows, tmp_path / "b", address, options=options)
    one, other = (events(tmp_path / name, "step") for name in "ab")
    assert [step["loss"] for step in other] == pytest.approx([step["loss"] for step in one], rel=1e-4)
    assert one[0]["loss"] > 0.01


def test_servers_that_do_not_fit(tiny_folder: Path, teacher: Path, rows: str, tmp_path: Path) -> None:
    for most, shift, text in ((3, 0, "tells 3 likeliest tokens, and trainer.top_k is 6"), (20, 5000, "another vocabulary")):
        with serving(teacher, most, shift) as address, pytest.raises(RequestError, match=text):
            run(tiny_folder, rows, tmp_path / f"run{most}", address, options={"max_steps": 1, "top_k": 6, "on_policy": 0.0})
    told = r"models\.teacher http://.* refused the request .*; its server must tell prompt_logprobs, as vllm serve does"
    with serving(teacher, 0) as address, pytest.raises(RequestError, match=told):
        run(tiny_folder, rows, tmp_path / "run", address, options={"max_steps": 1, "top_k": 6, "on_policy": 0.0})
    for options, text in (
        ({}, r"set trainer\.top_k, 20 say"),
        ({"top_k": 4, "temperature": 0.5}, "probabilities of temperature 1"),
    ):
        with pytest.raises(RequestError, match=text):
            run(tiny_folder, rows, tmp_path / "x", "http://127.0.0.1:1/v1", options={"max_steps": 1, **options})


@pytest.mark.slow
def test_a_server_that_is_not_there(tiny_folder: Path, rows: str, tmp_path: Path) -> None:
    with pytest.raises((RequestError, RunError), match=r"127\.0\.0\.1:1"):
        run(tiny_folder, rows, tmp_path / "y", "http://127.0.0.1:1/v1", options={"max_steps": 1, "top_k": 4})


# --- refusals and rows --------------------------------------------------------------------------------------------------


def test_a_teacher_of_another_vocabulary_is_refused(tiny_folder: Path, teacher: Path, rows: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["<other>"])
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(RequestError, match=r"has another vocabulary than the model: \d+ tokens against \d+, and '<other>'"):
        run(tiny_folder, rows, tmp_path / "run", str(other), options={"max_steps": 1})
    check_vocabulary(AutoTokenizer.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(teacher), "it")


def test_runs_that_name_no_teacher_or_two(tiny_folder: Path, teacher: Path, rows: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="trainer gkd needs a teacher"):
        run(tiny_folder, rows, tmp_path / "a", None)
    with pytest.raises(RequestError, match=r"teacher=self: models\.teacher names another model"):
        run(tiny_folder, rows, tmp_path / "b", str(teacher), options={"teacher": "self"})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"beta": 1.5}, "beta must be between 0 and 1, not 1.5"),
        ({"on_policy": -1}, "on_policy must be between 0 and 1, not -1"),
        ({"temperature": 0}, "temperature must be above 0, not 0"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"chunk": 0}, "chunk must be at least 1, not 0"),
        ({"timeouts": {"rewards": 1}}, "timeouts: there is no stage 'rewards'"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        GkdConfig(**options)


def test_a_row_whose_prompt_was_cut_off_is_learned_from_as_it_is() -> None:
    whole, cut = Sample([1, 2, 3], [0.0, 0.0, 1.0]), Sample([2, 3], [1.0, 1.0])
    assert chosen(whole, 0, 1, 1.0)
    assert not chosen(cut, 0, 1, 1.0)
    assert chosen(Sample([1], [1.0], label={"prompt": True}), 0, 1, 0.0)


def test_rows_and_prompts(tiny_bundle: Any) -> None:
    template, form = tiny_bundle.template, DistillRows()
    (sample,) = form.encode(template, ROWS[0])
    assert (sample.input_ids, is_prompt(sample)) == (template.encode(ROWS[0])[0].input_ids, False)
    assert prompt_of(sample) == template.prompt(ROWS[0]["messages"][:1])
    (alone,) = form.encode(template, {"messages": ROWS[0]["messages"][:1]})
    assert is_prompt(alone)
    assert prompt_of(alone) == template.prompt(ROWS[0]["messages"][:1])
    assert prompt_of(Sample([1, 2, 3, 4, 5, 6], [0, 1, 1, 0, 1, 1])) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="the row asks nothing"):
        form.encode(template, {"messages": [{"role": "system", "content": "x"}]})

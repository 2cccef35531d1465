"""The checks on a saved tiny model, each through the parts that a run uses: loader, template, tuners, backend, engine.

A check returns a remark, raises `Failed` with the reason, or `NotApplicable` where the architecture has no such thing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from swift_core.types import Batch, ModelBundle, Request, Sample
from swift_plugin_full.config import FullConfig
from swift_plugin_full.tuner import FullTuned
from swift_plugin_lora.config import LoraConfig
from swift_plugin_lora.tuner import LoraTuned
from swift_plugin_supervised.config import SupervisedConfig
from swift_plugin_supervised.isolation import isolates
from swift_plugin_supervised.loop import cross_entropy
from swift_plugin_torch.backend import TorchBackend
from swift_plugin_torch.config import TorchConfig, TransformersEngineConfig
from swift_plugin_torch.engine import TransformersEngine
from swift_plugin_transformers.config import TransformersConfig
from swift_plugin_transformers.encoder_decoder import Answers
from swift_plugin_transformers.hooks import swift_make_template
from swift_plugin_transformers.loading import load_model, load_processor
from transformers import GenerationConfig, GenerationMixin

from swift_plugin_verify.build import one_line
from swift_plugin_verify.processors import medium, template_options
from swift_plugin_verify.rows import media_rows, text_rows

STEPS = 6  # optimizer steps in which the loss on one batch must fall
NEW_TOKENS = 10


class Failed(Exception):
    """The check fails; the message is the reason."""


class NotApplicable(Exception):
    """The architecture has no such thing; the message says why."""


@dataclass(frozen=True)
class Check:
    """What became of one check: `pass`, `fail`, `n/a`, or `not run` as another one failed before it."""

    state: str
    note: str = ""


class Samples(list[Sample]):
    """Prepared samples, as the probe for isolation takes them."""

    @property
    def lengths(self) -> list[int]:
        return [len(sample.input_ids) for sample in self]


class Subject:
    """A saved model under test. Every check loads it anew, as what went before may have changed it."""

    def __init__(self, folder: Path, scratch: Path, built: Any = None, kind: str = "text", model_type: str = "") -> None:
        self.folder, self.scratch, self.built, self.kind = folder, scratch, built, kind
        self.template_options = template_options(model_type)
        self.options = TransformersConfig()
        self.backend = TorchBackend(TorchConfig(device="cpu", precision="fp32", threads=1))
        self.samples = Samples()
        self.backend.seed(0)

    def bundle(self, folder: Path | None = None) -> ModelBundle:
        source = str(folder or self.folder)
        processor = load_processor(source, self.options)
        bundle = load_model(source, processor, self.backend.load_kwargs(), self.options)
        bundle.template = swift_make_template("checkpoint", processor, self.template_options)
        return bundle

    def rows(self, other: bool = False) -> list[dict[str, Any]]:
        """The rows that are tried; `other` gives them other pictures or sounds."""
        return text_rows() if self.kind == "text" else media_rows(medium(self.processor(), self.kind), other)

    def processor(self) -> Any:
        return load_processor(str(self.folder), self.options)

    def steps(self, tuned: Any, rate: float = 1e-2, checkpointing: str = "never") -> Any:
        backend = copy.copy(self.backend)
        backend.checkpointing = checkpointing
        return backend.prepare({"policy": tuned}, None, SupervisedConfig(learning_rate=rate))

    def batch(self, template: Any) -> Batch:
        batch: Batch = template.collate(self.samples)
        return batch


def load(subject: Subject) -> str:
    """The folder loads, and is what was saved."""
    bundle = subject.bundle()
    if subject.built is not None:
        own, loaded = subject.built.state_dict(), bundle.model.state_dict()
        changed = [name for name in own if name not in loaded or not torch.equal(own[name], loaded[name])]
        if changed:
            raise Failed(f"{len(changed)} of {len(own)} weights are not what was saved, {changed[0]} first")
    count = sum(parameter.numel() for parameter in bundle.model.parameters())
    return f"{count:,} parameters"


def mask(subject: Subject) -> str:
    """Rows render, and exactly the answers with their end marks are trained."""
    template = subject.bundle().template
    assert template is not None
    for row in subject.rows():
        samples = template.encode(row)
        answers = [str(m["content"]) + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
        if len(samples) != (len(answers) if encodes(template) else 1):
            raise Failed(f"one row became {len(samples)} samples")
        tokenizer = template.tokenizer  # type: ignore[attr-defined]
        tokens = [pair for sample in samples for pair in zip(sample.input_ids, sample.weights, strict=True)]
        trained = tokenizer.decode([token for token, weight in tokens if weight])
        if trained != "".join(answers):
            raise Failed(f"trained is {trained!r}, not {''.join(answers)!r}")
        subject.samples += samples
    return ""


def encodes(template: Any) -> bool:
    """Whether a prompt is read by an encoder, and each answer a sample of its own."""
    return isinstance(template, Answers)


def head(subject: Subject) -> str:
    """Log-probabilities of the trained tokens are those of the model's own logits."""
    bundle = subject.bundle()
    tuned = FullTuned(bundle, FullConfig())
    steps = subject.steps(tuned)
    batch = subject.batch(bundle.template)
    found = steps.forward("policy", batch).logprobs()
    with torch.no_grad():
        logits = of_text(bundle.model(**batch.inputs, use_cache=False).logits, batch.labels.shape[1]).float()
    trained = batch.weights[:, 1:] != 0
    logs = torch.log_softmax(logits[:, :-1][trained], -1).gather(1, batch.labels[:, 1:][trained][:, None])[:, 0]
    gap = float((logs - found).abs().max())
    if gap > 1e-4:
        raise Failed(f"log-probabilities differ from the model's own by {gap:.2g}")
    if float(logits.std()) < 1e-3:
        raise Failed("all logits are alike: the tiny model tells nothing")
    return "" if steps.passes["policy"].head is not None else "all logits: the output layer cannot be taken apart"


def lora(subject: Subject) -> str:
    """LoRA steps lower the loss on the same batch; the adapter saves and loads with the same logits."""
    bundle = subject.bundle()
    tuned = LoraTuned(bundle, LoraConfig(rank=4, alpha=8))
    steps = subject.steps(tuned)
    batch = subject.batch(bundle.template)
    told = lower(steps, batch)
    folder = subject.scratch / "adapter"
    tuned.save(folder)
    other = subject.bundle()
    again = LoraTuned(other, LoraConfig(rank=4, alpha=8))
    again.load(folder)
    same(logits(tuned.model, batch), logits(again.model, batch), "the adapter that was saved and loaded")
    return told


def merge(subject: Subject) -> str:
    """A merged adapter gives the log-probabilities of the adapter, and so does the folder it is saved as."""
    bundle = subject.bundle()
    tuned = LoraTuned(bundle, LoraConfig(rank=4, alpha=8))
    steps = subject.steps(tuned)
    batch = subject.batch(bundle.template)
    for _ in range(2):
        steps.forward_backward([batch], cross_entropy)
        steps.optimizer_step(1e-2, 1.0)
    before = logprobs(tuned.model, batch)
    merged = tuned.merge()
    gap = float((before - logprobs(merged.model, batch)).abs().max())
    folder = subject.scratch / "merged"
    merged.model.save_pretrained(folder)
    merged.processor.save_pretrained(folder)
    saved = float((before - logprobs(subject.bundle(folder).model, batch)).abs().max())
    if max(gap, saved) > 1e-4:
        raise Failed(f"log-probabilities of the merged model differ by {gap:.2g}, of its folder by {saved:.2g}")
    return f"gap {max(gap, saved):.0e}"


def full(subject: Subject) -> str:
    """Steps on all weights lower the loss; the folder saves and loads with the same logits."""
    bundle = subject.bundle()
    tuned = FullTuned(bundle, FullConfig())
    steps = subject.steps(tuned, 3e-3)
    batch = subject.batch(bundle.template)
    told = lower(steps, batch, 3e-3)
    folder = subject.scratch / "full"
    tuned.save(folder)
    again = subject.bundle(folder)
    same(logits(tuned.model, batch), logits(again.model, batch), "the folder that was saved and loaded")
    return told


def generate(subject: Subject) -> str:
    """The engine, with its cache, makes the tokens that a plain loop without one makes."""
    if subject.kind != "text":
        return generate_with_media(subject)
    bundle = subject.bundle()
    assert bundle.template is not None
    prompt = list(bundle.template.prompt(subject.rows()[0]["messages"][:1]))
    engine = TransformersEngine(bundle, TransformersEngineConfig())
    (made,) = engine.generate([Request(token_ids=prompt, max_tokens=NEW_TOKENS)])
    if not made.token_ids:
        raise Failed("nothing was generated")
    if encodes(bundle.template):
        return decoded(bundle, {"input_ids": torch.tensor([prompt])}, made.token_ids)
    fault = unlike_plain(bundle.model, prompt, made.token_ids)
    if fault is None:
        return f"{len(made.token_ids)} tokens"
    if not prepares_inputs(bundle.model) or unlike_own(bundle.model, prompt, made.token_ids):
        raise Failed(fault)
    return f"{len(made.token_ids)} tokens, as its own preparation of inputs makes without a cache; a plain pass makes others"


def unlike_plain(model: Any, prompt: list[int], made: list[int]) -> str | None:
    """The first token that a loop of plain forward passes would not have made; None where there is none."""
    ids = list(prompt)
    with torch.no_grad():
        for at, token in enumerate(made):
            row = torch.tensor([ids])
            scores = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, -1].float()
            close = float(scores.max() - scores[token])
            if close > 1e-3:
                return f"token {at} is {token} with the cache and {int(scores.argmax())} without ({close:.2g} apart)"
            ids.append(token)
    return None


def decoded(bundle: ModelBundle, inputs: dict[str, torch.Tensor], made: list[int]) -> str:
    """Each token that an encoder-decoder made is the likeliest, in one pass without a cache, after those before it."""
    template: Any = bundle.template
    with torch.no_grad():
        begun = inputs.pop("decoder_input_ids", torch.tensor([[template.tokenizer.decoder_start]]))
        given = torch.cat([begun, torch.tensor([made[:-1]], dtype=torch.long)], 1)
        found = bundle.model(**inputs, decoder_input_ids=given, use_cache=False).logits[0, begun.shape[1] - 1 :].float()
    for at, token in enumerate(made):
        close = float(found[at].max() - found[at, token])
        if close > 1e-3:
            raise Failed(f"token {at} is {token} with the cache and {int(found[at].argmax())} without ({close:.2g} apart)")
    return f"{len(made)} tokens"


def prepares_inputs(model: Any) -> bool:
    """Whether a class makes the inputs of a step itself, such as with a mask token at the place to predict: then what it
    generates need not be what a plain pass over the same tokens predicts."""
    return type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation


def unlike_own(model: Any, prompt: list[int], made: list[int]) -> bool:
    """Whether the library's own generation without a cache makes other tokens."""
    row = torch.tensor([prompt])
    own = model.generation_config
    config = GenerationConfig(
        max_new_tokens=len(made), do_sample=False, use_cache=False, pad_token_id=own.pad_token_id,
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id,
    )  # fmt: skip
    with torch.no_grad():
        ids = model.generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=config)[0].tolist()
    return bool(ids[len(prompt) :] != made)


def generate_with_media(subject: Subject) -> str:
    """The engine's answer to a picture or a sound: each token is the likeliest after what stands before it, without a cache."""
    bundle, row = subject.bundle(), subject.rows()[0]
    template: Any = bundle.template
    engine = TransformersEngine(bundle, TransformersEngineConfig())
    messages, media = row["messages"][:1], {key: row[key] for key in ("images", "videos", "audios") if key in row}
    (made,) = engine.generate([Request(messages=messages, media=media, max_tokens=NEW_TOKENS)])
    if not made.token_ids:
        raise Failed("nothing was generated")
    inputs = template.inputs(messages, media)
    if encodes(template):
        return decoded(bundle, inputs, made.token_ids)
    special = set(template.tokenizer.all_special_ids)  # after one that stands for a medium the model would look for more media
    count = next((n for n, token in enumerate(made.token_ids) if token in special), len(made.token_ids))
    length, new = inputs["input_ids"].shape[1], torch.tensor([made.token_ids[:count]], dtype=torch.long)
    for key, value in inputs.items():  # values for each token go on over the answer: text, seen, of no medium
        if value.shape[:2] == (1, length) and not value.is_floating_point():
            last = value[:, -1:].repeat(1, count, *[1] * (value.ndim - 2))  # which media a token sees
            more = {"input_ids": new, "attention_mask": torch.ones_like(new)}.get(key, torch.zeros_like(new))
            more = more if value.ndim == 2 else last
            inputs[key] = torch.cat([value, more], 1)
    with torch.no_grad():
        found = of_text(bundle.model(**inputs, use_cache=False).logits, length + count)[0].float()
    for at, token in enumerate(made.token_ids[: count + 1]):
        scores = found[length + at - 1]
        close = float(scores.max() - scores[token])
        if close > 1e-3:
            raise Failed(f"token {at} is {token} with the cache and {int(scores.argmax())} without ({close:.2g} apart)")
    return f"{min(count + 1, len(made.token_ids))} tokens"


def media(subject: Subject) -> str:
    """Another picture or sound changes the logits of the answer."""
    bundle = subject.bundle()
    template: Any = bundle.template
    others = Samples(template.encode(subject.rows(other=True)[1]))
    batches = [template.collate([sample]) for sample in (subject.samples[-1], others[-1])]
    found = [logprobs(bundle.model, batch)[:, :-1][batch.weights[:, 1:] != 0] for batch in batches]
    if found[0].shape != found[1].shape:
        raise Failed("two pictures of one size become texts of different lengths")
    gap = float((found[0] - found[1]).abs().max())
    if gap < 1e-4:
        raise Failed(f"the log-probabilities of the answer change by {gap:.1g} only")
    return f"by {gap:.2g}"


def tower(subject: Subject) -> str:
    """Training all weights, the gradient reaches the part that reads the media."""
    bundle = subject.bundle()
    tuned = FullTuned(bundle, FullConfig())
    steps = subject.steps(tuned)
    steps.forward_backward([subject.batch(bundle.template)], cross_entropy)
    parts = ("vision", "audio") if bundle.parts is None else tuple(bundle.parts.names)
    of: Any = bundle.parts.of if bundle.parts is not None else (lambda name: ())
    wanted = "vision" if subject.kind == "image" else "audio"
    wanted = wanted if wanted in parts else "projector"  # what reads the media of a model without a tower
    own = {name: p for name, p in tuned.trainable().items() if wanted in of(name)}
    if not own:
        raise Failed(f"no parameter is of the part {wanted}; parts: {', '.join(parts)}")
    if own and all("vqmodel." in name for name in own):
        raise NotApplicable("its pictures become words of the vocabulary, through which no gradient passes")
    reached = [name for name, p in own.items() if p.grad is not None and float(p.grad.abs().max()) > 0]
    if not reached:
        raise Failed(f"none of the {len(own)} parameters of the {wanted} part has a gradient")
    return f"{len(reached)} of {len(own)} parameters"


def packing(subject: Subject) -> str:
    """Samples laid end to end give the log-probabilities that each gives alone, where the model isolates them; else those
    padded into one batch do."""
    bundle = subject.bundle()
    template = bundle.template
    assert template is not None
    steps = subject.steps(FullTuned(bundle, FullConfig()))
    alone = torch.cat([steps.forward("policy", template.collate([sample])).logprobs() for sample in subject.samples])
    lack = isolates(steps, template, subject.samples)
    together = subject.samples
    if lack is None:
        packed = template.pack(subject.samples)
        assert packed is not None
        together = Samples([packed])
    gap = float((steps.forward("policy", template.collate(together)).logprobs() - alone).abs().max())
    limit = 1e-5 * max(1.0, float(alone.abs().max()))
    if gap > limit:
        raise Failed(f"{'padded' if lack else 'packed'} samples differ from each alone by {gap:.2g}")
    return f"padded: {lack}" if lack else ""


def recompute(subject: Subject) -> str:
    """Gradients with activations recomputed are those with activations kept."""
    found: list[dict[str, torch.Tensor]] = []
    for mode in ("never", "always"):
        bundle = subject.bundle()
        tuned = FullTuned(bundle, FullConfig())
        steps = subject.steps(tuned, checkpointing=mode)
        if not steps.checkpointing.able:
            raise NotApplicable("the library has no gradient checkpointing for it")
        torch.manual_seed(0)
        steps.forward_backward([subject.batch(bundle.template)], cross_entropy)
        if steps.checkpointing.on != (mode == "always"):
            raise Failed("gradient checkpointing was asked for and is not on")
        found.append({name: p.grad for name, p in tuned.trainable().items() if p.grad is not None})
    kept, made = found
    if kept.keys() != made.keys():
        raise Failed(f"{len(kept.keys() ^ made.keys())} parameters have a gradient in one of the two only")
    if not kept:
        raise Failed("no parameter has a gradient")
    scale = max(1.0, *(float(grad.abs().max()) for grad in kept.values()))
    gaps = {name: float((kept[name] - made[name]).abs().max()) for name in kept}
    worst = max(gaps, key=lambda name: gaps[name])
    if gaps[worst] > 1e-5 * scale:
        raise Failed(f"the gradient of {worst} differs by {gaps[worst]:.2g}")
    return ""


TEXT: dict[str, Callable[[Subject], str]] = {
    "load": load, "mask": mask, "head": head, "lora": lora, "full": full, "merge": merge, "generate": generate,
    "packing": packing, "recompute": recompute,
}  # fmt: skip


MEDIA: dict[str, Callable[[Subject], str]] = {
    "load": load, "mask": mask, "head": head, "media": media, "tower": tower, "lora": lora, "full": full, "merge": merge,
    "generate": generate, "packing": packing, "recompute": recompute,
}  # fmt: skip


def run_checks(subject: Any, checks: dict[str, Callable[[Any], str]]) -> dict[str, Check]:
    """Every check in turn. After a failed `load` or `mask` the others do not run."""
    results: dict[str, Check] = {}
    for name, check in checks.items():
        broken = next((before for before in ("load", "mask") if before in results and results[before].state == "fail"), None)
        if broken:
            results[name] = Check("not run", f"{broken} failed")
            continue
        try:
            results[name] = Check("pass", check(subject))
        except NotApplicable as err:
            results[name] = Check("n/a", str(err))
        except Failed as err:
            results[name] = Check("fail", str(err))
        except Exception as err:
            results[name] = Check("fail", one_line(err))
    return results


def lower(steps: Any, batch: Batch, rate: float = 1e-2) -> str:
    """Train on one batch. Raises Failed unless the loss on it falls."""
    before = steps.evaluate([batch], cross_entropy).loss
    for _ in range(STEPS):
        steps.forward_backward([batch], cross_entropy)
        steps.optimizer_step(rate, 1.0)
    after = steps.evaluate([batch], cross_entropy).loss
    if not after < before - 1e-3:
        raise Failed(f"the loss goes from {before:.4f} to {after:.4f}")
    return f"{before:.2f} to {after:.2f}"


def logits(model: Any, batch: Batch) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(**batch.inputs, use_cache=False).logits
    return found


def logprobs(model: Any, batch: Batch) -> torch.Tensor:
    return torch.log_softmax(of_text(logits(model, batch), batch.labels.shape[1]).float(), -1)


def of_text(logits: torch.Tensor, length: int) -> torch.Tensor:
    """Logits of the tokens of the text, the last `length`: GIT gives what it sees of a picture as well, before them."""
    return logits[:, -length:]


def same(left: torch.Tensor, right: torch.Tensor, what: str) -> None:
    if not torch.equal(left, right):
        raise Failed(f"logits of {what} differ by {float((left - right).abs().max()):.2g}")

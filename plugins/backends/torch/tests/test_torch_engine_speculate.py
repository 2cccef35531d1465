"""Guessed tokens: answers are what they are without, samples follow the model's distribution, and guesses are counted."""

from __future__ import annotations

import copy
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from swift_core.errors import CapabilityError, RequestError
from swift_core.types import Completion, Constraint, ModelBundle, Request
from swift_plugin_torch.config import TransformersEngineConfig
from swift_plugin_torch.engine import TransformersEngine
from swift_plugin_torch.rows import Call, Guess, Prompt, Row
from swift_plugin_torch.sampling import draw, restrict
from swift_plugin_torch.speculate import NGrams, checked, limits
from swift_plugin_torch.texts import Text

PROMPTS = [[10 + 3 * n + 7 * row for n in range(4 + row)] for row in range(7)]
REPEATS = [[40, 41, 42, 43, 44, 45] * 4, [90, 91, 92] * 6, *PROMPTS[:3]]


def sharpened(bundle: ModelBundle, seed: int = 0, noise: float = 0.0) -> ModelBundle:
    """Weights large enough that no two tokens are nearly as likely; `noise` makes a model that is like it."""
    model = copy.deepcopy(bundle.model)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.manual_seed(seed + len(name))
            parameter.data.normal_(0, 0.3)
            parameter.data += noise * torch.randn_like(parameter)
            if "o_proj" in name:
                parameter.data *= 0.02  # a token decides much about the next one, so that answers soon go in circles
    return replace(bundle, model=model)


def engine(bundle: ModelBundle, **options: Any) -> TransformersEngine:
    return TransformersEngine(bundle, TransformersEngineConfig(**options))


def answers(made: Any, requests: list[Request]) -> list[Completion]:
    return sorted(made.generate(requests), key=lambda found: (found.index, found.choice))


@pytest.fixture
def draft(tiny_bundle: ModelBundle, tmp_path: Path) -> Path:
    """A folder with a model that is often right about `sharpened(tiny_bundle)`."""
    near = sharpened(tiny_bundle, noise=0.02)
    near.model.save_pretrained(tmp_path / "draft")
    tiny_bundle.processor.save_pretrained(tmp_path / "draft")
    return tmp_path / "draft"


def row(ids: list[int], **asked: Any) -> Row:
    return Row(
        Call(False), 0, 0, Request(token_ids=ids, **asked), Prompt(ids), None, frozenset(), Text(str, ()), random.Random(0)
    )


def test_ngrams_of_the_talk_are_read_on() -> None:
    grams = NGrams(3)
    one = row([1, 2, 3, 4, 5, 9, 1, 2, 3])
    assert grams.follow(one, 3) == [4, 5, 9]
    assert grams.follow(one, 8) == [4, 5, 9, 1, 2, 3, 4, 5]  # on and on, as in a repetition
    one.ids += [4, 7, 2, 3]  # "2 3" was followed by 4 twice; "7 2 3" is new
    assert grams.follow(one, 2) == [4, 7]  # the place used last
    one.ids += [8]
    assert grams.follow(one, 2) == []
    assert grams.follow(row([5, 5]), 2) == []  # two tokens before it are asked for
    assert NGrams(1).follow(row([5, 5]), 2) == [5, 5]


def test_guesses_are_fewer_where_many_rows_run_or_few_tokens_are_left() -> None:
    assert limits({0: row([1], max_tokens=99)}, 5, "cpu") == {0: 5}
    assert limits({0: row([1], max_tokens=3)}, 5, "cpu") == {0: 2}
    assert limits({n: row([1], max_tokens=99) for n in range(16)}, 5, "cpu") == dict.fromkeys(range(16), 1)
    assert set(limits({n: row([1], max_tokens=99) for n in range(32)}, 5, "cpu").values()) == {0}
    one = row([1])
    for accepted, reach in ((5, 5), (2, 5), (0, 2), (0, 1), (0, 1)):
        checked(one, 5, accepted, 5)
        assert one.reach == reach
    checked(one, 1, 1, 5)
    assert (one.reach, one.drafted, one.accepted) == (2, 26, 8)


@pytest.mark.parametrize("way", ["ngrams", "draft"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_greedy_answers_are_those_without(tiny_bundle: ModelBundle, draft: Path, way: str, batch_size: int) -> None:
    bundle = sharpened(tiny_bundle)
    requests = [Request(token_ids=ids, max_tokens=20 + 10 * n, ignore_eos=True) for n, ids in enumerate(REPEATS)]
    plain = answers(engine(copy.copy(bundle), batch_size=batch_size), requests)
    asked = {"ngrams": 2} if way == "ngrams" else {"draft": str(draft)}
    made = engine(bundle, batch_size=batch_size, **asked)
    for _ in range(2):  # again with kept prompts
        found = answers(made, requests)
        assert [one.token_ids for one in found] == [one.token_ids for one in plain]
        for one, other in zip(found, plain, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            assert (one.text, one.finish) == (other.text, other.finish)
        assert sum(one.accepted for one in found) > 5
    assert all(one.drafted == one.accepted == 0 for one in plain)
    assert all(0 <= one.accepted <= one.drafted for one in found)
    runner, scheduler = made._start()
    scheduler.wait_for(lambda rows: not rows)
    assert runner.slots is not None
    assert set(runner.slots.used) == {0}


def test_passes_are_saved_and_counted(tiny_bundle: ModelBundle, draft: Path) -> None:
    """Tokens = passes of the model after the prompt's + accepted guesses, for a row alone."""
    bundle = sharpened(tiny_bundle)
    made = engine(bundle, draft=str(draft))
    made._start()  # what tries the model is over
    passes, original = 0, bundle.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        return original(*args, **kwargs)

    bundle.model.forward = forward
    (found,) = made.generate([Request(token_ids=PROMPTS[3], max_tokens=40, ignore_eos=True)])
    assert len(found.token_ids) == 40
    assert passes + found.accepted == 40
    assert found.accepted >= 8


@pytest.mark.parametrize("way", ["ngrams", "draft"])
def test_options_of_a_request_hold_for_guessed_tokens(tiny_bundle: ModelBundle, draft: Path, way: str) -> None:
    """Penalties, bias, stops, constraints, min_tokens and pieces, each as without."""
    bundle = sharpened(tiny_bundle)
    plain = engine(copy.copy(bundle))
    made = engine(bundle, **({"ngrams": 2} if way == "ngrams" else {"draft": str(draft)}))
    base = Request(token_ids=REPEATS[0], max_tokens=24, top_logprobs=2)
    free = answers(plain, [replace(base, ignore_eos=True)])[0]
    requests = [
        replace(base, repetition_penalty=1.4), replace(base, frequency_penalty=0.5, presence_penalty=0.5, ignore_eos=True),
        replace(base, logit_bias={77: 3.0}), replace(base, stop_ids=[free.token_ids[9]]), replace(base, stop=[free.text[3:5]]),
        replace(base, constraint=Constraint("regex", "(ab|cde){6}")),
        replace(base, min_tokens=12, stop_ids=free.token_ids[2:3]),
        replace(base, max_tokens=1), replace(base, max_tokens=2),
    ]  # fmt: skip
    for one, other in zip(answers(made, requests), answers(plain, requests), strict=True):
        assert (one.token_ids, one.text, one.finish) == (other.token_ids, other.text, other.finish)
        assert [[token for token, _ in top] for top in one.top_logprobs] == [[t for t, _ in top] for top in other.top_logprobs]
    *pieces, last = made.generate([requests[0]], stream=True)
    assert [token for piece in pieces for token in piece.token_ids] == last.token_ids
    assert "".join(piece.text for piece in pieces) == last.text.rstrip("\ufffd")  # half a character is not shown


def test_a_seeded_sample_is_the_same_with_ngrams(tiny_bundle: ModelBundle) -> None:
    """A guess without a distribution is compared with what is drawn anyhow, which is Leviathan's rule for it."""
    bundle = sharpened(tiny_bundle)
    request = Request(token_ids=REPEATS[1], max_tokens=60, temperature=0.7, top_k=3, seed=5, n=3, ignore_eos=True)
    plain, found = answers(engine(copy.copy(bundle)), [request]), answers(engine(bundle, ngrams=1), [request])
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    assert sum(one.drafted for one in found) > sum(one.accepted for one in found) > 0


def far(found: dict[int, int], shares: torch.Tensor, count: int) -> float:
    """Chi-squared of counts against shares, by its degrees of freedom, in standard deviations; rare tokens are one cell."""
    often = shares * count >= 8
    expected = [*(shares[often] * count).tolist(), float(shares[~often].sum() * count)]
    seen = [found.get(token, 0) for token in torch.nonzero(often)[:, 0].tolist()]
    seen.append(count - sum(seen))
    cells = [(a, b) for a, b in zip(seen, expected, strict=True) if b > 0]
    assert len(cells) > 4
    freedom = len(cells) - 1
    return (sum((a - b) ** 2 / b for a, b in cells) - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("asked", [{}, {"temperature": 0.6, "top_p": 0.9}, {"top_k": 6}])
def test_the_rule_keeps_the_distribution(asked: dict[str, Any]) -> None:
    """8,000 tokens, each drawn with a guess from another distribution, against the model's own; and the share of guesses that
    stand is the sum of min(p, q). A rule that takes every guess fails."""
    count = 8_000
    one = row([1], **{"temperature": 1.0, "seed": 1, **asked})
    torch.manual_seed(0)
    scores = torch.randn(24) * 1.5
    q = torch.softmax(torch.randn(24) * 1.2, -1)
    p = torch.softmax(scores / one.request.temperature, -1)
    restrict(p, one.request.top_k, one.request.top_p, 0.0)
    p /= p.sum()
    guesses = torch.multinomial(q, count, replacement=True, generator=torch.Generator().manual_seed(2)).tolist()
    found: dict[int, int] = {}
    stood = 0
    for token in guesses:
        one.guess = Guess(token, q)
        (drawn,) = draw(scores[None].clone(), [one])
        found[drawn] = found.get(drawn, 0) + 1
        stood += drawn == token
    taken = {token: guesses.count(token) for token in set(guesses)}
    assert far(found, p, count) < 4 < far(taken, p, count)
    assert set(found) <= set(torch.nonzero(p)[:, 0].tolist())
    least = float(torch.minimum(p, q).sum())
    assert stood / count == pytest.approx(least, abs=0.02)


def test_samples_with_a_draft_follow_the_distribution(tiny_bundle: ModelBundle, draft: Path) -> None:
    """Second tokens of 1,000 answers, most of them guessed by the draft, against the model's own distribution of them."""
    bundle = sharpened(tiny_bundle)
    bundle.model.lm_head.weight.data *= 0.6  # flatter: there is something to draw
    prompt, heat = PROMPTS[2], 0.7
    with torch.no_grad():
        first = torch.softmax(bundle.model(torch.tensor([prompt])).logits[0, -1] / heat, -1)
        likely = first.topk(40).indices
        after = torch.softmax(bundle.model(torch.tensor([[*prompt, int(token)] for token in likely])).logits[:, -1] / heat, -1)
    shares = (first[likely, None] * after).sum(0) / first[likely].sum()
    made = engine(bundle, draft=str(draft), batch_size=4)
    request = Request(token_ids=prompt, max_tokens=3, temperature=heat, seed=11, n=1000, ignore_eos=True)
    done = [one for one in made.generate([request]) if one.token_ids[0] in set(likely.tolist())]
    found: dict[int, int] = {}
    for one in done:
        found[one.token_ids[1]] = found.get(one.token_ids[1], 0) + 1
    assert far(found, shares, len(done)) < 4
    drafted, accepted = sum(one.drafted for one in done), sum(one.accepted for one in done)
    assert drafted >= len(done)
    assert 0.02 * drafted < accepted < 0.98 * drafted
    again = [one.token_ids for one in answers(made, [replace(request, n=5)])]
    assert again == [one.token_ids for one in answers(made, [replace(request, n=5)])]  # a seed gives the same sample


def test_what_cannot_be_is_said(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose one"):
        TransformersEngineConfig(ngrams=2, draft="x")
    with pytest.raises(ValueError, match="guesses must be at least 1"):
        TransformersEngineConfig(guesses=0)
    request = [Request(token_ids=[5, 6], max_tokens=2)]
    config = transformers.MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, state_size=4)
    mamba = replace(tiny_bundle, model=transformers.MambaForCausalLM(config).eval())
    with pytest.raises(CapabilityError, match=r"engine.ngrams: MambaForCausalLM cannot take back what it read"):
        list(engine(mamba, ngrams=2).generate(request))
    other = copy.deepcopy(tiny_bundle.processor)
    other.add_tokens(["<new>"])
    tiny_bundle.model.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(RequestError, match=r"engine.draft: .*other has another vocabulary, 1 tokens differ"):
        list(engine(tiny_bundle, draft=str(tmp_path / "other")).generate(request))
    with pytest.raises(RequestError, match="no-such"):
        list(engine(tiny_bundle, draft="./no-such").generate(request))


def test_rows_that_go_alone_are_answered_without_guesses(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    """A prompt-tuning adapter brings states of its own: that no guesses are made beside them is said once."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(copy.deepcopy(tiny_bundle.model), config)
    tuned.save_pretrained(tmp_path / "soft")
    made = engine(tiny_bundle, ngrams=1)
    made.load_adapter("soft", tmp_path / "soft")
    request = Request(token_ids=REPEATS[0], max_tokens=12, adapter="soft", ignore_eos=True)
    with pytest.warns(UserWarning, match="made without guesses"):
        (found,) = made.generate([request])
    assert (len(found.token_ids), found.drafted) == (12, 0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        (again,) = made.generate([request])
    assert not any("guesses" in str(one.message) for one in told)
    assert again.token_ids == found.token_ids

"""What a trainer that aligns asks of a session: the reference, an engine on the policy in training, a value model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from swift_core.config import parse_config
from swift_core.errors import RequestError
from swift_core.session import Session
from swift_core.types import Request, Sample

SAMPLES = [Sample([10, 20, 30, 40, 50], [0.0, 0.0, 1.0, 1.0, 1.0]), Sample([7, 8, 9], [0.0, 1.0, 1.0])]
CONFIG = SimpleNamespace(learning_rate=1e-3, weight_decay=0.0, betas=[0.9, 0.999])


@pytest.fixture(params=["lora", "full"])
def session(request: pytest.FixtureRequest, tiny_folder: Path) -> Iterator[Session]:
    settings = {"model": str(tiny_folder), "tuner": request.param, "backend": {"name": "torch", "device": "cpu"}, "seed": 3}
    with Session(parse_config(settings)) as opened:
        opened.backend.seed(3)
        yield opened


def moved(session: Session) -> Any:
    """The policy, trained away from its start."""
    policy = session.get("policy")
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return policy


def test_the_reference_is_the_policy_before_tuning(session: Session) -> None:
    """Log-probabilities, logits and entropies, all asked for after the pass; the policy has its own before and after."""
    template: Any = session.template(session.model_ref, session.processor(session.model_ref))
    plain = session.bundle(session.model_ref).model.eval()
    policy = moved(session)
    steps = session.backend.prepare({"policy": policy, "reference": session.get("reference")}, None, CONFIG)
    batch = template.collate(SAMPLES)
    own = steps.forward("policy", batch).logprobs()
    found = steps.forward("reference", batch)
    with torch.no_grad():
        logits = plain(**batch.inputs).logits
    logs = torch.log_softmax(logits[:, :-1].double(), -1)
    expected = logs.gather(-1, batch.labels[:, 1:, None])[..., 0][found.trained]
    assert torch.allclose(found.logprobs().double(), expected, atol=1e-5)
    assert torch.allclose(found.trained_logits(), logits[:, :-1][found.trained], atol=1e-4)
    assert torch.allclose(found.entropies().double(), -(logs.exp() * logs).sum(-1)[found.trained], atol=1e-5)
    again = steps.forward("policy", batch).logprobs()
    assert torch.equal(own, again)
    assert float((own - found.logprobs()).abs().max()) > 1e-2


def test_an_engine_in_this_process_runs_the_policy_in_training(session: Session) -> None:
    policy = session.get("policy")
    layers = {name: type(module) for name, module in policy.model.named_modules()}
    engine = session.policy_engine()
    asked = Request(token_ids=[10, 20, 30], max_tokens=8, ignore_eos=True)
    (before,) = engine.generate([asked])
    moved(session)
    engine.sync_weights(iter(()), 7)
    policy.model.eval()
    (after,) = engine.generate([asked])
    assert (before.weight_version, after.weight_version) == (0, 7)
    assert before.logprobs[0] != pytest.approx(after.logprobs[0], abs=1e-2)
    assert layers == {name: type(module) for name, module in policy.model.named_modules()}  # they are trained as they are
    ids = torch.tensor([[10, 20, 30, *after.token_ids]])
    with torch.no_grad():
        logs = torch.log_softmax(policy.model(ids).logits[0].double(), -1)
    assert logs[2:-1].argmax(-1).tolist() == after.token_ids
    assert after.logprobs == pytest.approx(logs[2:-1].gather(-1, ids[0, 3:, None])[:, 0].tolist(), abs=1e-4)


def test_full_weights_are_those_of_a_plain_model(session: Session) -> None:
    policy = moved(session)
    steps = session.backend.prepare({"policy": policy}, None, CONFIG)
    weights = {name: tensor.clone() for name, tensor in steps.full_weights("policy")}
    plain = session.bundle(session.model_ref).model.eval()
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    policy.model.eval()
    ids = torch.tensor([[10, 20, 30, 40]])
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, policy.model(ids).logits, atol=1e-4)


def test_a_value_model_says_a_number_at_each_token(session: Session) -> None:
    template: Any = session.template(session.model_ref, session.processor(session.model_ref))
    value = session.get("value")
    steps = session.backend.prepare({"policy": value}, None, CONFIG)
    batch = template.collate(SAMPLES)
    assert steps.forward("policy", batch).logits.shape == (2, 5, 1)
    result = steps.forward_backward([batch], lambda outputs, batch: (outputs.logits.float() ** 2).sum())
    assert steps.optimizer_step(1e-3, None) > 0
    assert result.loss > 0


def test_a_role_without_a_model_is_told(session: Session) -> None:
    with pytest.raises(RequestError, match=r"role 'teacher': set models\.teacher"):
        session.get("teacher")

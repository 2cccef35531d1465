"""schemathesis asks whatever the server's own description allows, and what it does not: no answer is a 5xx."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance


def paths() -> list[str]:
    return [
        "/health", "/v1/models", "/v1/models/{model}", "/v1/chat/completions", "/v1/completions", "/v1/responses",
        "/v1/responses/{ident}", "/v1/embeddings", "/v1/rerank", "/tokenize", "/detokenize", "/v1/load_adapter",
        "/v1/unload_adapter",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", paths())
def test_no_server_error(served: Any, path: str) -> None:
    schema = schemathesis.openapi.from_url(served.url.removesuffix("/v1") + "/openapi.json").include(path=path)

    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            strategy = operation.as_strategy(generation_mode=mode)

            @settings(max_examples=25, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck),
                      derandomize=True)  # fmt: skip
            @given(case=strategy)
            def ask(case: Any) -> None:
                if isinstance(case.body, dict):
                    case.body = {"model": "tiny", **case.body} if "model" not in case.body else case.body
                    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                        if isinstance(case.body.get(name), int) and case.body[name] > 4:
                            case.body[name] = 4
                case.call_and_validate(
                    checks=[not_a_server_error, status_code_conformance, response_schema_conformance], timeout=60
                )

            with suppress(Unsatisfiable):  # what takes nothing cannot be asked wrongly
                ask()

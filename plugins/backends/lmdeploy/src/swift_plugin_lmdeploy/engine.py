"""The engine `lmdeploy`: how LMDeploy's server is started, and its `/generate`, which takes and gives token ids."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from swift_core.errors import CapabilityError
from swift_core.types import ModelFolder, Request
from swift_plugin_openai.environments import python_of, read_recipe
from swift_plugin_openai.native import Pieces, prompt_values
from swift_plugin_openai.tokens import TokenEngine
from swift_plugin_openai.wire import Scored

from swift_plugin_lmdeploy.config import LmdeployConfig

LACKS = ("min_tokens", "presence_penalty", "frequency_penalty", "logit_bias", "seed")  # of `/generate`
SENT = ("max_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos")


class LmdeployEngine(TokenEngine):
    """Stop strings are found here; `/generate` gives one answer to a request."""

    name = "lmdeploy"
    capabilities = frozenset({"stream", "concurrent"})
    own_stops = True

    def __init__(self, folder: ModelFolder, config: LmdeployConfig) -> None:
        self.options = config
        self.python = python_of(self.name, config.python, read_recipe(Path(__file__).parent, "cuda").megabytes, "--cuda")
        super().__init__(folder, config)

    def command(self, port: int) -> list[str]:
        options = self.options
        words = [
            self.python, "-I", "-m", "lmdeploy", "serve", "api_server", str(Path(self.folder.folder).absolute()),
            "--server-name", "127.0.0.1", "--server-port", str(port), "--backend", options.backend, "--dtype", options.dtype,
            "--cache-max-entry-count", str(options.memory_share), "--api-keys", self.server.key, "--logprobs-mode",
            "raw_logprobs",
        ]  # fmt: skip
        if options.max_length is not None:
            words += ["--session-len", str(options.max_length)]
        return words + options.arguments

    def check(self, request: Request) -> None:
        plain = Request()
        for name in LACKS:
            if getattr(request, name) != getattr(plain, name):
                raise CapabilityError(f"engine lmdeploy has no {name}")
        if request.n > 1 and request.temperature > 0:
            raise CapabilityError("engine lmdeploy draws one answer to a request: send it n times")

    def native(self, sent: Mapping[str, Any], stream: bool) -> dict[str, Any]:
        """The body of `/generate` for one in vLLM's form."""
        body: dict[str, Any] = {name: sent[name] for name in SENT} | {"input_ids": sent["prompt"], "stream": stream}
        if sent["temperature"] == 0:  # LMDeploy takes greedy as a choice among one
            body |= {"temperature": 1.0, "top_k": 1}
        else:
            body["top_k"] = sent["top_k"]
        if sent["logprobs"]:
            body["top_logprobs_num"] = sent["logprobs"]
        return body | {"return_logprob": True, "skip_special_tokens": True}

    async def _events(self, sent: dict[str, Any], stream: bool) -> AsyncGenerator[Mapping[str, Any], None]:
        if not stream:
            yield Pieces().read(await self.client.post("/generate", self.native(sent, False)))
            return
        async with aclosing(self.client.events("/generate", self.native(sent, True))) as events:
            async for event in events:
                yield Pieces().read(event)  # each event has its own tokens only

    async def scores(self, model: str, ids: list[int], top: int) -> list[Scored]:
        body = {"input_ids": ids, "max_tokens": 0, "return_logprob": True, "logprob_start_len": 0}
        if top:
            raise CapabilityError("engine lmdeploy does not tell what is likeliest in a prompt's places")
        return prompt_values(await self.client.post("/generate", body), ids)

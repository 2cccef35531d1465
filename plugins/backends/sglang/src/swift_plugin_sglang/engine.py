"""The engine `sglang`: how SGLang's server is started, and its own `/generate`, which takes and gives token ids."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from swift_core.errors import CapabilityError
from swift_core.types import ModelFolder, Request
from swift_plugin_openai.environments import python_of, read_recipe
from swift_plugin_openai.native import Pieces, prompt_values, sampling
from swift_plugin_openai.tokens import BASE, TokenEngine
from swift_plugin_openai.wire import Scored

from swift_plugin_sglang.config import SglangConfig


class SglangEngine(TokenEngine):
    """Stop strings are found here: SGLang then needs no tokenizer of its own for them."""

    name = "sglang"
    capabilities = frozenset({"stream", "concurrent", "adapters", "constraint"})
    own_stops = True

    def __init__(self, folder: ModelFolder, config: SglangConfig) -> None:
        self.options = config
        self.python = python_of(self.name, config.python, read_recipe(Path(__file__).parent, "cuda").megabytes, "--cuda")
        super().__init__(folder, config)

    def command(self, port: int) -> list[str]:
        options = self.options
        words = [
            self.python, "-I", "-m", "sglang.launch_server", "--host", "127.0.0.1", "--port", str(port), "--model-path",
            str(Path(self.folder.folder).absolute()), "--dtype", options.dtype, "--mem-fraction-static",
            str(options.memory_share), "--api-key", self.server.key, "--sampling-defaults", "openai", "--enable-lora",
            "--max-loras-per-batch", str(options.max_adapters), "--max-lora-rank", str(options.max_rank),
            "--lora-target-modules", "all",
        ]  # fmt: skip
        if options.max_length is not None:
            words += ["--context-length", str(options.max_length)]
        return words + options.arguments

    def check(self, request: Request) -> None:
        if request.constraint and request.constraint.kind == "grammar":
            raise CapabilityError(
                "engine sglang takes EBNF, and no Lark grammar; it has json_schema, json_object, regex, choice"
            )

    def native(self, sent: Mapping[str, Any], stream: bool) -> dict[str, Any]:
        """The body of `/generate` for one in vLLM's form."""
        body = {"input_ids": sent["prompt"], "sampling_params": sampling(sent), "stream": stream, "return_logprob": True}
        if sent["logprobs"]:
            body["top_logprobs_num"] = sent["logprobs"]
        return body | ({} if sent["model"] == BASE else {"lora_path": sent["model"]})

    async def _events(self, sent: dict[str, Any], stream: bool) -> AsyncGenerator[Mapping[str, Any], None]:
        pieces = Pieces()
        if not stream:
            yield pieces.read(await self.client.post("/generate", self.native(sent, False)))
            return
        async with aclosing(self.client.events("/generate", self.native(sent, True))) as events:
            async for event in events:
                yield pieces.read(event)

    async def scores(self, model: str, ids: list[int], top: int) -> list[Scored]:
        body: dict[str, Any] = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        body |= {"return_logprob": True, "logprob_start_len": 0} | ({} if model == BASE else {"lora_path": model})
        body |= {"top_logprobs_num": top} if top else {}
        return prompt_values(await self.client.post("/generate", body), ids)

    async def post_adapter(self, name: str, folder: Path) -> None:
        await self.client.tell("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.absolute())})

    async def drop_adapter(self, name: str) -> None:
        await self.client.tell("/unload_lora_adapter", {"lora_name": name})

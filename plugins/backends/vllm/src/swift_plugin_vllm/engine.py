"""The engine `vllm`: how vLLM's server is started, and where it differs from what the base sends."""

from __future__ import annotations

from pathlib import Path

from swift_core.errors import RequestError, RunError
from swift_core.types import ModelFolder
from swift_plugin_openai.environments import mark_of, python_of, read_recipe
from swift_plugin_openai.tokens import BASE, TokenEngine

from swift_plugin_vllm.config import VllmConfig

SERVE = Path(__file__).parent / "server" / "serve.py"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as its largest rank


class VllmEngine(TokenEngine):
    """Adapters need room that vLLM makes when it starts: for those loaded before the first request, or as options say."""

    name = "vllm"
    capabilities = frozenset({"stream", "concurrent", "adapters", "constraint", "sync"})

    def __init__(self, folder: ModelFolder, config: VllmConfig) -> None:
        self.options = config
        self.python = python_of(self.name, config.python, read_recipe(Path(__file__).parent).megabytes)
        self.cuda = config.python is None and (mark_of(self.name) or {}).get("device") == "cuda"
        self.room = (0, 0)  # adapters and their rank that the running server has room for
        super().__init__(folder, config)

    @property
    def serial_scores(self) -> bool:  # type: ignore[override]
        return self.room[0] > 0  # prompt_logprobs of several rows at once end vLLM's process where LoRA is on

    def command(self, port: int) -> list[str]:
        options = self.options
        words = [
            self.python, "-I", str(SERVE), "--host", "127.0.0.1", "--port", str(port), "--middleware", "guard.Guard",
            "--worker-extension-cls", "extension.Extension",
            "--model", str(self.current.absolute()), "--served-model-name", BASE, "--dtype", options.dtype,
            "--max-num-seqs", str(options.max_rows), "--generation-config", "vllm", "--enable-prompt-tokens-details",
            "--structured-outputs-config", '{"backend": "guidance"}',
        ]  # fmt: skip
        if options.max_length is not None:
            words += ["--max-model-len", str(options.max_length)]
        if not (self.cuda and options.compiled):
            words.append("--enforce-eager")
        if self.cuda:
            words += ["--gpu-memory-utilization", str(options.memory_share)]
        else:  # a prompt read in parts sets a seed's generator back, which vLLM cannot do on a CPU: its process ends
            words.append("--no-enable-chunked-prefill")
        self.room = self._room()
        if self.room[0]:
            words += ["--enable-lora", "--max-loras", str(self.room[0]), "--max-lora-rank", str(self.room[1])]
        return words + options.arguments

    def _room(self) -> tuple[int, int]:
        folders = [*([self.own] if self.own else []), *self.adapters.values()]
        count = max(self.options.max_adapters + bool(self.own), len(folders))
        if not count:
            return 0, 0
        rank = max([self.options.max_rank, *(int(self._check_adapter(folder)["r"]) for folder in folders)])
        return count, next((known for known in RANKS if known >= rank), rank)

    def variables(self, key: str) -> dict[str, str]:
        found = {
            "VLLM_API_KEY": key, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # its calls that change weights; the guard asks for the key there too
        }  # fmt: skip
        if not self.cuda:
            found |= {"VLLM_CPU_KVCACHE_SPACE": f"{self.options.cache_gb:g}"}
        if self.options.threads:
            found |= {"OMP_NUM_THREADS": str(self.options.threads)}
        return found

    async def post_weights(self, folder: Path) -> None:
        """vLLM reads the folder into the model that is loaded. Its caches hold states of the weights before."""
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.absolute())}}
        await self.client.tell("/collective_rpc", rpc)
        await self.client.tell("/collective_rpc", {"method": "tie_output_layer"})
        answer = await self.client.post("/reset_prefix_cache", {})
        if not answer.get("success"):
            raise RunError("vLLM did not forget what it computed with the weights before")

    def load_adapter(self, name: str, folder: Path) -> None:
        rank = int(self._check_adapter(folder)["r"])
        if self.server.running:
            others = len(self.adapters.keys() - {name}) + bool(self.own)
            if others >= self.room[0] or rank > self.room[1]:
                raise RequestError(
                    f"adapter {folder} (rank {rank}) has no room: vLLM was started for {self.room[0]} adapters of rank up to "
                    f"{self.room[1]}. Start with engine.max_adapters={others + 1} engine.max_rank={rank}"
                )
        super().load_adapter(name, folder)

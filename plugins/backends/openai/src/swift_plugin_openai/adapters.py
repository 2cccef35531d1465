"""What an adapter's folder must be for an engine that reads it itself: LoRA as peft writes it, on the base's own weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swift_core.errors import RequestError

MERGE = "merge it first: swift-core export"
CHANGED_BASE = ("pissa", "olora", "corda", "loftq")  # beginnings of init_lora_weights that move a part of the base


def read_adapter(folder: Path, engine: str) -> dict[str, Any]:
    """The config of a LoRA adapter. Raises RequestError where the engine could not serve it, or would serve another model."""
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as err:
        raise RequestError(f"adapter {folder}: adapter_config.json cannot be read ({err.__class__.__name__})") from None
    if not (folder / "adapter_model.safetensors").is_file():
        raise RequestError(f"adapter {folder} holds no adapter_model.safetensors")
    if config.get("peft_type") != "LORA":
        raise RequestError(f"adapter {folder} is of type {config.get('peft_type')}; engine {engine} serves LORA; {MERGE}")
    if str(config.get("init_lora_weights")).lower().startswith(CHANGED_BASE):
        raise RequestError(f"adapter {folder} ({config['init_lora_weights']}) holds a part of the base's weights; {MERGE}")
    for key in ("use_dora", "modules_to_save", "trainable_token_indices", "alpha_pattern", "rank_pattern", "lora_bias"):
        if config.get(key):
            raise RequestError(f"adapter {folder} has {key}, which engine {engine} does not serve; {MERGE}")
    if config.get("bias", "none") != "none":
        raise RequestError(f"adapter {folder} has trained biases, which engine {engine} does not serve; {MERGE}")
    return config

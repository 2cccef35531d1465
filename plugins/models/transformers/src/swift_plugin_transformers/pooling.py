"""Heads that judge a text by its last token, over texts laid end to end in one row: a judgement for each of them.

The library's models for sequence classification pool one token a row. Where a pass says by `cu_seq_lens_q` where its texts end
(see `attention`), the states of the last tokens go through the model's own `score` instead. Shape: N texts.
"""

from __future__ import annotations

from typing import Any

import torch


def install(model: Any) -> None:
    """Let a loaded model with a pooled `score` judge each text of a flat row: logits [N, labels] in the order of the texts."""
    base = getattr(model, model.base_model_prefix, None)
    if base is None or base is model or not isinstance(getattr(model, "score", None), torch.nn.Linear):
        return
    held: dict[str, torch.Tensor] = {}

    def begin(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        held.clear()
        if kwargs.get("cu_seq_lens_q") is not None:
            ends, seen = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
            pad = model.config.get_text_config().pad_token_id
            held["places"] = last_tokens(kwargs["input_ids"][0], ends, ends if seen is None else seen, pad)

    def keep(base: Any, args: Any, outputs: Any) -> None:
        if held:
            held["states"] = outputs.last_hidden_state

    def judge(model: Any, args: Any, outputs: Any) -> Any:
        if held and outputs.logits.ndim == 2:  # a head that judges each token has logits of three dimensions
            outputs.logits = model.score(held["states"][0, held["places"]])
        held.clear()
        return outputs

    model.register_forward_pre_hook(begin, with_kwargs=True)
    base.register_forward_hook(keep)
    model.register_forward_hook(judge)


def last_tokens(ids: torch.Tensor, ends: torch.Tensor, seen: torch.Tensor, pad: int | None) -> torch.Tensor:
    """Where each text [T] is judged: [N]. As in a padded row, at its last token that is no padding token. A beginning that the
    texts after it share is none of them; `ends`, `seen` are the sums of the segments' tokens, and of the keys that they see."""
    lengths, keys = ends.diff().tolist(), seen.diff().tolist()
    found, at = [], 0
    for n, length in enumerate(lengths):
        shared = keys[n] == length and n + 1 < len(keys) and keys[n + 1] > lengths[n + 1]
        if not shared:
            own = ids[at : at + length]
            kept = (own != pad).nonzero() if pad is not None else own.new_empty(0)
            found.append(at + (int(kept[-1]) if len(kept) else length - 1))
        at += length
    return torch.tensor(found, device=ids.device)

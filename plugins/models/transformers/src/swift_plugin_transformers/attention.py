"""Attention over several documents laid end to end in one row, each seeing itself alone, without a mask over all pairs.

Registered with the transformers library as the attention implementation `swift_documents`. A forward pass says where its
documents end by `cu_seq_lens_q`, the argument that the library's flash attention takes; without it this is plain sdpa.
By `cu_seq_lens_k` it may say that one sees more keys than it has tokens: then it begins with the last document before it that
sees none but its own. Shapes: T tokens, H query heads, K key heads, D values a head, documents of L tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "swift_documents"
BLOCK = 128  # queries at once: what lies right of a block's diagonal is never computed
LONGEST = 1024  # tokens of a document whose probabilities are kept for the backward pass; longer ones go through sdpa


def install(model: Any) -> None:
    """Let a loaded model take flat rows of documents: by this attention where the model's own is sdpa and does no more than
    softmax(q k) v, else by the library's mask over all pairs, which it makes from position ids that begin again."""
    config = model.config.get_text_config()
    own = any(name.endswith("sinks") for name, _ in model.named_parameters()) or getattr(config, "attn_logit_softcapping", None)
    if not own and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(_chosen(model.config))  # an architecture that takes none from outside stays as it is
    ours = model.config._attn_implementation == NAME

    def adapt(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ends = kwargs.get("cu_seq_lens_q")
        if ends is not None and not ours:
            if kwargs.get("cu_seq_lens_k") is not None:
                raise NotImplementedError("this attention knows no beginning that documents share")
            del kwargs["cu_seq_lens_q"]
        elif ends is not None and kwargs.get("attention_mask") is None:
            # The library passes a four-dimensional mask on as it is: this one stands in for T x T values that nobody reads.
            kwargs["attention_mask"] = torch.ones((1, 1, 1, 1), device=ends.device)
        return args, kwargs

    model.register_forward_pre_hook(adapt, with_kwargs=True)


def _chosen(config: Any) -> dict[str, str]:
    """This attention, but for parts of a model that have none but their own, such as a sound encoder in windows."""
    parts = {key: part._attn_implementation for key in config.sub_configs if (part := getattr(config, key, None)) is not None}
    return {"": NAME, **{key: NAME if own == "sdpa" else own for key, own in parts.items()}}


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None, cu_seq_lens_k: torch.Tensor | None = None,
    sliding_window: int | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D]."""
    if cu_seq_lens_q is None:
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    extra = sorted(name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None)
    if extra:
        raise NotImplementedError(f"attention over documents knows no {', '.join(extra)}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    places = _places(cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k)
    longest = max(place.before + place.length for place in places)
    window = sliding_window if sliding_window and longest > sliding_window else None
    alike = query.dtype == key.dtype == value.dtype and value.shape[-1] == query.shape[-1]
    if query.device.type == "cpu" and causal and alike and not dropout and not window and longest <= LONGEST:
        return CausalDocuments.apply(query, key, value, places, scale), None
    if not causal and any(place.before for place in places):
        raise NotImplementedError("only causal attention lets documents share their beginning")
    parts = []
    for place in places:
        q, k, v = query[:, :, place.at : place.at + place.length], _seen(key, 2, place), _seen(value, 2, place)
        masked = causal and (place.before or (window and place.length > window))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=_band(place.length, place.before, window, q.device) if masked else None, dropout_p=dropout,
            is_causal=causal and not masked, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        parts.append(out.transpose(1, 2))
    return torch.cat(parts, 1), None


class Place(NamedTuple):
    """Where a document lies in the row, and the `before` tokens from `root` on that it begins with."""

    at: int
    length: int
    root: int
    before: int


def _places(ends: torch.Tensor, ends_seen: torch.Tensor) -> list[Place]:
    """`ends`, `ends_seen` [documents + 1]: the sums of their tokens, and of the keys that they see."""
    found: list[Place] = []
    root = 0
    for at, length, seen in zip(ends.tolist(), ends.diff().tolist(), ends_seen.diff().tolist(), strict=False):
        if seen == length:
            root = at
        found.append(Place(at, length, root, seen - length))
    return found


def _seen(tensor: torch.Tensor, axis: int, place: Place) -> torch.Tensor:
    """Keys or values of a document, those of its shared beginning first."""
    if place.root + place.before == place.at:  # one piece, of the beginning or of it alone
        return tensor.narrow(axis, place.root, place.before + place.length).contiguous()
    own = tensor.narrow(axis, place.at, place.length)
    return torch.cat([tensor.narrow(axis, place.root, place.before), own], axis) if place.before else own.contiguous()


def _band(length: int, before: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys a query sees: itself and those before it, with a window the last `window` of them all. [L, before + L]."""
    distance = torch.arange(before, before + length, device=device)[:, None] - torch.arange(before + length, device=device)
    return (distance >= 0) & (distance < (window or before + length))


class CausalDocuments(torch.autograd.Function):
    """softmax(scale q k^T) v, causal within each document and after the beginning that it shares, in blocks of queries.

    For documents of up to some hundred tokens on a CPU this takes half the time of the fused kernel, forward and backward.
    It keeps the probabilities: about H L^2 / 2 values a document and layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        places: list[Place],
        scale: float,
    ) -> torch.Tensor:
        _, heads, tokens, size = query.shape
        groups = key.shape[1]
        out = query.new_empty(1, tokens, heads, size)
        kept = []
        for place in places:
            at, length, _, before = place
            keys, values = _seen(key[0], 1, place), _seen(value[0], 1, place)
            for begin, end in _blocks(length):
                q = (query[0, :, at + begin : at + end] * scale).reshape(groups, -1, size)
                last = before + end
                scores = torch.bmm(q, keys[:, :last].transpose(1, 2)).view(groups, -1, end - begin, last)
                scores[..., before + begin :] += _above_diagonal(end - begin, scores)
                share = torch.softmax(scores, -1).view(groups, -1, last)
                seen = torch.bmm(share, values[:, :last]).view(heads, end - begin, size)
                out[0, at + begin : at + end] = seen.transpose(0, 1)
                kept.append(share)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, *kept)
            ctx.places, ctx.scale = places, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        _, heads, _, size = query.shape
        groups, shares = key.shape[1], iter(kept)
        # Laid out as the projections before them are, so that nothing copies them on.
        of_query, of_key, of_value = (torch.empty_like(t.transpose(1, 2)).transpose(1, 2) for t in (query, key, value))
        for place in ctx.places:
            at, length, root, before = place
            keys, values = _seen(key[0], 1, place), _seen(value[0], 1, place)
            sums = [torch.zeros_like(keys), torch.zeros_like(values)]
            for begin, end in _blocks(length):
                share, last = next(shares), before + end
                g = grad[0, at + begin : at + end].transpose(0, 1).reshape(groups, -1, size)
                q = (query[0, :, at + begin : at + end] * ctx.scale).reshape(groups, -1, size)
                of_scores = torch._softmax_backward_data(torch.bmm(g, values[:, :last].transpose(1, 2)), share, -1, share.dtype)
                found = torch.bmm(of_scores, keys[:, :last]).view(heads, end - begin, size)
                torch.mul(found, ctx.scale, out=of_query[0, :, at + begin : at + end])
                sums[0][:, :last] += torch.bmm(of_scores.transpose(1, 2), q)
                sums[1][:, :last] += torch.bmm(share.transpose(1, 2), g)
            for whole, part in zip((of_key, of_value), sums, strict=True):
                whole[0, :, at : at + length] = part[:, before:]
                whole[0, :, root : root + before] += part[:, :before]
        return of_query, of_key, of_value, None, None


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(begin, min(length, begin + BLOCK)) for begin in range(0, length, BLOCK)]


def _above_diagonal(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((size, size), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)

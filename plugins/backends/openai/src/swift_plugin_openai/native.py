"""The `/generate` that SGLang and LMDeploy have of their own: token ids in and out. Pure functions, to and from vLLM's form.

As documented by SGLang (docs "Sampling Parameters", "Native APIs") and LMDeploy (`GenerateReqInput`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from swift_core.errors import RunError

from swift_plugin_openai.wire import Scored

SAMPLING = {  # SGLang's names of what vLLM's body holds
    "max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "temperature": "temperature", "top_p": "top_p",
    "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "stop_token_ids": "stop_token_ids", "ignore_eos": "ignore_eos", "n": "n",
}  # fmt: skip


class Pieces:
    """What each choice's events have told so far: their ids and log-probabilities are of the whole answer each time."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def read(self, event: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """An event, or a whole answer, in vLLM's form; of a growing answer only what is new."""
        items = event if isinstance(event, Sequence) else [event]
        choices, usage = [], {}
        for number, item in enumerate(items):
            choice = int(item.get("index", number))
            meta = item.get("meta_info") or {}
            done = self.seen.get(choice, 0)
            ids = list(item.get("output_ids") or ())
            told = list(meta.get("output_token_logprobs") or ())
            top = list(meta.get("output_top_logprobs") or ())
            self.seen[choice] = len(ids)
            finish = meta.get("finish_reason")
            usage = {
                "prompt_tokens": meta.get("prompt_tokens") or 0,
                "prompt_tokens_details": {"cached_tokens": meta.get("cached_tokens") or 0},
            }
            logprobs = {
                "tokens": [f"token_id:{entry[1]}" for entry in told[done:]],
                "token_logprobs": [entry[0] for entry in told[done:]],
                "top_logprobs": [{f"token_id:{entry[1]}": entry[0] for entry in place or ()} for place in top[done:]],
            }
            kind = finish.get("type") if isinstance(finish, Mapping) else finish
            choices.append({"index": choice, "text": "", "token_ids": ids[done:], "logprobs": logprobs, "finish_reason": kind})
        return {"choices": choices, "usage": usage}


def sampling(sent: Mapping[str, Any]) -> dict[str, Any]:
    """SGLang's `sampling_params` of a body in vLLM's form. SGLang reads top_k -1 as off."""
    found = {name: sent[given] for given, name in SAMPLING.items() if given in sent}
    found["top_k"] = found.get("top_k") or -1
    found["skip_special_tokens"] = True
    if "seed" in sent:
        found["sampling_seed"] = sent["seed"]
    if "logit_bias" in sent:
        found["logit_bias"] = sent["logit_bias"]
    for kind, value in sent.get("structured_outputs", {}).items():
        found |= _constraint(kind, value)
    return found


def _constraint(kind: str, value: Any) -> dict[str, Any]:
    if kind == "json":
        return {"json_schema": json.dumps(value)}
    if kind == "json_object":
        return {"json_schema": '{"type": "object"}'}
    if kind == "choice":
        return {"regex": "|".join(f"({re.escape(text)})" for text in value)}
    return {"regex": value} if kind == "regex" else {"ebnf": value}


def prompt_values(answer: Mapping[str, Any], ids: Sequence[int]) -> list[Scored]:
    """The log-probabilities of a prompt's ids but the first, told as `input_token_logprobs`, with or without the first, and
    the likeliest in their places where `input_top_logprobs` tells them.

    Raises RunError where those told are of other ids.
    """
    meta = answer.get("meta_info") or {}
    told = meta.get("input_token_logprobs") or []
    likeliest = (meta.get("input_top_logprobs") or [])[-len(ids) + 1 :]
    if [entry[1] for entry in told[-len(ids) + 1 :]] != list(ids[1:]):
        raise RunError("the server did not tell the log-probabilities of the prompt that it was sent")
    tops = [[(int(entry[1]), float(entry[0])) for entry in place or ()] for place in likeliest] or [[]] * len(ids)
    return [(float(entry[0]), top) for entry, top in zip(told[-len(ids) + 1 :], tops, strict=False)]

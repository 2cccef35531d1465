"""A response's output items as they grow: reasoning, messages and function calls, and the events that tell of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from swift_core.types import AnswerDelta

from swift_plugin_serve.answers import Scored, logprob_of
from swift_plugin_serve.tokens import Tokens

Event = dict[str, Any]  # `kind`, and the fields of the event


class Items:
    """At most one item is open; a delta of another kind closes it."""

    def __init__(self, ident: Callable[[str], str]) -> None:
        self.items: list[dict[str, Any]] = []
        self._ident = ident
        self._open: str | int | None = None  # "reasoning", "message", or a call's number

    def take(
        self, deltas: Sequence[AnswerDelta], calls: Sequence[str], scored: Sequence[Scored], tokens: Tokens | None
    ) -> list[Event]:
        """Events of some deltas. calls: the ids of the tool calls so far."""
        found: list[Event] = []
        logprobs = [logprob_of(tokens, one) for one in scored] if tokens is not None else []
        for delta in deltas:
            if delta.reasoning:
                found += self._to("reasoning")
                found.append(self._grow("response.reasoning_text.delta", delta.reasoning))
            if delta.content:
                found += self._to("message")
                part = self.items[-1]["content"][0]
                if logprobs:
                    part.setdefault("logprobs", []).extend(logprobs)
                found.append(self._grow("response.output_text.delta", delta.content, logprobs=logprobs))
                logprobs = []
            if delta.call is not None:
                found += self._to(delta.call, calls[delta.call], delta.name)
                if delta.arguments:
                    self.items[-1]["arguments"] += delta.arguments
                    found.append({"kind": "response.function_call_arguments.delta", **self._place(), "delta": delta.arguments})
        return found

    def close(self, status: str = "completed") -> list[Event]:
        """Events that end the open item. An answer without any item is an empty message."""
        found = self._to("message") if not self.items else []
        if self._open is None:
            return found
        item, place = self.items[-1], self._place()
        item["status"] = status
        if isinstance(self._open, int):
            done = {"arguments": item["arguments"], "name": item["name"]}
            found.append({"kind": "response.function_call_arguments.done", **place, **done})
        else:
            part, kind = item["content"][0], "output_text" if self._open == "message" else "reasoning_text"
            more = {"logprobs": part.get("logprobs", [])} if kind == "output_text" else {}
            found.append({"kind": f"response.{kind}.done", **place, "content_index": 0, "text": part["text"], **more})
            found.append({"kind": "response.content_part.done", **place, "content_index": 0, "part": dict(part)})
        found.append({"kind": "response.output_item.done", "output_index": place["output_index"], "item": dict(item)})
        self._open = None
        return found

    def _to(self, kind: str | int, call: str = "", name: str = "") -> list[Event]:
        """Events that close the open item and open one of a kind, where another is open."""
        if self._open == kind:
            return []
        found = self.close() if self._open is not None else []
        self._open = kind
        if isinstance(kind, int):
            item = {"id": self._ident("fc"), "type": "function_call", "call_id": call, "name": name, "arguments": ""}
        elif kind == "message":
            item = {"id": self._ident("msg"), "type": "message", "role": "assistant", "content": []}
        else:
            item = {"id": self._ident("rs"), "type": "reasoning", "summary": [], "content": []}
        item["status"] = "in_progress"
        self.items.append(item)
        copied = {key: list(value) if isinstance(value, list) else value for key, value in item.items()}
        found.append({"kind": "response.output_item.added", "output_index": len(self.items) - 1, "item": copied})
        if not isinstance(kind, int):
            part = {"type": "output_text", "text": "", "annotations": []} if kind == "message" else _THOUGHT
            item["content"].append(dict(part))
            found.append({"kind": "response.content_part.added", **self._place(), "content_index": 0, "part": dict(part)})
        return found

    def _grow(self, kind: str, text: str, **more: Any) -> Event:
        self.items[-1]["content"][0]["text"] += text
        return {"kind": kind, **self._place(), "content_index": 0, "delta": text, **more}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}


_THOUGHT = {"type": "reasoning_text", "text": ""}

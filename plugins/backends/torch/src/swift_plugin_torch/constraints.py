"""Answers that must be of a form: a JSON schema, a regular expression, a choice of texts or a Lark grammar, by llguidance.

A compiled grammar tells at each place which tokens may follow; the sampler leaves no others.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import torch
from swift_core.errors import RequestError, RunError
from swift_core.types import Constraint


class Constraints:
    """Compiles constraints for one tokenizer, which is read once, when the first is asked for."""

    def __init__(self, tokenizer: Any, stops: list[int]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._lock = threading.Lock()
        self._known: Any = None

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher at its beginning. Raises RequestError for a constraint that is malformed or that nothing can satisfy."""
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise RequestError("a constraint needs llguidance: pip install llguidance") from None
        grammar = _grammar(constraint, LLMatcher)
        tokenizer = self._read()
        made = LLMatcher(tokenizer, grammar, log_level=0)
        if made.is_error():
            raise RequestError(f"constraint {constraint.kind}: {_line(made.get_error())}")
        matcher = Matcher(made, constraint.kind, self._stops)
        if not matcher.possible():
            raise RequestError(f"constraint {constraint.kind}: no answer can satisfy it")
        return matcher

    def _read(self) -> Any:
        with self._lock:
            if self._known is None:
                import llguidance.hf

                try:
                    known = llguidance.hf.from_tokenizer(self._tokenizer, eos_token=list(self._stops) or None)
                except Exception as err:
                    raise RequestError(f"constraints need a fast tokenizer that llguidance can read: {_line(err)}") from None
                self._known = known
            return self._known


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, kind: str, stops: list[int]) -> None:
        self._matcher, self._kind = matcher, kind
        self._stops = stops

    def copy(self) -> Matcher:
        return Matcher(self._matcher.deep_copy(), self._kind, self._stops)

    def possible(self) -> bool:
        """Whether any token, or the end, is allowed."""
        return self._matcher.is_accepting() or bool(self._allowed().any())

    def restrict(self, scores: torch.Tensor, stops: frozenset[int]) -> None:
        """Rule out, in place, all tokens of scores [V] that may not follow. Where the form is whole, each of `stops` may."""
        allowed = torch.from_numpy(self._allowed()).to(scores.device)
        count = min(len(allowed), len(scores))
        scores[:count].masked_fill_(~allowed[:count], float("-inf"))
        scores[count:] = float("-inf")  # places of the output layer that are no tokens

    def accept(self, token: int) -> bool:
        """Go on by a token. True where the form is whole and nothing can follow."""
        if not self._matcher.consume_token(token):
            raise RunError(f"constraint {self._kind}: {_line(self._matcher.get_error())}")
        return bool(self._matcher.is_stopped())

    def _allowed(self) -> np.ndarray[Any, Any]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise RunError(f"constraint {self._kind}: {_line(self._matcher.get_error())}")
        return np.unpackbits(bits, bitorder="little").astype(bool)


def _grammar(constraint: Constraint, known: Any) -> str:
    value, kind = constraint.value, constraint.kind
    if kind == "json_object":
        return str(known.grammar_from_json_schema({"type": "object"}))
    if kind == "json_schema":
        if not isinstance(value, (dict, str)):
            raise RequestError(f"constraint json_schema: expected a schema, an object, not {type(value).__name__}")
        try:
            schema = json.loads(value) if isinstance(value, str) else value
            return str(known.grammar_from_json_schema(schema))
        except ValueError as err:
            raise RequestError(f"constraint json_schema: {_line(err)}") from None
    if kind == "choice":
        if not isinstance(value, (list, tuple)) or not value or not all(isinstance(text, str) and text for text in value):
            raise RequestError("constraint choice: expected a list of texts, at least one, none of them empty")
        return str(known.grammar_from_lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)))
    if not isinstance(value, str) or not value:
        raise RequestError(f"constraint {kind}: expected a text, not {value!r}")
    if kind == "regex":
        return str(known.grammar_from_regex(value))
    if kind == "grammar":
        return str(known.grammar_from_lark(value))
    raise RequestError(f"constraint {kind!r} is not known; known: json_schema, json_object, regex, choice, grammar")


def _line(err: Any) -> str:
    """An error on one line, not too long."""
    text = " ".join(str(err).split())
    return text if len(text) <= 300 else text[:297] + "..."

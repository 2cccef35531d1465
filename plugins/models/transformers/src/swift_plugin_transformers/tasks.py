"""Templates of models with a head: `classify`, `tag`, `embed`, `rerank` and `reward`.

A sample is one text or several that belong together, one after the other in `input_ids`; `label` says how long each is and
what it stands for. A batch pads all texts of its samples on the right: N texts of T tokens. Texts that are judged by their last
token can be laid end to end instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from swift_core.errors import RequestError
from swift_core.types import Batch, Row, Sample

from swift_plugin_transformers.collation import collate, pack
from swift_plugin_transformers.config import TaskTemplateConfig

IGNORED = -100  # the label of a token that is none of the task's


class TaskTemplate:
    """What the five share. A subclass says which texts a row holds, what its label is, and whether a text is judged whole."""

    task = ""
    pooled = False
    prefetch = 0

    def __init__(self, processor: Any, config: TaskTemplateConfig) -> None:
        self.tokenizer, self.config = getattr(processor, "tokenizer", processor), config
        self.encoder = getattr(self.tokenizer, "cls_token_id", None) is not None
        pad = [getattr(self.tokenizer, f"{name}_token_id", None) for name in ("pad", "eos")]
        self.pad_id = int(next((token for token in pad if isinstance(token, int)), 0))

    def encode(self, row: Row) -> list[Sample]:
        """One sample with its label. Raises ValueError with the reason to refuse the row, RequestError where its form is none
        of this template's."""
        return [self.sample(row)]

    def sample(self, row: Row, labelled: bool = True) -> Sample:
        """`labelled=False` for inference: a label is neither needed nor read."""
        raise NotImplementedError

    def make(self, texts: Sequence[dict[str, list[int]]], value: Any) -> Sample:
        """A sample of tokenized texts."""
        if not texts or not all(text["input_ids"] for text in texts):
            raise ValueError("the row has no text")
        ids = [token for text in texts for token in text["input_ids"]]
        second = [(text.get("token_type_ids") or [0]).index(1) if 1 in text.get("token_type_ids", ()) else -1 for text in texts]
        label: dict[str, Any] = {"value": value, "lengths": [len(text["input_ids"]) for text in texts]}
        if any(at >= 0 for at in second):
            label["second"] = second
        return Sample(ids, [1.0] * len(ids), label=label, notes=["text cut"] if any(text.get("cut") for text in texts) else [])

    def tokens(self, text: str, pair: str | None = None, special: bool = True, offsets: bool = False) -> dict[str, Any]:
        """Ids of a text or a pair, cut to `max_length` by the tokenizer, which keeps its special tokens."""
        limit, how = self.config.max_length, {"add_special_tokens": special, "return_attention_mask": False}
        how |= {"return_offsets_mapping": True} if offsets else {}
        whole = self.tokenizer(text, pair, **how)
        if limit is None or len(whole["input_ids"]) <= limit:
            return dict(whole)
        return {**self.tokenizer(text, pair, truncation=True, max_length=limit, **how), "cut": True}

    def text(self, messages: Sequence[Row], tools: Any = None) -> dict[str, Any]:
        """A message as it is, a conversation as the checkpoint's chat template renders it."""
        plain = [{**message, "content": content(message)} for message in messages]
        chat = self.config.chat if self.config.chat is not None else len(plain) > 1
        if not chat:
            return self.tokens("\n".join(message["content"] for message in plain))
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("a conversation needs a chat template, and this checkpoint has none; template.chat=false joins it")
        return self.tokens(self.tokenizer.apply_chat_template(plain, tools=tools, tokenize=False), special=False)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """inputs: input_ids, attention_mask [N, T]. targets: `value`, a list with one for each sample, and `lengths`, how many
        texts each has. Packed samples come alone: their texts lie end to end, [1, T]."""
        flat = samples[0] if samples[0].segments else None
        samples = flat.label["samples"] if flat else samples
        texts = [text for sample in samples for text in split(sample)]
        width = max(len(ids) for ids, _ in texts)
        ids, mask = torch.full((len(texts), width), self.pad_id), torch.zeros(len(texts), width, dtype=torch.long)
        types = torch.zeros(len(texts), width, dtype=torch.long)
        for row, (text, second) in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
            if second >= 0:
                types[row, second : len(text)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        tokens = int(mask.sum())
        if flat:
            laid = collate([flat], self.pad_id)
            inputs, ids, mask = laid.inputs, laid.labels, torch.ones_like(laid.labels)
        elif "token_type_ids" in self.tokenizer.model_input_names:
            inputs["token_type_ids"] = types
        values = [sample.label["value"] for sample in samples]
        targets = {"value": values, "lengths": [len(sample.label["lengths"]) for sample in samples]}
        return Batch(
            inputs, ids, mask.float(), [sample.row for sample in samples], self.weigh(values), tokens, tokens, targets=targets
        )

    def weigh(self, values: Sequence[Any]) -> float:
        """What a batch's loss is the sum over."""
        return float(len(values))

    def prompt(self, messages: list[Row], tools: list[Any] | None = None, **kwargs: Any) -> list[int]:
        return list(self.text(messages, tools)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def stop_ids(self) -> list[int]:
        return []

    def pack(self, samples: Sequence[Sample], share: bool | Sequence[int] = False) -> Sample | None:
        """The texts of samples end to end; with `share`, what all texts of a sample begin with once. None where a text is not
        judged by its last token alone, or is a pair whose halves are told apart."""
        if not self.pooled or self.encoder or any("second" in sample.label for sample in samples):
            return None
        texts = [Sample(ids, [0.0] * len(ids)) for sample in samples for ids, _ in split(sample)]
        packed = pack(texts, [len(sample.label["lengths"]) for sample in samples] if share else False)
        packed.label = {"samples": list(samples)}
        return packed

    def number(self, label: Any) -> int:
        """The number of a class, given by name or number."""
        names, count = self.config.labels, self.config.num_labels or len(self.config.labels) or None
        if isinstance(label, str) and label in names:
            return names.index(label)
        if isinstance(label, str) and not re.fullmatch(r"\d+", label):
            known = f"; labels: {', '.join(names)}" if names else "; name the classes in their order: model.labels=[...]"
            raise ValueError(f"label {label!r} is no known class{known}")
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise ValueError(f"label {label!r} is no class: give a name or a number")
        if int(label) < 0:
            raise ValueError(f"label {label} is below 0: classes count from 0")
        if count and int(label) >= count:
            raise ValueError(f"label {label} is not below the number of classes, {count}")
        return int(label)


class Classify(TaskTemplate):
    """`{"text" | "messages" | "query", "document"?, "label"}`: a class, a list of classes, or numbers."""

    task = "sequence_classification"
    pooled = True

    def sample(self, row: Row, labelled: bool = True) -> Sample:
        messages, other = row["messages"], row.get("document")
        text = self.tokens(content(messages[-1]), _string(other, "document")) if other is not None else self.text(
            messages, row.get("tools")
        )  # fmt: skip
        return self.make([text], self.value(row) if labelled else None)

    def value(self, row: Row) -> Any:
        if row.get("label") is None:
            raise RequestError("the row has no 'label'")
        label, problem = row["label"], self.config.problem
        if problem == "multi_label" or (problem is None and isinstance(label, list)):
            if not isinstance(label, list):
                raise ValueError(f"label {label!r}: a list of classes is expected where problem is multi_label")
            return sorted({self.number(item) for item in label})
        if problem == "regression" or (problem is None and isinstance(label, float)):
            numbers = label if isinstance(label, list) else [label]
            return [_number(item, "label") for item in numbers]
        return self.number(label)


class Tag(TaskTemplate):
    """`{"text", "label"}`: a label for each word between blanks, or a list of `[start, end, label]` in characters; what no
    span covers is label 0. Only the first token of a word is labelled; of a span, each."""

    task = "token_classification"

    def sample(self, row: Row, labelled: bool = True) -> Sample:
        text = "\n".join(content(message) for message in row["messages"])
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError("labels of tokens need a fast tokenizer, one with a tokenizer.json")
        encoded = self.tokens(text, offsets=True)
        places = [(a, b) for a, b in encoded["offset_mapping"]]
        value = self.labels(text, places, row.get("label")) if labelled else [0] * len(places)
        sample = self.make([encoded], value)
        sample.weights = [float(label != IGNORED) for label in value]
        sample.text = text
        return sample

    def labels(self, text: str, places: list[tuple[int, int]], label: Any) -> list[int]:
        if not isinstance(label, list):
            raise RequestError("the row has no list 'label': one for each word, or [start, end, label] spans")
        if any(isinstance(item, list) for item in label) or (not label and text):
            return self._spans(text, places, label)
        words = [match.span() for match in re.finditer(r"\S+", text)]
        if len(words) != len(label):
            raise ValueError(f"the row has {len(words)} words and {len(label)} labels")
        found, numbers = [IGNORED] * len(places), [self.number(item) for item in label]
        word = 0
        for n, (start, end) in enumerate(places):
            while word < len(words) and words[word][1] <= start:
                word += 1
            if word < len(words) and start < end and end > words[word][0]:
                found[n] = numbers[word]
                word += 1
        return found

    def _spans(self, text: str, places: list[tuple[int, int]], label: list[Any]) -> list[int]:
        found = [0 if start < end else IGNORED for start, end in places]
        for span in label:
            if not (isinstance(span, list) and len(span) == 3 and all(isinstance(at, int) for at in span[:2])):
                raise ValueError(f"label {span!r}: a span is [start, end, label], in characters")
            if not 0 <= span[0] < span[1] <= len(text):
                raise ValueError(f"label {span!r} lies outside the text, which has {len(text)} characters")
            number = self.number(span[2])
            for n, (start, end) in enumerate(places):
                if start < end and start < span[1] and end > span[0]:
                    found[n] = number
        return found

    def weigh(self, values: Sequence[Any]) -> float:
        return float(sum(label != IGNORED for value in values for label in value))


class Embed(TaskTemplate):
    """`{"query", "positive", "negatives"?}`, or `{"query", "document", "label"}` with how alike the two are."""

    task = "embedding"

    def sample(self, row: Row, labelled: bool = True) -> Sample:
        query = self._text(self.config.query_prefix, content(row["messages"][-1]))
        if not labelled:
            return self.make([query], None)
        documents, value = documents_of(row)
        return self.make([query, *(self._text(self.config.document_prefix, text) for text in documents)], value)

    def _text(self, prefix: str, text: str) -> dict[str, Any]:
        encoded = self.tokens(prefix + text)
        eos = self.tokenizer.eos_token_id
        if self.pooling == "last" and isinstance(eos, int) and encoded["input_ids"][-1:] != [eos]:
            keep = encoded["input_ids"][: self.config.max_length - 1] if self.config.max_length else encoded["input_ids"]
            encoded["input_ids"] = [*keep, eos]  # the same last token for every text: its state is the vector
        return encoded

    @property
    def pooling(self) -> str:
        return self.config.pooling if self.config.pooling != "auto" else ("mean" if self.encoder else "last")

    def vectors(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[N, H] of length 1, from the last states [N, T, H] and the attention mask [N, T]."""
        return torch.nn.functional.normalize(pool(states.float(), mask.to(states.device), self.pooling), dim=-1)


class Rerank(TaskTemplate):
    """`{"query", "positive", "negatives"}`, or `{"query", "document", "label"}` with 1 for a document that answers."""

    task = "reranker"
    pooled = True

    def sample(self, row: Row, labelled: bool = True) -> Sample:
        query = content(row["messages"][-1])
        if not labelled:
            documents, value = [_string(text, "document") for text in _to_score(row)], None
        else:
            documents, value = documents_of(row)
            if value is None and len(documents) < 2:
                raise ValueError("the row has a 'positive' and no 'negatives': nothing to rank it against")
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"label {value:g}: a document's label is from 0, no answer, to 1, an answer")
        return self.make([self._pair(query, document) for document in documents], value)

    def _pair(self, query: str, document: str) -> dict[str, Any]:
        return self.tokens(query, document) if self.encoder else self.tokens(f"Query: {query}\nDocument: {document}")


class Reward(TaskTemplate):
    """`{"messages", "rejected"}`: two conversations, the first of them better, by `margin` where there is one."""

    task = "reward"
    pooled = True

    def sample(self, row: Row, labelled: bool = True) -> Sample:
        conversations = [row["messages"]]
        if labelled:
            if not row.get("rejected"):
                raise RequestError("the row has no 'rejected' conversation")
            conversations.append(row["rejected"])
        texts = [self.text(messages, row.get("tools")) for messages in conversations]
        if labelled and texts[0]["input_ids"] == texts[1]["input_ids"]:
            raise ValueError("the two conversations are the same: neither is better")
        return self.make(texts, _number(row.get("margin", 0.0), "margin") if labelled else None)


TEMPLATES: dict[str, type[TaskTemplate]] = {
    "classify": Classify, "tag": Tag, "embed": Embed, "rerank": Rerank, "reward": Reward,
}  # fmt: skip


def pool(states: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """One vector for each text, [N, H]: of `states` [N, T, H] the mean, the last or the first without padding (on any side)."""
    if how == "mean":
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    steps = torch.arange(mask.shape[1], device=mask.device)
    place = (steps * mask).argmax(1) if how == "last" else mask.argmax(1)
    return states[torch.arange(len(states), device=states.device), place]


def split(sample: Sample) -> list[tuple[list[int], int]]:
    """The texts of a sample: the ids of each, and where the second of a pair begins, or -1."""
    lengths = sample.label["lengths"]
    second, found, at = sample.label.get("second", [-1] * len(lengths)), [], 0
    for length, pair in zip(lengths, second, strict=True):
        found.append((sample.input_ids[at : at + length], pair))
        at += length
    return found


def documents_of(row: Row) -> tuple[list[str], float | None]:
    """A row's documents: the positive before the negatives, without a value; or the one with a value."""
    if row.get("document") is not None:
        if row.get("label") is None:
            raise RequestError("the row has a 'document' and no 'label'")
        return [_string(row["document"], "document")], _number(row["label"], "label")
    positive = row.get("positive")
    if isinstance(positive, list) and len(positive) == 1:
        positive = positive[0]
    if positive is None:
        raise RequestError("the row has no 'positive', and no 'document' with a 'label'")
    negatives = row.get("negatives", row.get("negative")) or []
    negatives = negatives if isinstance(negatives, list) else [negatives]
    return [_string(positive, "positive"), *(_string(text, "negatives") for text in negatives)], None


def _to_score(row: Row) -> list[Any]:
    """The documents of a row without regard to its label: `documents`, `document`, or the positive before the negatives."""
    for key in ("documents", "document"):
        if row.get(key):
            return row[key] if isinstance(row[key], list) else [row[key]]
    if row.get("positive") is None:
        raise ValueError("the row has no 'document' or 'documents' to score")
    return list(documents_of({**row, "document": None})[0])


def content(message: Row) -> str:
    """What a message says. Raises ValueError for media, which heads do not take yet."""
    said = message.get("content") or ""
    if isinstance(said, str):
        return said
    if any(part.get("type") != "text" for part in said):
        raise ValueError("the row has media: models with a head are trained on text")
    return "".join(part["text"] for part in said)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be text")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value}")
    return float(value)

"""Which modules of a model are its language model, vision or audio tower, projector, embeddings, head and experts.

Found by structure: the library's own accessors, and the names that modules of these kinds bear; a family's manifest may name
them itself. language, vision, audio and projector share out all weights; embeddings, head and experts lie within them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from swift_core.errors import RequestError
from torch import nn

WHOLE = ("language", "vision", "audio", "projector")
WITHIN = ("embeddings", "head", "experts")
PARTS = (*WHOLE, *WITHIN)

PROJECTOR = re.compile(
    r"projector|projection$|connector|merger|aligner|resampler|q_?former|abstractor|adapter|adaptor|mlp1$|mlp_AR$|"
    r"embed_(vision|audio)|(image|vision|audio|visual)_(proj|newline|embeds|seperator|separator)|view_sep|query_tokens|"
    r"language_proj|multi_modal|multimodal|modality"
)
VISION = re.compile(r"vision|visual|image|video|vit$|siglip|sam_|^sam$|high_res|^vpm$|vqmodel|vq_?vae|tile_|^img")
AUDIO = re.compile(r"audio|speech|sound|acoustic|semantic_tokenizer|^apm$|whisper|codec")
LANGUAGE = re.compile(r"^(language_model|text_model|llm|decoder|text_decoder|text_backbone|talker)$")
INNER = re.compile(r"merger|projector|projection|connector|aligner|resampler")  # a projector at the end of a tower


@dataclass(frozen=True)
class Parts:
    """Beginnings of module names by part. A weight belongs to the part of the longest one that its name begins with."""

    prefixes: Mapping[str, tuple[str, ...]]
    modules: tuple[str, ...] = ()  # names of all modules and of parameters beside them, for a family's patterns

    @property
    def names(self) -> list[str]:
        return [part for part in PARTS if part in self.prefixes]

    def of(self, name: str) -> set[str]:
        """The parts of a parameter or module, by its name in the plain model or under an adapter."""
        plain = name.removeprefix("base_model.model.")
        found = {part for part in WITHIN if any(_under(plain, prefix) for prefix in self.prefixes.get(part, ()))}
        ranked = [(len(p), part) for part in WHOLE for p in self.prefixes.get(part, ()) if _under(plain, p)]
        return found | ({max(ranked)[1]} if ranked else set())

    def check(self, wanted: Sequence[str], address: str) -> None:
        """Raise RequestError for a part that the model does not have."""
        for part in wanted:
            if part not in self.prefixes:
                raise RequestError(f"{address}: the model has no part {part!r}; its parts: {', '.join(self.names)}")

    def rated(self, groups: list[dict[str, Any]], named: Mapping[str, Any], rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """Parameter groups with `lr_scale` times the rate of each weight's part; a part within another goes before it."""
        self.check(list(rates), "trainer.rates")
        names = {id(parameter): name for name, parameter in named.items()}
        split: list[dict[str, Any]] = []
        used: set[str] = set()
        for group in groups:
            by_rate: dict[float, list[Any]] = {}
            for parameter in group["params"]:
                parts = self.of(names[id(parameter)])
                own = next((part for part in (*WITHIN, *WHOLE) if part in rates and part in parts), None)
                used |= {own} if own else set()
                by_rate.setdefault(rates[own] if own else 1.0, []).append(parameter)
            scale = group.get("lr_scale", 1.0)
            split += [{**group, "params": found, "lr_scale": scale * rate} for rate, found in by_rate.items()]
        if idle := [part for part in rates if part not in used]:
            raise RequestError(f"trainer.rates: nothing of the part {idle[0]!r} is trained; see freeze and the tuner's parts")
        return split

    def overridden(self, patterns: Mapping[str, Sequence[str]]) -> Parts:
        """With a family's own names: beginnings of names, or `re:PATTERN` matched against whole module names."""
        found = dict(self.prefixes)
        for part, given in patterns.items():
            if part not in PARTS:
                raise RequestError(f"parts: {part!r} is none; parts: {', '.join(PARTS)}")
            names = [name for name in self.modules if any(_matches(name, pattern) for pattern in given)]
            outer = [name for name in names if not any(name != other and _under(name, other) for other in names)]
            if outer:
                for other in WHOLE if part in WHOLE else ():  # what structure took for another part
                    found[other] = tuple(name for name in found.get(other, ()) if name not in outer)
                found = {name: places for name, places in found.items() if places} | {part: tuple(outer)}
        return replace(self, prefixes=found)


def find_parts(model: Any, patterns: Mapping[str, Sequence[str]] | None = None) -> Parts:
    """The parts of a transformers model. `patterns` are a family's own (see `Parts.overridden`)."""
    found: dict[str, list[str]] = {}
    decoder = _decoder(model)
    _walk(model, "", decoder, found)
    sees = getattr(getattr(model, "config", None), "vision_config", None) is not None  # by a projector alone, it may be
    if not set(found) & {"vision", "audio"} and not (sees and "projector" in found):  # text alone: all of it
        found = {"language": [""]}
    ends = [("embeddings", "get_input_embeddings"), ("head", "get_output_embeddings")]
    for part, method in ends:
        if name := _name_of(model, _call(model, method)):
            found[part] = [name]
    if "head" not in found and (heads := _heads(model)):
        found["head"] = heads
    experts = [name for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"]
    if experts:
        found["experts"] = experts
    own = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_modules() if name}
    parts = Parts({part: tuple(dict.fromkeys(names)) for part, names in found.items()}, tuple(sorted(own)))
    return parts.overridden(patterns) if patterns else parts


def _walk(module: Any, prefix: str, decoder: Any, found: dict[str, list[str]]) -> None:
    """Give every child of a wrapper its part; a wrapper is what holds the decoder among other things."""
    for name, child in _children(module):
        full = f"{prefix}{name}"
        wraps = isinstance(child, nn.Module) and any(inner is decoder for inner in child.modules() if inner is not child)
        part = _part_by_name(name) or _part_by_input(module, name, child)
        if wraps and name == getattr(module, "base_model_prefix", None):  # the whole bare model, as SpeechT5's
            part = None
        if LANGUAGE.search(name) or (child is decoder and not _holds_media(child)):
            found.setdefault("language", []).append(full)
        elif part is None and (wraps or child is decoder or _holds_media(child)):
            _walk(child, f"{full}.", decoder, found)
        else:
            found.setdefault(part or "language", []).append(full)
            if part in ("vision", "audio"):
                _inner_projectors(child, full, found)


def _part_by_name(name: str) -> str | None:
    """By what a module is called: a projector's name may hold the tower's, so it is asked first."""
    for part, pattern in (("projector", PROJECTOR), ("audio", AUDIO), ("vision", VISION)):
        if pattern.search(name):
            return part
    return None


def _part_by_input(module: Any, name: str, child: Any) -> str | None:
    """By what a tower takes; a nameless `encoder` beside a language model encodes sound where the model hears. That of an
    encoder-decoder may read pictures or sound in place of text."""
    kinds = {"pixel_values": "vision", "flattened_patches": "vision", "input_features": "audio", "input_values": "audio"}
    inputs = getattr(child, "main_input_name", None) if isinstance(child, nn.Module) else None
    if name == "encoder" and hasattr(module, "language_model"):
        hears = any(key.startswith("audio") for key in vars(getattr(module, "config", object)))
        return kinds.get(str(inputs), "audio" if hears else "vision")
    return kinds.get(str(inputs)) if name == "encoder" and hasattr(module, "decoder") else None


def _inner_projectors(tower: Any, prefix: str, found: dict[str, list[str]]) -> None:
    for name, _ in _children(tower):
        if INNER.search(name):
            found.setdefault("projector", []).append(f"{prefix}.{name}")


def _holds_media(module: Any, depth: int = 2) -> bool:
    """Whether a tower lies inside, as in a flat model beside its layers."""
    return any(
        _part_by_name(name) in ("vision", "audio") or (depth > 1 and _holds_media(child, depth - 1))
        for name, child in _children(module)
    )


def _children(module: Any) -> Iterator[tuple[str, Any]]:
    """Submodules and direct parameters."""
    if isinstance(module, nn.Module):
        yield from module.named_children()
        yield from module.named_parameters(recurse=False)


def _decoder(model: Any) -> Any:
    found = _call(model, "get_decoder")
    return None if found is model else found


def _heads(model: Any) -> list[str]:
    """What a classifier has beside its bare model; of a bare model nothing."""
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if base is None:
        return []
    return [name for name, child in model.named_children() if child is not base and any(True for _ in child.parameters())]


def _call(model: Any, method: str) -> Any:
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _name_of(model: Any, wanted: Any) -> str | None:
    return None if wanted is None else next((name for name, module in model.named_modules() if module is wanted), None)


def _under(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _matches(name: str, pattern: str) -> bool:
    return bool(re.fullmatch(pattern[3:], name)) if pattern.startswith("re:") else _under(name, pattern)

"""docs/models.md: which architectures pass which checks, generated from the results of `models verify`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from swift_plugin_verify.results import BESIDE, Row, passes, reasons

TITLES = {"text": "Text generation", "image": "Image and text", "audio": "Audio and text", "folder": "Folders"}
SIGNS = {"pass": "yes", "n/a": "–", "fail": "**no**", "not run": "·"}

HEAD = """# Models

What `swift-core models verify` found with transformers {transformers} and swift-core {swift_core}. Each architecture was built
as a tiny random model, saved under a random name with a tokenizer or processor made locally, and taken through the parts that
a run uses. {beside}. This page is generated: `swift-core models verify --table docs/models.md`.

{counts}

A checkpoint of an architecture that misses a check may still do what you need: the reason says what does not hold.

| check | what holds |
|---|---|
{checks}

yes: it holds. –: the architecture has no such thing. **no**: it does not hold, and the reason stands under the table.
·: not tried, as an earlier check failed.
"""

CHECKS = {
    "build": "a tiny configuration by rule, a random model of it",
    "load": "the saved folder loads by its config.json alone, and every weight is what was saved",
    "mask": "rows render with the chat template; exactly the answers are trained, media tokens aside",
    "head": "log-probabilities of the trained tokens are those of the model's own logits",
    "media": "another image, video or audio changes the logits",
    "tower": "under full tuning the gradient reaches the part that reads the media",
    "lora": "LoRA steps lower the loss on the same batch; the adapter saved and loaded gives the same logits, bit for bit",
    "full": "steps on all weights lower the loss; the folder saved and loaded gives the same logits, bit for bit",
    "merge": "merged, and merged and saved: log-probabilities within 1e-4 of the adapter's (fp32)",
    "generate": "greedy generation with the cache makes the tokens that a loop without it makes",
    "packing": "samples laid end to end give what each gives alone (1e-5); `padded` where the model does not isolate them",
    "recompute": "gradient checkpointing changes no gradient (1e-5)",
}


def counts(rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """By kind: how many pass in full, and how many there are."""
    return {
        kind: (sum(passes(row) for row in rows if row["kind"] == kind), sum(row["kind"] == kind for row in rows))
        for kind in TITLES if any(row["kind"] == kind for row in rows)
    }  # fmt: skip


def page(rows: Sequence[Row], versions: Mapping[str, str], families: Mapping[str, str]) -> str:
    """The whole page. `families`: by architecture, the installed family that lists it."""
    used = [name for name in CHECKS if any(name in row["checks"] for row in rows)]
    lines = [
        f"- {TITLES[kind]}: {good} of {total} architectures pass in full ({good / total:.1%})"
        for kind, (good, total) in counts(rows).items()
    ]
    seconds = sum(row.get("seconds", 0) for row in rows)
    lines.append(f"- {seconds / 60:.0f} minutes of one core in all")
    told = "\n".join(f"| {name} | {CHECKS[name]} |" for name in used)
    parts = [HEAD.format(counts="\n".join(lines), checks=told, beside=_beside(versions), **versions)]
    parts += [_section(kind, [row for row in rows if row["kind"] == kind], families) for kind in counts(rows)]
    return "\n".join(parts)


def _beside(versions: Mapping[str, str]) -> str:
    """Which of the libraries that some architectures need were there."""
    there = [f"{name} {versions[name]}" for name in BESIDE if name in versions]
    lacking = [name for name in BESIDE if name not in versions]
    told = [f"Installed beside: {', '.join(there)}"] if there else []
    told += [f"{'not' if there else 'Not'} installed: {', '.join(lacking)}"] if lacking else []
    return "; ".join(told)


def _section(kind: str, rows: Sequence[Row], families: Mapping[str, str]) -> str:
    rows = sorted(rows, key=lambda row: (row["name"].lower(), row["model_type"]))
    names = [name for name in CHECKS if any(name in row["checks"] for row in rows)]
    lines = [f"## {TITLES[kind]}", "", f"| architecture | model type | family | {' | '.join(names)} |"]
    lines.append("|---" * (3 + len(names)) + "|")
    for row in rows:
        cells = [_sign(row["checks"].get(name)) for name in names]
        lines.append(f"| {row['name']} | {row['model_type']} | {families.get(row['name'], '')} | {' | '.join(cells)} |")
    missing = [row for row in rows if not passes(row)]
    if missing:
        lines += ["", "What does not hold, and why:", ""]
        lines += [f"- {row['name']} ({row['model_type']}): {_plain('; '.join(reasons(row)))}" for row in missing]
    return "\n".join([*lines, ""])


def _sign(check: Mapping[str, str] | None) -> str:
    if check is None:
        return "·"
    padded = check["state"] == "pass" and check["note"].startswith("padded")
    return "padded" if padded else SIGNS[check["state"]]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{char}" if char in "|<>*_`[]" else char for char in text)

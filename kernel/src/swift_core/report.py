"""`report.html`: loss, speed, memory, a trainer's own figures and tables, and the account of the data, from `log.jsonl`."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:56em;margin:2em auto;padding:0 1em;color:#222}table{border-collapse:collapse}"
    "td{padding:.15em 1.5em .15em 0}svg{width:100%;height:auto}h2{margin-top:1.6em}"
)


def write_report(output: Path) -> None:
    """Write `output/report.html` from `output/log.jsonl`."""
    events = []
    for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:  # the half line of a killed process
            continue
    steps = {event["step"]: event for event in events if event["event"] == "step"}  # a resumed run's steps replace the old
    evals = {event["step"]: event["loss"] for event in events if event["event"] == "eval"}
    runs = [event for event in events if event["event"] == "run"]
    summary: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "summary"), {})
    parts = [f"<h1>{html.escape(output.name)}</h1>", _table(summary, skip=("event", "time"))]
    if steps:
        loss = [(step, event["loss"]) for step, event in sorted(steps.items())]
        parts += ["<h2>Loss</h2>", _chart([("training", loss), ("evaluation", sorted(evals.items()))])]
        speed = [(step, event["tokens_per_second"]) for step, event in sorted(steps.items())]
        parts += ["<h2>Tokens a second</h2>", _chart([("tokens/s", speed)])]
        memory = [(step, event["peak_bytes"] / 2**20) for step, event in sorted(steps.items())]
        parts += ["<h2>Peak memory, MiB</h2>", _chart([("MiB", memory)])]
        for name in steps[max(steps)].get("charts", ()):  # further figures that a trainer wants drawn
            drawn = [(step, event[name]) for step, event in sorted(steps.items()) if name in event]
            parts += [f"<h2>{html.escape(name)}</h2>", _chart([("", drawn)])] if drawn else []
    parts += [_grid(table) for table in {event["title"]: event for event in events if event["event"] == "table"}.values()]
    if runs:
        said = dict.fromkeys(html.escape(event["text"]) for event in events if event["event"] in ("note", "warning"))
        notes = "".join(f"<p>{text}</p>" for text in said)  # such as how samples were packed
        parts += ["<h2>Data</h2>", _table(runs[-1]["data"]), notes]
        parts += ["<h2>Plan</h2>", _table(runs[-1]["plan"] | runs[-1]["backend"])]
    head = f"<!doctype html><meta charset=utf-8><title>{html.escape(output.name)}</title><style>{STYLE}</style>"
    (output / "report.html").write_text(head + "\n".join(parts), encoding="utf-8")


def _table(values: dict[str, Any], skip: tuple[str, ...] = ()) -> str:
    def show(value: Any) -> str:
        if isinstance(value, dict):
            return _table(value) if value else "none"
        return html.escape(f"{value:.6g}" if isinstance(value, float) else str(value))

    rows = "".join(f"<tr><td>{html.escape(str(k))}<td>{show(v)}" for k, v in values.items() if k not in skip)
    return f"<table>{rows}</table>"


def _grid(table: dict[str, Any]) -> str:
    """A `table` event, of which the last of each title is shown: title, step, columns, rows."""
    lines = [[html.escape(str(cell)) for cell in row] for row in (table["columns"], *table["rows"])]
    cells = "".join("<tr>" + "".join(f"<td>{cell}" for cell in line) for line in lines)
    return f"<h2>{html.escape(table['title'])}, step {table['step']}</h2><table>{cells}</table>"


def _chart(series: list[tuple[str, list[tuple[float, float]]]]) -> str:
    """Lines of (x, y) points as SVG, each named in its colour."""
    points = [point for _, line in series for point in line]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    width, height = right - left or 1, high - low or 1
    drawn = ""
    for number, (name, line) in enumerate(series):
        colour = ("#1f6feb", "#d1242f")[number]
        path = " ".join(f"{40 + 740 * (x - left) / width:.1f},{190 - 170 * (y - low) / height:.1f}" for x, y in line)
        drawn += f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>' if line else ""
        drawn += f'<text x="{50 + 120 * number}" y="14" fill="{colour}" font-size="12">{name}</text>' if line else ""
    labels = f'<text x="0" y="24" font-size="11">{high:.4g}</text><text x="0" y="192" font-size="11">{low:.4g}</text>'
    return f'<svg viewBox="0 0 800 210">{labels}{drawn}<text x="700" y="208" font-size="11">step {right:.0f}</text></svg>'

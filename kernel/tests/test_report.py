"""The report: a trainer's own figures as charts, its tables, and nothing that is written into the page as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swift_core.events import Event, PlainConsole
from swift_core.report import write_report


def step(number: int, **more: Any) -> dict[str, Any]:
    own = {"event": "step", "step": number, "steps": 3, "loss": 1.0, "tokens_per_second": 5.0, "peak_bytes": 2**20}
    return own | {"learning_rate": 0.1, "seconds_left": 1.0} | more


def test_figures_are_drawn_and_tables_shown(tmp_path: Path) -> None:
    lines = [
        step(1, reward=0.25),
        {"event": "table", "title": "Samples", "step": 1, "columns": ["answer"], "rows": [["early"]]},
        step(2, reward=0.75, charts=["reward", "kl"]),
        {"event": "table", "title": "Samples", "step": 2, "columns": ["answer", "reward"], "rows": [["<b>late</b>", 0.75]]},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    chart = page.split("<h2>reward</h2>")[1].split("<h2>")[0]
    assert (">0.75<" in chart, ">0.25<" in chart, "<h2>kl</h2>" in page) == (True, True, False)
    assert "<h2>Samples, step 2</h2><table><tr><td>answer<td>reward<tr><td>&lt;b&gt;late&lt;/b&gt;<td>0.75</table>" in page
    assert "early" not in page


def test_a_step_says_what_its_trainer_tells() -> None:
    told = PlainConsole().line(Event("step", step(1, told="  reward 0.250")))
    assert told == "step 1/3  loss 1.0000  lr 1.00e-01  5 tokens/s  0:01 left  reward 0.250"

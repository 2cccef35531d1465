"""Prepares a large synthetic jsonl and trains ten steps on it, in a process of its own, and prints rates and peak memory.

    python benchmarks/data/million.py [--rows 1000000] [--workers N] [--stream] [--model FOLDER]

Without `--model` a tiny random Llama with a byte tokenizer stands in. Memory is that of the whole process tree, sampled ten
times a second: `pss` counts what processes share once, `rss` once for each. The second run finds the samples in the cache.
Seconds before the model was loaded hold the start of the program too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gil", "Hana")
THINGS = ("tea", "jam", "lamp", "map", "rope", "bell", "kite", "drum")
PLACES = ("in the tin", "on the shelf", "under the stairs", "by the door", "in the blue box")


def write_rows(path: Path, rows: int) -> None:
    """`rows` short question and answer rows; the same ones each time."""
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            name, thing, place = generator.choice(NAMES), generator.choice(THINGS), generator.choice(PLACES)
            row = {"query": f"{name} {number}: where is the {thing}?", "response": f"The {thing} is {place}."}
            file.write(json.dumps(row) + "\n")


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [pid, *(found for child in children for found in tree(int(child)))]


def memory(pid: int) -> tuple[int, int]:
    """Bytes of a process: its share of what is shared, and all that it maps."""
    pss = rss = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in ("Pss", "Rss"):
                size = int(value.split()[0]) * 1024
                pss, rss = (size, rss) if name == "Pss" else (pss, size)
    except OSError:
        pass
    return pss, rss


def measure(command: list[str], env: dict[str, str]) -> dict[str, float]:
    """Run a command to its end. Returns seconds, and the peak memory of its process tree in bytes."""
    started, peak_pss, peak_rss, most = time.perf_counter(), 0, 0, 0
    process = subprocess.Popen(command, env=env)
    while process.poll() is None:
        found = [memory(pid) for pid in tree(process.pid)]
        peak_pss, peak_rss = max(peak_pss, sum(p for p, _ in found)), max(peak_rss, sum(r for _, r in found))
        most = max(most, len(found))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"the run failed with exit code {process.returncode}")
    return {"seconds": time.perf_counter() - started, "pss": peak_pss, "rss": peak_rss, "processes": most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, help="processes that encode; default: the run's own")
    parser.add_argument("--stream", action="store_true", help="window by window instead of prepared whole")
    parser.add_argument("--model", help="a model's folder or id")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--runs", type=int, default=2, help="1: without the second, which finds the samples in the cache")
    parser.add_argument("--trainer", default="sft")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows = folder / "rows.jsonl"
        write_rows(rows, options.rows)
        model = options.model
        if model is None:
            from swift_plugin_transformers.testing import save_tiny

            model = str(save_tiny(folder / "tiny"))
        command = [
            sys.executable, "-m", "swift_core.cli.main", "train", "--model", model, "--dataset", str(rows),
            "--trainer", options.trainer, f"trainer.max_steps={options.steps}", "bad_rows=skip", "--output",
        ]  # fmt: skip
        extra = ["stream=true"] if options.stream else []
        if options.workers is not None:
            extra.append(f"data_workers={options.workers}")
        env = os.environ | {"SWIFT_CACHE": str(folder / "cache")}
        if options.model and not Path(options.model).is_dir():
            env.pop("SWIFT_CACHE")  # the embedded model lies in the cache
        print(f"{options.rows} rows, {rows.stat().st_size / 2**20:.0f} MiB")
        for name in ("first", "second")[: options.runs]:
            started = time.time()
            done = measure([*command, str(folder / name), *extra], env)
            first = json.loads((folder / name / "log.jsonl").read_text(encoding="utf-8").partition("\n")[0])
            before = first["time"] - started
            rate = "" if options.stream or name == "second" else f", {options.rows / before:.0f} rows/s"
            seconds = f"{done['seconds']:.1f} s, {before:.1f} s of them before the model was loaded{rate}"
            memory_used = f"peak memory {done['pss'] / 2**20:.0f} MiB pss, {done['rss'] / 2**20:.0f} MiB rss"
            print(f"{name} run: {seconds}; {memory_used}, {done['processes']:.0f} processes", flush=True)


if __name__ == "__main__":
    main()

"""Load and faults against `swift-core serve`: many clients, some that vanish, wrong and huge bodies, adapters swapped.

    python -m benchmarks.serve.load [--model DIR] [--clients 200] [--seconds 120] [--swaps 1000] [--json]

Starts a server with a tiny random model and four adapters of it, unless --model names another (then the swaps are left out).
Prints how every request ended, the memory of the server as time goes on, and exits with 1 where a promise is broken. What is
left of the command line goes to `swift-core serve`; engine.prefix_mib=16 stands before it, so that the cache of prompts' states
is full early and what else grows is seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ADAPTERS = ("red", "green", "blue", "black")
FAIR = {200, 429}  # how a good request may end
HUGE = 10 << 20  # characters of the prompt that is too long


@dataclass
class Report:
    """What was seen. `statuses` of good requests, `faults` of those that were to be refused."""

    statuses: Counter[str] = field(default_factory=Counter)
    faults: dict[str, int] = field(default_factory=dict)
    memory: list[float] = field(default_factory=list)  # MiB, sampled evenly over the load
    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)  # seconds to the first token
    swaps: int = 0
    wrong: int = 0
    left: dict[str, float] = field(default_factory=dict)  # running and waiting requests at the end
    exit_code: int | None = None

    def broken(self) -> list[str]:
        """The promises that did not hold."""
        found = [f"{count} requests ended with {name}" for name, count in self.statuses.items() if name not in ("200", "429")]
        wanted = {"malformed": 400, "huge": 400, "vanished": 0, "after": 200}
        found += [f"{name}: status {self.faults.get(name)}" for name, s in wanted.items() if self.faults.get(name, s) != s]
        if self.wrong:
            found.append(f"{self.wrong} of {self.swaps} swaps got another adapter's answer")
        if any(self.left.values()):
            found.append(f"left behind: {self.left}")
        if self.growth() > 0.1:
            found.append(f"memory grew by {self.growth():.0%} from the second quarter of the time to the last")
        if self.exit_code != 0:
            found.append(f"the server ended with code {self.exit_code}")
        return found

    def growth(self) -> float:
        """Of the median memory, from the second quarter of the samples to the last: the first one warms up."""
        quarter = len(self.memory) // 4
        if quarter < 2:
            return 0.0
        second, last = sorted(self.memory[quarter : 2 * quarter]), sorted(self.memory[-quarter:])
        return last[len(last) // 2] / second[len(second) // 2] - 1

    def table(self) -> dict[str, float]:
        """Resident MiB at twelve moments of the load: the median of the samples about each."""
        count, found = len(self.memory) - 1, {}
        for n in range(12):
            part = sorted(self.memory[count * n // 12 : max(count * (n + 1) // 12, count * n // 12 + 1)])
            found[f"{self.seconds * (n + 0.5) / 12:.0f} s"] = part[len(part) // 2]
        return found

    def told(self) -> dict[str, Any]:
        firsts = sorted(self.first) or [0.0]
        return {
            "requests": dict(self.statuses), "faults": self.faults, "tokens_per_second": round(self.tokens / self.seconds, 1),
            "first_token_median": round(firsts[len(firsts) // 2], 3),
            "first_token_p99": round(firsts[int(len(firsts) * 0.99)], 3),
            "memory_mib": {"begin": self.memory[0], "end": self.memory[-1], "highest": max(self.memory),
                           "growth": round(self.growth(), 4)},
            "memory_by_time": self.table(),
            "swaps": self.swaps, "wrong": self.wrong, "left": self.left, "exit_code": self.exit_code, "broken": self.broken(),
        }  # fmt: skip


def make_models(folder: Path) -> tuple[Path, list[Path]]:
    """A tiny random model, and adapters that make it answer each with a letter of its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from swift_plugin_transformers.testing import save_tiny
    from transformers import AutoModelForCausalLM

    base = save_tiny(folder / "tiny", initializer_range=0.3)
    made = []
    for n, name in enumerate(ADAPTERS):
        torch.manual_seed(n)
        targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=64, target_modules=targets)
        )
        for key, value in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(value, std=0.5)
        model.save_pretrained(folder / name)
        made.append(folder / name)
    return base, made


class Server:
    """A `swift-core serve` process."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        command = [sys.executable, "-m", "swift_core.cli.main", "serve", "--port", "0", *map(str, arguments)]
        self.log = folder / "serve.log"
        with self.log.open("wb") as file:
            self.popen = subprocess.Popen(command, stderr=file, stdout=file)
        self.url = self._url().removesuffix("/v1")

    def _url(self) -> str:
        until = time.monotonic() + 300
        while time.monotonic() < until and self.popen.poll() is None:
            for line in self.log.read_text(encoding="utf-8").splitlines():
                if line.startswith("{") and json.loads(line)["event"] == "listening":
                    return str(json.loads(line)["url"])
            time.sleep(0.1)
        raise SystemExit(f"the server did not start:\n{self.log.read_text(encoding='utf-8')[-3000:]}")

    def memory(self) -> float:
        """Resident MiB."""
        pages = int(Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20), 1)

    def end(self) -> int:
        self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(60)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return self.popen.wait()


def body(model: str, text: str, tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_completion_tokens": tokens, **more}


async def client_loop(http: httpx.AsyncClient, model: str, seed: int, until: float, report: Report) -> None:
    """One client: streams an answer, then the next; after 429 it waits as it is told."""
    draw = random.Random(seed)
    while time.monotonic() < until:
        started, status = time.monotonic(), "no answer"
        ask = body(model, "word " * draw.randint(1, 40), draw.randint(8, 48), stream=True)
        try:
            async with http.stream("POST", "/v1/chat/completions", json=ask) as answer:
                status, done = str(answer.status_code), False
                wait = float(answer.headers.get("retry-after", 0))
                async for line in answer.aiter_lines():
                    if line.startswith("data: [DONE]"):
                        done = True
                    elif line.startswith('data: {"error"'):
                        status = "error event: " + line[:200]
                    elif '"content":"' in line and '"content":""' not in line:
                        report.tokens += 1
                        if started:
                            report.first.append(time.monotonic() - started)
                            started = 0.0
                if status == "200" and not done:
                    status = "cut short"
        except httpx.HTTPError as err:
            status, wait = type(err).__name__, 0.0
        report.statuses[status] += 1
        if wait:
            await asyncio.sleep(min(wait, 5) * draw.uniform(0.5, 1.5))


async def vanish(http: httpx.AsyncClient, model: str, until: float) -> int:
    """Begin answers and go away; how many."""
    count = 0
    while time.monotonic() < until:
        try:
            async with (
                asyncio.timeout(0.5),
                http.stream("POST", "/v1/chat/completions", json=body(model, "a long story", 400, stream=True)) as answer,
            ):
                async for _ in answer.aiter_lines():
                    break
        except (httpx.HTTPError, TimeoutError):
            pass
        count += 1
        await asyncio.sleep(1)
    return count


async def watch(server: Server, until: float, report: Report) -> None:
    while time.monotonic() < until:
        report.memory.append(server.memory())
        await asyncio.sleep(0.5)


async def wrong_bodies(http: httpx.AsyncClient, model: str, report: Report) -> None:
    json_type = {"Content-Type": "application/json"}
    answer = await http.post("/v1/chat/completions", content=b'{"model": "tiny", "messages": [', headers=json_type)
    report.faults["malformed"] = answer.status_code
    answer = await http.post("/v1/chat/completions", json=body(model, "a b " * (HUGE // 4), 4))
    report.faults["huge"] = answer.status_code


async def swap(http: httpx.AsyncClient, count: int, report: Report) -> None:
    """Requests that each ask another adapter than the one before, 16 at a time; each answer is compared."""
    ask = {"temperature": 0}
    wanted = {}
    for name in ADAPTERS:
        answer = await http.post("/v1/chat/completions", json=body(name, "Who?", 12, **ask))
        wanted[name] = answer.json()["choices"][0]["message"]["content"]
    assert len(set(wanted.values())) == len(ADAPTERS), f"the adapters answer alike: {wanted}"
    gate = asyncio.Semaphore(16)

    async def one(n: int) -> None:
        name = ADAPTERS[n % len(ADAPTERS)]
        async with gate:
            answer = await http.post("/v1/chat/completions", json=body(name, "Who?", 12, **ask))
        report.swaps += 1
        if answer.status_code != 200 or answer.json()["choices"][0]["message"]["content"] != wanted[name]:
            report.wrong += 1

    await asyncio.gather(*(one(n) for n in range(count)))


async def load(server: Server, model: str, clients: int, seconds: float, swaps: int) -> Report:
    """All of it, one after the other; the wrong bodies and the vanishing client come during the load."""
    report = Report()
    limits = httpx.Limits(max_connections=clients + 20, max_keepalive_connections=clients + 20)
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as http,
        httpx.AsyncClient(base_url=server.url, timeout=300) as rude,  # its connections break off
    ):
        started = time.monotonic()
        until = started + seconds
        loops = [client_loop(http, model, n, until, report) for n in range(clients)]
        gone, *_ = await asyncio.gather(
            vanish(rude, model, until), watch(server, until, report), wrong_bodies(http, model, report), *loops
        )
        report.seconds = time.monotonic() - started
        if swaps:
            await swap(http, swaps, report)
        answer = await http.post("/v1/chat/completions", json=body(model, "Still there?", 4))
        report.faults |= {"after": answer.status_code, "clients_vanished": gone}
        for _ in range(100):
            health = (await http.get("/health")).json()
            report.left = {"running": health["running"], "waiting": health["waiting"]}
            if not any(report.left.values()):
                break
            await asyncio.sleep(0.1)
        report.memory.append(server.memory())
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Load and faults against swift-core serve.")
    parser.add_argument("--model", help="a model; default: a tiny random one with four adapters")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    args, rest = parser.parse_known_args()  # what is left goes to `swift-core serve`
    with tempfile.TemporaryDirectory() as scratch:
        folder, extra = Path(scratch), []
        model = args.model
        if model is None:
            model, adapters = make_models(folder)
            extra = [item for name, path in zip(ADAPTERS, adapters, strict=True) for item in ("--adapter", f"{name}={path}")]
        small = [] if args.model else ["engine.prefix_mib=16"]
        server = Server(folder, "--model", model, "--name", "tiny", *extra, *small, *rest)
        try:
            report = asyncio.run(load(server, "tiny", args.clients, args.seconds, 0 if args.model else args.swaps))
        finally:
            code = server.end()
        report.exit_code = code
    told = report.told()
    print(json.dumps(told) if args.json else "\n".join(f"{key}: {value}" for key, value in told.items()))
    sys.exit(1 if report.broken() else 0)


if __name__ == "__main__":
    main()

"""What /metrics tells Prometheus: requests, tokens, times, and how full the server is."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from swift_plugin_serve.admission import Admission

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """A registry of its own, so that a process may hold several servers."""

    def __init__(self, admission: Admission) -> None:
        own = self.registry = CollectorRegistry()
        ProcessCollector(registry=own)
        self.requests = Counter("swift_requests", "Requests answered", ["path", "status"], registry=own)
        self.seconds = Histogram("swift_request_seconds", "From arrival to last byte", ["path"], buckets=SECONDS, registry=own)
        self.first = Histogram("swift_first_token_seconds", "From arrival to the first token", buckets=SECONDS, registry=own)
        self.prompt_tokens = Counter("swift_prompt_tokens", "Tokens of prompts", ["model"], registry=own)
        self.cached_tokens = Counter("swift_cached_prompt_tokens", "Of them, taken from a cache", ["model"], registry=own)
        self.answer_tokens = Counter("swift_generated_tokens", "Tokens generated", ["model"], registry=own)
        self.drafted_tokens = Counter("swift_drafted_tokens", "Tokens guessed and checked", ["model"], registry=own)
        self.accepted_tokens = Counter("swift_accepted_tokens", "Of them, those that were right", ["model"], registry=own)
        self.cancelled = Counter("swift_cancelled_requests", "Requests whose client went away", registry=own)
        self.faults = Counter("swift_engine_faults", "Errors of the engine", registry=own)
        running = Gauge("swift_running_requests", "Requests that the engine works on", registry=own)
        running.set_function(lambda: admission.running)
        waiting = Gauge("swift_waiting_requests", "Requests that wait for the engine", registry=own)
        waiting.set_function(lambda: admission.waiting)

    def text(self) -> bytes:
        return generate_latest(self.registry)

"""What /metrics shows, in Prometheus' text form: requests, tokens, waiting times, memory. Knows no request's content."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

from neox_lite.version import __version__

from .engine import Engine, NotLoaded
from .jobs import Ticket

ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/login")
FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts of one server; its gauges are read from the engine when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)

        def make(kind: Any, name: str, help: str, **more: Any) -> Any:
            return kind(f"neox_lite_{name}", help, registry=self._registry, **more)

        self.requests = make(Counter, "requests", "Answered requests", labelnames=("route", "status"))
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens of prompts")
        self.reused_tokens = make(Counter, "reused_tokens", "Tokens of prompts that were in the KV cache")
        self.new_tokens = make(Counter, "completion_tokens", "Generated tokens")
        self.first_s = make(Histogram, "time_to_first_token_seconds", "From a job to its first token", buckets=FIRST_S)
        self.between_s = make(Histogram, "time_between_tokens_seconds", "Between two tokens", buckets=BETWEEN_S)

    def collect(self) -> Iterator[GaugeMetricFamily | InfoMetricFamily]:
        """The gauges; prometheus_client calls this."""
        status = self._engine.status()
        for name, help, value in (
            ("sequences_active", "Sequences being generated", status.active),
            ("jobs_waiting", "Jobs in the queue", status.waiting),
            ("tokens_per_second", "New tokens of all sequences, over the last seconds", status.tokens_per_s),
            ("kv_cache_tokens", "Tokens in the KV cache", status.cached_tokens),
        ):
            yield GaugeMetricFamily(f"neox_lite_{name}", help, value=value)
        memory = GaugeMetricFamily("neox_lite_memory_bytes", "Memory in use", labels=("tier",))
        for tier, size in status.memory.items():
            memory.add_metric((tier,), size)
        yield memory
        info = {"version": __version__, "name": status.name or "", "state": status.state, "context": self._context()}
        yield InfoMetricFamily("neox_lite_model", "The model that is served", value=info)

    def _context(self) -> str:
        try:
            return str(self._engine.context)
        except NotLoaded:
            return ""

    def token(self, ticket: Ticket, last_s: float | None) -> float:
        """Count a new token and what it waited for; last_s: when the one before it came. Returns when this one did."""
        now = time.monotonic()
        self.new_tokens.inc()
        if last_s is None:
            self.first_s.observe(now - ticket.clock.start_s)
            self.prompt_tokens.inc(len(ticket.job.prompt))
            self.reused_tokens.inc(ticket.reused_tokens)
        else:
            self.between_s.observe(now - last_s)
        return now

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def answered(self, path: str, status: int) -> None:
        """Count an answer. Routes that are not ours share one name."""
        self.requests.labels(path if path in ROUTES else "other", str(status)).inc()

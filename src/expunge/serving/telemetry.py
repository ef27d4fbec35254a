"""Counts and times for Prometheus; no label holds a word of a request, a target or a client."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from expunge.guards.decoding import Answer
from expunge.guards.policy import Plan

_TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Telemetry:
    """Metrics of one server, with a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("expunge_requests", "Requests by route and status", ["route", "status"], registry=self.registry)
        self.outcomes = Counter("expunge_answers", "Answers by how they ended", ["finish"], registry=self.registry)
        self.fired = Counter("expunge_guard_fired", "Requests on which a guard acted", ["guard", "hook"], registry=self.registry)
        self.failed = Counter("expunge_guard_failed", "Failures of guards", ["guard"], registry=self.registry)
        self.guarding = Histogram(
            "expunge_guard_seconds", "Time spent by guards for one request", ["hook"], buckets=_TIMES, registry=self.registry
        )
        self.seconds = Histogram(
            "expunge_request_seconds", "Time for one answer", ["route"], buckets=_TIMES, registry=self.registry
        )
        self.tokens = Counter("expunge_tokens", "New tokens", registry=self.registry)
        self.batches = Histogram(
            "expunge_batch_size", "Requests answered together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.targets = Gauge("expunge_targets", "Targets that are hidden", registry=self.registry)
        self.unhidden = Gauge("expunge_targets_open", "Targets that no guard can take in", registry=self.registry)
        self.running = Gauge("expunge_running", "Requests that are being answered", registry=self.registry)

    def answered(self, route: str, plan: Plan, answer: Answer, seconds: float) -> None:
        """Count an answer."""
        self.outcomes.labels(answer.finish).inc()
        self.tokens.inc(answer.tokens)
        self.seconds.labels(route).observe(seconds)
        for row, hook in {(f.row, f.hook) for f in plan.fired}:
            self.fired.labels(row, hook).inc()
        for row in {row for row, _ in plan.failed}:
            self.failed.labels(row).inc()
        for hook, spent in plan.seconds.items():
            self.guarding.labels(hook).observe(spent)

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

"""Figures for Prometheus. No text, no hash and no id is ever a label: labels are few and known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from guardtrain.serve.gate import Judged
    from guardtrain.serve.guard import Guard

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Everything that one server counts, in a registry of its own."""

    def __init__(self, guard: Guard) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_OfGuard(guard))
        self.requests = self._counter("requests", "Requests that were answered.", "endpoint", "status")
        self.request_seconds = self._histogram("request_seconds", "From a request to its whole answer.", "endpoint")
        self.check_seconds = self._histogram("check_seconds", "From a text to its verdict.", "mode")
        self.verdicts = self._counter("verdicts", "Texts that were judged.", "decision", "status")
        self.failures = self._counter("failures", "Texts without a verdict.", "failure")
        self.failed_open = self._counter("failed_open", "Texts that passed without a verdict.", "failure")
        self.shadowed = self._counter("shadow_passed", "Texts that shadow mode let pass.")
        self.refused_keys = self._counter("refused_keys", "Requests with a wrong key or none.")
        self.upstream_failures = self._counter("upstream_failures", "Answers that the upstream did not give.", "code")
        self.clients_gone = self._counter("clients_gone", "Clients that hung up before their answer.")
        self.in_flight = Gauge("guardtrain_in_flight", "Requests being answered.", registry=self.registry)

    def count(self, judged: Judged, *, is_shadow: bool) -> None:
        """One judged text."""
        verdict = judged.verdict
        self.verdicts.labels(verdict.decision or "none", verdict.status).inc()
        self.check_seconds.labels(verdict.mode or "default").observe(verdict.latency_ms / 1000)
        if verdict.failure is not None:
            self.failures.labels(verdict.failure).inc()
        if verdict.failure is not None and judged.failed_open:
            self.failed_open.labels(verdict.failure).inc()
        if is_shadow and judged.blocks:
            self.shadowed.inc()

    def shown(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"guardtrain_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, *labels: str) -> Histogram:
        return Histogram(f"guardtrain_{name}", what, labels, buckets=SECONDS, registry=self.registry)


class _OfGuard(Collector):
    """What the guard itself counts, read when somebody looks."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("guardtrain_ready", "Whether the model would answer now.", float(self.guard.is_ready))
        yield GaugeMetricFamily("guardtrain_queue_depth", "Texts that wait for the model.", float(self.guard.queue_depth))
        yield CounterMetricFamily("guardtrain_cache_hits", "Verdicts that were known.", value=float(self.guard.cache_hits))
        yield CounterMetricFamily(
            "guardtrain_model_restarts", "Times the model was started anew.", value=float(self.guard.restarts)
        )

"""Figures of a service as Prometheus reads them: requests, plans, jobs, workers, and the process itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)


class _Read(Collector):
    """What is looked up when the figures are asked for."""

    def __init__(self, jobs: Callable[[], Mapping[str, int]], workers: Callable[[], int]) -> None:
        self._jobs, self._workers = jobs, workers

    def collect(self) -> Iterator[Metric]:
        """Jobs by status, and workers that live."""
        jobs = GaugeMetricFamily("isochunk_jobs", "Jobs by status.", labels=["status"])
        for status, count in self._jobs().items():
            jobs.add_metric([status], count)
        yield jobs
        yield GaugeMetricFamily("isochunk_workers", "Workers that live.", value=self._workers())


class Metrics:
    """The figures of one service.

    jobs: how many there are of each status. workers: how many live. plans: how many are being made or wait.
    """

    def __init__(
        self, *, jobs: Callable[[], Mapping[str, int]], workers: Callable[[], int], plans: Callable[[], int]
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(_Read(jobs, workers))
        self._requests = Counter(
            "isochunk_http_requests", "Requests answered.", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "isochunk_http_request_seconds",
            "Seconds from a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        waiting = Gauge("isochunk_plans_waiting", "Plans that are being made or wait.", registry=self._registry)
        waiting.set_function(plans)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self._registry)

"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response

from usmlite.serve.batching import Step

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_WINDOWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "usmlite_requests", "Requests by what they asked for and how they were answered.",
            ["endpoint", "status"], registry=registry,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "usmlite_request_seconds", "From the first byte of a request to the last of its answer.",
            ["endpoint"], buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.audio_seconds = Counter(
            "usmlite_audio_seconds", "Seconds of audio transcribed, live audio included.", registry=registry
        )
        self.step_windows = Histogram(
            "usmlite_step_windows", "Windows of audio decoded side by side.", buckets=_WINDOWS,
            registry=registry,
        )  # fmt: skip
        self.model_seconds = Counter(
            "usmlite_model_seconds", "Seconds that the model was at work.", registry=registry
        )

    def watch(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A figure that is asked for when somebody looks."""
        Gauge(f"usmlite_{name}", help_text, registry=self._registry).set_function(value)

    def step(self, step: Step) -> None:
        """Counts a step of the model."""
        if step.windows:
            self.step_windows.observe(step.windows)
            self.model_seconds.inc(step.seconds)

    def response(self) -> Response:
        """All figures in Prometheus's text format."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

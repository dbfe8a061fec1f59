"""What a server counts, for Prometheus; every application has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The server's counters, as /metrics shows them under ``mechanex_``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        here = self.registry
        self.requests = Counter(
            "mechanex_requests", "HTTP requests answered.", ("path", "status"), registry=here
        )
        self.request_seconds = Histogram(
            "mechanex_request_seconds",
            "From a request to the end of its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=here,
        )
        self.prompt_tokens = Counter("mechanex_prompt_tokens", "Prompt tokens read.", registry=here)
        self.completion_tokens = Counter("mechanex_completion_tokens", "Tokens chosen.", registry=here)
        self.answers = Counter(
            "mechanex_answers", "Answers ended, by the reason.", ("reason",), registry=here
        )
        self.first_token_seconds = Histogram(
            "mechanex_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=here,
        )
        self.batch_rows = Histogram(
            "mechanex_batch_rows",
            "Rows of a decoding step.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=here,
        )
        self.model_seconds = Counter(
            "mechanex_model_seconds", "Time in the model, by the kind of pass.", ("kind",), registry=here
        )
        self.steering_seconds = Counter(
            "mechanex_steering_seconds", "Time in steering, part of the model's.", registry=here
        )

    def watch(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """Shows a number that is read when asked for."""
        Gauge(f"mechanex_{name}", meaning, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

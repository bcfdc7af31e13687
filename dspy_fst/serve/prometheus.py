"""The metrics that Prometheus reads at /metrics. Two apps in one process have separate metrics."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dspy_fst.serve.admission import AdmissionQueue

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Metrics of one app. Its gauges read the admission queue at each scrape."""

    def __init__(self, queue: AdmissionQueue):
        registry = self.registry = CollectorRegistry()
        self._requests = Counter(
            "dspy_fst_requests", "Requests by endpoint and HTTP status.", ["endpoint", "status"], registry=registry
        )
        self._seconds = Histogram(
            "dspy_fst_request_seconds",
            "Time from a request's arrival to the end of its reply, by endpoint.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._errors = Counter(
            "dspy_fst_errors",
            "Errors by code. invalid_api_key, too_large, queue_full, not_ready, draining were refused before any work.",
            ["type"],
            registry=registry,
        )
        self._tokens = Counter(
            "dspy_fst_tokens",
            "Tokens of the trained model, read (prompt) or sampled (completion).",
            ["kind"],
            registry=registry,
        )
        for name, help, read in (
            (
                "dspy_fst_in_flight",
                "Slots taken by requests at work, or by threads that outlive their request.",
                queue.at_work,
            ),
            ("dspy_fst_queue", "Requests that wait for a slot.", queue.waiting),
            (
                "dspy_fst_overdue",
                "Slots taken by threads whose request timed out or whose caller left.",
                queue.overdue,
            ),
        ):
            Gauge(name, help, registry=registry).set_function(read)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def error(self, code: str) -> None:
        self._errors.labels(code).inc()

    def tokens(self, prompt: int, completion: int) -> None:
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)

    def page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

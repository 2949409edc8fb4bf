"""What a gateway worker counts, in a Prometheus registry of its own.

Each worker is its own process and labels its series with `worker`; a scrape is answered by the worker it reaches.
"""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_FIRST_TOKEN_BUCKETS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The counters of one worker."""

    def __init__(self, worker: int) -> None:
        self._registry = CollectorRegistry()
        label = ("worker",)
        value = str(worker)
        self._runs = Counter("onebox_runs", "Runs by task and end.", (*label, "task", "state"), registry=self._registry)
        self._errors = Counter("onebox_errors", "Errors sent, by code.", (*label, "code"), registry=self._registry)
        self._routes = Counter(
            "onebox_routes", "Routes by deciding tier and task.", (*label, "tier", "task"), registry=self._registry
        )
        self._tokens = Counter("onebox_tokens", "Tokens by kind.", (*label, "kind"), registry=self._registry)
        self._continuations = Counter(
            "onebox_engine_continuations",
            "Replies that went on at another replica, by what happened to their own.",
            (*label, "reason"),
            registry=self._registry,
        )
        self._worker = value
        self.running = Gauge("onebox_runs_running", "Runs at work.", label, registry=self._registry).labels(value)
        self.takeovers = Counter(
            "onebox_runs_taken_over", "Runs continued after their worker was lost.", label, registry=self._registry
        ).labels(value)
        self.first_token_s = Histogram(
            "onebox_first_token_seconds",
            "Seconds from a run's acceptance to its first text.",
            label,
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=self._registry,
        ).labels(value)

    def count_run(self, task: str, state: str, prompt_tokens: int, completion_tokens: int) -> None:
        """A run ended."""
        self._runs.labels(self._worker, task, state).inc()
        self._tokens.labels(self._worker, "prompt").inc(prompt_tokens)
        self._tokens.labels(self._worker, "completion").inc(completion_tokens)

    def count_error(self, code: str) -> None:
        """An error left for a client."""
        self._errors.labels(self._worker, code).inc()

    def count_route(self, tier: str, task: str) -> None:
        """The router decided."""
        self._routes.labels(self._worker, tier, task).inc()

    def count_continuation(self, reason: str) -> None:
        """A reply went on at another replica."""
        self._continuations.labels(self._worker, reason).inc()

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)

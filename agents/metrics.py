"""What a gateway worker counts, for Prometheus; docs/observability.md lists every name.

Names are `onebox_<part>_<what>[_<unit>][_total]`. Nothing is counted per token: what a reply costs is added at its end.
Whether a worker has these numbers for itself or shares them with its siblings is `agents.shared_metrics`.
"""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from agents.shared_metrics import Place

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_REPLY_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_RUN_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_STEP_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """The counters of one worker. With a `place`, taken before, they add to its siblings', and it shows the sum."""

    def __init__(self, place: Place | None = None) -> None:
        own = CollectorRegistry()
        self._scraped = own if place is None else place.registry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"onebox_{name}", about, labels, registry=own)

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(f"onebox_{name}", about, registry=own, multiprocess_mode="livesum")

        def histogram(name: str, about: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"onebox_{name}", about, labels, buckets=buckets, registry=own)

        self._requests = counter("gateway_requests", "HTTP requests by route and status.", "method", "route", "status")
        self._first_byte = histogram(
            "gateway_first_byte_seconds", "Seconds from a request to its status line.", _REPLY_S, "route"
        )
        self._errors = counter("gateway_errors", "Errors sent to clients, by code.", "code")
        self.open_requests = gauge("gateway_requests_open", "HTTP requests being answered.")

        self._runs = counter("runs_ended", "Runs by task and end.", "task", "state")
        self._run_s = histogram("runs_seconds", "Seconds from a run's start to its stored end.", _RUN_S, "task")
        self._first_token_s = histogram(
            "runs_first_token_seconds", "Seconds from a run's acceptance to its first text.", _REPLY_S, "task"
        )
        self._tokens = counter("runs_tokens", "Tokens of ended runs.", "task", "kind")
        self.running = gauge("runs_running", "Runs at work.")
        self._continued = counter(
            "runs_continued", "Replies that went on at another replica, by what happened to their own.", "reason"
        )
        self._away = counter("models_away", "Times one of several models was found not to answer.", "model")
        self.takeovers = counter("runs_taken_over", "Runs continued after their worker was lost.")

        self._decisions = counter("router_decisions", "Routes by deciding tier and task.", "tier", "task")
        self._decision_s = histogram("router_decision_seconds", "Seconds to a route, by tier.", _STEP_S, "tier")

        self.admission_waiting = gauge("admission_waiting", "Runs that wait for a place at an engine.")
        self.admission_wait_s = histogram("admission_wait_seconds", "Seconds a run waited for a place.", _RUN_S)
        self._refusals = counter("admission_refusals", "Runs refused, by whose limit it was.", "limit")

        self._plugin_runs = counter("plugin_runs", "Executions of plugins by how they ended.", "plugin", "end")
        self._plugin_s = histogram("plugin_seconds", "Seconds of work of a plugin, by plugin.", _RUN_S, "plugin")

        self._store_s = histogram("store_seconds", "Seconds of a round trip to the store.", _STEP_S, "operation")
        self._store_failures = counter("store_failures", "Round trips the store did not answer.", "operation")

    def count_request(self, method: str, route: str, status: int, first_byte_s: float | None) -> None:
        """A request was answered, or its client left; `first_byte_s` where an answer had begun."""
        self._requests.labels(method, route, str(status)).inc()
        if first_byte_s is not None:
            self._first_byte.labels(route).observe(first_byte_s)

    def count_error(self, code: str) -> None:
        """An error left for a client."""
        self._errors.labels(code).inc()

    def count_run(self, task: str, state: str, prompt_tokens: int, completion_tokens: int, seconds: float) -> None:
        """A run ended."""
        self._runs.labels(task, state).inc()
        self._run_s.labels(task).observe(seconds)
        self._tokens.labels(task, "prompt").inc(prompt_tokens)
        self._tokens.labels(task, "completion").inc(completion_tokens)

    def count_first_token(self, task: str, seconds: float) -> None:
        """A run has its first text."""
        self._first_token_s.labels(task).observe(seconds)

    def count_route(self, tier: str, task: str, seconds: float) -> None:
        """The router decided."""
        self._decisions.labels(tier, task).inc()
        self._decision_s.labels(tier).observe(seconds)

    def count_refusal(self, limit: str) -> None:
        """A run was refused: the `tenant` has its share, or the `queue` is full."""
        self._refusals.labels(limit).inc()

    def count_plugin(self, plugin: str, end: str, seconds: float) -> None:
        """A plugin's work ended: `ok`, `failed` or `stopped`."""
        self._plugin_runs.labels(plugin, end).inc()
        self._plugin_s.labels(plugin).observe(seconds)

    def count_continuation(self, reason: str) -> None:
        """A reply went on at another replica."""
        self._continued.labels(reason).inc()

    def count_away(self, model: str) -> None:
        """One of several models does not answer; others stand in for it."""
        self._away.labels(model).inc()

    def count_store(self, operation: str, seconds: float, failed: bool) -> None:
        """A round trip to the store ended."""
        self._store_s.labels(operation).observe(seconds)
        if failed:
            self._store_failures.labels(operation).inc()

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._scraped)

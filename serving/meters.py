"""The Prometheus metrics of one engine replica, in a registry of their own; the engine's own come beside them."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.roster import Load


class Meters:
    """What a replica counts. `load` is asked how much there is to do at the moment."""

    def __init__(self, load: Callable[[], Load]) -> None:
        self._registry = registry = CollectorRegistry()

        def gauge(name: str, about: str, of: Callable[[Load], float]) -> None:
            Gauge(f"onebox_engine_{name}", about, registry=registry).set_function(lambda: of(load()))

        gauge("running", "Requests being answered", lambda now: now.running)
        gauge("waiting", "Requests that wait for the engine", lambda now: now.waiting)
        gauge("capacity", "Requests it works on at a time", lambda now: now.capacity)
        gauge("kv_use_ratio", "Share of the KV cache in use", lambda now: now.kv_use)
        gauge("held_tokens", "Tokens of the prompts and replies at work", lambda now: now.tokens)
        gauge("draining", "1 while it leaves the fleet", lambda now: now.draining)
        self.aborted = Counter("onebox_engine_aborted", "Replies whose reader left", registry=registry)
        self.tokens = Counter("onebox_engine_tokens", "Tokens sent", registry=registry)
        self.finished = Counter("onebox_engine_finished", "Whole replies by reason", ["finish"], registry=registry)
        self.failed = Counter("onebox_engine_failed", "Errors answered by code", ["code"], registry=registry)
        self.first_frame = Histogram(
            "onebox_engine_first_frame_seconds",
            "Time to the first frame",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=registry,
        )

    def text(self) -> bytes:
        """All of them in Prometheus text format."""
        return generate_latest(self._registry)

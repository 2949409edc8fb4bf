"""`make bench ARGS=metrics`: what it costs a gateway worker to be watched, per run and not per token.

Each kind of worker is a process of its own; the numbers are medians of rounds in it, kinds interleaved.
"""

import io
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Final

from tests.bench.report import table, write_section

ROUNDS: Final = 9
TIMES: Final = 2000
KINDS: Final = ("alone", "shared", "traced")


async def main() -> None:
    """Measure and write the section."""
    with tempfile.TemporaryDirectory() as folder:
        pools = {kind: ProcessPoolExecutor(1, get_context("spawn")) for kind in KINDS}
        rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(ROUNDS):
            for kind, pool in pools.items():
                rounds[kind].append(pool.submit(measure, kind, folder).result())
        for pool in pools.values():
            pool.shutdown()
    rows = [
        (name, *(f"{median(each[name] for each in rounds[kind]):.2f}" for kind in KINDS)) for name in rounds["alone"][0]
    ]
    text = table(("µs", "a worker alone", "workers that share", "with tracing on"), rows)
    write_section("metrics", "What being watched costs", text)


def measure(kind: str, folder: str) -> dict[str, float]:
    """Microseconds of each thing in this process, which stays the same kind of worker."""
    from agents.metrics import Metrics
    from agents.otel import OtelTracer
    from agents.shared_metrics import Place
    from agents.tracing import NO_TRACER
    from onebox import logs

    state = sys.modules[__name__].__dict__
    if "metrics" not in state:
        place = Place(Path(folder), 0)
        if kind == "shared":
            place.take()
        state["metrics"] = Metrics(place if kind == "shared" else None)
        # Nobody listens there: spans are made, queued and dropped.
        state["tracer"] = OtelTracer("http://127.0.0.1:9/v1/traces") if kind == "traced" else NO_TRACER
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    metrics, tracer = state["metrics"], state["tracer"]

    def run() -> None:
        metrics.running.inc()
        metrics.count_route("head", "write", 0.004)
        metrics.count_first_token("write", 0.2)
        metrics.count_plugin("write", "ok", 1.0)
        metrics.count_run("write", "completed", 100, 200, 1.1)
        metrics.running.dec()

    def request() -> None:
        metrics.open_requests.inc()
        metrics.open_requests.dec()
        metrics.count_request("POST", "/v1/chat/completions", 200, 0.2)

    def spans() -> None:
        with tracer.span("POST", "server"), tracer.span("run") as span:
            span.note(onebox__run="resp_1")
            with tracer.span("plugin write"), tracer.span("generate", "client", current=False):
                pass

    logger = logging.getLogger("bench")
    logger.propagate = False
    handler = logging.StreamHandler(io.StringIO())
    logger.handlers = [handler]

    def line() -> None:
        logger.warning("Run of %r %s in %.3f s, %d + %d tokens", "write", "completed", 1.1, 100, 200)

    handler.setFormatter(logs.TextLines({"part": "gateway"}, False))
    spent = {
        "metrics of a run": timed(run),
        "metrics of an HTTP request": timed(request),
        "metrics of a round trip to the store": timed(lambda: metrics.count_store("script", 0.001, False)),
        "spans of a run": timed(spans),
        "a line of text": timed(line),
    }
    handler.setFormatter(logs.JsonLines({"part": "gateway"}, False))
    spent["a line of JSON"] = timed(line)
    spent["a scrape"] = timed(metrics.render, 20)
    return spent


def timed(work: Callable[[], object], times: int = TIMES) -> float:
    """Microseconds of processor time per call."""
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times * 1e6

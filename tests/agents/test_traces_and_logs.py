"""One request as a tree of spans in a real collector, and as lines of a log that has no text of a user."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from deploy.store import EmbeddedStore
from onebox.sockets import free_port
from tests.agents.processes import Stack, run_stack, until
from tests.collector import Collector, Span, run_collector
from tests.processes import ROOT

SECRET = "tangerine-velvet-4711"  # what users write here and no log may have
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with run_collector() as running:
        yield running


@pytest.fixture(scope="module")
def traced(valkey: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Stack]:
    """A gateway that traces and logs JSON; no other one may take over its runs, so it has a database of its own."""
    own = replace(valkey, url=valkey.url.removesuffix("/0") + "/1")
    extra = {"otel_endpoint": collector.url, "log_format": "json", "lease_s": "1", "lease_renew_s": "0.3"}
    with run_stack(Stack(tmp_path_factory.mktemp("traced"), own, extra)) as stack:
        yield stack


def chat(stack: Stack, task: str, text: str, **headers: str) -> httpx.Response:
    body = {"model": task, "messages": [{"role": "user", "content": text}], "max_tokens": 8}
    return stack.client.post("/v1/chat/completions", json=body, headers=headers)


def path_up(span: Span, spans: list[Span]) -> list[str]:
    """The names from a span to its root."""
    known = {each.id: each for each in spans}
    names = [span.name]
    while (parent := known.get(span.parent)) is not None:
        names.append(parent.name)
        span = parent
    return names


def test_a_request_is_one_tree_of_spans_from_http_to_the_engine_call(traced: Stack, collector: Collector) -> None:
    reply = chat(traced, "auto", f"Translate into German: {SECRET}", traceparent=f"00-{TRACE}-{CALLER}-01").json()
    run_id = reply["id"]
    until(lambda: any(span.attributes.get("onebox.run") == run_id for span in collector.spans))
    spans = [span for span in collector.spans if span.trace == TRACE]
    (root,) = (span for span in spans if span.parent == CALLER)
    assert root.name == "POST /v1/chat/completions"
    assert root.attributes["http.response.status_code"] == 200
    generated = [span for span in spans if span.name == "generate"]
    assert ["generate", "plugin translate", "run", root.name] in [path_up(span, spans) for span in generated]
    (routed,) = (span for span in spans if span.name == "route")
    assert path_up(routed, spans) == ["route", "run", root.name]
    (run,) = (span for span in spans if span.name == "run")
    assert run.attributes["onebox.state"] == "completed"
    assert run.attributes["gen_ai.usage.output_tokens"] == reply["usage"]["completion_tokens"]
    assert all(str(span.attributes.get("onebox.request", run_id)).startswith(run_id) for span in generated)
    assert SECRET not in repr(spans)


def test_requests_without_a_trace_begin_one_each(traced: Stack, collector: Collector) -> None:
    ids = {chat(traced, "write", "A line").json()["id"] for _ in range(2)}

    def runs() -> list[Span]:
        return [span for span in collector.named("run") if span.attributes["onebox.run"] in ids]

    until(lambda: len(runs()) == 2)
    assert len({span.trace for span in runs()}) == 2


def test_a_run_that_is_taken_over_stays_in_its_trace(traced: Stack, collector: Collector) -> None:
    job = {"model": "write", "input": "A long line", "background": True, "max_output_tokens": 400}
    trace = "1" * 32
    run_id = traced.client.post("/v1/responses", json=job, headers={"traceparent": f"00-{trace}-{CALLER}-01"}).json()[
        "id"
    ]
    traced.gateway.kill()
    traced.gateway.start()
    until(lambda: traced.client.get(f"/v1/responses/{run_id}").json()["status"] == "completed")
    until(lambda: any(span.trace == trace for span in collector.named("run")))
    (run,) = (span for span in collector.named("run") if span.trace == trace)
    assert run.attributes["onebox.run"] == run_id
    assert int(str(run.attributes["onebox.epoch"])) >= 2


def test_a_failed_run_fails_its_spans_by_the_code(traced: Stack, collector: Collector) -> None:
    traced.engine.stop()
    try:
        failed = chat(traced, "write", f"A line on {SECRET}")
    finally:
        traced.engine.start()
    assert failed.status_code == 503
    until(lambda: any(span.failed for span in collector.named("run")))
    assert {span.attributes.get("error.type") for span in collector.named("run") if span.failed} == {
        failed.json()["error"]["code"]
    }


def test_every_line_of_the_log_is_json_and_names_its_run_but_no_text(traced: Stack) -> None:
    run_id = chat(traced, "write", f"A line on {SECRET}").json()["id"]
    traced.client.post("/v1/chat/completions", content=json.dumps({"model": SECRET, "messages": [SECRET]}))
    lines = [json.loads(line) for line in traced.gateway.log.read_text().splitlines()]
    assert {"time", "level", "logger", "message", "part"} <= set.intersection(*(set(line) for line in lines))
    (ended,) = (line for line in lines if line.get("run") == run_id)
    assert ended["message"].startswith("Run of 'write' completed in ")
    assert len(ended["tenant"]) == 12
    assert SECRET not in traced.gateway.log.read_text()
    assert not [line for line in lines if line["level"] == "error" and "run" not in line]


def test_a_gateway_without_the_packages_says_in_a_line_how_to_get_them(traced: Stack, tmp_path: Path) -> None:
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("raise ImportError('not installed')")
    worker = traced.worker(free_port())
    environment = dict(worker.environment) | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(worker.argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'onebox[tracing]'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr

"""What gateways and engines show to Prometheus, and the dashboard that is made of it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from agents.engine_metrics import merge
from deploy.scrape import Scrape, Source
from deploy.store import EmbeddedStore
from onebox.settings import Settings
from onebox.sockets import free_port
from tests.agents.processes import ADMIN_KEY, Child, Stack, run_stack, until
from tests.dashboard import expressions, names
from tests.processes import ROOT

ENDED = "onebox_runs_ended_total"


@pytest.fixture
def workers(valkey: EmbeddedStore, tmp_path: Path) -> Iterator[tuple[Stack, list[tuple[str, Child]]]]:
    """Two gateway workers that count for one another, with their addresses."""
    with run_stack(Stack(tmp_path, valkey, {"scripted_itl_ms": "20"})) as stack, two(stack) as pair:
        yield stack, pair


@contextmanager
def two(stack: Stack) -> Iterator[list[tuple[str, Child]]]:
    pair: list[tuple[str, Child]] = []
    try:
        for place in range(2):
            port = free_port()
            worker = stack.worker(port)
            pair.append((f"http://127.0.0.1:{port}", replace(worker, argv=(*worker.argv, "--place", str(place)))))
            pair[-1][1].start()
        yield pair
    finally:
        for _, worker in pair:
            worker.stop()


def ask(url: str, max_tokens: int = 3, **fields: object) -> httpx.Response:
    """One short reply of the task `write`."""
    body = {"model": "write", "messages": [{"role": "user", "content": "A line"}], "max_tokens": max_tokens, **fields}
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=30, trust_env=False)


def scrape(url: str) -> Scrape:
    return Source(url).scrape()


def test_any_worker_answers_for_all_and_a_dead_ones_counts_stay(
    workers: tuple[Stack, list[tuple[str, Child]]],
) -> None:
    _, ((first, victim), (second, _)) = workers
    for url in (first, first, second):
        assert ask(url).status_code == 200
    assert [scrape(url).sum(ENDED, task="write") for url in (first, second)] == [3, 3]
    assert scrape(first).sum("onebox_runs_tokens_total", kind="completion") == 9

    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    job = {"model": "write", "input": "A long line", "background": True, "max_output_tokens": 500}
    httpx.post(f"{first}/v1/responses", json=job, headers=headers, trust_env=False).raise_for_status()
    until(lambda: scrape(second).sum("onebox_runs_running") == 1)
    victim.kill()
    assert scrape(second).sum("onebox_runs_running") == 0
    assert scrape(second).sum(ENDED) == 3

    victim.start()
    assert ask(first).status_code == 200
    assert scrape(second).sum(ENDED, task="write", state="completed") >= 4


def test_requests_are_counted_by_route_and_not_by_what_varies_in_it(stack: Stack) -> None:
    before = scrape(stack.url)
    for name in ("one", "two"):
        assert stack.client.get(f"/v1/conversations/{name}").status_code == 404
    assert stack.client.get("/nowhere/at/all").status_code == 404
    assert httpx.get(f"{stack.url}/v1/models", trust_env=False).status_code == 401
    after, name = scrape(stack.url), "onebox_gateway_requests_total"
    assert after.sum(name, method="GET", status="404") - before.sum(name, method="GET", status="404") == 3
    routes = after.values(name, "route")
    assert {"unmatched", "/v1/conversations/{identifier}"} <= set(routes)
    assert not any(word in route.split("/") for route in routes for word in ("one", "two", "nowhere"))


def families(page: httpx.Response) -> set[str]:
    return {family.name for family in text_string_to_metric_families(page.text)}


def test_the_engines_page_has_every_replica_by_its_door(stack: Stack) -> None:
    assert ask(stack.url).status_code == 200
    door = stack.engine_url.removeprefix("http://")
    until(lambda: door in scrape(stack.url).values("onebox_engine_tokens_total", "replica"))
    until(lambda: families(stack.engine_client.get("/metrics")) == families(stack.client.get("/metrics/engines")))
    model = stack.engine_client.get("/v1/model").json()["id"]
    assert scrape(stack.url).values("onebox_engine_running", "model") == [model]


def test_pages_of_replicas_merge_into_one_that_prometheus_can_read() -> None:
    page = (
        "# HELP a_total A\n# TYPE a_total counter\n"
        'a_total{x="1 {"} 3\n'
        "# HELP b B\n# TYPE b histogram\n"
        'b_bucket{le="0.1"} 1\nb_bucket{le="+Inf"} 2\nb_count 2\nb_sum 0.5\n'
    )
    text = merge([({"replica": "h:1"}, page), ({"replica": 'h:"2'}, page)]).decode()
    families = list(text_string_to_metric_families(text))
    assert [family.name for family in families] == ["a", "b"]
    assert [len(family.samples) for family in families] == [2, 8]
    assert {sample.labels["replica"] for family in families for sample in family.samples} == {"h:1", 'h:"2'}
    assert text.count("# TYPE") == 2


def test_prometheus_finds_what_its_config_names(stack: Stack) -> None:
    jobs = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert len(jobs) == 2
    for job in jobs:
        assert job["static_configs"] == [{"targets": [f"127.0.0.1:{Settings().api_port}"]}]
        page = httpx.get(f"{stack.url}{job['metrics_path']}", trust_env=False)
        assert page.headers["content-type"].startswith("text/plain")
        assert families(page)


def test_every_metric_and_label_of_the_dashboard_is_exported(stack: Stack) -> None:
    assert ask(stack.url).status_code == 200
    assert ask(stack.url, model="nobody").status_code == 404
    assert stack.client.post("/v1/route", json={"text": "Translate this: good morning"}).status_code == 200
    until(lambda: bool(scrape(stack.url).series.get("onebox_engine_tokens_total")))
    pages = [httpx.get(f"{stack.url}{path}", trust_env=False).text for path in ("/metrics", "/metrics/engines")]
    declared = {line.split()[2] for page in pages for line in page.splitlines() if line.startswith("# TYPE")}
    series = scrape(stack.url).series
    used: set[str] = set()
    for expression in expressions():
        for name in names(expression, "onebox_"):
            used.add(name)
            assert name.removesuffix("_bucket") in declared, f"{name!r} in {expression!r} is not exported"
        wanted = set(re.findall(r"(\w+)=\"", expression))
        for listed in re.findall(r"by \(([^)]*)\)", expression):
            wanted |= set(listed.replace(" ", "").split(",")) - {"le"}
        for name in names(expression, "onebox_"):
            for labels in series.get(name, {}):
                assert wanted <= {label for label, _ in labels}, f"{expression!r}: {name!r} has other labels"
    assert len(used) > 20
    assert sum(name in series for name in used) > 20


def test_every_metric_of_the_docs_is_exported_and_the_other_way_round(stack: Stack) -> None:
    pages = [httpx.get(f"{stack.url}{path}", trust_env=False).text for path in ("/metrics", "/metrics/engines")]
    declared = {line.split()[2] for page in pages for line in page.splitlines() if line.startswith("# TYPE onebox_")}
    declared = {name for name in declared if not name.endswith("_created")}
    text = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(onebox_\w+)`", text, re.MULTILINE))
    assert documented == declared

"""`python -m deploy top`: the fleet, its queue and its replies at a glance, in a terminal.

Everything shown comes from the gateway's two pages of metrics, so it works for any Onebox that can be reached.
"""

import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.scrape import Scrape, Source, Window
from onebox.errors import SetupError

FIRST_TOKEN = "onebox_runs_first_token_seconds"
ENGINE_TOKENS = "onebox_engine_tokens_total"


def top(source: Source, console: Console, interval_s: float, *, once: bool) -> None:
    """Show what happens, again each `interval_s`, until interrupted; with `once`, what happened in one interval.

    Raises:
        SetupError: there is nothing to be seen at the start.
    """
    before = source.scrape()
    if once:
        time.sleep(interval_s)
        console.print(view(Window(before, source.scrape()), source.url))
        return
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        live.update(Text(f"Watching {source.url} …"), refresh=True)
        while True:
            time.sleep(interval_s)
            try:
                after = source.scrape()
            except SetupError as error:
                live.update(Text(f"{error.message}\nTrying again.", style="red"), refresh=True)
                continue
            live.update(view(Window(before, after), source.url), refresh=True)
            before = after


def view(window: Window, url: str) -> RenderableType:
    """The screen for one window."""
    return Group(_head(window, url), _summary(window), _tasks(window), _fleet(window))


def _head(window: Window, url: str) -> RenderableType:
    return Text(f"Onebox at {url}, the last {window.seconds:.1f} s", style="bold")


def _summary(window: Window) -> RenderableType:
    now = window.after
    table = _table("", "now", "per second")
    table.add_row("replicas", f"{len(_replicas(now))}", "")
    ended = window.rate("onebox_runs_ended_total")
    table.add_row("runs", f"{now.sum('onebox_runs_running'):.0f} at work", f"{ended:.1f} ended")
    refused = window.rate("onebox_admission_refusals_total")
    table.add_row("queue", f"{now.sum('onebox_admission_waiting'):.0f} waiting", f"{refused:.1f} refused")
    table.add_row("tokens", "", f"{window.rate(ENGINE_TOKENS):.1f}")
    table.add_row("first token p50 / p95 / p99", _quantiles(window, FIRST_TOKEN), "")
    requests = window.rate("onebox_gateway_requests_total")
    table.add_row("requests", f"{now.sum('onebox_gateway_requests_open'):.0f} open", f"{requests:.1f}")
    table.add_row("errors", _errors(window), f"{window.rate('onebox_gateway_errors_total'):.1f}")
    moved = [window.rate(f"onebox_runs_{name}_total") for name in ("continued", "taken_over")]
    table.add_row("continued / taken over", "", " / ".join(f"{each:.1f}" for each in moved))
    failures = window.gain("onebox_store_failures_total")
    table.add_row("store p50 / p95 / p99", _quantiles(window, "onebox_store_seconds"), f"{failures:.0f} failures")
    return table


def _tasks(window: Window) -> RenderableType:
    table = _table("task", "runs/s", "failed/s", "first token p50 / p95 / p99", "tokens/s")
    for task in window.after.values("onebox_runs_ended_total", "task"):
        table.add_row(
            task,
            f"{window.rate('onebox_runs_ended_total', task=task):.1f}",
            f"{window.rate('onebox_runs_ended_total', task=task, state='failed'):.1f}",
            _quantiles(window, FIRST_TOKEN, task=task),
            f"{window.rate('onebox_runs_tokens_total', task=task, kind='completion'):.1f}",
        )
    return table


def _fleet(window: Window) -> RenderableType:
    now = window.after
    table = _table("replica", "model", "running", "waiting", "places", "KV cache", "prefix hits", "tokens/s")
    for replica, model in _replicas(now):
        used = now.sum("onebox_engine_kv_use_ratio", replica=replica)
        table.add_row(
            replica + (" (leaving)" if now.sum("onebox_engine_draining", replica=replica) else ""),
            model,
            f"{now.sum('onebox_engine_running', replica=replica):.0f}",
            f"{now.sum('onebox_engine_waiting', replica=replica):.0f}",
            f"{now.sum('onebox_engine_capacity', replica=replica):.0f}",
            f"{used:.0%}",
            _hits(window, replica),
            f"{window.rate(ENGINE_TOKENS, replica=replica):.1f}",
        )
    return table


def _replicas(now: Scrape) -> list[tuple[str, str]]:
    """Replica and model of each that answered."""
    labels = [dict(labels) for labels in now.series.get("onebox_engine_running", {})]
    return sorted((each["replica"], each["model"]) for each in labels)


def _hits(window: Window, replica: str) -> str:
    """Share of the prompts' tokens that the prefix cache had; engines differ in what they call it."""
    asked, found = (
        sum(window.gain(name, replica=replica) for name in names)
        for names in (
            ("vllm:prefix_cache_queries_total", "onebox_engine_prefix_queried_tokens_total"),
            ("vllm:prefix_cache_hits_total", "onebox_engine_prefix_hit_tokens_total"),
        )
    )
    return f"{found / asked:.0%}" if asked else "-"


def _quantiles(window: Window, name: str, **labels: str) -> str:
    return " / ".join(_time(window.quantile(share, name, **labels)) for share in (0.5, 0.95, 0.99))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _errors(window: Window) -> str:
    """The codes of the window, with their numbers."""
    name = "onebox_gateway_errors_total"
    counts = {code: window.gain(name, code=code) for code in window.after.values(name, "code")}
    return ", ".join(f"{code} {count:.0f}" for code, count in counts.items() if count) or "none"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for place, column in enumerate(columns):
        table.add_column(column, no_wrap=True, justify="right" if place else "left")
    return table

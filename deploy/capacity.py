"""`python -m deploy.capacity`: how far one cell of gateways, store and fleet goes, and what gives way first.

A cell is one RayService with its gateways and its store. The model divides what so many replicas ask of each part by
what the part can do; parts of which there may be more (gateways) are counted, parts of which there is one are limits.
Inputs are measured, published or assumed, and all of them are in `capacity.toml`. What routing does is simulated by
`deploy.routing_simulation`. The output is the tables of docs/scaling.md.
"""

import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from deploy.routing_simulation import POLICIES, Simulation, Traffic
from onebox.settings import Settings
from serving.roster import ASK_TIMEOUT_S, FRESH_PER_REPLICA_S, FRESH_S

INPUTS: Final = Path(__file__).with_suffix(".toml")
PAGE: Final = INPUTS.parents[1] / "docs" / "scaling.md"
DECADES: Final = (1, 10, 100, 1_000, 10_000)
SIMULATED: Final = (4, 16, 64)
SHORT: Final = {"log_keep_s": 600}
REPLICAS_MAX: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Input:
    """One number and where it is from."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class Load:
    """What so many replicas bring about when they are as busy as assumed."""

    replicas: int
    streams: float
    tokens_per_s: float
    runs_per_s: float
    tenants: float
    workers: int


@dataclass(frozen=True, slots=True)
class Limit:
    """A part of which a cell has one. `share` tells how much of it a load takes: 1.0 is all of it."""

    name: str
    share: Callable[[Load], float]
    remedy: str


def read_inputs(path: Path = INPUTS) -> Mapping[str, Input]:
    """All inputs by their names."""
    return {name: Input(float(one["value"]), one["source"]) for name, one in tomllib.loads(path.read_text()).items()}


class Cell:
    """The model of one cell."""

    def __init__(self, inputs: Mapping[str, Input], settings: Settings | None = None) -> None:
        self._inputs = inputs
        self._settings = settings or Settings.model_validate({})  # not the environment's
        self.limits: tuple[Limit, ...] = self._limits()

    def load(self, replicas: int) -> Load:
        """What `replicas` bring about, and the gateway workers that takes."""
        streams = replicas * self._settings.engine_max_ongoing * self._of("busy_share")
        tokens_per_s = streams * self._of("stream_tokens_per_s")
        runs_per_s = tokens_per_s / self._of("reply_tokens")
        per_run_us = self._of("gateway_us_per_run") + replicas * self._of("gateway_us_per_door_choice_and_replica")
        cores = (tokens_per_s * self._of("gateway_us_per_token") + runs_per_s * per_run_us) / 1e6
        free = self._of("target_share") - self._of("gateway_idle_cpu_share")
        workers = max(2, math.ceil(cores / free))
        return Load(replicas, streams, tokens_per_s, runs_per_s, replicas * self._of("tenants_per_replica"), workers)

    def first(self, replicas: int) -> tuple[Limit, float]:
        """The limit that so many replicas come nearest to, or exceed most."""
        load = self.load(replicas)
        limit = max(self.limits, key=lambda one: one.share(load))
        return limit, limit.share(load)

    def full_at(self, limit: Limit) -> int | None:
        """The most replicas that keep within `target_share` of a limit; None where there is no such number."""

        def fits(replicas: int) -> bool:
            return limit.share(self.load(replicas)) <= self._of("target_share")

        if not fits(1):
            return 0
        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
            if high > REPLICAS_MAX:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def size(self) -> int:
        """The most replicas that keep within every limit."""
        return min(found for limit in self.limits if (found := self.full_at(limit)) is not None)

    def _of(self, name: str) -> float:
        return self._inputs[name].value

    def _per_reply(self, what: str) -> float:
        return self._of(f"{what}_run") + self._of("reply_tokens") * self._of(f"{what}_token")

    def _limits(self) -> tuple[Limit, ...]:
        return (
            Limit("memory of the store", self._store_memory, "keep logs for less long (`ONEBOX_LOG_KEEP_S`); cells"),
            Limit("main thread of the store", self._store_cpu, "cells"),
            Limit("disk of the store", self._store_disk, "a faster disk; cells"),
            Limit("search for lost runs", self._search, "fewer tenants per cell"),
            Limit("Serve's controller", self._controller, "cells"),
            Limit("HAProxy on each node", self._haproxy, "ingress on fewer nodes; cells"),
            Limit("roster: a replica's time to answer", self._roster_answers, "cells"),
            Limit("roster: time to ask all", self._roster_asking, "cells"),
            Limit("gateway: time to choose a door", self._choice, "cells"),
            Limit("nodes of one Ray cluster", lambda load: load.replicas / self._of("ray_nodes_max"), "cells"),
            Limit("nodes of one Kubernetes cluster", self._kubernetes, "several Kubernetes clusters"),
            Limit("connections tracked on a node", self._connections, "raise nf_conntrack_max"),
        )

    def _store_memory(self, load: Load) -> float:
        kept = load.runs_per_s * self._settings.log_keep_s
        return kept * self._per_reply("store_memory_bytes_per") / (self._of("store_memory_gib") * 2**30)

    def _store_cpu(self, load: Load) -> float:
        idle = load.workers * self._of("store_idle_scripts_per_s_per_worker")
        return (load.runs_per_s * self._per_reply("store_us_per") + idle * self._script_us()) / 1e6

    def _store_disk(self, load: Load) -> float:
        return load.runs_per_s * self._per_reply("store_log_bytes_per") / (self._of("store_disk_mib_per_s") * 2**20)

    def _search(self, load: Load) -> float:
        scripts = load.tenants * self._of("search_scripts_per_s_per_tenant")
        return scripts * self._script_us() / 1e6

    def _script_us(self) -> float:
        """A script on its own; a run's own are no batches."""
        return self._of("store_us_per_run") / self._of("store_scripts_per_run")

    def _controller(self, load: Load) -> float:
        return self._of("controller_cpu_share") + load.replicas * self._of("controller_cpu_share_per_replica")

    def _haproxy(self, load: Load) -> float:
        return load.replicas * self._of("haproxy_cpu_share_per_replica") / self._of("haproxy_core_share_max")

    def _roster_answers(self, load: Load) -> float:
        """Gateways ask any replica each second; that one asks all others once in a while, see `serving.roster`."""
        fresh_s = FRESH_S + FRESH_PER_REPLICA_S * load.replicas
        asking = load.replicas * (1 - math.exp(-load.workers * fresh_s / load.replicas))
        busy = asking / fresh_s * self._of("roster_us_per_answer") / 1e6
        return busy / self._of("roster_core_share_max")

    def _roster_asking(self, load: Load) -> float:
        return load.replicas * self._of("roster_us_per_answer") / 1e6 / ASK_TIMEOUT_S

    def _choice(self, load: Load) -> float:
        spent_ms = load.replicas * self._of("gateway_us_per_door_choice_and_replica") / 1e3
        return spent_ms / self._of("choice_ms_max")

    def _kubernetes(self, load: Load) -> float:
        return load.replicas / self._of("kubernetes_nodes_max")

    def _connections(self, load: Load) -> float:
        """The node with most: gateways keep a connection per stream on either side; so many gateways on a node."""
        per_worker = 2 * load.streams / load.workers + load.replicas
        return self._of("gateways_per_node") * per_worker / self._of("conntrack_max")


def tables(inputs: Mapping[str, Input] | None = None) -> dict[str, str]:
    """The tables of docs/scaling.md by their names."""
    known = inputs or read_inputs()
    cell = Cell(known)
    short = Cell(known, Settings.model_validate(SHORT))
    return {
        "inputs": _inputs_table(known),
        "sizes": _sizes_table(cell),
        "decades": _decades_table(cell, short),
        "limits": _limits_table(cell, short),
        "cells": _cells_table(short, known),
        "routing": _routing_table(short, known),
    }


def _inputs_table(inputs: Mapping[str, Input]) -> str:
    rows = [(f"`{name}`", f"{one.value:g}", one.source) for name, one in inputs.items()]
    return _table(("input", "value", "from"), rows)


def _sizes_table(cell: Cell) -> str:
    rows = []
    for replicas in DECADES:
        load = cell.load(replicas)
        rows.append(
            (
                f"{replicas:,}",
                f"{load.streams:,.0f}",
                f"{load.tokens_per_s:,.0f}",
                f"{load.runs_per_s:,.0f}",
                f"{load.workers:,}",
            )
        )
    return _table(("replicas", "streams", "tok/s", "runs/s", "gateway workers"), rows)


def _decades_table(cell: Cell, short: Cell) -> str:
    rows = []
    for replicas in DECADES:
        (one, share), (then, then_share) = cell.first(replicas), short.first(replicas)
        rows.append(
            (f"{replicas:,}", f"{one.name} ({_percent(share)})", f"{then.name} ({_percent(then_share)})", then.remedy)
        )
    return _table(("replicas", "first with the defaults", "first with logs kept for 10 min", "what helps then"), rows)


def _limits_table(cell: Cell, short: Cell) -> str:
    rows = []
    for limit, then in zip(cell.limits, short.limits, strict=True):
        found, later = cell.full_at(limit), short.full_at(then)
        rows.append((limit.name, _count(found), _count(later), limit.remedy))
    return _table(("part", "replicas, defaults", "logs kept for 10 min", "what helps"), rows)


def _cells_table(cell: Cell, inputs: Mapping[str, Input]) -> str:
    size = cell.size()
    rows = []
    for replicas in DECADES:
        cells = math.ceil(replicas / size)
        load = cell.load(math.ceil(replicas / cells))
        workers = cells * load.workers
        series = replicas * inputs["series_per_replica"].value + workers * inputs["series_per_worker"].value
        servers = math.ceil(series / inputs["prometheus_series_max"].value)
        rows.append((f"{replicas:,}", f"{cells:,}", f"{workers:,}", f"{series:,.0f}", f"{servers:,}"))
    return _table(
        ("replicas", f"cells of up to {size}", "gateway workers", "metric series", "Prometheus servers"), rows
    )


def _routing_table(cell: Cell, inputs: Mapping[str, Input], sizes: tuple[int, ...] = SIMULATED) -> str:
    rows = []
    for replicas in sizes:
        gateways = cell.load(replicas).workers
        reply_s = inputs["reply_tokens"].value / inputs["stream_tokens_per_s"].value
        traffic = Traffic(
            replicas, gateways, Settings.model_validate({}).engine_max_ongoing, inputs["busy_share"].value, reply_s
        )
        for policy in POLICIES:
            seen = Simulation(traffic, policy).run()
            figures = (f"{seen.same:.3f}", f"{seen.peak:.2f}x", f"{100 * seen.full:.1f} %")
            rows.append((f"{replicas}", f"{gateways}", policy, *figures))
    header = ("replicas", "gateways", "policy", "turns at their replica", "peak load over mean", "met no free place")
    return _table(header, rows)


def _count(found: int | None) -> str:
    if found is None:
        return f"beyond {REPLICAS_MAX:,}"
    return f"{found:,}" if found else "less than 1"


def _percent(share: float) -> str:
    return f"{100 * share:,.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def _with_section(page: str, name: str, section: str) -> str:
    return re.sub(rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _: section, page, flags=re.DOTALL)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def main(
    replicas: Annotated[
        list[int] | None, typer.Argument(help="Simulate routing for these sizes and print nothing else.")
    ] = None,
    write: Annotated[bool, typer.Option(help="Put the tables into docs/scaling.md in place of those there.")] = False,
) -> None:
    """Print the tables of docs/scaling.md, in Markdown."""
    inputs = read_inputs()
    if replicas:
        typer.echo(_routing_table(Cell(inputs, Settings.model_validate(SHORT)), inputs, tuple(replicas)))
        return
    page = PAGE.read_text(encoding="utf-8")
    for name, text in tables(inputs).items():
        section = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
        typer.echo(section + "\n")
        page = _with_section(page, name, section)
    if write:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

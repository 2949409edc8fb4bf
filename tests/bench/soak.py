"""An hour at twice the capacity: does any process, or the store, grow?

Few places of a slow scripted engine, so that places are the limit and not the processor, and a closed crowd of users
who think about as long as a reply takes: if none ever waited they would use twice the places. So there is always a
queue, and always somebody who is refused and comes back when `Retry-After` says. They do all that users do, and delete
their conversations, which would be kept for good. Logs are kept for a minute only, so that their number is steady long
before the warm-up ends. `SOAK_MINUTES` sets how long it all lasts; a sixth of it, but a minute at least, is warm-up.
"""

import asyncio
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import aiohttp
import psutil
import redis

from agents.store_keys import TENANTS
from deploy import instance
from deploy.scrape import Source
from onebox.errors import SetupError
from tests.bench import report
from tests.bench.measures import store_of
from tests.bench.soak_users import Tally, User, Visitor
from tests.product import KEY, Product, product

MINUTES = float(os.environ.get("SOAK_MINUTES", "60"))
WARM_UP_S = max(60.0, 60 * MINUTES / 6)
EVERY_S = 10.0
EDGE = 6  # samples whose median is a series' start or end
REPLICAS, PLACES, WORKERS = 2, 4, 2
USERS = 4 * REPLICAS * PLACES
KEEP_S = 60
SETTLE_S = 20.0
GROWTH_GOAL = 1.0  # MiB a minute
ENV = {
    "ONEBOX_ENGINE": "scripted",
    "ONEBOX_ENGINE_REPLICAS": str(REPLICAS),
    "ONEBOX_ENGINE_MAX_ONGOING": str(PLACES),
    "ONEBOX_GATEWAY_WORKERS": str(WORKERS),
    "ONEBOX_QUEUE_PER_PLACE": "1",
    "ONEBOX_SCRIPTED_ITL_MS": "25",
    "ONEBOX_LOG_KEEP_S": str(KEEP_S),
}
IDENTIFIER = re.compile(r"(run|conversation|idempotency):[^:]+")


@dataclass(frozen=True, slots=True)
class Meter:
    """One process at one moment.

    `mib` leaves out what is mapped from files: that is shared, and changes when others on the machine come and go.
    """

    at: float
    mib: float
    descriptors: int
    threads: int
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Box:
    """The product as a whole at one moment."""

    at: float
    keys: int
    store_mib: float
    disk_mib: float
    waiting: float
    running: float


Sample = TypeVar("Sample", Meter, Box)


class Meters:
    """All series: of each process by its pid, and of the box."""

    def __init__(self, ours: Product, store: redis.Redis) -> None:
        self._product = ours
        self._store = store
        self._source = Source(ours.api_url, KEY)
        self.names: dict[int, str] = {}
        self.processes: dict[int, list[Meter]] = {}
        self.box: list[Box] = []
        self.missed = 0  # times the box itself did not answer

    def read(self) -> None:
        """One sample of everything that runs now."""
        at = time.monotonic()
        launcher = psutil.Process(self._product.pid)
        for process in (launcher, *launcher.children(recursive=True)):
            with suppress(psutil.Error), process.oneshot():
                times, memory = process.cpu_times(), process.memory_info()
                mib = (memory.rss - memory.shared) / 2**20
                meter = Meter(at, mib, process.num_fds(), process.num_threads(), times.user + times.system)
                self.names.setdefault(process.pid, self._name(process))
                self.processes.setdefault(process.pid, []).append(meter)
        try:
            scrape = self._source.scrape()
            keys, memory = self._store.dbsize(), self._store.info("memory")["used_memory"]
        except (SetupError, redis.RedisError):
            self.missed += 1
            return
        waiting, running = (scrape.sum(name) for name in ("onebox_admission_waiting", "onebox_runs_running"))
        self.box.append(Box(at, keys, memory / 2**20, _size_mib(self._product.home), waiting, running))

    def mib(self, name: str) -> float:
        """The latest memory of all processes whose names begin so."""
        return sum(series[-1].mib for pid, series in self.processes.items() if self.names[pid].startswith(name))

    def _name(self, process: psutil.Process) -> str:
        """What the launcher calls its own children; the rest by their programs, Ray's by their titles."""
        if process.pid == self._product.pid:
            return "launcher"
        here = instance.read(self._product.home)
        for name, pid in here.children.items() if here else ():
            if pid == process.pid:
                return name
        words = process.cmdline()
        if words and words[0].startswith("ray::"):
            return words[0].removeprefix("ray::").split(".")[0]
        if "-m" in words:
            return words[words.index("-m") + 1].rpartition(".")[2]
        return next((Path(word).stem for word in words if word.endswith(".py")), process.name())


async def main() -> None:
    """Run it and write the section `soak`."""
    if 60 * MINUTES < 2 * WARM_UP_S:
        sys.exit(f"SOAK_MINUTES is {MINUTES:g}, which leaves nothing behind the warm-up; give 2 or more.")
    with (
        tempfile.TemporaryDirectory(prefix="ob-") as folder,
        product(Path(folder), ENV) as ours,
        store_of(Path(folder)) as store,
    ):
        meters, tally = Meters(ours, store), Tally()
        await asyncio.to_thread(meters.read)
        kinds = _kinds(store)
        began = time.monotonic()
        async with asyncio.TaskGroup() as crowd:
            tasks = await _tasks(ours.api_url)
            for number in range(USERS):
                crowd.create_task(User(number, ours.api_url, tasks, tally).live())
            crowd.create_task(Visitor(ours, tally).live())
            await _watch(meters, tally, began)
            tally.ending.set()
        ended = meters.box[-1].at
        await asyncio.sleep(KEEP_S + SETTLE_S)
        await asyncio.to_thread(meters.read)
        left = _kinds(store) - kinds - Counter([str(TENANTS)])
    _write(meters, tally, began + WARM_UP_S, ended, left)


async def _tasks(url: str) -> list[tuple[str, str]]:
    """The tasks' own examples, English and Chinese."""
    headers = {"authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(url, headers=headers) as http, http.get("/v1/tasks") as response:
        found = (await response.json())["data"]
    return [(task["name"], example["text"]) for task in found for example in task["examples"]]


async def _watch(meters: Meters, tally: Tally, began: float) -> None:
    """Take the samples, and say once a minute how it goes."""
    for number in range(1, round(60 * MINUTES / EVERY_S) + 1):
        await asyncio.sleep(max(0.0, began + number * EVERY_S - time.monotonic()))
        await asyncio.to_thread(meters.read)
        if number % round(60 / EVERY_S) == 0:
            box = meters.box[-1]
            parts = ", ".join(f"{name} {meters.mib(name):.1f}" for name in ("gateway", "page", "store", "ServeReplica"))
            print(
                f"{(box.at - began) / 60:4.0f} min: {parts} MiB; {box.keys} keys; {box.waiting:.0f} waiting; "
                f"{sum(tally.done.values())} done, {tally.refused} refused, {tally.cut} cut, "
                f"{sum(tally.broken.values())} broken; load {report.load_average()}",
                flush=True,
            )


def _write(meters: Meters, tally: Tally, warm: float, ended: float, left: Counter[str]) -> None:
    final = meters.box[-1].at
    boxes = [box for box in meters.box if warm <= box.at <= ended]
    growths: list[tuple[float, str]] = []
    openings: list[tuple[float, str]] = []
    gone: Counter[str] = Counter()
    rows: list[tuple[str, ...]] = []
    for pid, series in meters.processes.items():
        name = meters.names[pid]
        if series[0].at > warm or series[-1].at < final:
            gone[name] += 1
            continue
        count = sum(row[0].split(" ")[0] == name for row in rows)
        name = f"{name} {count + 1}" if count else name
        loaded = [meter for meter in series if warm <= meter.at <= ended]
        growth, opening = _slope(loaded, lambda meter: meter.mib), _slope(loaded, lambda meter: meter.descriptors)
        growths.append((growth, name))
        openings.append((opening, name))
        busy = (loaded[-1].cpu_s - loaded[0].cpu_s) / (loaded[-1].at - loaded[0].at)
        rows.append(
            (
                name,
                _span(loaded, lambda meter: meter.mib, ".1f"),
                f"{growth:+.3f}",
                _span(loaded, lambda meter: meter.descriptors, ".0f"),
                f"{opening:+.2f}",
                _span(loaded, lambda meter: meter.threads, ".0f"),
                f"{100 * busy:.1f} %",
                f"{series[0].descriptors} → {series[-1].descriptors}",
                f"{series[0].mib:.1f} → {series[-1].mib:.1f}",
            )
        )
    runs = sum(tally.done.values())
    (growth, grower), (opening, opener) = max(growths), max(openings)
    others = ", ".join(f"{count} {name}" for name, count in gone.items()) or "none"
    late = ", ".join(f"{count} {route}" for route, count in tally.refused_in_stream.items()) or "0"
    leftover = ", ".join(f"{count} {kind}" for kind, count in left.most_common()) or "none"
    facts = [
        ("steepest memory of a process", f"{growth:+.2f} MiB/min ({grower})", f"{GROWTH_GOAL:g} MiB/min"),
        ("steepest descriptors of a process", f"{opening:+.2f} a minute ({opener})", "flat"),
        ("keys in the store", _trend(boxes, lambda box: box.keys, ".0f"), "flat"),
        ("keys left by the load when its logs have expired", leftover, "none"),
        ("store's `used_memory`, MiB", _trend(boxes, lambda box: box.store_mib, ".2f"), "flat"),
        ("files under the home, MiB", _trend(boxes, lambda box: box.disk_mib, ".1f"), ""),
        ("processes that came or went", others, ""),
        ("runs at work, median", f"{statistics.median(box.running for box in boxes):.0f}", ""),
        ("runs waiting, median", f"{statistics.median(box.waiting for box in boxes):.0f}", ""),
        ("samples with a queue", f"{100 * statistics.mean(box.waiting > 0 for box in boxes):.0f} %", "100 %"),
        ("samples that got no answer", f"{meters.missed}", "0"),
        ("requests", f"{tally.requests}", ""),
        ("done", f"{runs}: " + ", ".join(f"{count} {kind}" for kind, count in tally.done.most_common()), ""),
        ("refused", f"{tally.refused}", ""),
        ("refused after their 200, in the stream", late, ""),
        ("refusals that are no clean 429/503 with Retry-After", f"{tally.unclean}", "0"),
        ("replies cut", f"{tally.cut}", "0"),
        ("other failures", f"{sum(tally.broken.values()) - tally.cut}", "0"),
    ]
    note = (
        f"{USERS} users and a visitor of the page at {REPLICAS} replicas of {PLACES} places behind {WORKERS} gateway "
        f"workers, {MINUTES:g} min, of which {WARM_UP_S / 60:.0f} to warm up; samples every {EVERY_S:g} s, lines by "
        f"least squares; memory is what is in no file (RssAnon). Start and end are medians of {EDGE} samples; "
        f"idle is before the load, and {KEEP_S + SETTLE_S:.0f} s after it. Load average after: {report.load_average()}."
    )
    header = (
        "process", "MiB", "MiB/min", "descriptors", "a minute", "threads", "CPU", "descriptors idle", "MiB idle"
    )  # fmt: skip
    failures = "".join(f"\n- {count} x {kind}" for kind, count in tally.broken.most_common(20))
    text = f"{note}\n\n{report.table(('', 'measured', 'goal'), facts)}\n\n{report.table(header, rows)}"
    report.write_section("soak", "An hour at twice the capacity", text)
    if failures:
        print(f"Failures:{failures}")


def _slope(series: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    """How much it grows in a minute."""
    return 60 * statistics.linear_regression([one.at for one in series], [value(one) for one in series]).slope


def _span(series: Sequence[Sample], value: Callable[[Sample], float], form: str) -> str:
    first, last = (statistics.median(value(one) for one in some) for some in (series[:EDGE], series[-EDGE:]))
    return f"{first:{form}} → {last:{form}}"


def _trend(boxes: Sequence[Box], value: Callable[[Box], float], form: str) -> str:
    return f"{_span(boxes, value, form)}, {_slope(boxes, value):+{form}} a minute"


def _kinds(store: redis.Redis) -> Counter[str]:
    """The keys by what they are, without their ids."""
    return Counter(IDENTIFIER.sub(r"\1:*", key.decode()) for key in store.scan_iter(count=1000))


def _size_mib(folder: Path) -> float:
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.lstat().st_size
    return size / 2**20

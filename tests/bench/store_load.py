"""What a stream costs the gateway and the store: the inputs of the capacity model (`deploy.capacity`).

Two series of runs, short ones and long ones, on one gateway worker: two equations each for the cost of a run and the
cost of a token. The store's side is its own account (`INFO commandstats`, `cpu`, `memory`, …), less what it does idle.
"""

import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
import redis

from agents.doors import Doors
from agents.store_keys import TENANTS
from tests.bench import report
from tests.bench.capacity_inputs import table
from tests.bench.load import Target, stream
from tests.bench.measures import gateway_workers, resident_mib, store_of
from tests.product import KEY, product

STREAMS = 200
SHORT, LONG = 8, 256
SERIES = {SHORT: 3, LONG: 1}  # how often all streams run, by the length of their replies
IDLE_S = 10.0
IDLE_TENANTS = 200
DOORS = 512
ENV = {
    "ONEBOX_ENGINE": "scripted",
    "ONEBOX_SCRIPTED_ITL_MS": "33.3",
    "ONEBOX_ENGINE_MAX_ONGOING": "256",
    "ONEBOX_GATEWAY_WORKERS": "1",
}


@dataclass(frozen=True, slots=True)
class Reading:
    """The meters at one moment: counts, seconds of CPU and bytes since the start."""

    at: float
    gateway_cpu_s: float
    store_cpu_s: float
    scripts: float
    script_s: float
    store_in: float
    store_out: float
    log: float
    memory: float

    def since(self, before: "Reading") -> "Reading":
        """What has been added."""
        return Reading(*(getattr(self, name) - getattr(before, name) for name in self.__slots__))


async def main() -> None:
    """Run it and write the section `store-load`."""
    with tempfile.TemporaryDirectory(prefix="ob-") as folder, product(Path(folder), ENV) as ours:
        (worker,) = gateway_workers(ours.pid)
        with store_of(Path(folder)) as store:
            meter = _Meter(worker, store)
            target = Target("onebox", ours.api_url, "chat", KEY)
            await _series(target, SHORT)
            idle = await _idle(meter)
            measured = {}
            for tokens, times in SERIES.items():
                before = meter.read()
                for _ in range(times):
                    await _series(target, tokens)
                measured[tokens] = meter.read().since(before)
            resident = await _resident(target, worker)
            series = await _series_exported(ours.api_url)
            store.sadd(TENANTS, *(f"tenant-{index}" for index in range(IDLE_TENANTS)))
            crowded = await _idle(meter)
    figures: dict[str, float] = _figures(idle, measured) | {
        "gateway_kib_per_stream": resident * 1024 / STREAMS,
        "series_per_worker": series,
        "search_scripts_per_s_per_tenant": (crowded.scripts - idle.scripts) / IDLE_S / IDLE_TENANTS,
        "gateway_us_per_door_choice_and_replica": _choice_us() / DOORS,
    }
    load = report.load_average()
    note = (
        f"{STREAMS} streams at 30 tok/s on one worker; runs of {SHORT} and of {LONG} tokens, solved for the cost of a "
        f"run and of a token, less what is spent idle. Load average after: {load}."
    )
    report.write_section("store-load", "What a stream costs gateway and store", f"{note}\n\n{table(figures)}")


class _Meter:
    def __init__(self, worker: psutil.Process, store: redis.Redis) -> None:
        self._worker = worker
        self._store = store

    def read(self) -> Reading:
        """All meters now."""
        commands, stats, cpu = (self._store.info(part) for part in ("commandstats", "stats", "cpu"))
        scripts = [commands[name] for name in ("cmdstat_evalsha", "cmdstat_eval") if name in commands]
        times = self._worker.cpu_times()
        return Reading(
            time.monotonic(),
            times.user + times.system,
            cpu["used_cpu_user_main_thread"] + cpu["used_cpu_sys_main_thread"],
            sum(script["calls"] for script in scripts),
            sum(script["usec"] for script in scripts) / 1e6,
            stats["total_net_input_bytes"],
            stats["total_net_output_bytes"],
            self._store.info("persistence")["aof_current_size"],
            self._store.info("memory")["used_memory_dataset"],
        )


async def _idle(meter: _Meter) -> Reading:
    await asyncio.sleep(2)
    before = meter.read()
    await asyncio.sleep(IDLE_S)
    return meter.read().since(before)


async def _series(target: Target, tokens: int) -> None:
    """All streams at once, each to its end."""
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=300)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout) as http,
        asyncio.TaskGroup() as group,
    ):
        for index in range(STREAMS):
            message = {"role": "user", "content": f"Tell a long story, number {index}."}
            group.create_task(stream(http, target, [message], tokens))


async def _resident(target: Target, worker: psutil.Process) -> float:
    """MiB that the worker has more in the middle of a series than before it."""
    before = resident_mib([worker])
    series = asyncio.create_task(_series(target, LONG))
    await asyncio.sleep(LONG / 30 / 2)
    during = resident_mib([worker])
    await series
    return max(0.0, during - before)


async def _series_exported(url: str) -> int:
    """Metric series of one worker."""
    async with aiohttp.ClientSession() as http, http.get(f"{url}/metrics") as response:
        return sum(bool(line) and not line.startswith("#") for line in (await response.text()).splitlines())


def _figures(idle: Reading, measured: dict[int, Reading]) -> dict[str, float]:
    """The cost of a run and of a token, from two lengths of replies."""
    figures = {
        "gateway_idle_cpu_share": idle.gateway_cpu_s / idle.at,
        "store_idle_scripts_per_s_per_worker": idle.scripts / idle.at,
    }
    names = {
        "gateway_cpu_s": ("gateway_us_per", 1e6),
        "store_cpu_s": ("store_us_per", 1e6),
        "scripts": ("store_scripts_per", 1.0),
        "script_s": ("store_script_us_per", 1e6),
        "store_in": ("store_bytes_in_per", 1.0),
        "store_out": ("store_bytes_out_per", 1.0),
        "log": ("store_log_bytes_per", 1.0),
        "memory": ("store_memory_bytes_per", 1.0),
    }
    runs = {tokens: STREAMS * SERIES[tokens] for tokens in measured}
    for field, (name, factor) in names.items():
        spent = {
            tokens: (getattr(one, field) - getattr(idle, field) / idle.at * one.at) / runs[tokens]
            for tokens, one in measured.items()
        }
        per_token = (spent[LONG] - spent[SHORT]) / (LONG - SHORT)
        figures[f"{name}_token"] = per_token * factor
        figures[f"{name}_run"] = (spent[SHORT] - SHORT * per_token) * factor
    return figures


def _choice_us() -> float:
    """Microseconds of one choice among `DOORS` replicas."""
    doors = Doors()
    urls = [f"http://10.0.0.{index}:31100" for index in range(DOORS)]
    doors.list([{"door": url, "running": 8, "waiting": 0, "capacity": 64} for url in urls])
    for url in urls:
        doors.prove(url, answers=True)
    rounds = 200
    began = time.perf_counter()
    for index in range(rounds):
        doors.choose(f"conversation-{index}")
    return (time.perf_counter() - began) / rounds * 1e6

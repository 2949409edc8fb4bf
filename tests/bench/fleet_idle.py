"""What a fleet costs to keep, by the number of its replicas: inputs of the capacity model (`deploy.capacity`).

Fleets of two sizes stand idle for a while, then one replica is asked for the roster as gateways do. CPU seconds of each
part, and the slope between the sizes, which is the cost of one replica more.
"""

import asyncio
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import aiohttp
import psutil

from onebox.sockets import free_port
from tests.bench import report
from tests.bench.capacity_inputs import table
from tests.product import process

SIZES = (2, 10)
IDLE_S = 15.0
ASKED_S = 10.0
TOKEN = "bench-token"
PARTS = {
    "controller": "ServeController",
    "raylet": "raylet/raylet",
    "haproxy": "haproxy -",
    "replica": "ServeReplica:onebox:engine",
}


async def main() -> None:
    """Run it and write the section `fleet-idle`."""
    idle: dict[int, Mapping[str, float]] = {}
    asked: dict[int, tuple[Mapping[str, float], float, int]] = {}
    for size in SIZES:
        idle[size], asked[size] = await _fleet(size)
    few, many = SIZES
    more = many - few
    slope = {part: (idle[many][part] - idle[few][part]) / more for part in PARTS}
    spent, rounds, size_bytes = asked[many]
    extra = sum(max(0.0, spent[part] - idle[many][part]) for part in ("replica", "controller")) * ASKED_S
    figures = {
        "controller_cpu_share": idle[few]["controller"] - few * slope["controller"],
        "controller_cpu_share_per_replica": slope["controller"],
        "haproxy_cpu_share_per_replica": slope["haproxy"],
        "replica_idle_cpu_share": idle[many]["replica"] / many,
        "roster_us_per_answer": extra / (rounds * many) * 1e6,
        "roster_bytes_per_replica": size_bytes / many,
    }
    load = report.load_average()
    note = (
        f"Fleets of {few} and {many} scripted replicas behind HAProxy, {IDLE_S:g} s idle, then the roster asked for "
        f"{ASKED_S:g} s. Shares are of one core. Load average after: {load}."
    )
    report.write_section("fleet-idle", "What a fleet costs to keep", f"{note}\n\n{table(figures)}")


async def _fleet(size: int) -> tuple[Mapping[str, float], tuple[Mapping[str, float], float, int]]:
    """CPU shares by part idle; the same, rosters gathered and bytes of one while it is asked for."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="ob-") as folder:
        env = {
            "ONEBOX_HOME": folder,
            "ONEBOX_ENGINE": "scripted",
            "ONEBOX_ENGINE_REPLICAS": str(size),
            "ONEBOX_ENGINE_PORT": str(port),
            "ONEBOX_ENGINE_URL": url,
            "ONEBOX_INTERNAL_TOKEN": TOKEN,
        }
        with process(
            (sys.executable, "-m", "deploy.fleet"), f"{url}/-/healthz", Path(folder) / "fleet.log", env
        ) as child:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            async with aiohttp.ClientSession(headers=headers) as http:
                await _until_all(http, url, size)
                await asyncio.sleep(5)
                before, began = _cpu_s(child.pid), time.monotonic()
                await asyncio.sleep(IDLE_S)
                idle = _shares(before, _cpu_s(child.pid), time.monotonic() - began)
                door = (await _roster(http, url))[0][0]["door"]
                before, began, rounds = _cpu_s(child.pid), time.monotonic(), 0
                body = b""
                while time.monotonic() - began < ASKED_S:
                    _, body = await _roster(http, door)
                    rounds += 1
                    await asyncio.sleep(0.5 + 0.005 * size)  # each time the answer is due again, see `serving.roster`
                asked = _shares(before, _cpu_s(child.pid), time.monotonic() - began)
    return idle, (asked, rounds, len(body))


async def _until_all(http: aiohttp.ClientSession, url: str, size: int) -> None:
    async with asyncio.timeout(180):
        while True:
            try:
                if len((await _roster(http, url))[0]) == size:
                    return
            except (aiohttp.ClientError, KeyError, ValueError):
                pass
            await asyncio.sleep(0.5)


async def _roster(http: aiohttp.ClientSession, url: str) -> tuple[list[dict[str, str]], bytes]:
    async with http.get(f"{url}/v1/fleet") as response:
        body = await response.read()
        return (await response.json())["replicas"], body


def _cpu_s(launcher: int) -> dict[str, float]:
    """CPU seconds so far by part, all processes of a part together."""
    spent = dict.fromkeys(PARTS, 0.0)
    for child in psutil.Process(launcher).children(recursive=True):
        try:
            command, times = " ".join(child.cmdline()), child.cpu_times()
        except psutil.Error:
            continue
        for part, mark in PARTS.items():
            if mark in command:
                spent[part] += times.user + times.system
    return spent


def _shares(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> Mapping[str, float]:
    return {part: (after[part] - before[part]) / seconds for part in PARTS}

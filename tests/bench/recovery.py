"""From a fault to the next token: engine replicas and gateway workers killed or frozen under 24 streams, one at a time.

Each fault is alone: the next one comes when everything has been whole for a while. Only streams that the fault held up
count, the others have no gap.
"""

import asyncio
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import psutil

from tests.bench import report
from tests.bench.measures import engine_replicas, gateway_workers, percentile
from tests.product import KEY, product

STREAMS = 24
REPEATS = 4
GAP_S = 0.25
LEASE_S = 10.0
ENV = {
    "ONEBOX_ENGINE": "scripted",
    "ONEBOX_ENGINE_REPLICAS": "2",
    "ONEBOX_SCRIPTED_ITL_MS": "60",
}
Victims = Callable[[int], list[psutil.Process]]


async def main() -> None:
    """Run it and write the section `recovery`."""
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory(prefix="ob-") as folder, product(Path(folder), ENV) as ours:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        headers = {"authorization": f"Bearer {KEY}"}
        async with aiohttp.ClientSession(connector=connector, headers=headers) as http:
            await _two_replicas(ours.pid)
            for name, number, victims, goal in (
                ("replica killed", signal.SIGKILL, engine_replicas, "2 s"),
                ("replica frozen", signal.SIGSTOP, engine_replicas, "2 s"),
                ("gateway worker killed", signal.SIGKILL, gateway_workers, f"{LEASE_S + 2:g} s"),
                ("gateway worker frozen", signal.SIGSTOP, gateway_workers, f"{LEASE_S + 2:g} s"),
            ):
                gaps: list[float] = []
                for index in range(REPEATS):
                    gaps += await _round(http, ours.api_url, ours.pid, victims, number, index)
                    await _two_replicas(ours.pid)
                rows.append(
                    (
                        name,
                        str(len(gaps)),
                        _seconds(gaps, 0.5),
                        _seconds(gaps, 0.99),
                        goal,
                    )
                )
    load = report.load_average()
    note = (
        f"{STREAMS} streams on two scripted replicas and two workers, each fault {REPEATS} times and alone; a reader "
        f"whose connection broke reads on at once. Load average after: {load}."
    )
    text = report.table(("fault", "streams held up", "to the next token, p50", "p99", "goal p99"), rows)
    report.write_section("recovery", "From a fault to the next token", f"{note}\n\n{text}")


async def _round(
    http: aiohttp.ClientSession, url: str, launcher: int, victims: Victims, number: signal.Signals, index: int
) -> list[float]:
    """The gaps of one fault."""
    hits: list[float] = []
    readers = [asyncio.create_task(_read(http, url, f"{index}-{stream}", hits)) for stream in range(STREAMS)]
    await asyncio.sleep(3)
    found = victims(launcher)
    victim = found[index % len(found)]
    hits.append(time.monotonic())
    victim.send_signal(number)
    try:
        gaps = await asyncio.gather(*readers)
    finally:
        if number == signal.SIGSTOP and victim.is_running():
            victim.send_signal(signal.SIGCONT)
    return [gap for gap in gaps if gap > GAP_S]


async def _read(http: aiohttp.ClientSession, url: str, name: str, hits: list[float]) -> float:
    """Seconds from the fault to the next text of one stream, which is read to its end."""
    ask = {"model": "chat", "input": f"Write on and on, {name}", "background": True}
    async with http.post(f"{url}/v1/responses", json=ask) as response:
        run = f"{url}/v1/responses/{(await response.json())['id']}"
    after, gap = -1, 0.0
    while True:
        try:
            timeout = aiohttp.ClientTimeout(total=None, sock_read=1.0, sock_connect=2.0)
            behind = f"&starting_after={after}" if after >= 0 else ""
            async with http.get(f"{run}?stream=true{behind}", timeout=timeout) as response:
                kind = b""
                async for line in response.content:
                    if line.startswith(b"id: "):
                        after = int(line[4:])
                    elif line.startswith(b"event: "):
                        kind = line[7:].strip()
                    elif line.startswith(b"data: ") and kind == b"response.output_text.delta" and hits and not gap:
                        gap = time.monotonic() - hits[0]
                    elif line.startswith(b"data: ") and kind in (b"response.completed", b"response.failed"):
                        if kind == b"response.failed":
                            raise RuntimeError(f"{run} failed")
                        return gap
        except (aiohttp.ClientError, TimeoutError):
            await asyncio.sleep(0.05)


def _seconds(gaps: list[float], share: float) -> str:
    return f"{percentile(gaps, share):.2f} s" if gaps else f"none above {GAP_S:g} s"


async def _two_replicas(launcher: int) -> None:
    """Return once two replicas and two workers are there and have had time to be found."""
    while len(engine_replicas(launcher)) < 2 or len(gateway_workers(launcher)) < 2:
        await asyncio.sleep(0.5)
    await asyncio.sleep(8)

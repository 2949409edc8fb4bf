"""Two hundred readers that never read: what each costs in memory, and what the others notice of them."""

import asyncio
import socket
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from onebox.client import Client
from tests.bench import report
from tests.bench.measures import gateway_workers, ms, percentile, resident_mib
from tests.product import KEY, product

SLOW = 200
OTHERS = 16
ROUNDS = 3
RIVALS = 20
ENV = {"ONEBOX_ENGINE": "scripted", "ONEBOX_SCRIPTED_ITL_MS": "5", "ONEBOX_ENGINE_MAX_ONGOING": "256"}


async def main() -> None:
    """Run it and write the section `slow`."""
    with tempfile.TemporaryDirectory(prefix="ob-") as folder, product(Path(folder), ENV) as ours:
        async with Client(ours.api_url, KEY) as client:
            await _gaps(ours.api_url)
            workers = gateway_workers(ours.pid)
            alone: list[float] = []
            beside: list[float] = []
            grown: list[float] = []
            for _ in range(ROUNDS):
                run_id = await _start_heavy(ours.api_url)
                await asyncio.sleep(4)
                alone += await _gaps(ours.api_url)
                before = resident_mib(workers)
                sockets = await asyncio.to_thread(_open_readers, ours.api_url, run_id)
                await asyncio.sleep(4)
                beside += await _gaps(ours.api_url)
                grown.append((resident_mib(workers) - before) * 1024 / SLOW)
                for each in sockets:
                    each.close()
                await client.cancel(run_id)
    rows = [
        ("memory per reader that never reads", f"{max(grown):.0f} KiB", "64 KiB"),
        ("gap between others' pieces, p99, alone", ms(percentile(alone, 0.99)), ""),
        ("gap between others' pieces, p99, beside them", ms(percentile(beside, 0.99)), ""),
        ("ratio", f"{percentile(beside, 0.99) / percentile(alone, 0.99):.2f}", "1.20"),
    ]
    load = report.load_average()
    note = (
        f"{SLOW} readers of one run, {OTHERS} other streams, {ROUNDS} rounds, the worst round's memory; load: {load}."
    )
    report.write_section("slow", "Readers that never read", f"{note}\n\n{report.table(('', 'measured', 'goal'), rows)}")


async def _start_heavy(url: str) -> str:
    """A run whose log is large: 20 rivals for each token."""
    body = {
        "model": "scripted",
        "input": "Write a long story",
        "background": True,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": RIVALS,
    }
    headers = {"authorization": f"Bearer {KEY}"}
    async with aiohttp.request("POST", f"{url}/v1/responses", json=body, headers=headers) as response:
        return str((await response.json())["id"])


def _open_readers(url: str, run_id: str) -> list[socket.socket]:
    """Connections that ask for the run and then take nothing, with the smallest receive buffer there is."""
    parts = urlsplit(url)
    request = (
        f"GET /v1/responses/{run_id}?stream=true HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Authorization: Bearer {KEY}\r\n\r\n"
    ).encode()
    opened: list[socket.socket] = []
    for _ in range(SLOW):
        each = socket.socket()
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        each.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        each.sendall(request)
        opened.append(each)
    return opened


async def _gaps(url: str) -> list[float]:
    """Seconds between the pieces of ordinary streams."""
    gaps: list[float] = []

    async def one(http: aiohttp.ClientSession, index: int) -> None:
        body = {
            "model": "chat",
            "messages": [{"role": "user", "content": f"Hello, number {index}"}],
            "max_tokens": 400,
            "stream": True,
        }
        headers = {"authorization": f"Bearer {KEY}"}
        last = 0.0
        async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    if last:
                        gaps.append(now - last)
                    last = now

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await asyncio.gather(*[one(http, index) for index in range(OTHERS)])
    return gaps

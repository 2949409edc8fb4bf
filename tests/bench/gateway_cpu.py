"""What a token costs each process: CPU time over tokens, while many streams run at a reader's pace.

The scripted engine speaks at 30 tokens a second on each stream; one gateway worker carries them all. CPU time, not
wall time, so other load on the machine hardly shows. A run costs something to begin and end, whatever its length: short
and long replies of the same streams tell that from what each further token costs.
"""

import asyncio
import tempfile
from pathlib import Path

import psutil

from tests.bench import report
from tests.bench.load import Target, measure
from tests.product import KEY, product

PACE = 30  # tokens a second on each stream
STREAMS = (16, 64, 200, 500)
ROUNDS = 3
SHORT, LONG = 20, 300
PARTS = {"gateway": "-m agents", "store": "valkey", "replica": "ServeReplica"}


async def main() -> None:
    """Run it and write the section `gateway-cpu`."""
    rows: list[tuple[str, ...]] = []
    with (
        tempfile.TemporaryDirectory(prefix="ob-") as folder,
        product(Path(folder), environment(max(STREAMS))) as ours,
    ):
        target = Target("onebox", ours.api_url, "auto", KEY)
        await measure(target, messages(4), 4, 16)
        parts = _parts(ours.pid)
        for streams in STREAMS:
            rounds = [await _round(target, streams, parts) for _ in range(ROUNDS)]
            rows.append((str(streams), *map(_middle, *rounds)))
    load = report.load_average()
    note = (
        f"{PACE} tokens a second on each stream, medians of {ROUNDS} rounds, router, plugin and durable log included. "
        f"A run: what one costs beside its tokens, by comparing replies of {SHORT} and of {LONG} tokens. Whole: "
        f"CPU time over tokens of the long ones. Load average after: {load}."
    )
    header = (
        "streams", "tok/s", "gateway: µs/token", "ms/run", "whole, µs/token",
        "store: µs/token", "ms/run", "replica: µs/token", "ms/run",
    )  # fmt: skip
    report.write_section("gateway-cpu", "CPU time per token", f"{note}\n\n{report.table(header, rows)}")


def _middle(*values: str) -> str:
    return sorted(values, key=float)[ROUNDS // 2]


def environment(streams: int) -> dict[str, str]:
    """One gateway worker, and an engine that speaks at a reader's pace on so many streams."""
    return {
        "ONEBOX_ENGINE": "scripted",
        "ONEBOX_GATEWAY_WORKERS": "1",
        "ONEBOX_SCRIPTED_ITL_MS": str(1000 / PACE),
        "ONEBOX_ENGINE_MAX_ONGOING": str(streams),
    }


def messages(count: int) -> list[list[dict[str, str]]]:
    """So many requests, no two alike."""
    return [[{"role": "user", "content": f"Write a long story about lighthouse number {n}."}] for n in range(count)]


def _parts(pid: int) -> list[psutil.Process]:
    """The processes of `PARTS` among the product's own."""
    family = psutil.Process(pid).children(recursive=True)
    lines = [(process, " ".join(process.cmdline())) for process in family]
    return [next(process for process, line in lines if mark in line) for mark in PARTS.values()]


async def _round(target: Target, streams: int, parts: list[psutil.Process]) -> tuple[str, ...]:
    """Tokens per second, then of each part what a token and what a run costs; of the first also both together."""
    (few, _, cheap), (many, tokens_per_s, dear) = [await _spend(target, streams, parts, n) for n in (SHORT, LONG)]
    per_token = [(more - less) / (many - few) for less, more in zip(cheap, dear, strict=True)]
    per_run = [(less - few * each) / streams for less, each in zip(cheap, per_token, strict=True)]
    pairs = [(f"{1e6 * each:.0f}", f"{1e3 * run:.1f}") for each, run in zip(per_token, per_run, strict=True)]
    return f"{tokens_per_s:.0f}", *pairs[0], f"{1e6 * dear[0] / many:.0f}", *pairs[1], *pairs[2]


async def _spend(
    target: Target, streams: int, parts: list[psutil.Process], length: int
) -> tuple[float, float, list[float]]:
    """Tokens, tokens per second, and the CPU seconds of each part for one reply on each stream."""
    before = [spent_s(part) for part in parts]
    started = asyncio.get_running_loop().time()
    sample = await measure(target, messages(streams), streams, length)
    tokens = sample.tokens_per_s * (asyncio.get_running_loop().time() - started)
    return tokens, sample.tokens_per_s, [spent_s(part) - earlier for part, earlier in zip(parts, before, strict=True)]


def spent_s(process: psutil.Process) -> float:
    """CPU time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)

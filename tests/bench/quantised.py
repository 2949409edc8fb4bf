"""Weights rounded to INT8 against bfloat16 on CPU: speed, and what it does to the replies.

Each runs in processes of its own, `tests.bench.quantised_engine`, in turns.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from serving.quantise import quantise
from tests.bench import report
from tests.bench.decoding import MODEL
from tests.bench.quantised_engine import STREAMS, TEXTS
from tests.bench.real_model import fetch
from tests.product import ROOT

ROUNDS = 2


async def main() -> None:
    """Run it and write the section `quantised`."""
    model = await fetch(MODEL)
    with tempfile.TemporaryDirectory(prefix="ob-") as folder:
        rounded, replies = Path(folder) / "int8", Path(folder) / "replies.json"
        rounded.mkdir()
        await asyncio.to_thread(quantise, model, rounded)
        variants = {"bfloat16": model, "INT8": rounded}
        results: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
        for _ in range(ROUNDS):
            for name, weights in variants.items():
                results[name].append(await asyncio.to_thread(_measure, weights, replies))
    header = (
        "weights",
        *(f"tok/s at {streams}" for streams in STREAMS),
        *(f"perplexity, {name}" for name in TEXTS),
        "same next token",
        "facts kept",
    )
    load = report.load_average()
    note = (
        f"{MODEL}, {os.cpu_count()} threads, no drafts, means of {ROUNDS} rounds, load average after: {load}. Same "
        "next token: at each token of bfloat16's greedy replies. Facts: names and numbers of the given texts that are "
        "in the replies."
    )
    table = report.table(header, [_row(name, some) for name, some in results.items()])
    report.write_section("quantised", "Rounded weights on CPU", f"{note}\n\n{table}")


def _measure(folder: Path, replies: Path) -> dict[str, float]:
    argv = (sys.executable, "-m", "tests.bench.quantised_engine", str(folder), str(replies))
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{folder}: {done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _row(name: str, results: Sequence[dict[str, float]]) -> tuple[str, ...]:
    mean = {key: statistics.fmean(result[key] for result in results) for key in results[0]}
    return (
        name,
        *(f"{mean[f'tokens_per_s_{streams}']:.1f}" for streams in STREAMS),
        *(f"{mean[f'perplexity_{text}']:.2f}" for text in TEXTS),
        f"{mean['agreement']:.1%}",
        f"{mean['facts']:.0%}",
    )

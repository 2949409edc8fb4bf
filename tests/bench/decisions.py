"""What the router decides on messages it has not learned from, how fast on one core, and what corrections teach it.

The messages are those in `agents/data` that are not trained on. Time, memory and loading are measured in a process of
its own that may use one core.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.labelled import BOUNDARY, GOLDEN, GOLDEN_PLANS, HABITS, HELD_OUT, Labelled, read_labelled, read_records
from agents.learning import Learned
from agents.reader.plans import TASKS
from agents.reader.reader import DECLINED, Reading, shared_reader
from agents.scoring import COVERAGES, judged
from onebox.labels import Label
from tests.bench import report

TAUGHT = 40
SETS = {"golden": GOLDEN, "held out": HELD_OUT}


async def main() -> None:
    """Run it and write the section `decisions`."""
    reader = shared_reader()
    known = {name: read_labelled([path]) for name, path in SETS.items()}
    read = {name: [reader.read(item.messages) for item in items] for name, items in known.items()}
    text = [
        "### Right decisions",
        report.table(
            ("messages", "all", "hard half", "surest 80 %", "lowest task", "zh", "en", "ECE"),
            [_row(name, known[name], read[name]) for name in SETS],
        ),
        "### Accuracy against coverage",
        report.table(
            ("surest", *SETS),
            [
                (
                    f"{coverage:.0%}",
                    *("{:.1%} (from {:.2f})".format(*judged(known[n], read[n]).at_coverage(coverage)) for n in SETS),
                )
                for coverage in COVERAGES
            ],
        ),
        "### Plans",
        _plans(),
        "### What cannot be done",
        report.table(("language", "declined of 20", "wrongly declined of 20"), _boundary()),
        "### Forty corrections of one habit",
        report.table(
            ("habit", "before", "after", "other messages before", "after", "most lost by a task"), _habits(read)
        ),
        "### On one core",
        report.table(("", ""), _measured()),
    ]
    report.write_section("decisions", "Decisions of the router", "\n\n".join(text))


def _row(name: str, items: Sequence[Labelled], readings: Sequence[Reading]) -> tuple[str, ...]:
    found = judged(items, readings)
    tasks = {task: found.accuracy([item.task == task for item in items]) for task in TASKS}
    worst = min(tasks, key=lambda task: tasks[task])
    shares = [found.accuracy([item.lang == lang for item in items]) for lang in ("zh", "en")]
    return (
        f"{name}, {len(items)}",
        f"{found.accuracy():.1%}",
        f"{found.accuracy([item.hard for item in items]):.1%}",
        f"{found.at_coverage(0.8)[0]:.1%}",
        f"{worst} {tasks[worst]:.1%}",
        *(f"{share:.1%}" for share in shares),
        f"{found.calibration_error():.3f}",
    )


def _plans() -> str:
    items = read_labelled([GOLDEN_PLANS])
    plans = [shared_reader().read(item.messages).plan for item in items]
    several = [plan == item.plan for plan, item in zip(plans, items, strict=True) if len(item.plan) > 1]
    single = [len(plan) == 1 for plan, item in zip(plans, items, strict=True) if len(item.plan) == 1]
    exact = f"Exact: {sum(several)} of {len(several)} requests for several steps"
    return f"{exact}; kept single: {sum(single)} of {len(single)} decoys."


def _boundary() -> list[tuple[str, str, str]]:
    items = read_labelled([BOUNDARY])
    said = [
        (one := shared_reader().read(item.messages)).unsupported >= DECLINED and one.plan == ("chat",) for item in items
    ]
    rows = []
    for lang in [*dict.fromkeys(item.lang for item in items), "all"]:
        counts = []
        for wanted in (True, False):
            some = [
                told for told, item in zip(said, items, strict=True)
                if item.unsupported is wanted and lang in (item.lang, "all")
            ]  # fmt: skip
            counts.append(f"{sum(some)} of {len(some)}" if lang == "all" else str(sum(some)))
        rows.append((lang, *counts))
    return [(row[0], row[1], row[2]) for row in rows]


def _habits(read: dict[str, list[Reading]]) -> list[tuple[str, ...]]:
    records = read_records(HABITS)
    others, as_read = read_labelled(list(SETS.values())), [one for some in read.values() for one in some]
    rows = []
    for habit in dict.fromkeys(record["habit"] for record in records):
        items = [
            item for item, record in zip(read_labelled([HABITS]), records, strict=True) if record["habit"] == habit
        ]
        labels = [
            Label(item.id, float(index), "reroute", item.messages, item.plan, ("chat",), "tenant", None)
            for index, item in enumerate(items[:TAUGHT])
        ]
        learned, _ = Learned.of((), {"a": labels})
        rest = [shared_reader().read(item.messages) for item in items[TAUGHT:]]
        taught = [learned.taught(one, "a") for one in rest]
        after = [learned.taught(one, "a") for one in as_read]
        before_others, after_others = judged(others, as_read), judged(others, after)
        lost = {
            task: before_others.accuracy(chosen) - after_others.accuracy(chosen)
            for task in TASKS
            if (chosen := [item.task == task for item in others])
        }
        worst = max(lost, key=lambda task: lost[task])
        rows.append(
            (
                habit,
                f"{judged(items[TAUGHT:], rest).accuracy():.0%}",
                f"{judged(items[TAUGHT:], taught).accuracy():.0%}",
                f"{before_others.accuracy():.1%}",
                f"{after_others.accuracy():.1%}",
                f"{worst} {100 * lost[worst]:.1f} points",
            )
        )
    return rows


def _measured() -> list[tuple[str, str]]:
    code = f"import {__name__} as bench; bench.on_one_core()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return [
        ("a decision, median", f"{found['p50']:.1f} ms"),
        ("a decision, p95 (goal 10)", f"{found['p95']:.1f} ms"),
        ("loading (goal 2 s)", f"{found['load']:.2f} s"),
        ("memory of the models (goal 160 MB)", f"{found['memory']:.0f} MB"),
    ]


def on_one_core() -> None:
    """Print time and memory as JSON; for a process of its own."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    items = read_labelled([GOLDEN, HELD_OUT])
    before, began = _resident_kb(), time.perf_counter()
    reader = shared_reader()
    loaded = time.perf_counter() - began
    times = []
    for item in items[:20] + items:
        start = time.perf_counter()
        reader.read(item.messages)
        times.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(times[20:], [50, 95])
    memory = (_resident_kb() - before) / 1024
    sys.stdout.write(json.dumps({"p50": p50, "p95": p95, "load": loaded, "memory": memory}))


def _resident_kb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])

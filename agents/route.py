"""Routes messages from a file, without engine or store, or scores the router on a labelled file.

    python -m agents.route FILE.jsonl          one decision per line on standard output
    python -m agents.route --eval FILE.jsonl   accuracy, calibration, coverage and confusion

A line has `id` and `messages`; for `--eval` also `task`, `lang` and perhaps `hard`.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from agents.router import Router
from agents.router_features import TASKS
from onebox.events import Routed
from onebox.messages import Message

COVERAGES: Final = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)
BINS: Final = 10


def read_lines(path: Path) -> list[dict[str, object]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


async def decide(records: Sequence[dict[str, object]]) -> list[Routed]:
    """The router's decision for every record."""
    router = Router()
    await router.warm()
    return [await router.route(_messages(record)) for record in records]


def expected_calibration_error(confidence: Sequence[float], right: Sequence[bool]) -> float:
    """Mean gap of confidence and accuracy over ten equal bins, weighted by their size (Naeini et al. 2015)."""
    shares, hits = np.asarray(confidence), np.asarray(right, dtype=float)
    bins = np.minimum((shares * BINS).astype(int), BINS - 1)
    used = [bins == number for number in range(BINS) if (bins == number).any()]
    return float(sum(abs(hits[chosen].mean() - shares[chosen].mean()) * chosen.mean() for chosen in used))


def report(records: Sequence[dict[str, object]], decisions: Sequence[Routed]) -> str:
    """The scores as text."""
    truth = [str(record["task"]) for record in records]
    said = [decision.task for decision in decisions]
    right = [t == s for t, s in zip(truth, said, strict=True)]
    confidence = [max(decision.probabilities.values()) for decision in decisions]
    labels = [task for task in TASKS if task in truth]
    lines = [
        f"messages {len(records)}",
        f"accuracy {np.mean(right):.4f}",
        f"macro-F1 {np.mean([_f1(truth, said, task) for task in labels]):.4f}",
        f"ECE {expected_calibration_error(confidence, right):.4f}",
        "ms p50 {:.1f} p95 {:.1f}".format(*np.percentile([decision.ms for decision in decisions], [50, 95])),
        "coverage accuracy confidence",
    ]
    order = np.argsort([-share for share in confidence], kind="stable")
    for coverage in COVERAGES:
        kept = order[: max(1, round(coverage * len(order)))]
        lines.append(f"{coverage:8.2f} {np.mean([right[i] for i in kept]):8.4f} {confidence[kept[-1]]:10.3f}")
    lines.append("expected \\ said " + " ".join(f"{task:>9}" for task in TASKS) + "    right")
    for task in labels:
        row = [sum(t == task and s == other for t, s in zip(truth, said, strict=True)) for other in TASKS]
        lines.append(f"{task:<15} " + " ".join(f"{n:9d}" for n in row) + f"  {row[TASKS.index(task)] / sum(row):7.3f}")
    for key in ("lang", "hard"):
        groups = sorted({str(record[key]) for record in records if key in record})
        for group in groups:
            chosen = [i for i, record in enumerate(records) if str(record.get(key)) == group]
            lines.append(f"{key} {group}: {np.mean([right[i] for i in chosen]):.4f} of {len(chosen)}")
    return "\n".join(lines) + "\n"


def _f1(truth: Sequence[str], said: Sequence[str], task: str) -> float:
    hit = sum(t == s == task for t, s in zip(truth, said, strict=True))
    return 2 * hit / (truth.count(task) + said.count(task)) if hit else 0.0


def _messages(record: dict[str, object]) -> tuple[Message, ...]:
    found = record["messages"]
    if not isinstance(found, list):
        raise ValueError(f"Line {record.get('id')!r} has no list of messages.")
    return tuple(Message(message["role"], message["content"]) for message in found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Route or score one file."""
    parser = argparse.ArgumentParser(prog="python -m agents.route", description="Routes the messages of a JSONL file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--eval", action="store_true", help="score against the labels in the file")
    chosen = parser.parse_args(arguments)
    try:
        records = read_lines(chosen.file)
        decisions = asyncio.run(decide(records))
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"Cannot route {str(chosen.file)!r}: {error}. Give a JSONL file with `id` and `messages`.\n")
        return 2
    if chosen.eval:
        sys.stdout.write(report(records, decisions))
        return 0
    for record, decision in zip(records, decisions, strict=True):
        line = {
            "id": record.get("id"),
            "task": decision.task,
            "probabilities": {task: round(share, 4) for task, share in decision.probabilities.items()},
            "plan": list(decision.plan),
            "tier": decision.tier,
            "ms": decision.ms,
        }
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

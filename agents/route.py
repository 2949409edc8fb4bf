"""Routes messages from a file, without engine or store, or scores the router on a labelled file.

    python -m agents.route FILE.jsonl          one decision per line on standard output
    python -m agents.route --eval FILE.jsonl   accuracy, calibration, coverage and confusion

A line has `id` and `messages`; for `--eval` also `task` or `plan`, and perhaps `lang`, `hard` and `unsupported`.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from agents.labelled import read_records
from agents.reader.plans import TASKS
from agents.router import Router
from agents.scoring import COVERAGES, Judged
from onebox.events import Routed
from onebox.messages import Message, Role


async def decide(talks: Sequence[Sequence[Message]]) -> list[Routed]:
    """The router's decision for every conversation."""
    router = Router()
    await router.warm()
    return [await router.route(messages) for messages in talks]


def report(records: Sequence[dict[str, object]], plans: Sequence[tuple[str, ...]], decisions: Sequence[Routed]) -> str:
    """The scores as text; `plans` are the right ones."""
    judged = Judged(
        [plan[0] for plan in plans],
        [decision.task for decision in decisions],
        [decision.probabilities[decision.task] for decision in decisions],
    )
    truth, said = judged.expected, judged.said
    labels = [task for task in TASKS if task in truth]
    lines = [
        f"messages {len(records)}",
        f"accuracy {judged.accuracy():.4f}",
        f"macro-F1 {judged.macro_f1():.4f}",
        f"ECE {judged.calibration_error():.4f}",
        "ms p50 {:.1f} p95 {:.1f}".format(*np.percentile([decision.ms for decision in decisions], [50, 95])),
    ]
    exact = [decision.plan == plan for decision, plan in zip(decisions, plans, strict=True)]
    for name, chosen in (
        ("plans of several steps, exact", [len(plan) > 1 for plan in plans]),
        ("single, kept single", [len(plan) == 1 for plan in plans]),
    ):
        kept = [
            right if len(plan) > 1 else len(decision.plan) == 1
            for right, plan, decision, take in zip(exact, plans, decisions, chosen, strict=True)
            if take
        ]
        if kept:
            lines.append(f"{name}: {sum(kept)} of {len(kept)}")
    lines.append("coverage accuracy confidence")
    for coverage in COVERAGES:
        accuracy, least = judged.at_coverage(coverage)
        lines.append(f"{coverage:8.2f} {accuracy:8.4f} {least:10.3f}")
    lines.append("expected \\ said " + " ".join(f"{task:>9}" for task in TASKS) + "    right")
    for task in labels:
        row = [sum(t == task and s == other for t, s in zip(truth, said, strict=True)) for other in TASKS]
        lines.append(f"{task:<15} " + " ".join(f"{n:9d}" for n in row) + f"  {row[TASKS.index(task)] / sum(row):7.3f}")
    for key in ("lang", "hard", "unsupported"):
        for group in sorted({str(record[key]) for record in records if key in record}):
            chosen = [str(record.get(key)) == group for record in records]
            declined = np.mean([decision.declined for decision, take in zip(decisions, chosen, strict=True) if take])
            lines.append(f"{key} {group}: {judged.accuracy(chosen):.4f} of {sum(chosen)}, declined {declined:.4f}")
    return "\n".join(lines) + "\n"


def _messages(record: dict[str, object]) -> tuple[Message, ...]:
    found = record.get("messages")
    if not isinstance(found, list) or not all(map(_is_message, found)):
        raise ValueError(f"the record {record.get('id')!r} has no list `messages` of roles and contents")
    return tuple(Message(message["role"], message["content"]) for message in found)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and value.get("role") in get_args(Role) and isinstance(value.get("content"), str)


def _label(record: dict[str, object]) -> tuple[str, ...]:
    plan = record.get("plan") or [record.get("task")]
    if not isinstance(plan, list) or not all(isinstance(task, str) for task in plan):
        raise ValueError(f"the record {record.get('id')!r} has no right `task` or `plan` to score against")
    return tuple(map(str, plan))


def main(arguments: Sequence[str] | None = None) -> int:
    """Route or score one file."""
    parser = argparse.ArgumentParser(prog="python -m agents.route", description="Routes the messages of a JSONL file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--eval", action="store_true", help="score against the labels in the file")
    chosen = parser.parse_args(arguments)
    try:
        records = read_records(chosen.file)
        talks = [_messages(record) for record in records]
        plans = [_label(record) for record in records] if chosen.eval else []
        if not records:
            raise ValueError("there is nothing in it")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"Cannot route {str(chosen.file)!r}: {error}. Give a JSONL file with `id` and `messages`.\n")
        return 2
    decisions = asyncio.run(decide(talks))
    if chosen.eval:
        sys.stdout.write(report(records, plans, decisions))
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

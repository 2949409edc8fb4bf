"""Trains the router's head on the messages in `agents/data` and writes `agents/data/router.npz`.

    python -m agents.train_router            train and write
    python -m agents.train_router --check    cross-validate only, print accuracy and calibration

How it does on the golden messages, which it does not learn from, goes into `agents/data/router_quality.json`. The same
data gives the same files. scikit-learn is needed here and nowhere at run time.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]  # ships no types
from scipy.sparse import csr_matrix, hstack  # type: ignore[import-untyped]  # ships no types
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]  # ships no types
from sklearn.model_selection import StratifiedKFold  # type: ignore[import-untyped]  # ships no types

from agents.encoder import Encoder
from agents.instruction import Instruction, split_instruction
from agents.router_features import BUCKETS, TASKS, Features, embedded_text, extract, follow_up
from agents.router_head import QUALITY, WEIGHTS, Head, softmax
from onebox.messages import Message

DATA: Final = Path(__file__).parent / "data"
TRAINING: Final = ("zh.jsonl", "en.jsonl", "other.jsonl", "plans.jsonl")
GOLDEN: Final = DATA / "golden.jsonl"
SUREST: Final = 0.8
REGULARIZATION: Final = 0.3
FOLDS: Final = 4


@dataclass(frozen=True, slots=True)
class Labelled:
    """A conversation whose last message was labelled by hand."""

    id: str
    messages: tuple[Message, ...]
    task: str
    lang: str
    hard: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """A labelled message with its features, and those of the turn before where there is one."""

    item: Labelled
    features: Features
    instruction: Instruction
    previous: Features | None


def read_labelled(paths: Sequence[Path]) -> list[Labelled]:
    """The labelled messages in `paths`, in order."""
    found = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            messages = tuple(Message(m["role"], m["content"]) for m in record["messages"])
            task = record["task"] if "task" in record else record["plan"][0]
            found.append(Labelled(record["id"], messages, task, record["lang"], bool(record.get("hard", False))))
    return found


def training_data() -> list[Labelled]:
    """The labelled messages the shipped head is trained on; of a plan the first step is the label."""
    return read_labelled([DATA / name for name in TRAINING])


def prepare(items: Sequence[Labelled], encoder: Encoder) -> list[Prepared]:
    """The features of every item."""
    chains: list[list[tuple[tuple[Message, ...], Instruction]]] = []
    for item in items:
        asked = [index for index, message in enumerate(item.messages) if message.role == "user"][-2:]
        chains.append([(item.messages[: i + 1], split_instruction(item.messages[i].text)) for i in asked])
    vectors = iter(encoder.embed([embedded_text(instruction) for chain in chains for _, instruction in chain]))
    prepared = []
    for item, chain in zip(items, chains, strict=True):
        features = [extract(messages, instruction, next(vectors)) for messages, instruction in chain]
        prepared.append(Prepared(item, features[-1], chain[-1][1], features[-2] if len(features) > 1 else None))
    return prepared


def fit(items: Sequence[Prepared]) -> Head:
    """A head for `items`; its temperature is 1."""
    return _fit(items, _previous(_fit(items, [None] * len(items)), items))


def predict(head: Head, items: Sequence[Prepared]) -> NDArray[np.float32]:
    """Unscaled scores of every item."""
    rows = [
        head.logits(item.features, follow_up(previous, item.item.messages, item.instruction))
        for item, previous in zip(items, _previous(head, items), strict=True)
    ]
    return np.stack(rows)


def cross_validate(items: Sequence[Prepared]) -> NDArray[np.float32]:
    """Unscaled scores of every item by a head that has not seen it."""
    labels = _labels(items)
    scores = np.zeros((len(items), len(TASKS)), dtype=np.float32)
    previous = _previous(_fit(items, [None] * len(items)), items)
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(labels, labels):
        head = _fit([items[i] for i in train], [previous[i] for i in train])
        scores[test] = predict(head, [items[i] for i in test])
    return scores


def temperature(scores: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The divisor of the scores that makes the labels likeliest."""

    def loss(log_t: float) -> float:
        scaled = scores / np.exp(log_t)
        norm = np.log(np.exp(scaled - scaled.max(1, keepdims=True)).sum(1)) + scaled.max(1)
        return float((norm - scaled[np.arange(len(labels)), labels]).mean())

    found: Any = minimize_scalar(loss, bounds=(-2, 2), method="bounded")  # scipy's type has no fields
    return round(float(np.exp(found.x)), 3)


def train(items: Sequence[Labelled], encoder: Encoder) -> tuple[Head, float]:
    """The head for `items`, calibrated, and its cross-validated accuracy."""
    prepared = prepare(items, encoder)
    labels = _labels(prepared)
    scores = cross_validate(prepared)
    head = fit(prepared)
    accuracy = float((scores.argmax(1) == labels).mean())
    return Head(head.grams, head.dense, head.bias, temperature(scores, labels)), accuracy


def quality(head: Head, encoder: Encoder) -> dict[str, object]:
    """How a head does on the golden messages: shares right of all, of the surest four fifths, by task and language."""
    golden = prepare(read_labelled([GOLDEN]), encoder)
    scores, labels = predict(head, golden) / head.temperature, _labels(golden)
    shares = np.stack([softmax(row) for row in scores])
    right = shares.argmax(1) == labels
    surest = np.argsort(-shares.max(1), kind="stable")[: round(SUREST * len(golden))]
    by_task = {task: right[labels == index] for index, task in enumerate(TASKS)}
    by_language = {
        lang: right[[item.item.lang == lang for item in golden]]
        for lang, _ in Counter(item.item.lang for item in golden).most_common()
    }
    return {
        "messages": len(golden),
        "routed_right": _share(right),
        "surest_right": _share(right[surest]),
        "tasks": {task: _share(some) for task, some in by_task.items()},
        "languages": {lang: _share(some) for lang, some in by_language.items()},
    }


def _share(right: NDArray[np.bool_]) -> float:
    return round(float(right.mean()), 3)


def _labels(items: Sequence[Prepared]) -> NDArray[np.int64]:
    return np.asarray([TASKS.index(item.item.task) for item in items], dtype=np.int64)


def _previous(head: Head, items: Sequence[Prepared]) -> list[NDArray[np.float32] | None]:
    return [
        None if item.previous is None else softmax(head.logits(item.previous, follow_up(None, (), item.instruction)))
        for item in items
    ]


def _fit(items: Sequence[Prepared], previous: Sequence[NDArray[np.float32] | None]) -> Head:
    rows, columns, values = [], [], []
    for row, item in enumerate(items):
        for gram in item.features.grams:
            rows.append(row)
            columns.append(gram.bucket)
            values.append(gram.sign * item.features.value)
    sparse = csr_matrix((values, (rows, columns)), shape=(len(items), BUCKETS), dtype=np.float64)
    extras = [follow_up(p, item.item.messages, item.instruction) for item, p in zip(items, previous, strict=True)]
    dense = np.stack([np.concatenate([item.features.dense, extra]) for item, extra in zip(items, extras, strict=True)])
    matrix = hstack([sparse, csr_matrix(dense.astype(np.float64))]).tocsr()
    model = LogisticRegression(C=REGULARIZATION, max_iter=200, tol=1e-3).fit(matrix, _labels(items))
    weights = np.asarray(model.coef_.T, dtype=np.float32)
    return Head(weights[:BUCKETS], weights[BUCKETS:], np.asarray(model.intercept_, dtype=np.float32), 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or with `--check` cross-validate only."""
    parser = argparse.ArgumentParser(prog="python -m agents.train_router", description="Trains the router's head.")
    parser.add_argument("--check", action="store_true", help="cross-validate, write nothing")
    chosen = parser.parse_args(arguments)
    items = training_data()
    encoder = Encoder()
    head, accuracy = train(items, encoder)
    sys.stdout.write(
        f"{len(items)} messages, cross-validated accuracy {accuracy:.3f}, temperature {head.temperature}\n"
    )
    if not chosen.check:
        head.save()
        QUALITY.write_text(json.dumps(quality(head, encoder), indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"wrote {WEIGHTS} and {QUALITY}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

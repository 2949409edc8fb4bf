"""Trains the router's reader on the messages in `agents/data`: `make router`.

    python -m agents.train_router            train, calibrate and write
    python -m agents.train_router --check    only say whether the shipped file is what the data gives, judging by its
                                             first steps

Written are `reader.npz` (what training changed), `anchors.npz` (what corrections are weighed against) and
`router_quality.json` (how it does on the golden messages, which it does not learn from; only the number that turns the
first step's scores into shares is fitted there). torch is needed here and nowhere at run time.
"""

import argparse
import hashlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from agents.golden import ANCHORS, write_anchors
from agents.labelled import DATA, GOLDEN, TRAINING, Labelled, read_labelled, training_data
from agents.reader.net import Net
from agents.reader.pieces import Pieces
from agents.reader.plans import TASKS
from agents.reader.ranges import ranges
from agents.reader.reader import QUALITY, Reader, Reading
from agents.reader.source import Source
from agents.reader.train import FIRST_STEPS, examples, fresh, train
from agents.reader.weights import WEIGHTS, Calibration, Weights, stored
from agents.scoring import SUREST, judged

LIKE: Final = 0.15  # losses of another processor differ by no more
ANCHORS_KEPT: Final = 1500
CALIBRATED_ON: Final = 1500  # training messages that say where what cannot be done begins
RANGED: Final = 64  # of so many training messages one is read to find how large numbers get
LOOKED_AT: Final = 32  # of so many one is in the short training that shows whether weights are what the data gives
VALID_DECLINED: Final = 0.005  # of those that can be answered, at most


def digest() -> str:
    """What the training messages are."""
    whole = hashlib.sha256()
    for name in TRAINING:
        whole.update((DATA / name).read_bytes())
    return whole.hexdigest()


def first_losses() -> list[float]:
    """The losses of the first steps of training on some of the data as it is."""
    source = Source()
    return train(fresh(source), examples(Pieces(source), training_data()[::LOOKED_AT]), steps=FIRST_STEPS)


def quality(items: Sequence[Labelled], readings: Sequence[Reading]) -> dict[str, object]:
    """How the reader does: shares right of all, of the surest four fifths, by task and language."""
    found = judged(items, readings)
    languages = Counter(item.lang for item in items)
    return {
        "messages": len(items),
        "routed_right": round(found.accuracy(), 3),
        "surest_right": round(found.at_coverage(SUREST)[0], 3),
        "tasks": {task: round(found.accuracy([item.task == task for item in items]), 3) for task in TASKS},
        "languages": {
            lang: round(found.accuracy([item.lang == lang for item in items]), 3) for lang, _ in languages.most_common()
        },
    }


def divisor(readings: Sequence[Reading], items: Sequence[Labelled]) -> float:
    """The divisor of the first step's scores that makes the labels likeliest."""
    scores = np.log(np.stack([one.probabilities for one in readings]) + 1e-12)
    labels = np.array([TASKS.index(item.task) for item in items])

    def loss(value: float) -> float:
        scaled = scores / value
        norm = np.log(np.exp(scaled - scaled.max(1, keepdims=True)).sum(1)) + scaled.max(1)
        return float((norm - scaled[np.arange(len(labels)), labels]).mean())

    candidates = np.geomspace(0.3, 3, 200)
    losses = [loss(float(value)) for value in candidates]
    return round(float(candidates[int(np.argmin(losses))]), 3)


def unsupported_bias(readings: Sequence[Reading], items: Sequence[Labelled]) -> float:
    """What is added to the score of what cannot be done, so that hardly any message that can be is declined."""
    shares = np.array([one.unsupported for one, item in zip(readings, items, strict=True) if item.unsupported is False])
    scores = np.log(shares / (1 - shares))
    return round(-float(np.quantile(scores, 1 - VALID_DECLINED)), 3)


def write(net: Net, source: Source) -> None:
    """Calibrate what was trained and write all files."""
    kept = stored(net.arrays(), source)
    seen = examples(Pieces(source), training_data()[::RANGED])
    kept |= {name: value.astype(np.float16) for name, value in ranges(net, seen).items() if ".out." not in name}
    kept["digest"], kept["losses"] = np.array(digest()), np.array(first_losses(), np.float32)
    kept["calibration"] = np.array(Calibration().numbers(), np.float32)
    reader = Reader(Weights(kept), source)
    golden, known = read_labelled([GOLDEN]), training_data()
    random.Random(0).shuffle(known)
    first = divisor([reader.read(item.messages) for item in golden], golden)
    some = known[:CALIBRATED_ON]
    bias = unsupported_bias([reader.read(item.messages) for item in some], some)
    kept["calibration"] = np.array(Calibration(first, bias).numbers(), np.float32)
    np.savez_compressed(WEIGHTS, allow_pickle=False, **kept)
    write_measured(Reader(Weights(kept), source))


def write_measured(reader: Reader) -> None:
    """Write what is measured with the weights: quality and anchors."""
    golden, known = read_labelled([GOLDEN]), training_data()
    random.Random(0).shuffle(known)
    sets = {"training": known[:ANCHORS_KEPT], "golden": golden}
    readings = {name: [reader.read(item.messages) for item in items] for name, items in sets.items()}
    tasks = {name: [item.task for item in items] for name, items in sets.items()}
    write_anchors(readings, tasks)
    QUALITY.write_text(json.dumps(quality(golden, readings["golden"]), indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or with `--check` compare the first steps only."""
    parser = argparse.ArgumentParser(prog="python -m agents.train_router", description="Trains the router's reader.")
    parser.add_argument("--check", action="store_true", help="compare the first steps of training, write nothing")
    chosen = parser.parse_args(arguments)
    if chosen.check:
        stored = Weights.load()
        same = str(stored.arrays["digest"]) == digest() and np.allclose(stored["losses"], first_losses(), LIKE, LIKE)
        sys.stdout.write("The shipped weights are what the data gives.\n" if same else "They are NOT what it gives.\n")
        return 0 if same else 1
    began, source = time.monotonic(), Source()
    net, pieces = fresh(source, "cuda" if torch.cuda.is_available() else "cpu"), Pieces(source)

    def told(_: Net, turn: int) -> None:
        sys.stdout.write(f"round {turn + 1} done after {time.monotonic() - began:.0f} s\n")
        sys.stdout.flush()

    train(net, examples(pieces, training_data()), after=told)
    write(net, source)
    sys.stdout.write(f"wrote {WEIGHTS}, {ANCHORS} and {QUALITY}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

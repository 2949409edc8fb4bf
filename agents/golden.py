"""The golden messages as the shipped weights see them: whatever changes decisions later is tried on these first.

`anchors.npz` has them, with a sample of the training messages; `agents.train_router` writes it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agents.reader.plans import TASKS
from agents.reader.reader import Reading
from agents.reader.source import Floats
from agents.reader.weights import WEIGHTS

HARM: Final = 0.005  # of the golden messages, which nothing that is learned later may cost
TASK_HARM: Final = 0.01  # of those of one task: less than one message of seventy
ANCHORS: Final = WEIGHTS.with_name("anchors.npz")


@dataclass(frozen=True, slots=True)
class Anchors:
    """Labelled messages: instructions, states (`WIDTH` numbers each), logarithms of the head's shares, right tasks."""

    texts: tuple[str, ...]
    vectors: Floats
    scores: Floats
    tasks: NDArray[np.int64]

    def cost(self, taken: NDArray[np.floating]) -> float:
        """The share of the messages that are told right now and would not be if something else had these shares."""
        right = self.scores.argmax(1) == self.tasks
        lost = taken > np.exp(self.scores).max(1) * (1 - taken)
        return float((right & lost).mean())

    def harmed(self, offsets: Floats, given: Floats | float = 0.0) -> bool:
        """Whether such scores cost more messages than those of `given`, of all or of one task, than they may."""
        before = (self.scores + given).argmax(1) == self.tasks
        lost = before.astype(int) - ((self.scores + offsets).argmax(1) == self.tasks)
        tasks = [lost[self.tasks == task].mean() for task in np.unique(self.tasks)]
        return bool(lost.mean() > HARM or max(tasks) > TASK_HARM)


@cache
def golden() -> Anchors:
    """The golden messages."""
    return _anchors("golden")


@cache
def training() -> Anchors:
    """The sample of the training messages."""
    return _anchors("training")


def _anchors(name: str) -> Anchors:
    with np.load(ANCHORS, allow_pickle=False) as stored:
        return Anchors(
            tuple(json.loads(stored[f"{name}.texts"].tobytes())),
            np.asarray(stored[f"{name}.vectors"], np.float32),
            np.asarray(stored[f"{name}.scores"], np.float32),
            np.asarray(stored[f"{name}.tasks"], np.int64),
        )


def write_anchors(readings: Mapping[str, Sequence[Reading]], tasks: Mapping[str, Sequence[str]]) -> None:
    """Write the readings of the `golden` and the `training` messages."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, some in readings.items():
        texts = json.dumps([one.instruction.text for one in some], ensure_ascii=False).encode()
        arrays[f"{name}.texts"] = np.frombuffer(texts, np.uint8)
        arrays[f"{name}.vectors"] = np.stack([one.vector for one in some]).astype(np.float16)
        arrays[f"{name}.scores"] = np.log(np.stack([one.probabilities for one in some]) + 1e-9).astype(np.float16)
        arrays[f"{name}.tasks"] = np.array([TASKS.index(task) for task in tasks[name]], np.int8)
    np.savez_compressed(ANCHORS, allow_pickle=False, **arrays)

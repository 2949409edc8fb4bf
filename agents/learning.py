"""What users' corrections teach the head at once: a small model on top of it, for everybody and for each tenant.

It is logistic regression in the head's own space and the instruction's words, with the head's scores as its offset
(some tenths of a second for hundreds of labels). Anchors, messages of the training data, hold the head in its place
elsewhere, and what would cost the golden messages more than half a point is not learned.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from agents.golden import golden, training
from agents.reader.plans import COUNT, TASKS, softmax
from agents.reader.reader import Reading, shared_reader
from agents.reader.source import Floats
from onebox.labels import Label
from onebox.messages import Message

LATEST: Final = 500  # labels that are used, of a tenant and of those for everybody
LESSONS: Final = 256  # kept, so that a label teaches its own tenant anew and no other
PARTS: Final = 16  # where labels do harm they are tried in parts as small as this share of them
BUCKETS: Final = 4096
STATE_SCALE: Final = 1.0
WORDS_SCALE: Final = 1.0
LABEL_WEIGHT: Final = 2.0
RIDGE: Final = 0.02
STEPS: Final = 80
STRENGTHS: Final = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4)
SAME: Final = 0.93  # likeness from which a corrected plan is taken for a message's own
_RUN: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]+|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_OLD: Final = f"Only the newest {LATEST} labels are used."
_HARMFUL: Final = "It would make other messages worse: the golden messages are tried each time."
_PLUGIN: Final = "Its first task is a plugin's, whose own examples decide about it."


@dataclass(frozen=True, slots=True)
class _Taught:
    """One model: what a feature adds to each task's score, and the plans of labels that change the number of steps."""

    weights: Floats
    likes: Floats
    plans: tuple[tuple[str, ...], ...]

    def plan(self, features: Floats) -> tuple[str, ...]:
        """The corrected plan of a message that is all but the same."""
        if not self.plans:
            return ()
        likeness = self.likes @ features / (STATE_SCALE**2 + WORDS_SCALE**2)
        best = int(likeness.argmax())
        return self.plans[best] if likeness[best] >= SAME else ()


class Learned:
    """The models in use. A value: what is learned anew comes as another one."""

    def __init__(self, shared: _Taught | None = None, own: Mapping[str, _Taught] | None = None) -> None:
        self._shared = shared
        self._own = dict(own or {})

    @classmethod
    def of(cls, shared: Sequence[Label], own: Mapping[str, Sequence[Label]]) -> tuple["Learned", dict[str, str]]:
        """What labels teach, and for each that is not used the reason, by its id."""
        everybody, refused = _lesson((), tuple(shared))
        reasons = dict(refused)
        used = tuple(label for label in shared if label.id not in reasons)
        tenants = {}
        for tenant, labels in own.items():
            taught, refused = _lesson(used, tuple(labels))
            reasons |= refused
            if taught is not None:
                tenants[tenant] = taught
        return cls(everybody, tenants), reasons

    def taught(self, reading: Reading, tenant: str) -> Reading:
        """The reading as corrections would have it."""
        model = self._own.get(tenant, self._shared)
        if model is None:
            return reading
        features = features_of(reading.vector, reading.instruction.text)
        scores = np.log(reading.probabilities + 1e-9) + features @ model.weights
        probabilities = softmax(np.asarray(scores, np.float32))
        task = TASKS[int(probabilities.argmax())]
        if (known := model.plan(features)) and known[0] == task:
            plan = known
        elif task != reading.task:
            plan = (task,)
        else:
            return replace(reading, probabilities=probabilities)
        return replace(reading, probabilities=probabilities, plan=plan, chain=plan, several=float(len(plan) > 1))


def features_of(vector: Floats, instruction: str) -> Floats:
    """A message's state and its instruction's words, each part of one length."""
    words = np.zeros(BUCKETS, dtype=np.float32)
    runs = [match.group() for match in _RUN.finditer(instruction)]
    for run in runs:
        if "\u3040" <= run[0] <= "\u9fff":
            for size in (1, 2, 3, 4):
                for at in range(len(run) - size + 1):
                    _count(words, run[at : at + size])
        else:
            _count(words, run)
    for before, after in pairwise(runs):
        _count(words, f"{before[-3:]} {after[:3]}")
    state = vector - _middle()
    state = state * (STATE_SCALE / (float(np.linalg.norm(state)) + 1e-9))
    words = words * (WORDS_SCALE / (float(np.linalg.norm(words)) + 1e-9))
    return np.asarray(np.concatenate([state, words]), np.float32)


def _count(words: Floats, piece: str) -> None:
    code = crc32(piece.encode())
    words[code & (BUCKETS - 1)] += 1.0 if code & 0x80000000 else -1.0


@lru_cache(maxsize=LESSONS)
def _lesson(given: tuple[Label, ...], labels: tuple[Label, ...]) -> tuple[_Taught | None, Mapping[str, str]]:
    """The model of `given`, known to do no harm, and of as many of `labels` as do none beside them.

    Also why others of `labels` are not used, by their ids.
    """
    reasons = {label.id: _PLUGIN for label in labels if label.plan[0] not in TASKS}
    usable = sorted((label for label in labels if label.id not in reasons), key=lambda label: label.created)
    reasons |= {label.id: _OLD for label in usable[:-LATEST]}
    known = [*given, *usable[-LATEST:]]
    if not known:
        return None, reasons
    lesson = _Lesson.of(known)
    # Fitted once for all tenants, who have the same labels of others.
    others = _lesson((), given)[0] if given else None
    kept, weights = lesson.harmless(len(given), others.weights if others is not None else None)
    reasons |= {label.id: _HARMFUL for index, label in enumerate(known) if index not in kept}
    if weights is None:
        return None, reasons
    # What says nothing of what was decided before, as over the API, may take a step away too.
    several = [index for index in kept if len(known[index].plan) > 1 or len(known[index].was) != 1]
    return _Taught(weights, lesson.features[several], tuple(known[index].plan for index in several)), reasons


@dataclass(frozen=True, slots=True)
class _Lesson:
    """Labels, and how like they are to one another and to the anchors."""

    features: Floats
    scores: Floats
    tasks: NDArray[np.int64]
    likeness: Floats

    @classmethod
    def of(cls, labels: Sequence[Label]) -> "_Lesson":
        rows = [_row(label.messages) for label in labels]
        features = np.stack([row[0] for row in rows]).astype(np.float32)
        tasks = np.array([TASKS.index(label.plan[0]) for label in labels])
        likeness = features @ np.concatenate([features, _training_features()]).T
        return cls(features, np.stack([row[1] for row in rows]), tasks, likeness)

    def harmless(self, given: int, weights: Floats | None) -> tuple[list[int], Floats | None]:
        """The first `given` labels, which teach `weights`, with those of the others that do no harm; what all teach.

        All at once, as a rule; where that does harm half of them, and so on: one bad label takes few others with it.
        """
        kept = list(range(given))
        there = _golden_features() @ weights if weights is not None else 0.0
        waiting = [list(range(given, len(self.tasks)))]
        least = max(1, len(waiting[0]) // PARTS)
        while waiting:
            part = waiting.pop()
            if part and (found := self._weights([*kept, *part], there)) is not None:
                kept, weights = [*kept, *part], found
            elif len(part) > least:
                middle = len(part) // 2
                waiting += [part[middle:], part[:middle]]
        return kept, weights

    def _weights(self, chosen: list[int], there: Floats | float = 0.0) -> Floats | None:
        """What some labels teach, weakened until it does no more harm than is `there`; None where it always does."""
        weights = self._fit(chosen)
        moved = _golden_features() @ weights
        for strength in STRENGTHS:
            if not golden().harmed(strength * moved, there):
                return np.asarray(strength * weights, np.float32)
        return None

    def _fit(self, chosen: list[int]) -> Floats:
        """The weights that some labels want, and the anchors, which want what the head says."""
        anchors, everyone, count = training(), len(self.tasks), len(chosen)
        across = self.likeness[chosen, everyone:]
        likeness = np.block([[self.likeness[np.ix_(chosen, chosen)], across], [across.T, _training_likeness()]])
        scores = np.concatenate([self.scores[chosen], anchors.scores])
        right = np.concatenate([np.eye(COUNT, dtype=np.float32)[self.tasks[chosen]], softmax(anchors.scores)])
        importance = np.ones((len(right), 1), np.float32)
        importance[:count] = LABEL_WEIGHT
        # Nesterov's steps, as long as half the largest curvature of the logistic loss allows.
        rate = 1.0 / (0.5 * LABEL_WEIGHT * _largest(likeness) + RIDGE)
        duals = ahead = np.zeros_like(right)
        for step in range(STEPS):
            shares = softmax(np.asarray(scores + likeness @ ahead, np.float32))
            error = importance * (shares - right) + RIDGE * ahead
            following = ahead - rate * error
            ahead, duals = following + step / (step + 3) * (following - duals), following
        taught = self.features[chosen].T @ duals[:count] + _training_features().T @ duals[count:]
        return np.asarray(taught, np.float32)


def _largest(likeness: Floats) -> float:
    """Not less than the largest eigenvalue of a symmetric matrix: by ten multiplications, and a tenth on top."""
    vector = np.ones(len(likeness), np.float32)
    for _ in range(10):
        vector = likeness @ (vector / np.linalg.norm(vector))
    return 1.1 * float(np.linalg.norm(vector))


@lru_cache(maxsize=2 * LATEST)
def _row(messages: tuple[Message, ...]) -> tuple[NDArray[np.float16], Floats]:
    reading = shared_reader().read(messages)
    features = features_of(reading.vector, reading.instruction.text).astype(np.float16)
    return features, np.asarray(np.log(reading.probabilities + 1e-9), np.float32)


@cache
def _middle() -> Floats:
    """The mean state, which says nothing about a message."""
    return np.asarray(training().vectors.mean(0), np.float32)


@cache
def _golden_features() -> Floats:
    return np.stack([features_of(*pair) for pair in zip(golden().vectors, golden().texts, strict=True)])


@cache
def _training_features() -> Floats:
    return np.stack([features_of(*pair) for pair in zip(training().vectors, training().texts, strict=True)])


@cache
def _training_likeness() -> Floats:
    return np.asarray(_training_features() @ _training_features().T, np.float32)

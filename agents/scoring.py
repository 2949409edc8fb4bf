"""How well shares fit labels: accuracy, calibration, accuracy against coverage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agents.labelled import Labelled
from agents.reader.reader import Reading

BINS: Final = 10
COVERAGES: Final = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)
SUREST: Final = 0.8


@dataclass(frozen=True, slots=True)
class Judged:
    """What was expected of some messages, what was said, and with what share."""

    expected: Sequence[str]
    said: Sequence[str]
    confidence: Sequence[float]

    @classmethod
    def of(cls, expected: Sequence[str], shares: Sequence[Mapping[str, float]]) -> "Judged":
        """Each message's likeliest task."""
        said = [max(some, key=lambda task: some[task]) for some in shares]
        return cls(expected, said, [max(some.values()) for some in shares])

    @property
    def right(self) -> NDArray[np.bool_]:
        """Of each message, whether it was told right."""
        return np.array([a == b for a, b in zip(self.expected, self.said, strict=True)])

    def accuracy(self, chosen: Sequence[bool] | None = None) -> float:
        """The share told right, of all or of some."""
        right = self.right if chosen is None else self.right[np.asarray(chosen, bool)]
        return float(right.mean())

    def at_coverage(self, coverage: float) -> tuple[float, float]:
        """The accuracy on the surest part, and the share of its least sure message."""
        order = np.argsort([-share for share in self.confidence], kind="stable")
        kept = order[: max(1, round(coverage * len(order)))]
        return float(self.right[kept].mean()), self.confidence[kept[-1]]

    def macro_f1(self) -> float:
        """The mean F1 of the tasks that were expected."""
        return float(np.mean([self._f1(task) for task in sorted(set(self.expected))]))

    def calibration_error(self) -> float:
        """`expected_calibration_error` of the shares."""
        return expected_calibration_error(self.confidence, self.right.tolist())

    def _f1(self, task: str) -> float:
        hit = sum(a == b == task for a, b in zip(self.expected, self.said, strict=True))
        return 2 * hit / (list(self.expected).count(task) + list(self.said).count(task)) if hit else 0.0


def judged(items: Sequence[Labelled], readings: Sequence[Reading]) -> Judged:
    """How readings fit labels."""
    return Judged.of([item.task for item in items], [one.shares for one in readings])


def expected_calibration_error(confidence: Sequence[float], right: Sequence[bool]) -> float:
    """Mean gap of confidence and accuracy over ten equal bins, weighted by their size (Naeini et al. 2015)."""
    shares, hits = np.asarray(confidence), np.asarray(right, dtype=float)
    bins = np.minimum((shares * BINS).astype(int), BINS - 1)
    used = [bins == number for number in range(BINS) if (bins == number).any()]
    return float(sum(abs(hits[chosen].mean() - shares[chosen].mean()) * chosen.mean() for chosen in used))

"""Plans in numbers: a first task, then at most two more, each given those before it."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

TASKS: Final = ("summarize", "translate", "qa", "reason", "write", "chat")
SLOTS: Final = 3
COUNT: Final = len(TASKS)
STOP: Final = COUNT  # no further step
ANSWERS: Final = COUNT + 2 * (COUNT + 1) + 1
UNSUPPORTED: Final = ANSWERS - 1
COLUMNS: Final = (slice(0, COUNT), slice(COUNT, 2 * COUNT + 1), slice(2 * COUNT + 1, 3 * COUNT + 2))
POOLS: Final = SLOTS + 1
# Which pool of the text each answer looks at.
POOL_OF: Final = np.repeat(np.arange(POOLS), [COUNT, COUNT + 1, COUNT + 1, 1])


def numbers(plan: Sequence[str]) -> list[int]:
    """A plan as one number per slot."""
    found = [TASKS.index(task) for task in plan][:SLOTS]
    return [*found, *[STOP] * (SLOTS - len(found))]


def softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores as shares of 1 along the last axis."""
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    result: NDArray[np.float32] = raised / raised.sum(-1, keepdims=True)
    return result

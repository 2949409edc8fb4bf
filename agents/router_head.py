"""The linear head: weights from `agents/data/router.npz`, probabilities, and the words that decided.

Trained by `agents.train_router`; it knows the six built-in tasks and no plugins.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agents.instruction import Instruction
from agents.router_features import TASKS, Features, embedded_text, extract, follow_up, instructions
from onebox.events import Cue
from onebox.messages import Message

WEIGHTS: Final = Path(__file__).parent / "data" / "router.npz"
QUALITY: Final = WEIGHTS.with_name("router_quality.json")
CUES_SHOWN: Final = 3
CUE_FLOOR: Final = 0.3
# Chinese and Japanese are written without spaces: there each character counts for itself.
_WORD: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


@dataclass(frozen=True, slots=True)
class Judgement:
    """The head's view of a message: a share of 1 per task, and what it is based on."""

    probabilities: NDArray[np.float32]
    features: Features
    instruction: Instruction
    embedding: NDArray[np.float32]

    @property
    def task(self) -> str:
        """The likeliest task."""
        return TASKS[int(self.probabilities.argmax())]


@dataclass(frozen=True, slots=True)
class Head:
    """Weights per n-gram bucket and per dense feature, one column per task of `TASKS`."""

    grams: NDArray[np.float32]
    dense: NDArray[np.float32]
    bias: NDArray[np.float32]
    temperature: float

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> "Head":
        """The head stored at `path`."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(
                stored["grams"].astype(np.float32),
                stored["dense"].astype(np.float32),
                stored["bias"].astype(np.float32),
                float(stored["temperature"]),
            )

    def save(self, path: Path = WEIGHTS) -> None:
        """Write the head to `path`, in half precision."""
        np.savez_compressed(
            path,
            grams=self.grams.astype(np.float16),
            dense=self.dense.astype(np.float16),
            bias=self.bias.astype(np.float16),
            temperature=np.float32(self.temperature),
        )

    def logits(self, features: Features, extra: NDArray[np.float32]) -> NDArray[np.float32]:
        """Unscaled scores, one per task."""
        buckets = np.fromiter((gram.bucket for gram in features.grams), dtype=np.int64, count=len(features.grams))
        signs = np.fromiter((gram.sign for gram in features.grams), dtype=np.float32, count=len(features.grams))
        scores = (self.grams[buckets] * signs[:, None]).sum(axis=0) * features.value
        result: NDArray[np.float32] = scores + np.concatenate([features.dense, extra]) @ self.dense + self.bias
        return result

    def embedded(self, messages: Sequence[Message]) -> list[str]:
        """The texts whose embeddings `judge` wants, oldest first."""
        return [embedded_text(instruction) for instruction in instructions(messages)]

    def judge(self, messages: Sequence[Message], vectors: NDArray[np.float32]) -> Judgement:
        """The probabilities for the last user message of `messages`, earlier turns considered.

        `vectors` has one row for each text of `embedded(messages)`.
        """
        asked = [index for index, message in enumerate(messages) if message.role == "user"][-3:]
        found = instructions(messages)
        previous: NDArray[np.float32] | None = None
        judgement: Judgement | None = None
        for position, (index, instruction) in enumerate(zip(asked, found, strict=True)):
            until = messages[: index + 1] if index else messages[:1]
            features = extract(until, instruction, vectors[position])
            extra = follow_up(previous, until, instruction)
            previous = softmax(self.logits(features, extra) / self.temperature)
            judgement = Judgement(previous, features, instruction, vectors[position])
        assert judgement is not None, "a conversation without a user message never reaches the head"
        return judgement

    def cues(self, judgement: Judgement, text: str, task: str) -> tuple[Cue, ...]:
        """The spans of `text` whose n-grams spoke most for `task` against the other tasks."""
        features = judgement.features
        if not features.grams:  # nothing but signs
            return ()
        rows = self.grams[[gram.bucket for gram in features.grams]]
        own = rows[:, TASKS.index(task)]
        contrast = own - (rows.sum(axis=1) - own) / (len(TASKS) - 1)
        starts, ends, signs = np.array([(gram.start, gram.end, gram.sign) for gram in features.grams]).T
        weights = contrast * signs * features.value / (ends - starts)
        steps = np.zeros(len(text) + 1)  # of the score from one character to the next
        np.add.at(steps, starts.astype(int), weights)
        np.add.at(steps, ends.astype(int), -weights)
        return _best_spans(text, np.cumsum(steps))


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shares of 1."""
    raised = np.exp(logits - logits.max())
    result: NDArray[np.float32] = (raised / raised.sum()).astype(np.float32)
    return result


def _best_spans(text: str, scores: NDArray[np.float64]) -> tuple[Cue, ...]:
    pieces = [(float(scores[m.start() : m.end()].sum()), m.start(), m.end()) for m in _WORD.finditer(text)]
    best = max((weight for weight, _, _ in pieces), default=0.0)
    if best <= 0:
        return ()
    spans: list[tuple[float, int, int]] = []
    for weight, start, end in pieces:
        if weight < best * CUE_FLOOR:
            continue
        if spans and text[spans[-1][2] : start] in {"", " "}:
            spans[-1] = (spans[-1][0] + weight, spans[-1][1], end)
        else:
            spans.append((weight, start, end))
    spans.sort(key=lambda span: -span[0])
    return tuple(Cue(text[start:end], start, end, round(weight, 3)) for weight, start, end in spans[:CUES_SHOWN])

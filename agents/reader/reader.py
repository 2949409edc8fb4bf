"""The reader: which steps a message asks for, how sure that is, which words say so, and whether it can be done at all.

Weights are `agents/data/reader.npz`: what training changed of the pretrained layers, and the answers on top of them.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agents.instruction import Instruction
from agents.reader.encoding import LENGTH, encode
from agents.reader.graph import Layer, Layers
from agents.reader.pieces import Pieces
from agents.reader.plans import COLUMNS, COUNT, POOL_OF, STOP, TASKS, UNSUPPORTED, softmax
from agents.reader.source import EPSILON, WIDTH, Floats, Source
from agents.reader.weights import WEIGHTS, Weights
from onebox.messages import Message

QUALITY: Final = WEIGHTS.with_name("router_quality.json")
DECLINED: Final = 0.5  # from here on a message of the task chat is taken to ask for what cannot be done
SURELY_DECLINED: Final = 0.7  # and from here on one of any task, which is chat then
_LOADING: Final = threading.Lock()
_TALK: Final = np.array([task == "chat" for task in TASKS], np.float32)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the reader says of a message.

    `probabilities` has a share of 1 for each of `TASKS` as the first step; `plan` the likeliest steps, `chain` those if
    they are several; `several` and `unsupported` how likely it asks for several steps, and for what cannot be done.
    `evidence` has the score that each piece gives each answer, `spans` where the piece is (start and end in the
    message, -1 for nowhere); `vector` is what the first step's answer is read from (`WIDTH` numbers).
    """

    probabilities: Floats
    plan: tuple[str, ...]
    chain: tuple[str, ...]
    several: float
    unsupported: float
    spans: NDArray[np.int64]
    evidence: Floats
    vector: Floats
    instruction: Instruction

    @property
    def shares(self) -> dict[str, float]:
        """`probabilities` by their tasks."""
        return dict(zip(TASKS, map(float, self.probabilities), strict=True))

    @property
    def task(self) -> str:
        """The likeliest first step."""
        return TASKS[int(self.probabilities.argmax())]


class Reader:
    """Reads conversations. Loading takes about a second; safe to share between threads."""

    def __init__(self, weights: Weights | None = None, source: Source | None = None) -> None:
        self._source = source = source or Source()
        self.pieces = Pieces(self._source)
        kept = weights or Weights.load()
        self._layers = Layers([_layer(self._source, kept, number) for number in range(kept.layers)])
        self._places = source.floats("emb.pos", LENGTH, WIDTH) + source.floats("emb.type", WIDTH)
        self._norm = source.floats("emb.ln.w", WIDTH), source.floats("emb.ln.b", WIDTH)
        self._weigh = kept["weigh.weight"].T
        self._answers, self._bias = kept["answers.weight"].T, kept["answers.bias"]
        self._second, self._third = kept["second"], kept["third"]
        self._calibration = kept.calibration

    def read(self, messages: Sequence[Message]) -> Reading:
        """The reading of the last message of `messages`, a user's."""
        encoded = encode(self.pieces, messages)
        states = self._layers.run(self._vectors(encoded.ids))
        weights = states @ self._weigh
        shares = np.exp(weights - weights.max(0))
        shares /= shares.sum(0)
        evidence = (states @ self._answers) * shares[:, POOL_OF]
        scores = evidence.sum(0) + self._bias
        kept = self._calibration
        first = softmax(scores[COLUMNS[0]] / kept.first)
        single, chain, several = self.plans(scores)
        plan = chain if several >= kept.several else single
        unsupported = float(1 / (1 + np.exp(-scores[UNSUPPORTED] - kept.unsupported_bias)))
        if len(plan) == 1 and unsupported >= SURELY_DECLINED:
            first = np.asarray((1 - unsupported) * first + unsupported * _TALK, np.float32)
            plan = (TASKS[int(first.argmax())],)
        return Reading(
            first, plan, chain, several, unsupported, encoded.spans, evidence, shares[:, 0] @ states,
            encoded.instruction,
        )  # fmt: skip

    def plans(self, scores: Floats) -> tuple[tuple[str, ...], tuple[str, ...], float]:
        """The likeliest plans of one and of several steps by a text's scores, and the share of all those of several."""
        first = softmax(scores[COLUMNS[0]])
        second = softmax(scores[COLUMNS[1]] + self._second)
        third = softmax(scores[COLUMNS[2]] + self._third[0][:, None] + self._third[1][None])
        several = float(1 - first @ second[:, STOP])
        single = (TASKS[int((first * second[:, STOP]).argmax())],)
        shares = first[:, None, None] * second[:, :COUNT, None] * third
        one, two, three = np.unravel_index(int(shares.argmax()), shares.shape)
        found = (int(one), int(two)) if three == STOP else (int(one), int(two), int(three))
        return single, tuple(TASKS[number] for number in found), several

    def _vectors(self, ids: NDArray[np.int64]) -> Floats:
        x = self._source.rows(ids) + self._places[: len(ids)]
        x = x - x.mean(1, keepdims=True)
        x = x / np.sqrt((x * x).mean(1, keepdims=True) + EPSILON) * self._norm[0] + self._norm[1]
        return np.asarray(x, np.float32)


def shared_reader() -> Reader:
    """The reader of this process, loaded when first asked for."""
    with _LOADING:
        return _loaded()


@cache
def _loaded() -> Reader:
    return Reader()


def _layer(source: Source, kept: Weights, number: int) -> Layer:
    at = f"layers.{number}."
    matrices, biases, divisors = [], [], []
    for name, (before, bias) in source.matrices(number).items():
        matrices.append(kept.changed(f"{at}{name}", before).T)
        biases.append(kept.given(f"{at}{name}.bias", bias))
        divisors.append(kept.divisor(f"{at}{name}", matrices[-1]))
    norms = [kept.given(f"{at}norms.{place}", norm) for place, norm in enumerate(source.norms(number))]
    return Layer(tuple(matrices), tuple(biases), tuple(norms), tuple(divisors))

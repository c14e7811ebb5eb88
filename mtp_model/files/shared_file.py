"""A local file that several threads read; its descriptors close with the last of them."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mtp_model.files.local import DIRECT_FROM_BYTES, open_direct, read_cached, read_direct


class SharedFile:
    """A file open for reading, closed when nobody has it any more: no reader is cut off."""

    def __init__(self, path: Path):
        """path: of the file itself. OSError for a link, and no wait for a pipe put there since."""
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        self.size = os.fstat(self._fd).st_size
        """In bytes, as it was when the file was opened."""
        self._lock = threading.Lock()
        self._direct_fd: int | None = None

    def read(self, out: np.ndarray, offset: int) -> int:
        """Read the start of `out` (uint8, 1-D); bytes read, 0 at the end of the file.

        Large reads go past the page cache: what is read once gains nothing from it.
        """
        if len(out) < DIRECT_FROM_BYTES:
            return read_cached(self._fd, out, offset)
        return read_direct(self._direct(), out, offset)

    def _direct(self) -> int:
        with self._lock:
            if self._direct_fd is None:
                self._direct_fd = open_direct(f"/proc/self/fd/{self._fd}", os.O_RDONLY)
            return self._direct_fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # `close` is kept for the end of the process, when modules are gone before objects are.
        for fd in (getattr(self, "_fd", None), getattr(self, "_direct_fd", None)):
            if fd is not None:  # os.open may have failed
                close(fd)

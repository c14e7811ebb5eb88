"""Files of this machine by their descriptors, past the page cache where that is possible."""

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mtp_model.files.memory import ALIGNMENT, AlignedBuffer, aligned

DIRECT_FROM_BYTES = 1 << 20  # below this the page cache is as good
O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it
_READ_BYTES = 8 << 20
_staging = threading.local()


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


def open_direct(path: Path | str, flags: int) -> int:
    """A file descriptor past the page cache, or a plain one where the file system has none."""
    try:
        return os.open(path, flags | O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def read_cached(fd: int, out: np.ndarray, offset: int) -> int:
    """Read the start of `out` (uint8, 1-D); bytes read, 0 at the end of the file."""
    return os.preadv(fd, [out.data], offset)


def read_direct(fd: int, out: np.ndarray, offset: int) -> int:
    """The same for a descriptor of open_direct, with any alignment.

    Whole pages go straight to aligned memory, all else through a buffer that this thread reuses.
    """
    pages = len(out) // ALIGNMENT * ALIGNMENT
    if pages and offset % ALIGNMENT == 0 and out.ctypes.data % ALIGNMENT == 0:
        return os.preadv(fd, [out[:pages].data], offset)
    skip = offset % ALIGNMENT
    wanted = min(skip + len(out), _READ_BYTES)
    staged = staging_memory()
    got = os.preadv(fd, [staged[: aligned(wanted)].data], offset - skip)
    count = max(min(got, wanted) - skip, 0)
    out[:count] = staged[skip : skip + count]
    return count


def staging_memory() -> np.ndarray:
    """This thread's aligned memory (uint8) of _READ_BYTES."""
    if not hasattr(_staging, "buffer"):
        _staging.buffer = AlignedBuffer(_READ_BYTES)
    return _staging.buffer.bytes


def write_all(fd: int, data: memoryview, begin: int = 0) -> None:
    """Write all of `data` from an offset on."""
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:], begin + done)
        except OSError as error:
            # The file was opened, but this filesystem wants another alignment.
            if error.errno != errno.EINVAL or not go_buffered(fd):
                raise


def go_buffered(fd: int) -> bool:
    """Go through the page cache from here on; False: the descriptor does already."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not flags & O_DIRECT:
        return False
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~O_DIRECT)
    return True


@contextlib.contextmanager
def opened(path: Path | str, flags: int, *, direct: bool = False) -> Iterator[int]:
    """A file descriptor that is closed at the end; past the page cache where the disk can.

    What fails with it names the file.
    """
    fd = open_direct(path, flags) if direct else os.open(path, flags, 0o666)
    try:
        with naming(path):
            yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """An OSError that names no file, as of a descriptor, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error

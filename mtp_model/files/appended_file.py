"""A file written from start to end at the disk's speed; knows no format."""

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mtp_model.files.appended import Appended
from mtp_model.files.local import ALIGNMENT, O_DIRECT, TMP_SUFFIX

_STAGING_BYTES = 4 * 2**20


class AppendedFile(Appended[Path]):
    """Appears at `path` only when it is whole and on the disk. An OSError names what there is yet.

    It goes through one aligned, reused buffer, past the page cache where that is possible: direct
    writes ran 3 times as fast as buffered ones. They need aligned memory, offsets and lengths, and
    tensors have none of these: the bytes are copied once.
    """

    def __init__(self, path: Path):
        page_aligned = mmap.mmap(-1, _STAGING_BYTES)
        super().__init__(path, np.frombuffer(page_aligned, np.uint8))
        self._partial = path.with_name(path.name + TMP_SUFFIX)
        self._written = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._fd = os.open(self._partial, flags | O_DIRECT, 0o666)
            self._direct = bool(O_DIRECT)
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
            self._fd = os.open(self._partial, flags, 0o666)
            self._direct = False

    def finish(self) -> None:
        """Flush to the disk, and make it visible."""
        if self._filled % ALIGNMENT:
            self._go_buffered()
        self._flush()
        with self._or_discarded():
            os.fsync(self._fd)
        self._close()
        self._partial.replace(self.path)
        _sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove what was written. Does nothing after finish() or a second time."""
        if self._fd >= 0:
            self._close()
            self._partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        done = 0
        with self._or_discarded():
            while done < self._filled:
                done += self._write(self._memory[done : self._filled].data, self._written + done)
        self._written += done
        self._filled = 0

    def _write(self, piece: memoryview, begin: int) -> int:
        try:
            return os.pwrite(self._fd, piece, begin)
        except OSError as err:
            if not (self._direct and err.errno == errno.EINVAL):
                raise
        self._go_buffered()  # opened, but this filesystem wants another alignment
        return os.pwrite(self._fd, piece, begin)

    @contextlib.contextmanager
    def _or_discarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            self.discard()
            raise OSError(err.errno, err.strerror, str(self._partial)) from err
        except BaseException:
            self.discard()
            raise

    def _go_buffered(self) -> None:
        if self._direct:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~O_DIRECT)
            self._direct = False

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1  # the number may be another file's from here on


def _sync_folder(path: Path) -> None:
    """Make a rename in the folder survive a power cut, where the filesystem can."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # network and FUSE filesystems refuse to sync folders
            os.fsync(folder)
    finally:
        os.close(folder)

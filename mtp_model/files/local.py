"""Bytes to and from files at the disk's speed: aligned buffers, direct I/O; knows no arrays.

Fresh memory costs 10-30 times reused memory, and going through the page cache costs a copy and the
cache's own work, so buffers are kept and what is large goes past it (O_DIRECT) where the disk can.
"""

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from mtp_model.files.objects import AnyPath, CloudPath
from mtp_model.problems import UserError

ALIGNMENT = 4096
DIRECT_FROM_BYTES = 1 << 20  # below this the page cache is as good
O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it
_READ_BYTES = 8 << 20
TMP_SUFFIX = ".partial"
_staging = threading.local()


def aligned(nbytes: int) -> int:
    """Bytes of the whole pages that hold nbytes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class AlignedBuffer:
    """Reusable page-aligned memory of a fixed capacity."""

    def __init__(self, capacity: int):
        self.capacity = aligned(capacity)
        self._map = mmap.mmap(-1, max(self.capacity, ALIGNMENT))
        self.bytes = np.frombuffer(self._map, np.uint8)


class ReusedMemory:
    """Page-aligned memory for one piece after the other: fresh memory is slow.

    least: bytes that are there from the first piece on, so that all pieces find enough.
    """

    def __init__(self, least: int = 0):
        self._least = least
        self._buffer = AlignedBuffer(0)

    def take(self, nbytes: int) -> np.ndarray:
        """So many bytes (uint8); they hold what they held before."""
        if self._buffer.capacity < nbytes:
            self._buffer = AlignedBuffer(max(nbytes, self._least))
        return self._buffer.bytes[:nbytes]


class ThreadMemory(threading.local, ReusedMemory):
    """The same for several threads: each has its own."""


def digest(data: bytes | memoryview) -> str:
    """xxh3_128 of bytes, in hex: the one digest of checkpoint directories."""
    return xxhash.xxh3_128_hexdigest(data)


def write_buffer(path: AnyPath, buffer: AlignedBuffer, nbytes: int) -> None:
    """Write the first nbytes of a buffer durably: temporary name, fsync, rename."""
    if isinstance(path, CloudPath):
        path.write_bytes(bytes(buffer.bytes[:nbytes].data))
        return
    tmp = path.with_name(path.name + TMP_SUFFIX)
    direct = nbytes >= DIRECT_FROM_BYTES
    # Direct writes take whole pages; what is past the end is cut off again.
    whole = aligned(nbytes) if direct else nbytes
    with open_fd(tmp, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, direct=direct) as fd:
        _write_all(fd, buffer.bytes[:whole].data)
        if whole != nbytes:
            os.ftruncate(fd, nbytes)
        os.fsync(fd)
    tmp.rename(path)


def write_pieces(path: AnyPath, pieces: Iterable[bytes]) -> str:
    """Write pieces in turn, durably (temporary name, fsync, rename); returns their digest.

    An object is written at once: what is written there fits into memory.
    """
    if isinstance(path, CloudPath):
        data = b"".join(pieces)
        path.write_bytes(data)
        return digest(data)
    tmp = path.with_name(path.name + TMP_SUFFIX)
    state = xxhash.xxh3_128()
    with tmp.open("wb") as out:
        for piece in pieces:
            state.update(piece)
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    tmp.rename(path)
    return state.hexdigest()


def read_range(path: AnyPath, offset: int, out: np.ndarray) -> None:
    """Fill `out` (uint8, 1-D) with a file's bytes from `offset`; UserError if it ends before."""
    if isinstance(path, CloudPath):
        out[:] = np.frombuffer(path.read_range(offset, len(out)), np.uint8)
        return
    done, direct = 0, len(out) >= DIRECT_FROM_BYTES
    read = read_direct if direct else read_cached
    with open_fd(path, os.O_RDONLY, direct=direct) as fd:
        while done < len(out):
            got = read(fd, out[done:], offset + done)
            if got == 0:
                raise UserError(
                    f"{path} ends at byte {offset + done}, {offset + len(out)} were needed: "
                    "it was cut short; write the checkpoint again"
                )
            done += got


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
    staged = _staging_memory()
    got = os.preadv(fd, [staged[: aligned(wanted)].data], offset - skip)
    count = max(min(got, wanted) - skip, 0)
    out[:count] = staged[skip : skip + count]
    return count


def _staging_memory() -> np.ndarray:
    """This thread's aligned memory (uint8) of _READ_BYTES."""
    if not hasattr(_staging, "buffer"):
        _staging.buffer = AlignedBuffer(_READ_BYTES)
    return _staging.buffer.bytes


def file_pieces(path: AnyPath, piece_bytes: int = 4 << 20) -> Iterator[bytes]:
    """A file's bytes, piece by piece; an object's at once."""
    if isinstance(path, CloudPath):
        yield path.read_bytes()
        return
    with path.open("rb") as file:
        while piece := file.read(piece_bytes):
            yield piece


def file_digest(path: AnyPath) -> str:
    """xxh3_128 of a file's bytes on the disk, in hex, holding one piece of it at a time.

    Of an object it is that of its bytes in the cloud, which are held all at once.
    """
    if isinstance(path, CloudPath):
        return digest(path.read_bytes())
    state, memory = xxhash.xxh3_128(), _staging_memory()
    with open_fd(path, os.O_RDONLY, direct=path.stat().st_size >= DIRECT_FROM_BYTES) as fd:
        offset = 0
        while got := read_direct(fd, memory, offset):
            state.update(memory[:got].data)
            offset += got
    return state.hexdigest()


def sync_directory(path: AnyPath) -> None:
    """Make the names in a folder durable; in the cloud they are."""
    if isinstance(path, CloudPath):
        return
    with open_fd(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


@contextlib.contextmanager
def open_fd(path: Path, flags: int, *, direct: bool = False) -> Iterator[int]:
    """A file descriptor that is closed at the end; past the page cache where the disk can."""
    fd = open_direct(path, flags) if direct else os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def open_direct(path: Path | str, flags: int) -> int:
    """A file descriptor past the page cache, or a plain one where the file system has none."""
    try:
        return os.open(path, flags | O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o644)


def _write_all(fd: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], done)

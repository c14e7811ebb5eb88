"""Bytes to and from files at the disk's speed: aligned buffers, direct writes; knows no arrays.

Fresh memory costs 10-30 times reused memory, and a buffered write costs the copy and the page
cache, so writers keep page-aligned buffers and write past the page cache where the disk can.
"""

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash

ALIGNMENT = 4096
DIRECT_FROM_BYTES = 1 << 20  # below this the page cache is as good
_READ_BYTES = 8 << 20
TMP_SUFFIX = ".partial"


class AlignedBuffer:
    """Reusable page-aligned memory of a fixed capacity."""

    def __init__(self, capacity: int):
        self.capacity = -(-capacity // ALIGNMENT) * ALIGNMENT
        self._map = mmap.mmap(-1, max(self.capacity, ALIGNMENT))
        self.bytes = np.frombuffer(self._map, np.uint8)


def digest(data: bytes | memoryview) -> str:
    """xxh3_128 of bytes, in hex: the one digest of checkpoint directories."""
    return xxhash.xxh3_128_hexdigest(data)


def write_buffer(path: Path, buffer: AlignedBuffer, nbytes: int) -> None:
    """Write the first nbytes of a buffer durably: temporary name, fsync, rename."""
    tmp = path.with_name(path.name + TMP_SUFFIX)
    fd = _open_for_writing(tmp, direct=nbytes >= DIRECT_FROM_BYTES)
    try:
        # Direct writes take whole pages; what is past the end is cut off again.
        whole = nbytes if nbytes < DIRECT_FROM_BYTES else -(-nbytes // ALIGNMENT) * ALIGNMENT
        _write_all(fd, buffer.bytes[:whole].data)
        if whole != nbytes:
            os.ftruncate(fd, nbytes)
        os.fsync(fd)
    finally:
        os.close(fd)
    tmp.rename(path)


def write_pieces(path: Path, pieces: Iterable[bytes]) -> str:
    """Write pieces in turn, durably (temporary name, fsync, rename); returns their digest."""
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


def read_range(path: Path, offset: int, out: np.ndarray) -> None:
    """Fill `out` (uint8, 1-D) with a file's bytes from `offset`; ValueError if it ends before."""
    view = out.data
    with open_fd(path, os.O_RDONLY) as fd:
        done = 0
        while done < len(view):
            got = os.preadv(fd, [view[done:]], offset + done)
            if got == 0:
                raise ValueError(
                    f"{path} ends at byte {offset + done}, {offset + len(view)} were needed: "
                    "it was cut short; write the checkpoint again"
                )
            done += got


def file_pieces(path: Path, piece_bytes: int = 4 << 20) -> Iterator[bytes]:
    """A file's bytes, piece by piece."""
    with path.open("rb") as file:
        while piece := file.read(piece_bytes):
            yield piece


def file_digest(path: Path) -> str:
    """xxh3_128 of a file's bytes on the disk, in hex, holding one piece of it at a time."""
    state, buffer = xxhash.xxh3_128(), AlignedBuffer(_READ_BYTES)
    with open_fd(path, os.O_RDONLY) as fd:
        # What the page cache still has of it need not be what the disk got.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        offset = 0
        while got := os.preadv(fd, [buffer.bytes.data], offset):
            state.update(buffer.bytes[:got].data)
            offset += got
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return state.hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in a folder durable."""
    with open_fd(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


@contextlib.contextmanager
def open_fd(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor that is closed at the end."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def _open_for_writing(path: Path, *, direct: bool) -> int:
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    if direct and hasattr(os, "O_DIRECT"):
        # A file system without direct writes refuses the flag (EINVAL); then through the cache.
        with contextlib.suppress(OSError):
            return os.open(path, flags | os.O_DIRECT, 0o644)
    return os.open(path, flags, 0o644)


def _write_all(fd: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], done)

"""Page-aligned memory that is used again and again: fresh memory costs 10-30 times as much."""

import mmap
import threading

import numpy as np

ALIGNMENT = 4096


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
    """Page-aligned memory for one piece after the other.

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

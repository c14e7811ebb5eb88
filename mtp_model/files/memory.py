"""How much memory there is, and page-aligned memory that is used again and again.

Fresh memory costs 10-30 times as much as memory that was used before.
"""

import contextlib
import mmap
import threading
from pathlib import Path

import numpy as np

ALIGNMENT = 4096
MEMINFO = Path("/proc/meminfo")
_GROUPS = Path("/sys/fs/cgroup")
LIMITS = (  # the most that a control group may hold, and what it holds: version 2 and 1
    (_GROUPS / "memory.max", _GROUPS / "memory.current"),
    (_GROUPS / "memory/memory.limit_in_bytes", _GROUPS / "memory/memory.usage_in_bytes"),
)


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


def available_bytes() -> int:
    """Memory that this process may still take, by the kernel and by its control group; 0 where
    the kernel doesn't say."""
    free = [_available_by_kernel()]
    for most, used in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it says `max`
            free.append(int(most.read_text()) - int(used.read_text()))
    return max(min(free), 0)


def _available_by_kernel() -> int:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable:")), 0)

"""A file of which some byte ranges are there, and which; must not know where bytes come from.

`NAME.part` holds the bytes, `NAME.ranges` one line for each range that is safely on the disk.
"""

import bisect
import itertools
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from converters.sources.hub_listing import Entry

Ranges = list[tuple[int, int]]
"""Begin and end of byte ranges: in order, not empty, with holes between them."""

_HASH_BYTES = 8 << 20
_LINE = re.compile(rb"^(\d+) (\d+)\n", re.M)


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same bytes as ranges in order, those that touch or overlap as one."""
    result: Ranges = []
    for begin, end in sorted(ranges):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        elif begin < end:
            result.append((begin, end))
    return result


def without(ranges: Ranges, taken: Ranges) -> Ranges:
    """The bytes of `ranges` that `taken` does not have."""
    result = []
    for begin, end in ranges:
        for taken_begin, taken_end in itertools.islice(taken, _first_after(taken, begin), None):
            if taken_begin >= end:
                break
            if begin < taken_begin:
                result.append((begin, taken_begin))
            begin = taken_end
        if begin < end:
            result.append((begin, end))
    return result


def covers(ranges: Ranges, begin: int, end: int) -> bool:
    """Whether all of begin..end is in one of the ranges."""
    found = _first_after(ranges, begin)
    return begin == end or (
        found < len(ranges) and ranges[found][0] <= begin and end <= ranges[found][1]
    )


def _first_after(ranges: Ranges, position: int) -> int:
    """Index of the first range that ends after a position."""
    return bisect.bisect_right(ranges, position, key=lambda span: span[1])


def num_bytes(ranges: Ranges) -> int:
    """How many bytes the ranges have together."""
    return sum(end - begin for begin, end in ranges)


def cut(ranges: Ranges, longest: int) -> Iterator[tuple[int, int]]:
    """The same ranges in pieces of at most `longest` bytes."""
    for begin, end in ranges:
        for start in range(begin, end, longest):
            yield start, min(start + longest, end)


class PartialFile:
    """As a context manager it is open for writing; several threads may write."""

    def __init__(self, folder: Path, name: str, entry: Entry):
        self.path = folder / f"{name}.part"
        self._lines = self.path.with_suffix(".ranges")
        self._entry = entry
        self._lock = threading.Lock()
        self._fd = -1

    @property
    def is_whole(self) -> bool:
        """Whether every byte of the file is there."""
        return not self.missing([(0, self._entry.size)])

    def share_with(self, ranges: Ranges) -> float:
        """The share of the file that is there once `ranges` are."""
        return num_bytes(merged([*self._ranges(), *ranges])) / max(self._entry.size, 1)

    def missing(self, ranges: Ranges) -> Ranges:
        """The bytes of `ranges` that are not there yet."""
        return without(ranges, self._ranges())

    def write(self, span: tuple[int, int], parts: Iterable[bytes]) -> None:
        """Write the bytes of a span, and note it once they are on the disk."""
        position = span[0]
        for part in parts:
            view = memoryview(part)
            while view:
                written = os.pwrite(self._fd, view, position)
                position += written
                view = view[written:]
        assert position == span[1], (position, span)
        os.fdatasync(self._fd)
        with self._lock, self._lines.open("a") as file:
            file.write(f"{span[0]} {span[1]}\n")

    def fault(self) -> str | None:
        """What is wrong with the whole file's digest."""
        hasher = self._entry.hasher()
        with self.path.open("rb") as file:
            while part := file.read(_HASH_BYTES):
                hasher.update(part)
        return self._entry.fault(hasher)

    def delete(self) -> None:
        """Forget what is there."""
        self._lines.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> "PartialFile":
        self._end_torn_line()
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._fd, self._entry.size)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _end_torn_line(self) -> None:
        if self._lines.is_file() and not self._lines.read_bytes().endswith(b"\n"):
            with self._lines.open("a") as file:
                file.write(" torn\n")

    def _ranges(self) -> Ranges:
        if not self.path.is_file() or not self._lines.is_file():
            return []
        # A power cut may have left anything at the end: what is no line is fetched again.
        lines = _LINE.findall(self._lines.read_bytes())
        return merged((int(begin), int(end)) for begin, end in lines)

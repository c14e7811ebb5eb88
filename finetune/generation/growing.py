"""Lines that are added to a file which has its name only when it is whole: FILE.partial until then.

On a disk that is one file. Nothing can be appended to an object: in a bucket FILE.partial is a
folder of objects of some lines each, which become one object in the end.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mtp_model.files.open import as_place
from mtp_model.files.place import Place

_MARK = "begun"
_PART = re.compile(r"(\d{12})-(\d{12})")


class Growing(Protocol):
    """A file that grows by lines. Of each line it is known which one it is, from 0."""

    @property
    def partial(self) -> Path | Place:
        """What there is of it until it is whole."""
        ...

    def begin(self) -> None:
        """Be seen, without a line."""
        ...

    def has_begun(self) -> bool:
        """Whether there is something to go on with."""
        ...

    def keep(self, count: int) -> int:
        """Go on behind so many lines: what follows them goes. How many of them are there."""
        ...

    def add(self, lines: Sequence[bytes], first: int) -> None:
        """Lines, the first of which has this number; they are durable then."""
        ...

    def finish(self) -> None:
        """Have the name, and nothing else be left."""
        ...

    def clear(self, *, finished: bool = False) -> None:
        """Nothing unfinished is left; `finished`: where that is in the finished file already."""
        ...


def growing(path: Path) -> Growing:
    """The file of a path or an address."""
    place = as_place(path)
    return GrowingObject(place) if place.is_far else GrowingFile(path)


class GrowingFile:
    """One file, which is given another name in the end."""

    def __init__(self, path: Path):
        self._path = path
        self.partial = path.with_name(path.name + ".partial")

    def begin(self) -> None:
        self.partial.touch()

    def has_begun(self) -> bool:
        return self.partial.exists()

    def keep(self, count: int) -> int:
        with self.partial.open("rb+") as file:
            lines = itertools.islice(iter(file.readline, b""), count)
            whole = sum(line.endswith(b"\n") for line in lines)
            file.truncate()
        return whole

    def add(self, lines: Sequence[bytes], first: int) -> None:  # noqa: ARG002
        with self.partial.open("ab") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        self.partial.replace(self._path)

    def clear(self, *, finished: bool = False) -> None:
        if not finished:  # its name is given in one moment: what is there is not of this file
            self.partial.unlink(missing_ok=True)


class GrowingObject:
    """Objects named by the numbers of their lines, begin-end; no line is in two of them."""

    def __init__(self, place: Place):
        self._place = place
        self.partial = place.parent / f"{place.name}.partial"

    def begin(self) -> None:
        (self.partial / _MARK).write_pieces([])

    def has_begun(self) -> bool:
        return (self.partial / _MARK).is_file()

    def keep(self, count: int) -> int:
        there = 0
        for begin, end, part in self._parts():
            if begin >= count:
                part.unlink()
            elif begin == there:
                there = end
        return there

    def add(self, lines: Sequence[bytes], first: int) -> None:
        (self.partial / f"{first:012}-{first + len(lines):012}").write_pieces(lines)

    def finish(self) -> None:
        whole = self._place.appended()
        with contextlib.ExitStack() as failed:
            failed.callback(whole.discard)
            for _, _, part in self._parts():
                for piece in part.pieces():
                    whole.append(np.frombuffer(piece, np.uint8))
            whole.finish()
        self.clear()

    def clear(self, *, finished: bool = False) -> None:
        parts = [part for _, _, part in self._parts()]
        if finished and sum(part.size() for part in parts) != self._place.size():
            return
        for part in (*parts, self.partial / _MARK):
            part.unlink()

    def _parts(self) -> list[tuple[int, int, Place]]:
        """Begin and end of what is there, in order."""
        named = ((_PART.fullmatch(part.name), part) for part in self.partial.entries())
        return [(int(name[1]), int(name[2]), part) for name, part in named if name]

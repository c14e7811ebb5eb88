"""A place for bytes: one interface for a folder on this machine and for an object store.

`as_place` of open.py gives the place that a path or a gs:// address means. Whoever has a place
reads and writes there without knowing which of the two it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import xxhash

from mtp_model.files.memory import AlignedBuffer

How = Literal["hard link", "reflink", "copy in the cloud"]
"""A way to take a file from another place without moving its bytes through this process."""

PIECE_BYTES = 4 << 20


def digest(data: bytes | memoryview) -> str:
    """xxh3_128 of bytes, in hex: the one digest of checkpoint directories."""
    return xxhash.xxh3_128_hexdigest(data)


class Appended(ABC):
    """A file that is written from start to end, and not there until it is whole.

    Gathers bytes in memory of a fixed size, which is passed on whenever it is full.
    """

    def __init__(self, path: "Place", memory: np.ndarray):
        self.path = path
        self._memory = memory
        self._filled = 0

    def append(self, view: np.ndarray) -> None:
        """Add bytes (uint8, 1-D)."""
        while len(view):
            piece = view[: len(self._memory) - self._filled]
            self._memory[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == len(self._memory):
                self._flush()

    @abstractmethod
    def finish(self) -> None:
        """Make it durable and visible."""

    @abstractmethod
    def discard(self) -> None:
        """Give it up. Does nothing after finish() or a second time."""

    @abstractmethod
    def _flush(self) -> None:
        """Pass on what was gathered; nothing is gathered then."""


class Lines(Protocol):
    """A growing list of lines, each of them durable once append() returns."""

    def read(self) -> list[bytes]:
        """All lines with their line ends, in order; the last one may be torn."""
        ...

    def keep(self, lines: Sequence[bytes]) -> None:
        """Go on after these first lines: whatever follows them goes. Needed before append()."""
        ...

    def append(self, line: bytes) -> None:
        """Add a line; several threads may, one at a time for the first line."""
        ...

    def close(self) -> None:
        """Nothing is appended after this."""
        ...


class Place(Protocol):
    """A file or folder: `place / name` is what is in it. Writes are durable when they return.

    Unless a method says otherwise, what is missing raises FileNotFoundError.
    """

    @property
    def name(self) -> str:
        """The last part of the path."""
        ...

    @property
    def parent(self) -> Self:
        """The folder that it is in."""
        ...

    @property
    def is_far(self) -> bool:
        """Whether it is on no disk of this machine: each read is a request, no name can be changed
        at one moment, and nothing can be appended."""
        ...

    def __truediv__(self, name: str, /) -> Self: ...

    def absolute(self) -> Self:
        """The same place, whatever folder the process is in."""
        ...

    def is_file(self) -> bool:
        """Whether there is a file of just this name."""
        ...

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        ...

    def exists(self) -> bool:
        """Whether there is anything."""
        ...

    def entries(self, beginning: str = "") -> list[Self]:
        """All that is directly in the folder and begins so, sorted; none where there is nothing."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below, however deep, by its path from here."""
        ...

    def is_same(self, other: "Place") -> bool:
        """Whether both are the same folder."""
        ...

    def overlaps(self, other: "Place") -> bool:
        """Whether both are the same folder, or one is in the other."""
        ...

    def read_bytes(self) -> bytes:
        """All of the file."""
        ...

    def read_range_into(self, begin: int, out: np.ndarray) -> None:
        """Fill `out` (uint8, 1-D) with the bytes from `begin`; UserError if the file is shorter."""
        ...

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
        """The file's bytes, piece by piece; an object's as one moment had them, or a UserError."""
        ...

    def size(self) -> int:
        """Bytes of the file."""
        ...

    def written_s(self) -> float:
        """When the file's bytes were written, in seconds since 1970."""
        ...

    def digest(self) -> str:
        """xxh3_128 of the bytes that are stored, in hex; an object's are held all at once."""
        ...

    def write_buffer(self, buffer: AlignedBuffer, nbytes: int) -> None:
        """Write the first nbytes of a buffer as this file, which appears when it is whole."""
        ...

    def write_pieces(self, pieces: Iterable[bytes]) -> str:
        """Write pieces in turn as this file, which appears when it is whole; their digest."""
        ...

    def appended(self, scratch: "Self | None" = None) -> Appended:
        """This file, to write from start to end; one that is there is replaced at its end.

        scratch: a folder of its own for the parts that a large object is sent in.
        """
        ...

    def fault(self, digest: str) -> str | None:
        """Why the file that was written is not stored with these bytes; None when it is."""
        ...

    def take(self, source: "Place") -> How | None:
        """Become the same file as `source` without moving bytes; None where that cannot be."""
        ...

    def can_link(self, source: "Place") -> bool:
        """Whether take() of `source` needs no room on a disk."""
        ...

    def too_long(self, names: Iterable[str]) -> list[str]:
        """Those of these files below (relative paths) that have no room for their names here."""
        ...

    def strangers(self) -> Iterator[tuple[str, str]]:
        """What in the folder, however deep, is not in it or is no file, and what it is instead."""
        ...

    def make_folder(self, *, marked: bool = False) -> None:
        """Be a folder, those above as well; nothing to do where it is one.

        An object store has no empty folders: `marked` puts an object into it, so that it is seen.
        """
        ...

    def unlink(self) -> None:
        """Delete the file."""
        ...

    def delete_tree(self, *, ignore_errors: bool = False) -> None:
        """Delete the file, or the folder with all that is in it.

        ignore_errors: leave in the folder what cannot be deleted, or what another process deletes.
        """
        ...

    def move_to(self, target: Self) -> None:
        """Give the folder another name in the same place."""
        ...

    def sync(self) -> None:
        """Make the names in the folder and in all folders below survive a power cut."""
        ...

    def locked(self, *, shared: bool = False, wait: bool = False) -> AbstractContextManager[bool]:
        """Hold the lock that this file is; False: another process holds it.

        It is released when the process ends, however it ends. Several may hold it `shared`.
        """
        ...

    def holder(self) -> str:
        """` (who holds this lock; what to do when it is gone)`; "" where nobody can tell."""
        ...

    def lines(self) -> Lines:
        """What is here as a growing list of lines."""
        ...

    def room_for(self, nbytes: int) -> dict[Path, int]:
        """What raise_if_full of local.py has to look for; nothing where there always is room."""
        ...

    def on_this_machine(self) -> AbstractContextManager[Path]:
        """This folder where it is on a disk of this machine, else a temporary one."""
        ...

    def kvstore(self) -> dict[str, Any]:
        """The folder as tensorstore names it, to read the array that is stored in it."""
        ...


def name_fault(file: str) -> str | None:
    """Why `file` cannot be the name of a file inside a folder; None when it can."""
    if file.startswith("/"):
        return "is an absolute path; file names are relative to the checkpoint's folder"
    if ".." in file.split("/"):
        return "leaves the checkpoint's folder"
    if not file or "\0" in file or {"", "."} & set(file.split("/")):
        return "is not a plain relative path"
    return None

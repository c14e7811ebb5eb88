"""Where a checkpoint's bytes come from: a set of files, whatever is in them."""

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mtp_model.checkpoint.directory import (
    COMPLETE,
    PROVENANCE,
    UNFINISHED,
    CheckpointError,
    unfinished_fault,
)
from mtp_model.files.place import Place
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem

Buffer = bytes | bytearray | memoryview | np.ndarray
Fingerprint = dict[str, int | str]
"""What tells that a file changed: `size` in bytes, `mtime_ns`, ...; survives JSON unchanged."""

Read = tuple[str, int, int]
"""File, offset of the first byte, number of bytes."""

Finish = Callable[[str], None]
"""Told each step that has read all it needs."""

HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@\s]+))?", re.A
)
"""`org/name` or `org/name@revision`, a branch, a tag or a commit."""

_PIECE_BYTES = 4 << 20
BOOKKEEPING = (".git", ".cache")  # of git and of huggingface_hub: copies of the files around them


def kind_fault(files: Collection[str]) -> str | None:
    """What a set of files is instead of a safetensors checkpoint, and what to do."""
    if {COMPLETE, PROVENANCE} <= set(files):
        found = "is a checkpoint directory, not a safetensors checkpoint"
        advice = "name what it was imported from, or what `convert-deepseek export` made of it"
        return f"{found}; {advice}"
    if any(file.startswith(f"{UNFINISHED}/") for file in files):
        return unfinished_fault()  # written over another checkpoint, it is in part still that one
    return None


class Source(Protocol):
    """A read-only set of files. Methods may be called by several threads at once.

    Every failure is a ProblemsError that names the file, what was found and what was needed.
    """

    name: str
    """What the user typed; for a model on the Hub with the commit that it stood for."""

    is_far: bool = False
    """Whether bytes come over a network, so that none should be read twice."""

    @property
    def folder(self) -> Place | None:
        """The folder that the files are in; None where they are in no place, as on the Hub."""
        return None

    def place(self, file: str) -> Place | None:  # noqa: ARG002
        """Where a file is; None where it is in no place."""
        return None

    def files(self) -> dict[str, int]:
        """Every file: relative posix path -> size in bytes, sorted by path."""
        ...

    def read(self, file: str, begin: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes of `file` from offset `begin`."""
        ...

    def read_into(self, file: str, begin: int, out: Buffer) -> None:
        """Fill all of `out` (C-contiguous, any dtype) with the bytes of `file` from `begin`."""
        ...

    def fingerprint(self, file: str) -> Fingerprint:
        """Equal as long as the file is the same, asked anew every time."""
        ...

    def room_needed(
        self,
        reads: Mapping[str, Sequence[Read]],  # noqa: ARG002
        folder: Path,  # noqa: ARG002
    ) -> Mapping[Path, int]:
        """About how many bytes `staged` takes on disk at once, by folder, beyond those there."""
        return {}

    @contextlib.contextmanager
    def staged(
        self,
        reads: Mapping[str, Sequence[Read]],  # noqa: ARG002
        folder: Path,  # noqa: ARG002
    ) -> Iterator[Finish]:
        """While inside, the source may fetch `reads`, by step and in the order of the steps.

        Steps may run in any order and at the same time. `folder` is the source's to use, for what
        it fetched; what is left there after an interruption is not fetched again. Here nothing is
        fetched: bytes are read where they are.
        """
        yield lambda _step: None


def read_pieces(
    source: Source, file: str, size: int, piece_bytes: int = _PIECE_BYTES
) -> Iterator[bytes]:
    """The first `size` bytes of a file, piece by piece."""
    for begin in range(0, size, piece_bytes):
        yield source.read(file, begin, min(piece_bytes, size - begin))


def replaced_files(
    source: Source, began: Mapping[str, Mapping[str, Any]], advice: str
) -> Iterator[Problem]:
    """Files that are not the same as when reading `began`, which has their fingerprints."""
    for file, was in began.items():
        if any(was.get(key) != value for key, value in source.fingerprint(file).items()):
            yield Problem("changed", file, f"was replaced while it was read; {advice}")


def raise_if_overlapping(dst: Place, source: Source) -> None:
    """Raise CheckpointError where files of a source are in the folder to write, or the reverse.

    Wherever the files really are: a folder of links is in no other.
    """
    places = (source.folder, *map(source.place, source.files()))
    if any(place and dst.overlaps(place) for place in places):
        raise CheckpointError(
            f"{dst} and {source.name}, which it is made of, overlap; name another place"
        )


def long_names(dst: Place, files: Iterable[str]) -> Iterator[Problem]:
    """Files that have no room for their names in the folder that is to be written."""
    for file in dst.too_long(files):
        detail = f"has a name that is too long in {dst}; name another place, or shorten the name"
        yield Problem("file", shown(file), detail)


def range_fault(size: int, begin: int, nbytes: int) -> str | None:
    """What is wrong with asking a file of `size` bytes for these; None where it has them."""
    if begin < 0 or nbytes < 0 or begin + nbytes > size:
        return f"is {size} bytes, needed bytes {begin} to {begin + nbytes}"
    return None


def byte_view(buffer: Buffer) -> NDArray[np.uint8]:
    """The memory of a C-contiguous buffer of any dtype, bfloat16 and float8 too, as bytes [n]."""
    if not isinstance(buffer, np.ndarray):
        return np.frombuffer(buffer, np.uint8)
    if not buffer.flags.c_contiguous:
        raise ValueError(f"needs a C-contiguous array, found strides {buffer.strides}")
    return buffer.reshape(-1).view(np.uint8)

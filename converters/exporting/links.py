"""A source's file in another folder: linked where that can be, copied where not; knows no tensors.

A hard link is the very file: whoever writes to one of its names writes to both. So nothing here or
elsewhere in this toolkit writes into a file that exists; files are replaced.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from converters.sources.local import LocalSource
from converters.sources.source import Source, read_pieces
from mtp_model.files.local import TMP_SUFFIX, write_pieces
from mtp_model.problems import Problem, ProblemsError

How = Literal["hard link", "reflink", "copy", "copy in the cloud"]
Taken = tuple[How, str | None]
"""How a file was taken over, and the xxh3-128 of what was copied through this machine."""

_FICLONE = 0x40049409  # of linux/fs.h; the fcntl module has it from Python 3.12 on
_PIECE_BYTES = 32 << 20


def place(source: Source, file: str, target: Path) -> Taken:
    """Put `file` at `target`, replacing what is there."""
    if isinstance(source, LocalSource):
        path = source.path(file)
        if _hard_link(path, target):
            return "hard link", None
        if _reflink(path, target):
            return "reflink", None
    return "copy", write_pieces(target, source_pieces(source, file))


def can_link(source: Source, file: str, folder: Path) -> bool:
    """Whether a link of `file` can be in `folder`: then it takes no room there."""
    if not isinstance(source, LocalSource):
        return False
    return source.path(file).stat().st_dev == folder.stat().st_dev


def _hard_link(path: Path, target: Path) -> bool:
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:  # another disk, or one without links; a file of somebody else; too many links
        return False
    return True


def _reflink(path: Path, target: Path) -> bool:
    """A file of its own that shares the other's blocks until one is written."""
    tmp = target.with_name(target.name + TMP_SUFFIX)
    try:
        with path.open("rb") as old, tmp.open("wb") as new:
            fcntl.ioctl(new, _FICLONE, old.fileno())
            os.fsync(new.fileno())
    except OSError:
        tmp.unlink(missing_ok=True)
        return False
    tmp.rename(target)
    return True


def source_pieces(source: Source, file: str) -> Iterator[bytes]:
    """The file's bytes; proved by their sha256 where the source knows it."""
    found = source.fingerprint(file)
    size, state = int(found["size"]), hashlib.sha256()
    for piece in read_pieces(source, file, size, _PIECE_BYTES):
        if "sha256" in found:
            state.update(piece)
        yield piece
    if found.get("sha256", state.hexdigest()) != state.hexdigest():
        detail = "arrived with another sha256 than the source lists; run the same command again"
        raise ProblemsError(source.name, [Problem("file", file, detail)])

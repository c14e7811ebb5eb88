"""The files of an export in their folder or in the cloud: written, taken from a source, checked.

A source's file is linked where that can be, and copied where not. A hard link is the very file:
whoever writes to one of its names writes to both. So nothing here or elsewhere in this toolkit
writes into a file that exists; files are replaced.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from converters.format.listing import SUFFIX
from converters.sources.local import LocalSource
from converters.sources.objects import CloudSource
from converters.sources.source import Source, byte_view, read_pieces
from mtp_model.checkpoint.directory import UNFINISHED
from mtp_model.files.appended import Appended
from mtp_model.files.appended_file import AppendedFile
from mtp_model.files.appended_object import AppendedObject
from mtp_model.files.cloud_objects import copy, state, states
from mtp_model.files.disk_room import raise_if_full
from mtp_model.files.local import TMP_SUFFIX, file_digest, write_pieces
from mtp_model.files.objects import AnyPath, CloudError, CloudPath
from mtp_model.problems import Problem, ProblemsError

How = Literal["hard link", "reflink", "copy", "copy in the cloud"]
Taken = tuple[How, str | None]
"""How a file was taken over, and the xxh3-128 of what was copied through this machine."""

_FICLONE = 0x40049409  # of linux/fs.h; the fcntl module has it from Python 3.12 on
_PIECE_BYTES = 32 << 20


class ExportFiles(Protocol):
    """The files of a destination, by their names in it."""

    @property
    def folder(self) -> AnyPath: ...

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file that is there in full."""
        ...

    def raise_if_full(self, needed: int) -> None:
        """Raise CheckpointError when there is no room for so many bytes."""
        ...

    def open(self, name: str) -> Appended:
        """A file to write; one that is there is replaced when the new one is whole."""
        ...

    def needs_room(self, source: Source, name: str) -> bool:
        """Whether a source's file takes room here."""
        ...

    def take(self, source: Source, name: str) -> Taken:
        """Put a source's file here as it is."""
        ...

    def fault(self, name: str, digest: str) -> str | None:
        """What is wrong with a file that was written. digest: xxh3-128 of the bytes."""
        ...


def export_files(dst: AnyPath) -> ExportFiles:
    """The files of the folder that is exported to."""
    return CloudFiles(dst) if isinstance(dst, CloudPath) else LocalFiles(dst)


@dataclass(frozen=True)
class LocalFiles:
    """In a folder: read back from the disk, linked from a source where that can be."""

    folder: Path

    def sizes(self) -> Mapping[str, int]:
        found = (path for path in self.folder.rglob("*" + SUFFIX) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in found}

    def raise_if_full(self, needed: int) -> None:
        raise_if_full({self.folder: needed}, "name another place")

    def open(self, name: str) -> Appended:
        return AppendedFile(self._made(name))

    def needs_room(self, source: Source, name: str) -> bool:
        return not can_link(source, name, self.folder)

    def take(self, source: Source, name: str) -> Taken:
        return place(source, name, self._made(name))

    def fault(self, name: str, digest: str) -> str | None:
        found = file_digest(self.folder / name)
        if found != digest:
            return f"reads back as {found}, {digest} was written: the disk is failing"
        return None

    def _made(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@dataclass(frozen=True)
class CloudFiles:
    """Objects below a folder in the cloud: what they should be, the service's checksums tell."""

    folder: CloudPath

    def sizes(self) -> Mapping[str, int]:
        return {name: found.size for name, found in states(self.folder).items()}

    def raise_if_full(self, needed: int) -> None:
        """There always is room."""

    def open(self, name: str) -> Appended:
        return AppendedObject(self.folder / name, self.folder / UNFINISHED / "parts" / name)

    def needs_room(self, source: Source, name: str) -> bool:  # noqa: ARG002
        return False

    def take(self, source: Source, name: str) -> Taken:
        if isinstance(source, CloudSource):
            return self._copied(source.path(name), self.folder / name)
        out = self.open(name)
        try:
            for piece in source_pieces(source, name):
                out.append(byte_view(piece))
            out.finish()
        finally:
            out.discard()
        return "copy", None

    def fault(self, name: str, digest: str) -> None:
        """None: AppendedObject leaves no object whose checksum is not that of what was sent."""

    def _copied(self, old: CloudPath, new: CloudPath) -> Taken:
        copy(old, new)
        was, found = state(old), state(new)
        if was is None or found is None or (found.size, found.crc32c) != (was.size, was.crc32c):
            new.unlink()
            raise CloudError(f"{new} was copied with another checksum; run the same command again")
        return "copy in the cloud", None


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

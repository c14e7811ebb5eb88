"""How the files of an export come to be in a folder or in the cloud, and whether they are there.

Knows files and their bytes; nothing of what is in them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from converters.exporting.links import Taken, can_link, place, source_pieces
from converters.format.listing import SUFFIX
from converters.sources.objects import CloudSource
from converters.sources.source import Source, byte_view
from mtp_model.checkpoint.directory import UNFINISHED
from mtp_model.files.appended import Appended
from mtp_model.files.appended_file import AppendedFile
from mtp_model.files.appended_object import AppendedObject
from mtp_model.files.cloud_objects import copy, state, states
from mtp_model.files.disk_room import raise_if_full
from mtp_model.files.local import file_digest
from mtp_model.files.objects import AnyPath, CloudError, CloudPath


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
    """Those of a destination."""
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

"""The files of an export in their place: written, taken from a source, checked."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import xxhash

from converters.format.listing import CONFIG_FILE, INDEX_FILE, SUFFIX
from converters.sources.source import Source, byte_view, read_pieces
from mtp_model.checkpoint.directory import UNFINISHED
from mtp_model.files.local import raise_if_full
from mtp_model.files.place import Appended, How, Place
from mtp_model.problems import Problem, ProblemsError

Taken = tuple[How | Literal["copy"], str | None]
"""How a file was taken over, and the xxh3-128 of what was copied through this machine."""

_PIECE_BYTES = 32 << 20


@dataclass(frozen=True)
class ExportFiles:
    """The files of a destination, by their names in it."""

    folder: Place

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every safetensors file that is there in full."""
        found = self.folder.sizes().items()
        return {name: size for name, size in found if name.endswith(SUFFIX)}

    def written_s(self, name: str) -> float:
        """When a file was written, in seconds since 1970."""
        return (self.folder / name).written_s()

    def is_untouched(self, name: str, written_s: float | None, digest: str | None) -> bool:
        """Whether a file is the one that was written then, or one of this machine has its bytes.

        Gigabytes are read only where the time is another: a copy of the folder has none of its own.
        """
        file = self.folder / name
        if file.written_s() == written_s:
            return True
        return digest is not None and not file.is_far and file.digest() == digest

    def raise_if_full(self, needed: int) -> None:
        """UserError when there is no room for so many bytes."""
        raise_if_full(self.folder.room_for(needed), "name another place")

    def unmark(self) -> None:
        """Take what makes a checkpoint of the folder: while it is written it is part this one, part
        that. An index of that one would stay where this one has none."""
        for name in (CONFIG_FILE, INDEX_FILE):
            if (self.folder / name).is_file():
                (self.folder / name).unlink()

    def open(self, name: str) -> Appended:
        """A file to write; one that is there is replaced when the new one is whole."""
        file = self.folder / name
        file.parent.make_folder()
        return file.appended(self.folder / UNFINISHED / "parts" / name)

    def needs_room(self, source: Source, name: str) -> bool:
        """Whether a source's file has to be copied here byte by byte."""
        theirs = source.place(name)
        return theirs is None or not (self.folder / name).can_link(theirs)

    def take(self, source: Source, name: str) -> Taken:
        """Put a source's file here as it is: linked or copied in the cloud where that can be."""
        ours, theirs = self.folder / name, source.place(name)
        ours.parent.make_folder()
        how = ours.take(theirs) if theirs else None
        return (how, None) if how else ("copy", self._copied(source, name))

    def fault(self, name: str, digest: str) -> str | None:
        """What is wrong with a file that was written. digest: xxh3-128 of the bytes."""
        return (self.folder / name).fault(digest)

    def _copied(self, source: Source, name: str) -> str:
        out, state = self.open(name), xxhash.xxh3_128()
        try:
            for piece in source_pieces(source, name):
                state.update(piece)
                out.append(byte_view(piece))
            out.finish()
        finally:
            out.discard()
        return state.hexdigest()


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

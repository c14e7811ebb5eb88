"""A journal where nothing can be appended to: an object for each line, named by its digest.

Looks like an open file to the journal; knows no more of lines than which one is the first.
"""

from mtp_model.files.local import digest
from mtp_model.files.objects import CloudPath, read_all

_FIRST = "first"


class ObjectLines:
    """Writes lines, the first one first; others by several threads at once if you like."""

    def __init__(self, folder: CloudPath, *, is_new: bool):
        self._folder = folder
        self._is_new = is_new

    def write(self, line: bytes) -> None:
        """Write one line; it is durable when this returns."""
        name = _FIRST if self._is_new else digest(line)
        self._is_new = False
        (self._folder / name).write_bytes(line)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""


def object_lines(folder: CloudPath) -> list[bytes]:
    """All lines, the first one first; none if that is missing."""
    names = folder.names()
    if _FIRST not in names:
        return []
    return read_all(folder / name for name in [_FIRST, *(n for n in names if n != _FIRST)])


def journals_among(folder: CloudPath, prefix: str) -> list[CloudPath]:
    """The journals of a folder whose names begin with `prefix`."""
    return [folder / name for name in sorted({n.partition("/")[0] for n in folder.names(prefix)})]

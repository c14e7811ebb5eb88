"""Objects below an address as a place: what a folder can do, done with whole objects.

Nothing can be appended to an object. So what is large is sent in parts, objects of their own,
several at a time, which the service joins; and a growing list of lines is an object for each line.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import google_crc32c
import numpy as np

from mtp_model.files.lock import holder, object_locked
from mtp_model.files.memory import AlignedBuffer
from mtp_model.files.objects import (
    CloudError,
    ObjectState,
    StoredObject,
    copy,
    join,
    missing,
    pieces,
    read_all,
    state,
    states,
)
from mtp_model.files.place import PIECE_BYTES, Appended, How, Place, digest

_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 8
_MARK = "begun"
_LONGEST_KEY = 1024  # bytes, as the service allows
_FIRST = "first"


class ObjectPlace(StoredObject):
    """An object, or all below it, with all that a Place can do."""

    @property
    def is_far(self) -> bool:
        return True

    def absolute(self) -> Self:
        return self

    def entries(self, beginning: str = "") -> list[Self]:
        return [
            self / name for name in sorted({n.partition("/")[0] for n in self.names(beginning)})
        ]

    def sizes(self) -> dict[str, int]:
        return {name: found.size for name, found in states(self).items()}

    def is_same(self, other: Place) -> bool:
        return self == other

    def overlaps(self, other: Place) -> bool:
        if not isinstance(other, ObjectPlace):
            return False
        ours, theirs = f"{self}/", f"{other}/"
        return ours.startswith(theirs) or theirs.startswith(ours)

    def read_range_into(self, begin: int, out: np.ndarray) -> None:
        out[:] = np.frombuffer(self.read_range(begin, len(out)), np.uint8)

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
        return pieces(self, piece_bytes)

    def size(self) -> int:
        return self._state().size

    def written_s(self) -> float:
        return self._state().written_s

    def digest(self) -> str:
        return digest(self.read_bytes())

    def write_buffer(self, buffer: AlignedBuffer, nbytes: int) -> None:
        self.write_bytes(bytes(buffer.bytes[:nbytes].data))

    def write_pieces(self, pieces: Iterable[bytes]) -> str:
        data = b"".join(pieces)
        self.write_bytes(data)
        return digest(data)

    def appended(self, scratch: Self | None = None) -> "AppendedObject":
        return AppendedObject(self, scratch or self.parent / f"{self.name}.parts")

    def fault(self, digest: str) -> None:
        """None: AppendedObject leaves no object whose checksum is not that of what was sent."""

    def take(self, source: Place) -> How | None:
        if not isinstance(source, ObjectPlace):
            return None
        copy(source, self)
        was, found = state(source), state(self)
        if was is None or found is None or (found.size, found.crc32c) != (was.size, was.crc32c):
            self.unlink()
            raise CloudError(f"{self} was copied with another checksum; run the same command again")
        return "copy in the cloud"

    def can_link(self, source: Place) -> bool:
        return isinstance(source, ObjectPlace)

    def too_long(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if len((self / name).key.encode()) > _LONGEST_KEY]

    def strangers(self) -> Iterator[tuple[str, str]]:
        yield from ()  # objects are no links

    def make_folder(self, *, marked: bool = False) -> None:
        if marked:
            (self / _MARK).write_bytes(b"")

    def move_to(self, target: Self) -> None:
        for name in self.names():
            copy(self / name, target / name)
        self.delete_tree()

    def sync(self) -> None:
        """Nothing to do: an object that was written is durable."""

    def locked(
        self, *, shared: bool = False, wait: bool = False
    ) -> contextlib.AbstractContextManager[bool]:
        return object_locked(self, shared=shared, wait=wait)

    def holder(self) -> str:
        return f" ({holder(self)})"

    def lines(self) -> "ObjectLines":
        return ObjectLines(self)

    def room_for(self, nbytes: int) -> dict[Path, int]:  # noqa: ARG002
        return {}

    @contextlib.contextmanager
    def on_this_machine(self) -> Iterator[Path]:
        with TemporaryDirectory(prefix="deepseek-mtp-") as folder:
            yield Path(folder)

    def kvstore(self) -> dict[str, Any]:
        return {"driver": "gcs", "bucket": self.bucket, "path": f"{self.key}/"}

    def _state(self) -> ObjectState:
        found = state(self)
        if found is None:
            raise missing(self)
        return found


class AppendedObject(Appended):
    """Appears at `path` only when it is whole. `scratch`: a folder for its parts alone.

    The service's checksum of the object has to be that of what was sent.
    """

    def __init__(self, path: ObjectPlace, scratch: ObjectPlace):
        super().__init__(path, np.empty(_PART_BYTES, np.uint8))
        self._object, self._scratch = path, scratch
        self._size = 0
        self._crc32c = google_crc32c.Checksum()
        self._pool = ThreadPoolExecutor(_PARTS_AT_ONCE)
        self._sent: list[Future[None]] = []

    def finish(self) -> None:
        """Make it visible; CloudError, and no object, if the service has stored other bytes."""
        with self._pool:
            if self._sent:
                self._flush()
                for sent in self._sent:
                    sent.result()
                parts = [self._part_path(number) for number in range(len(self._sent))]
                join(parts, self._object, self._scratch)
                self._scratch.delete_tree()
            else:
                self._object.write_bytes(self._taken())
        self._raise_if_damaged()

    def discard(self) -> None:
        """Stop. Parts that were sent stay in the scratch folder. Nothing to do after finish()."""
        self._pool.shutdown(cancel_futures=True)

    def _flush(self) -> None:
        if len(self._sent) >= _PARTS_AT_ONCE:
            self._sent[-_PARTS_AT_ONCE].result()  # no more than these in memory
        if self._filled:
            path = self._part_path(len(self._sent))
            self._sent.append(self._pool.submit(path.write_bytes, self._taken()))

    def _part_path(self, number: int) -> StoredObject:
        return self._scratch / f"part-{number:05}"

    def _taken(self) -> bytes:
        data = self._memory[: self._filled].tobytes()
        self._crc32c.update(data)
        self._size += len(data)
        self._filled = 0
        return data

    def _raise_if_damaged(self) -> None:
        found = state(self._object)
        ours = int.from_bytes(self._crc32c.digest(), "big")
        if found is None or (found.size, found.crc32c) != (self._size, ours):
            self._object.unlink()
            stored = f"{found.size} bytes, CRC32C {found.crc32c:08x}" if found else "nothing"
            sent = f"{self._size} bytes, CRC32C {ours:08x}"
            advice = "it was deleted; run the same command again"
            raise CloudError(f"{self._object}: {sent} were sent, {stored} are stored; {advice}")


class ObjectLines:
    """A folder with an object for each line, named by its digest but for the first one."""

    def __init__(self, folder: StoredObject):
        self._folder = folder

    def read(self) -> list[bytes]:
        """All lines, the first one first; none if that is missing."""
        names = self._folder.names()
        if _FIRST not in names:
            return []
        others = (name for name in names if name != _FIRST)
        return read_all(self._folder / name for name in (_FIRST, *others))

    def keep(self, lines: Sequence[bytes]) -> None:
        """Nothing goes: an object is written whole or not at all."""
        self._is_new = not lines

    def append(self, line: bytes) -> None:
        name = _FIRST if self._is_new else digest(line)
        self._is_new = False
        (self._folder / name).write_bytes(line)

    def close(self) -> None:
        """Nothing is open."""

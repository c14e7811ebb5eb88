"""Files of this machine as places, written and read at the disk's speed.

Going through the page cache costs a copy and the cache's own work, so what is large goes past it
(O_DIRECT) where the disk can: direct writes ran 3 times as fast as buffered ones.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PosixPath
from typing import Any, Self

import numpy as np
import xxhash

from mtp_model.files.direct import (
    DIRECT_FROM_BYTES,
    go_buffered,
    naming,
    open_direct,
    opened,
    read_cached,
    read_direct,
    staging_memory,
    write_all,
)
from mtp_model.files.memory import ALIGNMENT, AlignedBuffer, aligned
from mtp_model.files.place import PIECE_BYTES, Appended, How, Place, digest
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import UserError

TMP_SUFFIX = ".partial"
_LONGEST_NAME = 255  # bytes, on most disks
_STAGING_BYTES = 4 << 20
_FICLONE = 0x40049409  # of linux/fs.h; the fcntl module has it from Python 3.12 on


class LocalPlace(PosixPath):
    """A path of this machine with all that a Place can do."""

    @property
    def is_far(self) -> bool:
        return False

    def entries(self, beginning: str = "") -> list[Self]:
        if not self.is_dir():
            return []
        return sorted(entry for entry in self.iterdir() if entry.name.startswith(beginning))

    def sizes(self) -> dict[str, int]:
        found = {}
        for folder, _, names in os.walk(self):
            for path in (os.path.join(folder, name) for name in names):  # noqa: PTH118
                with contextlib.suppress(FileNotFoundError):  # another process gave it its name
                    state = os.stat(path)  # noqa: PTH116
                    if stat.S_ISREG(state.st_mode):
                        found[os.path.relpath(path, self)] = state.st_size
        return found

    def is_same(self, other: Place) -> bool:
        return isinstance(other, LocalPlace) and self.exists() and self.samefile(other)

    def overlaps(self, other: Place) -> bool:
        if not isinstance(other, LocalPlace):
            return False
        ours, theirs = self.resolve(), other.resolve()
        return ours.is_relative_to(theirs) or theirs.is_relative_to(ours)

    def read_range_into(self, begin: int, out: np.ndarray) -> None:
        done, direct = 0, len(out) >= DIRECT_FROM_BYTES
        read = read_direct if direct else read_cached
        with opened(self, os.O_RDONLY, direct=direct) as fd:
            while done < len(out):
                got = read(fd, out[done:], begin + done)
                if got == 0:
                    raise UserError(
                        f"{self} ends at byte {begin + done}, {begin + len(out)} were needed: "
                        "it was cut short; copy it again, or import it again with --overwrite"
                    )
                done += got

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
        with self.open("rb") as file, naming(self):
            while piece := file.read(piece_bytes):
                yield piece

    def size(self) -> int:
        return self.stat().st_size

    def written_s(self) -> float:
        return self.stat().st_mtime

    def digest(self) -> str:
        state, memory = xxhash.xxh3_128(), staging_memory()
        direct = self.stat().st_size >= DIRECT_FROM_BYTES
        with opened(self, os.O_RDONLY, direct=direct) as fd:
            offset = 0
            while got := read_direct(fd, memory, offset):
                state.update(memory[:got].data)
                offset += got
        return state.hexdigest()

    def write_buffer(self, buffer: AlignedBuffer, nbytes: int) -> None:
        direct = nbytes >= DIRECT_FROM_BYTES
        # Direct writes take whole pages; what is past the end is cut off again.
        whole = aligned(nbytes) if direct else nbytes
        partial = _partial(self)
        with opened(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, direct=direct) as fd:
            write_all(fd, buffer.bytes[:whole].data)
            if whole != nbytes:
                os.ftruncate(fd, nbytes)
            os.fsync(fd)
        partial.rename(self)

    def write_pieces(self, pieces: Iterable[bytes]) -> str:
        partial, state = _partial(self), xxhash.xxh3_128()
        with naming(partial), partial.open("wb") as out:
            for piece in pieces:
                state.update(piece)
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        partial.rename(self)
        return state.hexdigest()

    def appended(self, scratch: Place | None = None) -> "AppendedFile":  # noqa: ARG002
        return AppendedFile(self)

    def fault(self, digest: str) -> str | None:
        found = self.digest()
        if found != digest:
            return f"reads back as {found}, {digest} was written: the disk is failing"
        return None

    def take(self, source: Place) -> How | None:
        """A hard link is the very file: whoever writes to one of its names writes to both. So this
        toolkit writes into no file that exists; files are replaced."""
        if not isinstance(source, LocalPlace):
            return None
        if _hard_link(source, self):
            return "hard link"
        return "reflink" if _reflink(source, self) else None

    def can_link(self, source: Place) -> bool:
        folder = next(place for place in self.parents if place.exists())
        return isinstance(source, LocalPlace) and source.stat().st_dev == folder.stat().st_dev

    def too_long(self, names: Iterable[str]) -> list[str]:
        longest, whole = (os.pathconf(_existing(self), f"PC_{of}_MAX") for of in ("NAME", "PATH"))
        left = whole - 1 - _nbytes(f"{self.absolute()}/{TMP_SUFFIX}")
        return [
            name
            for name in names
            if _nbytes(name) > left or max(map(_nbytes, name.split("/"))) > longest
        ]

    def strangers(self) -> Iterator[tuple[str, str]]:
        root = Path(os.path.realpath(self))
        inside, left = folders_inside(root), [root]
        while left:
            with os.scandir(left.pop()) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
            left += [Path(entry.path) for entry in found if entry.is_dir(follow_symlinks=False)]
            for entry in found:
                if fault := _fault_of(entry, inside):
                    yield os.path.relpath(entry.path, root), fault

    def make_folder(self, *, marked: bool = False) -> None:  # noqa: ARG002
        try:
            self.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            above = next(path for path in (self, *self.parents) if path.exists())
            raise UserError(f"{above} is a file, needed a folder; name another place") from error

    def delete_tree(self, *, ignore_errors: bool = False) -> None:
        if self.is_dir() and not self.is_symlink():
            shutil.rmtree(self, ignore_errors=ignore_errors)
        else:
            self.unlink()

    def move_to(self, target: Self) -> None:
        self.rename(target)

    def sync(self) -> None:
        for folder, _, _ in os.walk(self):
            _sync_folder(folder)

    @contextlib.contextmanager
    def locked(self, *, shared: bool = False, wait: bool = False) -> Iterator[bool]:
        with self.open("a") as held:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            try:
                with naming(self):  # some network disks have no locks
                    fcntl.flock(held, kind if wait else kind | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def holder(self) -> str:
        return ""

    def lines(self) -> "FileLines":
        return FileLines(self)

    def room_for(self, nbytes: int) -> dict[Path, int]:
        return {self: nbytes}

    @contextlib.contextmanager
    def on_this_machine(self) -> Iterator[Path]:
        yield self

    def kvstore(self) -> dict[str, Any]:
        return {"driver": "file", "path": f"{self.resolve()}/"}


class AppendedFile(Appended):
    """Appears at `path` only when it is whole and on the disk. An OSError names what there is yet.

    It goes through one aligned, reused buffer, past the page cache where that is possible. Direct
    writes need aligned memory, offsets and lengths, and tensors have none of these: the bytes are
    copied once.
    """

    def __init__(self, path: Path):
        super().__init__(LocalPlace(path), AlignedBuffer(_STAGING_BYTES).bytes)
        self._partial = _partial(path)
        self._written = 0
        self._fd = open_direct(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def finish(self) -> None:
        """Flush to the disk, and make it visible."""
        if self._filled % ALIGNMENT:
            go_buffered(self._fd)
        self._flush()
        with self._or_discarded():
            os.fsync(self._fd)
        self._close()
        self._partial.replace(str(self.path))
        _sync_folder(self._partial.parent)

    def discard(self) -> None:
        """Remove what was written. Does nothing after finish() or a second time."""
        if self._fd >= 0:
            self._close()
            self._partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        with self._or_discarded():
            write_all(self._fd, self._memory[: self._filled].data, self._written)
        self._written += self._filled
        self._filled = 0

    @contextlib.contextmanager
    def _or_discarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            self.discard()
            raise OSError(err.errno, err.strerror, str(self._partial)) from err
        except BaseException:
            self.discard()
            raise

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1  # the number may be another file's from here on


class FileLines:
    """Lines of one file. A process that is killed leaves at most its last line torn."""

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.Lock()

    def read(self) -> list[bytes]:
        return self._path.read_bytes().splitlines(keepends=True) if self._path.is_file() else []

    def keep(self, lines: Sequence[bytes]) -> None:
        self._file = self._path.open("ab")
        os.truncate(self._path, sum(map(len, lines)))

    def append(self, line: bytes) -> None:
        with self._lock, naming(self._path):
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        with naming(self._path):
            self._file.close()


def folders_inside(root: Path) -> list[Path]:
    """A folder (links resolved) and what links in it may lead to.

    The Hub's cache is a folder of links (`snapshots/REV/x -> ../../blobs/HASH`): for a folder that
    is a snapshot, the cache's own `blobs` count as inside.
    """
    blobs = [root.parent.parent / "blobs"] if root.parent.name == "snapshots" else []
    return [root, *blobs]


def _fault_of(entry: os.DirEntry[str], inside: Iterable[Path]) -> str | None:
    """What an entry of a folder is that cannot be read as a file in it; None for files, folders."""
    if not entry.is_symlink():
        known = entry.is_file() or entry.is_dir()
        return None if known else "is not a regular file"
    leads = Path(os.path.realpath(entry.path))
    if any(map(leads.is_relative_to, inside)):
        return None
    return f"is a link out of the folder, to {shown(str(leads))}"


def raise_if_full(needs: Mapping[Path, int], advice: str) -> None:
    """UserError unless the disk of each folder has that many bytes free.

    Folders on one disk need room together; a folder need not be there yet.
    """
    disks: dict[int, list[Path]] = {}
    for folder in needs:
        disks.setdefault(_existing(folder).stat().st_dev, []).append(folder)
    for folders in disks.values():
        free = shutil.disk_usage(_existing(folders[0])).free
        if sum(needs[folder] for folder in folders) > free:
            amounts = " and ".join(
                f"{folder} needs {_amount(needs[folder])} more" for folder in folders
            )
            raise UserError(
                f"{amounts}, {'its' if len(folders) == 1 else 'their'} disk has {_amount(free)} "
                f"free; make room and run the same command again, or {advice}"
            )


def _sync_folder(folder: Path | str) -> None:
    """Make renames in a folder survive a power cut, where the filesystem can."""
    with opened(folder, os.O_RDONLY | os.O_DIRECTORY) as fd:
        try:
            os.fsync(fd)
        except OSError as error:  # network and FUSE filesystems refuse to sync folders
            if error.errno in (errno.EIO, errno.ENOSPC):
                raise


def _hard_link(path: Path, target: Path) -> bool:
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except (OSError, NotImplementedError):  # another disk; somebody else's file; too many links
        return False
    return True


def _reflink(path: Path, target: Path) -> bool:
    """A file of its own that shares the other's blocks until one is written."""
    partial = _partial(target)
    try:
        with path.open("rb") as old, partial.open("wb") as new:
            fcntl.ioctl(new, _FICLONE, old.fileno())
            os.fsync(new.fileno())
    except OSError:
        partial.unlink(missing_ok=True)
        return False
    partial.rename(target)
    return True


def _partial(path: Path) -> Path:
    """The name of a file until it is whole; where the suffix would make it too long, its digest."""
    name = path.name
    if _nbytes(name) + len(TMP_SUFFIX) > _LONGEST_NAME:
        name = digest(name.encode())
    return path.with_name(name + TMP_SUFFIX)


def _nbytes(name: str) -> int:
    return len(os.fsencode(name))


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _amount(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"

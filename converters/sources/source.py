"""Where a checkpoint's bytes come from; knows nothing of what is in the files."""

import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mtp_model.checkpoint.directory import COMPLETE, PROVENANCE
from mtp_model.files.local import DIRECT_FROM_BYTES, open_direct, read_cached, read_direct
from mtp_model.files.objects import is_cloud
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem, ProblemsError, raise_if_any

Buffer = bytes | bytearray | memoryview | np.ndarray
Fingerprint = dict[str, int | str]
"""What tells that a file changed: `size` in bytes, `mtime_ns`, ...; survives JSON unchanged."""

HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@\s]+))?", re.A
)
"""`org/name` or `org/name@revision`, a branch, a tag or a commit."""

_OPEN_FILES = 32
_PIECE_BYTES = 4 << 20
BOOKKEEPING = (".git", ".cache")  # of git and of huggingface_hub: copies of the files around them


def kind_fault(files: Collection[str]) -> str | None:
    """What a set of files is instead of a safetensors checkpoint, and what to do."""
    if {COMPLETE, PROVENANCE} - set(files):
        return None
    found = "is a checkpoint directory, not a safetensors checkpoint"
    advice = "name what it was imported from, or what `convert-deepseek export` made of it"
    return f"{found}; {advice}"


class Source(Protocol):
    """A read-only set of files. Methods may be called by several threads at once.

    Every failure is a ProblemsError that names the file, what was found and what was needed.
    """

    name: str
    """What the user typed; for a model on the Hub with the commit that it stood for."""

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


def read_pieces(
    source: Source, file: str, size: int, piece_bytes: int = _PIECE_BYTES
) -> Iterator[bytes]:
    """The first `size` bytes of a file, piece by piece."""
    for begin in range(0, size, piece_bytes):
        yield source.read(file, begin, min(piece_bytes, size - begin))


def open_source(src: str, *, keep_downloads: bool = False) -> Source:
    """The source that the user's words stand for: a local folder, gs://, or a model on the Hub.

    keep_downloads: files that are fetched whole from the Hub stay in its cache on this machine.
    """
    if is_cloud(src):
        from converters.sources.objects import CloudSource

        return CloudSource(src)
    if HUB_ID.fullmatch(src) and not os.path.lexists(src):
        from converters.sources.hub import (
            HubSource,  # loads huggingface_hub, which folders don't need
        )

        return HubSource(src, keep_downloads=keep_downloads)
    return LocalSource(src)


def byte_view(buffer: Buffer) -> NDArray[np.uint8]:
    """The memory of a C-contiguous buffer of any dtype, bfloat16 and float8 too, as bytes [n]."""
    if not isinstance(buffer, np.ndarray):
        return np.frombuffer(buffer, np.uint8)
    if not buffer.flags.c_contiguous:
        raise ValueError(f"needs a C-contiguous array, found strides {buffer.strides}")
    return buffer.reshape(-1).view(np.uint8)


def name_fault(file: str) -> str | None:
    """Why `file` cannot be the name of a file inside a folder; None when it can."""
    if file.startswith("/"):
        return "is an absolute path; file names are relative to the checkpoint's folder"
    if ".." in file.split("/"):
        return "leaves the checkpoint's folder"
    if not file or "\0" in file or {"", "."} & set(file.split("/")):
        return "is not a plain relative path"
    return None


class LocalSource:
    """A folder on this machine; links that lead out of it are refused.

    The Hub's cache is a folder of such links (`snapshots/REV/x -> ../../blobs/HASH`): for a folder
    that is a snapshot, the cache's own `blobs` count as inside.
    """

    def __init__(self, name: str):
        self.name = name
        self._root = Path(os.path.realpath(name))
        if not self._root.is_dir():
            found = "is a file" if self._root.exists() else "does not exist"
            needed = "needed the folder that holds config.json and the safetensors files"
            raise ProblemsError(name, [Problem("file", shown(name), f"{found}; {needed}")])
        self._inside = [self._root]
        if self._root.parent.name == "snapshots":
            self._inside.append(self._root.parent.parent / "blobs")
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()

    def files(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        problems: list[Problem] = []
        for file in sorted(self._walk()):
            try:
                sizes[file] = self._stat(file)[1].st_size
            except ProblemsError as err:
                problems += err.problems
        raise_if_any(self.name, problems)
        return sizes

    def read(self, file: str, begin: int, nbytes: int) -> bytes:
        opened = self._opened(file)
        self._check_range(file, opened.size, begin, nbytes)  # before memory is taken for it
        out = bytearray(nbytes)
        self._fill(file, opened, begin, memoryview(out))
        return bytes(out)

    def read_into(self, file: str, begin: int, out: Buffer) -> None:
        opened = self._opened(file)
        view = byte_view(out).data
        self._check_range(file, opened.size, begin, len(view))
        self._fill(file, opened, begin, view)

    def fingerprint(self, file: str) -> Fingerprint:
        found = self._stat(file)[1]
        return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}

    def path(self, file: str) -> Path:
        """Where `file` really is, links resolved."""
        return self._stat(file)[0]

    def _walk(self) -> Iterator[str]:
        for folder, subfolders, names in os.walk(self._root, onerror=self._refuse_folder):
            subfolders[:] = [name for name in subfolders if name not in BOOKKEEPING]
            links = [name for name in subfolders if Path(folder, name).is_symlink()]
            for name in names + links:
                yield Path(folder, name).relative_to(self._root).as_posix()

    def _refuse_folder(self, err: OSError) -> None:
        raise self._error(str(err.filename), f"cannot be listed: {err.strerror}")

    def _stat(self, file: str) -> tuple[Path, os.stat_result]:
        """Where `file` really is, and its state; refuses what is no regular file inside."""
        fault = name_fault(file)
        if fault:
            raise self._error(file, fault)
        try:
            file.encode()  # undecodable names arrive as surrogates, which no report can hold
            path = Path(os.path.realpath(self._root / file, strict=True))
            found = path.stat()
        except UnicodeEncodeError:
            raise self._error(file, "has a name that is not UTF-8; rename it") from None
        except OSError as err:
            raise self._error(file, f"cannot be opened: {err.strerror}") from err
        if not any(path.is_relative_to(folder) for folder in self._inside):
            fault = f"is a link out of the folder, to {shown(str(path))}; put the file itself there"
        elif not stat.S_ISREG(found.st_mode):
            fault = "is not a regular file"
        if fault:
            raise self._error(file, fault)
        return path, found

    def _opened(self, file: str) -> "_OpenFile":
        with self._lock:
            if file not in self._open:
                path, _ = self._stat(file)
                try:
                    self._open[file] = _OpenFile(path)
                except OSError as err:
                    raise self._error(file, f"cannot be opened: {err.strerror}") from err
            self._open.move_to_end(file)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)  # closes once its last reader is done with it
            return self._open[file]

    def _check_range(self, file: str, size: int, begin: int, nbytes: int) -> None:
        if begin < 0 or nbytes < 0 or begin + nbytes > size:
            needed = f"needed bytes {begin} to {begin + nbytes}"
            raise self._error(file, f"is {size} bytes, {needed}; it is truncated or was replaced")

    def _fill(self, file: str, opened: "_OpenFile", begin: int, view: memoryview) -> None:
        done = 0
        out = byte_view(view)
        direct = len(out) >= DIRECT_FROM_BYTES
        fd, read = (opened.direct_fd, read_direct) if direct else (opened.fd, read_cached)
        while done < len(view):
            try:
                got = read(fd, out[done:], begin + done)
            except OSError as err:
                raise self._error(file, f"byte {begin + done}: {err.strerror}") from err
            if not got:
                ended = f"ends at byte {begin + done}, needed bytes to {begin + len(view)}"
                raise self._error(file, f"{ended}; it was truncated while it was read")
            done += got

    def _error(self, file: str, detail: str) -> ProblemsError:
        return ProblemsError(self.name, [Problem("file", shown(file), detail)])


class _OpenFile:
    """A file descriptor that closes with its last reference, so that eviction can't race reads."""

    def __init__(self, path: Path):
        # No link and no wait: the path was resolved, and a pipe put there since must not block.
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        self.size = os.fstat(self.fd).st_size
        self._lock = threading.Lock()
        self._direct_fd: int | None = None

    @property
    def direct_fd(self) -> int:
        """The same file, past the page cache: what is read once gains nothing from it."""
        with self._lock:
            if self._direct_fd is None:
                self._direct_fd = open_direct(
                    f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC
                )
            return self._direct_fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # `close` is kept for the end of the process, when modules are gone before objects are.
        for fd in (getattr(self, "fd", None), getattr(self, "_direct_fd", None)):
            if fd is not None:  # os.open may have failed
                close(fd)

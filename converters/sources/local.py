"""A folder on this machine as the source of a checkpoint."""

import contextlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from converters.sources.source import (
    BOOKKEEPING,
    Buffer,
    Fingerprint,
    Source,
    byte_view,
    range_fault,
)
from mtp_model.files.direct import SharedFile
from mtp_model.files.local import LocalPlace, folders_inside
from mtp_model.files.place import name_fault
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem, ProblemsError, raise_if_any

_OPEN_FILES = 32


class LocalSource(Source):
    """A folder on this machine; links that lead out of it are refused, or followed."""

    def __init__(self, name: str, *, follow_links: bool = False):
        """follow_links: read what links out of the folder lead to, as the user has asked."""
        self.name = name
        self._follow_links = follow_links
        self._root = Path(os.path.realpath(name))
        if not self._root.is_dir():
            found = "is a file" if self._root.exists() else "does not exist"
            needed = "needed the folder that holds config.json and the safetensors files"
            raise ProblemsError(name, [Problem("file", shown(name), f"{found}; {needed}")])
        self._inside = folders_inside(self._root)
        self._lock = threading.Lock()
        self._open: OrderedDict[str, SharedFile] = OrderedDict()

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

    @property
    def folder(self) -> LocalPlace:
        return LocalPlace(self.name)

    def place(self, file: str) -> LocalPlace:
        """Where `file` really is, links resolved."""
        return LocalPlace(self._stat(file)[0])

    def _walk(self) -> Iterator[str]:
        walk = os.walk(self._root, onerror=self._refuse_folder, followlinks=self._follow_links)
        walked: list[Path] = []
        for folder, subfolders, names in walk:
            walked.append(Path(os.path.realpath(folder)))
            subfolders[:] = [name for name in subfolders if name not in BOOKKEEPING]
            links = [name for name in subfolders if Path(folder, name).is_symlink()]
            if self._follow_links:
                for name in links:
                    walked.append(self._linked_folder(Path(folder, name), walked))
                links = []  # os.walk goes into them
            for name in names + links:
                yield Path(folder, name).relative_to(self._root).as_posix()

    def _linked_folder(self, link: Path, walked: list[Path]) -> Path:
        """Where a link to a folder leads; refuses what would be walked twice, or without end."""
        linked = Path(os.path.realpath(link))
        if any(folder.is_relative_to(linked) for folder in walked):
            file = link.relative_to(self._root).as_posix()
            found = "is a link to a folder that is part of this one already"
            raise self._error(file, f"{found}; remove the link")
        return linked

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
            fault = f"cannot be opened: {err.strerror}"
            with contextlib.suppress(OSError):  # it is no link
                leads = shown(str((self._root / file).readlink()))
                fault = f"is a link to {leads}, which {fault}; mend the link or remove it"
            raise self._error(file, fault) from err
        is_inside = any(path.is_relative_to(folder) for folder in self._inside)
        if not is_inside and not self._follow_links:
            advice = "read it with --follow-links, or put the file itself there"
            fault = f"is a link out of the folder, to {shown(str(path))}; {advice}"
        elif stat.S_ISDIR(found.st_mode) and (self._root / file).is_symlink():
            advice = "read it with --follow-links, or put the folder itself there"
            fault = f"is a link to a folder; {advice}"
        elif not stat.S_ISREG(found.st_mode):
            fault = "is not a regular file"
        if fault:
            raise self._error(file, fault)
        return path, found

    def _opened(self, file: str) -> SharedFile:
        with self._lock:
            if file not in self._open:
                path, _ = self._stat(file)
                try:
                    self._open[file] = SharedFile(path)
                except OSError as err:
                    raise self._error(file, f"cannot be opened: {err.strerror}") from err
            self._open.move_to_end(file)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)  # closes once its last reader is done with it
            return self._open[file]

    def _check_range(self, file: str, size: int, begin: int, nbytes: int) -> None:
        if fault := range_fault(size, begin, nbytes):
            raise self._error(file, f"{fault}; it is truncated or was replaced")

    def _fill(self, file: str, opened: SharedFile, begin: int, view: memoryview) -> None:
        done = 0
        out = byte_view(view)
        while done < len(view):
            try:
                got = opened.read(out[done:], begin + done)
            except OSError as err:
                raise self._error(file, f"byte {begin + done}: {err.strerror}") from err
            if not got:
                ended = f"ends at byte {begin + done}, needed bytes to {begin + len(view)}"
                raise self._error(file, f"{ended}; it was truncated while it was read")
            done += got

    def _error(self, file: str, detail: str) -> ProblemsError:
        return ProblemsError(self.name, [Problem("file", shown(file), detail)])

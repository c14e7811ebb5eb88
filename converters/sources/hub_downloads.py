"""Local copies of the Hub's files: fetched before they are read, deleted after; few at a time.

Must not know what the bytes mean: it is given the byte ranges that will be read, in order.
"""

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from converters.sources.hub_cache import cached, keep_in_cache
from converters.sources.hub_errors import StoppedError, hub_error
from converters.sources.hub_http import Repository
from converters.sources.partial_file import PartialFile, Ranges, covers, cut, merged, num_bytes
from converters.sources.source import Read

_CONNECTIONS = 4  # for each file
_FETCHERS = 2  # so that the check of one file's digest overlaps with the next file's begin
_WHOLE_SHARE = 0.9  # of a file that is wanted: then fetch all of it, which its digest can prove


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of what is fetched ahead. A layer of V3 spans up to four files, and waits for them all."""

    most_files: int = 4
    piece_bytes: int = 64 << 20


@dataclass
class _File:
    """A file of the plan; `users` are the steps that will read it and are not finished."""

    name: str
    ranges: Ranges
    users: int = 0
    queued: bool = True
    awaited: bool = False
    path: Path | None = None
    kept: bool = False
    error: Exception | None = None


class Downloads:
    """Fetches what `reads` (by step, in order) need into `folder`, which may hold parts of it.

    A file that all its steps are finished with is deleted, unless `keep`: then it moves to the
    Hub's cache. At most `limits.most_files` are there at once, and those that readers wait for.
    """

    def __init__(
        self,
        repository: Repository,
        reads: Mapping[str, Sequence[Read]],
        folder: Path,
        *,
        keep: bool,
        limits: Limits,
    ):
        self._repository = repository
        self._folder = folder
        self._keep = keep
        self._limits = limits
        self._files = _planned(reads)
        self._steps = {step: {read[0] for read in of_step} for step, of_step in reads.items()}
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._clear_folder()
        self._threads = [threading.Thread(target=self._fetch_all) for _ in range(_FETCHERS)]
        for thread in self._threads:
            thread.start()

    def path(self, file: str, begin: int, end: int) -> Path | None:
        """Where the bytes begin..end of a file are; waits for them. None: not among these reads."""
        found = self._files.get(file)
        if found is None or not covers(found.ranges, begin, end):
            return None
        with self._changed:
            found.awaited = True
            self._changed.notify_all()
            while found.users and not found.path and not found.error and not self._stop.is_set():
                self._changed.wait()
            if found.error:
                raise found.error
            return found.path

    def finish(self, step: str) -> None:
        """A step has read all it needs."""
        with self._changed:
            for name in self._steps.pop(step):
                file = self._files[name]
                file.users -= 1
                if file.users == 0:
                    self._drop(file)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop fetching. What was fetched and not yet read stays, for the next run."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _clear_folder(self) -> None:
        """Delete what an earlier run fetched and this one won't read."""
        self._folder.mkdir(parents=True, exist_ok=True)
        stems = set(map(self._stem, self._files))
        for path in self._folder.iterdir():
            if path.stem not in stems:
                path.unlink()

    def _drop(self, file: _File) -> None:
        if not file.kept:
            self._partial(file.name).delete()
        file.path = None

    def _fetch_all(self) -> None:
        while file := self._next():
            try:
                path, error = self._fetch(file), None
            except StoppedError:
                path, error = None, None
            except Exception as err:  # whoever waits for the file raises it
                path, error = None, err
            with self._changed:
                file.path, file.error = path, error
                if not file.users:
                    self._drop(file)
                self._changed.notify_all()

    def _next(self) -> _File | None:
        """The next file to fetch, once there is room for it or somebody waits for it."""
        with self._changed:
            while not self._stop.is_set():
                queue = [file for file in self._files.values() if file.queued and file.users]
                if not queue:
                    return None
                here = sum(
                    not file.queued and not file.kept and file.users > 0
                    for file in self._files.values()
                )
                awaited = [file for file in queue if file.awaited]
                room = queue if here < self._limits.most_files else []
                for file in (*awaited, *room):
                    file.queued = False
                    return file
                self._changed.wait()
        return None

    def _fetch(self, file: _File) -> Path:
        """Where the wanted ranges of a file are, once they are."""
        if path := cached(self._repository, file.name):
            file.kept = True
            return path
        partial = self._partial(file.name)
        fault = None
        try:
            for _ in range(2):
                self._fetch_missing(file, partial)
                fault = partial.fault() if partial.is_whole else None
                if not fault:
                    return self._keep_if_whole(file, partial)
                partial.delete()
        except OSError as err:
            fault = f"cannot be stored in {self._folder}: {err.strerror}; make room there"
            raise hub_error(self._repository.name, file.name, fault) from err
        raise hub_error(self._repository.name, file.name, f"was fetched twice and {fault}")

    def _fetch_missing(self, file: _File, partial: PartialFile) -> None:
        def fetch(span: tuple[int, int]) -> None:
            partial.write(span, self._repository.stream(file.name, *span, self._stop))

        ranges = file.ranges
        if partial.share_with(ranges) >= _WHOLE_SHARE:
            ranges = [(0, self._repository.entries[file.name].size)]
        pieces = cut(partial.missing(ranges), self._limits.piece_bytes)
        with partial, ThreadPoolExecutor(_CONNECTIONS) as pool:
            for _ in pool.map(fetch, pieces):
                pass

    def _keep_if_whole(self, file: _File, partial: PartialFile) -> Path:
        if not (self._keep and partial.is_whole):
            return partial.path
        file.kept = True
        path = keep_in_cache(self._repository, file.name, partial.path)
        partial.delete()
        return path

    def _partial(self, name: str) -> PartialFile:
        return PartialFile(self._folder, self._stem(name), self._repository.entries[name])

    def _stem(self, name: str) -> str:
        """Of the copy's file name: says file and content, so that neither can be another's."""
        return hashlib.sha256(
            f"{self._repository.entries[name].digest} {name}".encode()
        ).hexdigest()


def _planned(reads: Mapping[str, Sequence[Read]]) -> dict[str, _File]:
    """The files in the order in which they are first read."""
    wanted: dict[str, list[tuple[int, int]]] = {}
    users: Counter[str] = Counter()
    for of_step in reads.values():
        for name, begin, nbytes in of_step:
            wanted.setdefault(name, []).append((begin, begin + nbytes))
        users.update({read[0] for read in of_step})
    return {
        name: _File(name=name, ranges=merged(ranges), users=users[name])
        for name, ranges in wanted.items()
    }


def room_needed(
    repository: Repository,
    reads: Mapping[str, Sequence[Read]],
    folder: Path,
    *,
    keep: bool,
    limits: Limits,
) -> dict[Path, int]:
    """About how many bytes fetching `reads` takes at once, by folder, beyond those in `folder`.

    It is about that: a reader that falls behind the others holds its files for longer.
    """
    sizes = {
        name: _fetched_bytes(file, repository.entries[name].size)
        for name, file in _planned(reads).items()
        if not cached(repository, name)
    }
    of_one_step = max((len({read[0] for read in step}) for step in reads.values()), default=0)
    at_once = sum(sorted(sizes.values())[-max(limits.most_files, of_one_step) :])
    there = sum(path.stat().st_blocks * 512 for path in folder.glob("*.part"))
    needed = {folder: max(at_once - there, 0)}
    if keep:
        whole = [size for name, size in sizes.items() if size == repository.entries[name].size]
        needed[Path(constants.HF_HUB_CACHE)] = sum(whole)
    return needed


def _fetched_bytes(file: _File, size: int) -> int:
    """Bytes that a file of this size takes: all of it once most of it is wanted."""
    wanted = num_bytes(file.ranges)
    return size if wanted >= _WHOLE_SHARE * size else wanted

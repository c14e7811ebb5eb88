"""A model on the Hub as the source of a checkpoint: `org/name` or `org/name@revision`.

Knows where bytes are at hand: the Hub's cache, what was fetched ahead, or else the network.
"""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from converters.sources.hub_cache import cached
from converters.sources.hub_downloads import Downloads, Limits, room_needed
from converters.sources.hub_errors import DEFAULT_PATIENCE, Patience, hub_error
from converters.sources.hub_http import Repository
from converters.sources.hub_listing import Entry
from converters.sources.source import HUB_ID, Buffer, Fingerprint, Finish, Read, Source, byte_view
from mtp_model.files.untrusted_json import shown

_HELD_BYTES = 64 << 20  # of small files, each whole: config, index, tokenizer


class HubSource(Source):
    """The files of a model at the commit that its revision stood for when this was made.

    `name` is the model with that commit, `org/name@0123...`: what is read stays the same when the
    branch moves. keep_downloads: files that were fetched whole move to the Hub's cache. token None:
    the one that the user is logged in with, if any.
    """

    is_far = True

    def __init__(
        self,
        src: str,
        *,
        keep_downloads: bool = False,
        token: str | None = None,
        endpoint: str | None = None,
        patience: Patience = DEFAULT_PATIENCE,
        limits: Limits | None = None,
    ):
        match = HUB_ID.fullmatch(src)
        if not match:
            raise hub_error("the Hub", shown(src), "is no model; needed org/name[@revision]")
        self._repository = Repository(
            match["repo"],
            match["revision"],
            token=token,
            endpoint=endpoint,
            patience=patience,
            where=f"the Hub, since there is no folder {src}",
        )
        self._keep_downloads = keep_downloads
        self._limits = limits or Limits()
        self._downloads: Downloads | None = None
        self._held = _HeldFiles(self._repository)
        self.name = self._repository.name

    def files(self) -> dict[str, int]:
        return {file: entry.size for file, entry in self._repository.entries.items()}

    def read(self, file: str, begin: int, nbytes: int) -> bytes:
        self._check_range(file, begin, nbytes)  # before memory is taken for it
        out = bytearray(nbytes)
        self._fill(file, begin, memoryview(out))
        return bytes(out)

    def read_into(self, file: str, begin: int, out: Buffer) -> None:
        view = byte_view(out).data
        self._check_range(file, begin, len(view))
        self._fill(file, begin, view)

    def fingerprint(self, file: str) -> Fingerprint:
        """Of the content: no request, since nothing at a commit can change."""
        entry = self._entry(file)
        kind = "sha256" if entry.sha256 else "git_blob"
        return {"size": entry.size, kind: entry.digest}

    def room_needed(self, reads: Mapping[str, Sequence[Read]], folder: Path) -> Mapping[Path, int]:
        """Bytes that `staged` needs on disk at once: a few files; to keep them, all of them."""
        return room_needed(
            self._repository, reads, folder, keep=self._keep_downloads, limits=self._limits
        )

    @contextlib.contextmanager
    def staged(self, reads: Mapping[str, Sequence[Read]], folder: Path) -> Iterator[Finish]:
        """Fetch `reads`, by step and in this order, into `folder`, ahead of whoever reads them."""
        downloads = Downloads(
            self._repository, reads, folder, keep=self._keep_downloads, limits=self._limits
        )
        self._downloads = downloads
        try:
            yield downloads.finish
        finally:
            self._downloads = None
            downloads.close()

    def _entry(self, file: str) -> Entry:
        entry = self._repository.entries.get(file)
        if not entry:
            raise hub_error(self.name, shown(file), "is not in the repository")
        return entry

    def _check_range(self, file: str, begin: int, nbytes: int) -> None:
        size = self._entry(file).size
        if begin < 0 or nbytes < 0 or begin + nbytes > size:
            needed = f"needed bytes {begin} to {begin + nbytes}"
            raise hub_error(self.name, file, f"is {size} bytes, {needed}")

    def _fill(self, file: str, begin: int, view: memoryview) -> None:
        end = begin + len(view)
        downloads = self._downloads
        path = downloads.path(file, begin, end) if downloads else None
        path = path or cached(self._repository, file)
        if path and _read_file(path, begin, view):
            return
        if self._held.holds(file):
            view[:] = self._held.content(file)[begin:end]
            return
        position = 0
        for part in self._repository.stream(file, begin, end):
            view[position : position + len(part)] = part
            position += len(part)


class _HeldFiles:
    """Small files in memory, each fetched once and proved by its digest, the last read the longest.

    Those are the files that are not in large file storage; the Hub's own servers, which hold them,
    need not know ranges.
    """

    def __init__(self, repository: Repository):
        self._repository = repository
        self._lock = threading.Lock()
        self._contents: OrderedDict[str, bytes] = OrderedDict()

    def holds(self, file: str) -> bool:
        entry = self._repository.entries[file]
        return not entry.sha256 and entry.size <= _HELD_BYTES

    def content(self, file: str) -> bytes:
        with self._lock:
            content = self._contents.pop(file, None)
            if content is None:
                content = self._repository.whole(file)
            self._contents[file] = content
            while sum(map(len, self._contents.values())) > _HELD_BYTES:
                self._contents.popitem(last=False)
            return content


def _read_file(path: Path, begin: int, view: memoryview) -> bool:
    """Fill `view` from a file; False when it was deleted meanwhile, or is shorter than it was."""
    try:
        with path.open("rb", buffering=0) as file:
            while view:
                got = os.preadv(file.fileno(), [view], begin)
                if not got:
                    return False
                begin, view = begin + got, view[got:]
    except FileNotFoundError:
        return False
    return True

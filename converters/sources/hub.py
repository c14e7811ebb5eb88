"""A model on the Hub as the source of a checkpoint: `org/name` or `org/name@revision`.

Bytes come from the Hub's cache on this machine, from what was fetched ahead, or by a request.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from converters.sources.ahead import MOST_FILES, Ahead
from converters.sources.hub_errors import hub_error
from converters.sources.hub_fetch import Downloads, cached, fetch_range, fetch_small, files_in
from converters.sources.hub_listing import Entry, list_model
from converters.sources.source import (
    HUB_ID,
    Buffer,
    Fingerprint,
    Finish,
    Read,
    Source,
    byte_view,
    range_fault,
)
from mtp_model.files.untrusted_json import shown

# Not in large file storage: config, index, tokenizer. The Hub's own servers hold them, which need
# not know ranges, so these are fetched whole, proved and held for a while.
_SMALL_BYTES = 16 << 20
_SMALL_FILES = 4


class HubSource(Source):
    """The files of a model at the commit that its revision stood for when this was made.

    `name` is the model with that commit, `org/name@0123...`: what is read stays the same when the
    branch moves.
    """

    is_far = True

    def __init__(self, src: str):
        match = HUB_ID.fullmatch(src)
        if not match:
            raise hub_error("the Hub", shown(src), "is no model; needed org/name[@revision]")
        where = f"the Hub, since there is no folder {src}"
        self._model = list_model(match["repo"], match["revision"], where=where)
        self._ahead: Ahead | None = None
        self._small = functools.lru_cache(_SMALL_FILES)(functools.partial(fetch_small, self._model))
        self.name = self._model.name

    def files(self) -> dict[str, int]:
        return {file: entry.size for file, entry in self._model.entries.items()}

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
        """A few whole files, or those of the step that reads the most.

        It is about that: a reader that falls behind the others holds its files for longer.
        """
        steps = self._to_fetch(reads)
        sizes = sorted(self._entry(file).size for file in {f for of in steps.values() for f in of})
        of_one_step = max(map(len, steps.values()), default=0)
        at_once = sum(sizes[-max(MOST_FILES, of_one_step) :])
        there = sum(path.stat().st_blocks * 512 for path in files_in(folder))
        return {folder: max(at_once - there, 0)}

    @contextlib.contextmanager
    def staged(self, reads: Mapping[str, Sequence[Read]], folder: Path) -> Iterator[Finish]:
        """Fetch the files of `reads` into `folder`, whole, ahead of whoever reads them."""
        steps = self._to_fetch(reads)
        downloads = Downloads(self._model, folder, {f for of in steps.values() for f in of})
        self._ahead = ahead = Ahead(steps, downloads.fetch, downloads.delete)
        try:
            yield ahead.finish
        finally:
            self._ahead = None
            ahead.close(downloads.stop)
            downloads.close()

    def _to_fetch(self, reads: Mapping[str, Sequence[Read]]) -> dict[str, list[str]]:
        """The files that each step needs from the network."""
        files = {file: not cached(self._model, file) for of in reads.values() for file, _, _ in of}
        return {
            step: list(dict.fromkeys(file for file, _, _ in of_step if files[file]))
            for step, of_step in reads.items()
        }

    def _entry(self, file: str) -> Entry:
        entry = self._model.entries.get(file)
        if not entry:
            raise hub_error(self.name, shown(file), "is not in the repository")
        return entry

    def _check_range(self, file: str, begin: int, nbytes: int) -> None:
        if fault := range_fault(self._entry(file).size, begin, nbytes):
            raise hub_error(self.name, file, fault)

    def _fill(self, file: str, begin: int, view: memoryview) -> None:
        if not view:
            return
        end = begin + len(view)
        ahead = self._ahead  # another thread may end it
        path = (ahead.path(file) if ahead else None) or cached(self._model, file)
        if path and _read_file(path, begin, view):
            return
        entry = self._entry(file)
        if not entry.sha256 and entry.size <= _SMALL_BYTES:
            view[:] = self._small(file)[begin:end]
        else:
            view[:] = fetch_range(self._model, file, begin, end)


def _read_file(path: Path, begin: int, view: memoryview) -> bool:
    """Fill `view` from a file; False when it was deleted meanwhile, or is shorter than it was."""
    try:
        with path.open("rb") as file:
            file.seek(begin)
            return file.readinto(view) == len(view)
    except FileNotFoundError:
        return False

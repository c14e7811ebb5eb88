"""Bytes fetched ahead of those who read them, from sources that are far away.

Knows only that a source may want to hear the plan: what is read, step by step. A local folder
doesn't.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, runtime_checkable

from converters.sources.source import Source
from mtp_model.files.objects import AnyPath, CloudPath

Read = tuple[str, int, int]
"""File, offset of the first byte, number of bytes."""

Finish = Callable[[str], None]
"""Told each step that has read all it needs."""


@runtime_checkable
class FarSource(Protocol):
    """A source that fetches what will be read."""

    def staged(
        self, reads: Mapping[str, Sequence[Read]], folder: Path
    ) -> AbstractContextManager[Finish]:
        """As `staged` below."""
        ...


@runtime_checkable
class FetchingSource(Protocol):
    """A far source that keeps what it fetches on a disk for a while."""

    def room_needed(self, reads: Mapping[str, Sequence[Read]], folder: Path) -> Mapping[Path, int]:
        """As `room_needed` below."""
        ...


def room_needed(
    source: Source, reads: Mapping[str, Sequence[Read]], folder: Path
) -> Mapping[Path, int]:
    """About how many bytes `staged` will have on disk at once, by folder, beyond those there."""
    return source.room_needed(reads, folder) if isinstance(source, FetchingSource) else {}


@contextlib.contextmanager
def staged(source: Source, reads: Mapping[str, Sequence[Read]], folder: Path) -> Iterator[Finish]:
    """While inside, the source fetches `reads`, by step and in the order of the steps.

    Steps may run in any order and at the same time. `folder` is the source's to use, for what it
    fetched; what is left there after an interruption is not fetched again.
    """
    if isinstance(source, FarSource):
        with source.staged(reads, folder) as finish:
            yield finish
    else:
        yield lambda _step: None


@contextlib.contextmanager
def room_for_fetched(unfinished: AnyPath, worker: tuple[int, int]) -> Iterator[Path]:
    """A worker's folder for `staged`: among what is unfinished, unless that is in the cloud.

    There it is temporary, and after an interruption what was fetched is fetched again.
    """
    if isinstance(unfinished, CloudPath):
        with TemporaryDirectory(prefix="convert-deepseek-") as folder:
            yield Path(folder)
    else:
        yield unfinished / f"fetched-{worker[0]}-of-{worker[1]}"

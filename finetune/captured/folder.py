"""Folders of captured samples: what their files are called, and which of a capture are missing."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.records import DataError
from mtp_model.files.open import as_place
from mtp_model.files.place import Place
from mtp_model.files.untrusted_json import parse
from mtp_model.problems import UserError

SUFFIX = ".safetensors"
PROGRESS_FILE = "capture.json"
_NUMBERED = re.compile(rf"sample-(\d{{8,18}}){re.escape(SUFFIX)}")


def sample_name(number: int) -> str:
    """What `capture` calls a sample."""
    return f"sample-{number:08}{SUFFIX}"


@dataclass(frozen=True)
class SamplesThere:
    """Which of a capture's samples are in its folder.

    runs: those without a gap, first and one past the last of each, in order; a folder may hold few
    with numbers of 18 digits.
    """

    runs: list[tuple[int, int]]

    @classmethod
    def among(cls, names: Iterable[str]) -> "SamplesThere":
        """Of the names of a folder's files."""
        runs: list[tuple[int, int]] = []
        for number in sorted(_numbers(names)):
            first = runs.pop()[0] if runs and runs[-1][1] == number else number
            runs.append((first, number + 1))
        return cls(runs)

    def has(self, numbers: range) -> bool:
        """Whether all of these are there."""
        return not numbers or any(
            first <= numbers.start and numbers.stop <= end for first, end in self.runs
        )


def _numbers(names: Iterable[str]) -> set[int]:
    """Those of the samples among some names."""
    return {int(found[1]) for name in names if (found := _NUMBERED.fullmatch(name))}


def samples_below(folder: Path) -> tuple[list[tuple[Place, int]], list[str]]:
    """Files that samples may be in, below a folder, in a fixed order, with their sizes; and what
    finished captures there lack.

    DataError where it is no folder, or a capture in it is not finished.
    """
    place = as_place(folder)
    if not place.is_dir():
        raise DataError([f"{place} is no folder of captured states"])
    sizes = {tuple(name.split("/")): size for name, size in place.sizes().items()}
    found = [
        (place / "/".join(parts), sizes[parts])
        for parts in sorted(sizes)
        if parts[-1].endswith(SUFFIX)
    ]
    return found, [*_lacking(place, sizes)]


def _lacking(place: Place, files: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """What each capture lacks in or below a place; files: paths of all that is there."""
    names: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for *folders, name in files:
        names[tuple(folders)].append(name)
    for folders in sorted(folders for folders, beside in names.items() if PROGRESS_FILE in beside):
        capture = place / "/".join(folders) if folders else place
        expected, there = _finished_samples(capture), _numbers(names[folders])
        number = expected - sum(each < expected for each in there)
        if number > 0:
            first = next(each for each in itertools.count() if each not in there)
            yield (
                f"{capture} lacks {number:,} of the {expected:,} samples that were captured, "
                f"{sample_name(first)} first"
            )


def _finished_samples(capture: Place) -> int:
    """How many samples a capture has; DataError for one that was interrupted."""
    file = capture / PROGRESS_FILE
    try:
        said: Any = parse(file.read_bytes())
    except UserError as error:
        raise DataError([f"{file} {error}"]) from error
    samples = said.get("samples") if isinstance(said, dict) and said.get("finished") else None
    if type(samples) is not int:
        raise DataError([f"{capture} is not finished: run the same `capture` again to go on"])
    return samples

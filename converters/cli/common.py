"""What the commands share: opening what the user named, printing results and errors."""

import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from converters.cli.arguments import PROG
from converters.exporting.as_source import DirectorySource
from converters.format.listing import SourceCheckpoint, open_safetensors
from converters.format.mtp_from import find_module, open_joined
from converters.sources.open import open_source
from converters.sources.source import Source, kind_fault
from mtp_model.checkpoint.directory import (
    COMPLETE,
    UNFINISHED,
    CheckpointError,
    open_checkpoint,
)
from mtp_model.files.open import as_place, is_address
from mtp_model.problems import Problem, ProblemsError, UserError
from mtp_model.reporting import (
    Section,
    human_bytes,
    problem_report,
    problems_as_json,
    show,
    stdout,
    to_json,
    visible,
)


def source_of(src: str, *, follow_links: bool) -> Source:
    """What SRC stands for; ProblemsError where it is not the kind of thing that is wanted."""
    source = open_source(src, follow_links=follow_links)
    if fault := kind_fault(source.files()):
        raise ProblemsError(source.name, [Problem("source", src, fault)])
    return source


def checkpoint_of(src: str, mtp_from: str | None, *, follow_links: bool) -> SourceCheckpoint:
    """The safetensors checkpoint SRC; with `--mtp-from` its main model with another's module."""
    source = source_of(src, follow_links=follow_links)
    if mtp_from is None:
        return open_safetensors(source)
    return open_joined(source, find_module(any_source(mtp_from, follow_links=follow_links)))


def raise_if_module_goes(dst: str | Path, mtp_from: str | None) -> None:
    """CheckpointError where what is written would replace the module that it is made of."""
    if mtp_from is None or not (is_address(mtp_from) or Path(mtp_from).exists()):
        return  # none, or on the Hub
    if as_place(dst).overlaps(as_place(mtp_from)):
        raise CheckpointError(
            f"{dst} and {mtp_from} of --mtp-from overlap; that is read while the other is written: "
            "name another place"
        )


def any_source(src: str, *, follow_links: bool) -> Source:
    """Any source, or a checkpoint directory as one."""
    if is_directory(src):
        return DirectorySource(open_checkpoint(as_place(src)))
    return source_of(src, follow_links=follow_links)


def is_directory(src: str) -> bool:
    """Whether the user's words stand for a checkpoint directory, complete or not."""
    place = as_place(src) if is_address(src) or Path(src).is_dir() else None
    return bool(place and ((place / COMPLETE).is_file() or (place / UNFINISHED).is_dir()))


def print_result(sections: Iterable[Section], plain: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(to_json(plain))
    else:
        show(stdout(), sections)


def tell(error: UserError, *, as_json: bool) -> None:
    """Say on stderr what is wrong, alike problems as one line; in full on stdout for --json."""
    problems = error if isinstance(error, ProblemsError) else None
    found = problem_report(problems.where, problems.problems) if problems else f"{PROG}: {error}"
    print(visible(found), file=sys.stderr)
    if as_json:
        with contextlib.suppress(OSError):  # a full disk under stdout is what was told
            print(to_json(problems_as_json(problems) if problems else {"error": found}), flush=True)


def time_and_rate(nbytes: int, seconds: float) -> str:
    return f"{seconds:,.1f} s, {human_bytes(nbytes / max(seconds, 1e-9))}/s"

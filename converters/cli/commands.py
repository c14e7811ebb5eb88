"""What each command does, from opened source to printed result; knows no command-line syntax."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.cli import views
from converters.exporting.destination import forget_record
from converters.exporting.exporter import export_checkpoint
from converters.format.check import check, read_config
from converters.format.fit import compare
from converters.format.inspection import inspect_source
from converters.format.listing import Listing, list_checkpoint
from converters.importing.importer import import_checkpoint
from converters.sources.open import open_source
from converters.sources.source import Source, kind_fault
from converters.verifying.digests import check_digests
from converters.verifying.logits import LogitsCheck, check_logits
from converters.verifying.report_folder import write_report
from converters.verifying.verify import Verification, check_storage
from mtp_model.checkpoint.directory import Checkpoint, open_checkpoint
from mtp_model.config import HiddenState, ModelConfig
from mtp_model.problems import Problem, ProblemsError, raise_if_any
from mtp_model.progress import progress
from mtp_model.reporting import Section, problem_report, problems_as_json, show, stdout, to_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from converters.cli.main import Export, Import, Inspect, Verify
    from converters.publishing.push import Pushed


def run_inspect(command: "Inspect") -> int:
    """Print what a checkpoint is; 1 if it has problems."""
    found = inspect_source(_source(command.src))
    _print(views.inspection(found), found.to_dict(), as_json=command.json)
    return 1 if found.problems else 0


def run_import(command: "Import") -> int:
    """Check everything that can be, then import."""
    listing, config_dict = _open(_source(command.src))
    config, notes = _checked(listing, config_dict, command)
    assert command.share
    began_s = time.monotonic()
    with progress("import") as report:
        summary = import_checkpoint(
            listing,
            config,
            command.dst,
            scope=command.scope,
            dtype=command.dtype,
            copies=command.copies,
            workers=command.workers,
            overwrite=command.overwrite,
            progress=report,
            worker=command.share,
            mtp_hidden_state=_hidden_state(command),
        )
    seconds = time.monotonic() - began_s
    if notes is None and summary.finished:
        stale = open_checkpoint(command.dst).provenance["stale_copies"]
        notes = tuple(f"{name} differs; the main model's is taken" for name in stale)
    plain = {**dataclasses.asdict(summary), "notes": notes or (), "seconds": seconds}
    _print(views.imported(summary, notes or (), seconds), plain, as_json=command.json)
    return 0


def _checked(
    listing: Listing, config_dict: dict[str, Any], command: "Import"
) -> tuple[ModelConfig, tuple[str, ...] | None]:
    """The config, and what to tell of stale copies; None where import itself has to find these.

    Scales and copies of a far source are not read twice: import checks them as they arrive.
    """
    if listing.source.is_far:
        found = compare(listing, config_dict, scope=command.scope)
        raise_if_any(listing.source.name, found.problems)
        assert found.config is not None
        return found.config, None
    with progress("check") as report:
        checked = check(
            listing, config_dict, scope=command.scope, copies=command.copies, progress=report
        )
    return checked.config, checked.notes


def _hidden_state(command: "Import") -> HiddenState | None:
    return None if command.mtp_hidden_state == "config" else command.mtp_hidden_state


def run_export(command: "Export") -> int:
    """Export, push if asked to, and tell what differs from the source."""
    checkpoint = open_checkpoint(command.ckpt)
    base = list_checkpoint(_source(command.base)) if command.base else None
    began_s = time.monotonic()
    with progress("export") as report:
        summary = export_checkpoint(
            checkpoint,
            command.dst,
            dtype=command.dtype,
            base=base,
            workers=command.workers,
            overwrite=command.overwrite,
            continuable=command.push is not None,
            progress=report,
        )
    seconds = time.monotonic() - began_s
    pushed = _push(Path(command.dst), command.push, checkpoint) if command.push else None
    plain = {
        **dataclasses.asdict(summary),
        "changed": summary.changed,
        "requantised": [dataclasses.asdict(cost) for cost in summary.requantised],
        "seconds": seconds,
        "pushed": dataclasses.asdict(pushed) if pushed else None,
    }
    _print(views.exported(summary, seconds, pushed), plain, as_json=command.json)
    return 0


def _push(folder: Path, repo_id: str, checkpoint: Checkpoint) -> "Pushed":
    """Upload what was exported; on failure ProblemsError that says how to go on."""
    from converters.publishing.push import (
        push_folder,  # loads huggingface_hub, which folders don't need
    )

    sent, total = 0, None
    try:
        with progress("push") as show_progress:

            def report(done: int, of: int) -> None:
                nonlocal sent, total
                sent, total = done, of
                show_progress(done, of)

            pushed = push_folder(folder, repo_id, provenance=checkpoint.provenance, progress=report)
    except ProblemsError as err:
        problem = Problem("push", repo_id, views.unsent(folder, sent, total))
        raise ProblemsError(err.where, [*err.problems, problem]) from err
    forget_record(folder)
    return pushed


def run_verify(command: "Verify") -> int:
    """Check digests and what else was asked; 1 unless all of it holds."""
    if command.report:
        Path(command.report).mkdir(parents=True, exist_ok=True)  # fails now, not after an hour
    ckpt = command.ckpt or command.src
    checkpoint = open_checkpoint(ckpt)
    source = _source(command.src) if command.ckpt else None
    opened = _open(source) if source else None
    with progress("digests") as report:
        digests = check_digests(checkpoint, workers=command.workers, progress=report)
    storage, logits = None, None
    if opened and digests.holds:
        with progress("tensors") as report:
            storage = check_storage(
                *opened, checkpoint, scope=command.scope, workers=command.workers, progress=report
            )
        logits = _logits(*opened, checkpoint) if command.logits else None
    found = Verification(
        source=source.name if source else None,
        checkpoint=ckpt,
        digests=digests,
        storage=storage,
        logits=logits,
    )
    _print(views.verification(found), found.to_dict(), as_json=command.json)
    if command.report:
        write_report(command.report, found)
    return 0 if found.holds else 1


def _logits(listing: Listing, config_dict: dict[str, Any], checkpoint: Checkpoint) -> LogitsCheck:
    if listing.source.is_far:
        detail = "is not on this machine; --logits needs a local folder, download it first"
        raise ProblemsError(listing.source.name, [Problem("source", "SRC", detail)])
    return check_logits(listing, config_dict, checkpoint)


def _source(src: str) -> Source:
    """What SRC stands for; ProblemsError where it is not the kind of thing that is wanted."""
    source = open_source(src)
    if fault := kind_fault(source.files()):
        raise ProblemsError(source.name, [Problem("source", src, fault)])
    return source


def _open(source: Source) -> tuple[Listing, dict[str, Any]]:
    """Headers and config.json; ProblemsError with the problems of both."""
    problems: list[Problem] = []
    opened = []
    for read in (list_checkpoint, read_config):
        try:
            opened.append(read(source))
        except ProblemsError as err:
            problems += err.problems
    raise_if_any(source.name, problems)
    listing, config = opened
    return listing, config


def _print(sections: "Iterable[Section]", plain: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(to_json(plain))
    else:
        show(stdout(), sections)


def tell_problems(err: ProblemsError, *, as_json: bool) -> None:
    """Problems on stderr, alike ones as one line; all of them on stdout where JSON was asked."""
    if as_json:
        print(to_json(problems_as_json(err)))
    print(problem_report(err.where, err.problems), file=sys.stderr)


def tell_error(text: str, *, as_json: bool) -> None:
    """Any other failure, the same way."""
    if as_json:
        print(to_json({"error": text}))
    print(text, file=sys.stderr)

"""`convert-deepseek verify`: whether an export would give a source's bytes and its logits; and what
differs between any two checkpoints."""

import sys
from pathlib import Path

from converters.cli.arguments import Verify
from converters.cli.common import any_source, checkpoint_of, is_directory, print_result
from converters.format.listing import SourceCheckpoint
from converters.verifying.compare import compare, open_side
from converters.verifying.digests import check_digests
from converters.verifying.logits.check import LogitsCheck, check_logits
from converters.verifying.logits.devices import devices_for
from converters.verifying.logits.layers import UNFINISHED
from converters.verifying.report import comparison, make_report_folder, verification, write_report
from converters.verifying.verify import Verification, check_storage
from mtp_model.checkpoint.directory import Checkpoint, read_checkpoint
from mtp_model.problems import Problem, ProblemsError, UserError
from mtp_model.progress import progress


def run_verify(command: Verify) -> int:
    """Check digests and what else was asked; 1 unless all of it holds."""
    if command.report:
        make_report_folder(command.report)
    if command.ckpt and (is_directory(command.src) or not is_directory(command.ckpt)):
        return _compare(command, command.src, command.ckpt)
    ckpt = command.ckpt or command.src
    checkpoint = read_checkpoint(ckpt)
    opened = None
    if command.ckpt:
        links = command.follow_links
        opened = checkpoint_of(command.src, command.mtp_from, follow_links=links)
        if command.logits:
            _raise_if_of_two(opened)
    with progress("digests") as report:
        digests = check_digests(checkpoint, workers=command.workers, progress=report)
    storage, logits = None, None
    if opened and digests.holds:
        with progress("tensors") as report:
            storage = check_storage(
                opened, checkpoint, scope=command.scope, workers=command.workers, progress=report
            )
        logits = _logits(opened, checkpoint, command) if command.logits else None
    found = Verification(
        source=opened.source.name if opened else None,
        checkpoint=ckpt,
        digests=digests,
        storage=storage,
        logits=logits,
    )
    print_result(verification(found), found.to_dict(), as_json=command.json)
    if command.report:
        write_report(command.report, found)
    return 0 if found.holds else 1


def _compare(command: Verify, a: str, b: str) -> int:
    """Any two checkpoints; 1 unless nothing differs."""
    if command.logits or command.mtp_from:
        raise UserError(
            f"{b} is not a checkpoint directory beside the safetensors that it was imported from, "
            "which --logits and --mtp-from compare: verify SRC CKPT"
        )
    sides = [open_side(any_source(src, follow_links=command.follow_links)) for src in (a, b)]
    with progress("tensors") as report:
        found = compare(*sides, scope=command.scope, workers=command.workers, progress=report)
    print_result(comparison(found), found.to_dict(), as_json=command.json)
    if command.report:
        write_report(command.report, found)
    return 0 if found.holds else 1


def _logits(source: SourceCheckpoint, checkpoint: Checkpoint, command: Verify) -> LogitsCheck:
    """The comparison of logits; with a report's folder, one that was stopped there goes on."""
    saved = Path(command.report) / UNFINISHED if command.report else None
    devices = devices_for(checkpoint, command.mesh.asked)
    print(f"logits on {devices.said}", file=sys.stderr)
    how = {"text": command.text, "saved": saved, "devices": devices}
    with progress("logits", unit="layers") as report:
        return check_logits(source, checkpoint, **how, progress=report)


def _raise_if_of_two(source: SourceCheckpoint) -> None:
    """The reference reads a checkpoint's own files by itself, not those of two."""
    if source.taken:
        detail = "is of two sources, and --logits reads one folder; export CKPT, and verify that"
        raise ProblemsError(source.source.name, [Problem("source", "SRC", detail)])

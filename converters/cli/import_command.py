"""`convert-deepseek import`: safetensors to a checkpoint directory."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

from converters.cli.arguments import Import
from converters.cli.common import (
    checkpoint_of,
    print_result,
    raise_if_module_goes,
    time_and_rate,
)
from converters.cli.inspect_command import plain_weights_text
from converters.format.listing import SourceCheckpoint
from converters.importing.finish import foreign_buffers
from converters.importing.importer import ImportSummary, import_checkpoint
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.config import HiddenState
from mtp_model.problems import group_names
from mtp_model.progress import progress
from mtp_model.reporting import (
    Facts,
    Section,
    human_bytes,
    plural,
)


def run_import(command: Import) -> int:
    """Check all that the headers tell, then import; values are checked as they are read."""
    raise_if_module_goes(command.dst, command.mtp_from)
    checkpoint = checkpoint_of(command.src, command.mtp_from, follow_links=command.follow_links)
    # The copies of another checkpoint's module may be of what its main model was before training.
    copies = "main" if checkpoint.taken else command.copies
    assert command.share
    began_s = time.monotonic()
    with progress("import") as report:
        summary = import_checkpoint(
            checkpoint,
            command.dst,
            scope=command.scope,
            dtype=command.dtype,
            copies=copies,
            workers=command.workers,
            overwrite=command.overwrite,
            progress=report,
            worker=command.share,
            mtp_hidden_state=_hidden_state(command),
        )
    seconds = time.monotonic() - began_s
    notes = [*_of_module(checkpoint)]
    if summary.finished:
        notes += _notes(summary, stale=copies == "main")  # else import has refused them
    said = [note for _, note in notes]
    plain = {**dataclasses.asdict(summary), "notes": said, "seconds": seconds}
    del plain["plain_weights"]  # said in the notes
    print_result(_imported(summary, notes, seconds), plain, as_json=command.json)
    return 0


def _of_module(checkpoint: SourceCheckpoint) -> Iterator[tuple[str, str]]:
    """Where the MTP module was taken from, and what became of it on the way."""
    if checkpoint.taken:
        yield "MTP module", f"from {checkpoint.taken.source.name}"
        for note in checkpoint.taken.notes:
            yield "MTP module", note


def _notes(summary: ImportSummary, *, stale: bool) -> Iterator[tuple[str, str]]:
    """What was taken though it looks like a mistake, of a finished import."""
    checkpoint = open_checkpoint(summary.path)
    if stale:
        for name in checkpoint.provenance["stale_copies"]:
            yield "stale copy", f"{name} differs; the main model's is taken"
    for name, _ in group_names(foreign_buffers(checkpoint)):
        found = "is not what config.json gives; no logit depends on it, and export writes it again"
        yield "buffer", f"{name} {found}"
    for plain in summary.plain_weights:
        if not plain.named:
            yield f"in {plain.dtype}", plain_weights_text(plain)


def _hidden_state(command: Import) -> HiddenState | None:
    return None if command.mtp_hidden_state == "config" else command.mtp_hidden_state


def _imported(
    summary: ImportSummary, notes: Sequence[tuple[str, str]], seconds: float
) -> Iterator[Section]:
    """What `import` prints."""
    pairs = [
        ("checkpoint", str(summary.path)),
        ("read", f"{plural(summary.num_tensors, 'tensor')}, {human_bytes(summary.source_bytes)}"),
        ("written", human_bytes(summary.stored_bytes)),
        ("time", time_and_rate(summary.source_bytes, seconds)),
    ]
    index, count = summary.worker
    if count > 1:
        pairs.append(("worker", f"{index + 1} of {count}, {plural(summary.num_units, 'piece')}"))
    if summary.resumed_units:
        resumed = f"{summary.resumed_units:,} of {summary.num_units:,} pieces were there"
        pairs.append(("continued", f"{resumed} already"))
    pairs += notes
    if not summary.finished:
        others = "this share is done, others are not; the last of them finishes the checkpoint"
        pairs.append(("unfinished", others))
    yield Facts(pairs)

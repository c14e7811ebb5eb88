"""`convert-deepseek export`: a checkpoint directory to safetensors, and to the Hub."""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from converters.cli.arguments import Export
from converters.cli.common import checkpoint_of, print_result, source_of, time_and_rate
from converters.exporting.destination import forget_record
from converters.exporting.exporter import export_checkpoint
from converters.exporting.result import ExportSummary
from converters.format.listing import SUFFIX, list_checkpoint
from mtp_model.checkpoint.directory import Checkpoint, open_checkpoint
from mtp_model.problems import Problem, ProblemsError
from mtp_model.progress import progress
from mtp_model.reporting import (
    Facts,
    Grid,
    Section,
    human_bytes,
    plural,
)

if TYPE_CHECKING:
    from converters.publishing.push import Pushed

_MOST_NAMES = 12
_MOST_REQUANTISED = 8


def run_export(command: Export) -> int:
    """Export, push if asked to, and tell what differs from the source."""
    checkpoint = open_checkpoint(command.ckpt)
    base = None
    follow_links = command.follow_links
    if command.base and command.mtp_from:
        base = checkpoint_of(command.base, command.mtp_from, follow_links=follow_links)
    elif command.base:
        base = list_checkpoint(source_of(command.base, follow_links=follow_links))
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
    print_result(exported(summary, seconds, pushed), plain, as_json=command.json)
    return 0


def _push(folder: Path, repo_id: str, checkpoint: Checkpoint) -> "Pushed":
    """Upload what was exported; on failure ProblemsError that says how to go on."""
    # Here and not above: it loads huggingface_hub, which folders don't need.
    from converters.publishing.push import push_folder

    sent, total = 0, None
    try:
        with progress("push") as show_progress:

            def report(done: int, of: int) -> None:
                nonlocal sent, total
                sent, total = done, of
                show_progress(done, of)

            pushed = push_folder(folder, repo_id, provenance=checkpoint.provenance, progress=report)
    except ProblemsError as err:
        problem = Problem("push", repo_id, unsent(folder, sent, total))
        raise ProblemsError(err.where, [*err.problems, problem]) from err
    forget_record(folder)
    return pushed


def exported(
    summary: ExportSummary, seconds: float, pushed: "Pushed | None" = None
) -> Iterator[Section]:
    """What `export` prints."""
    yield Facts([*_export_facts(summary, seconds, pushed)])
    if summary.base:
        yield _files_over_base(summary)
    if summary.requantised:
        yield from _requantised(summary)


def _export_facts(
    summary: ExportSummary, seconds: float, pushed: "Pushed | None"
) -> Iterator[tuple[str, str]]:
    same = sum(file.same_as_source for file in summary.files)
    yield "checkpoint", str(summary.path)
    if summary.base:
        yield "base", summary.base
    yield "files", f"{len(summary.files):,}, of which {same:,} have the source's every byte"
    tensors = plural(summary.num_tensors, "tensor")
    size = human_bytes(summary.written_bytes)
    yield "written", size if summary.base else f"{tensors}, {size}"
    yield "time", time_and_rate(summary.written_bytes, seconds)
    if summary.changed:
        yield "changed", f"{plural(len(summary.changed), 'tensor')} of the source"
    if summary.resumed_files:
        yield "continued", f"{plural(summary.resumed_files, 'file')} were there already"
    for note in summary.notes:
        yield "note", note
    if pushed:
        amount = f"{plural(pushed.num_files, 'file')}, {human_bytes(pushed.num_bytes)}"
        yield "pushed", f"{amount}, to {pushed.url}"
        if pushed.others:
            others = f"{plural(len(pushed.others), 'file')} there are not of this checkpoint"
            yield "note", f"{others}: {', '.join(pushed.others[:_MOST_NAMES])}"


def _files_over_base(summary: ExportSummary) -> Grid:
    """Every file that was written, and what became of those between."""
    rows = []
    for _, group in itertools.groupby(summary.files, lambda f: f.name if f.changed else f.how):
        files = [*group]
        first = files[0]
        names = [file.name.removesuffix(SUFFIX) for file in files]
        name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        how = "rewritten" if first.how == "written" else first.how
        changed = f"{len(first.changed):,}" if first.changed else ""
        size = human_bytes(sum(file.size for file in files))
        rows.append((name, f"{len(files):,}", how, changed, size))
    others = f"{summary.num_side_files:,}"
    rows.append(("config, tokenizer, index, others", others, "copy", "", ""))
    return Grid(("files", "number", "how", "tensors changed", "bytes"), rows)


def unsent(folder: Path, sent: int, total: int | None) -> str:
    """What a push that failed has left to do."""
    left = f"{human_bytes(total - sent)} of {human_bytes(total)}" if total else "all of it"
    done = f"{folder} is exported in full, {left} is not on the Hub yet"
    return f"{done}; the same command continues, and sends what is missing"


def _requantised(summary: ExportSummary) -> Iterator[Section]:
    worst = sorted(summary.requantised, key=lambda cost: -cost.rms_rel_err)
    rows = [
        (cost.name, f"{cost.rms_rel_err:.2e}", f"{cost.max_rel_err:.2e}")
        for cost in worst[:_MOST_REQUANTISED]
    ]
    shown = f", the {len(rows)} with the largest errors:" if len(worst) > len(rows) else ":"
    yield f"{plural(len(worst), 'weight')} got new FP8 scales{shown}"
    yield Grid(("weight", "rms error / rms weight", "largest error / block's largest"), rows)

"""What each command says when it is done; knows every result, computes and prints nothing."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converters.exporting.result import ExportSummary
from converters.format.inspection import Inspection, MtpModule, Network
from converters.format.listing import SUFFIX
from converters.importing.importer import ImportSummary
from converters.verifying.logits import LogitsCheck
from converters.verifying.verify import Part, StorageCheck, Verification
from mtp_model.grouping import group_names
from mtp_model.reporting import (
    Facts,
    Grid,
    Section,
    cut,
    human_bytes,
    human_count,
    plural,
    problem_report,
)

if TYPE_CHECKING:
    from converters.publishing.push import Pushed

_MOST_NAMES = 12
_MOST_REQUANTISED = 8


def inspection(found: Inspection) -> Iterator[Section]:
    """What `inspect` prints."""
    yield Facts([*_source_facts(found)])
    if found.network:
        yield _network_grid(found.network)
    if found.problems:
        yield problem_report(found.source, found.problems)


def _source_facts(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "checkpoint", found.source
    yield "model type", found.model_type or "unknown"
    yield "files", f"{found.files:,} safetensors, {human_bytes(found.file_bytes)}"
    for dtype, tally in found.dtypes.items():
        yield dtype, f"{plural(tally.tensors, 'tensor')}, {human_bytes(tally.bytes)}"
    if found.network:
        yield from _network_facts(found.network)
    why = "problems below" if found.problems else "by its headers; import checks scales and copies"
    yield "can be imported", f"{'no' if found.problems else 'yes'} ({why})"


def _network_facts(network: Network) -> Iterator[tuple[str, str]]:
    config = network.config
    experts = f"{config.n_routed_experts} experts, {config.num_experts_per_tok} for a token"
    yield "layers", f"{config.num_dense_layers} dense, {config.num_moe_layers} MoE ({experts})"
    mtp = sum(module.parameters for module in network.mtp)
    main, active = network.parameters - mtp, network.active_parameters
    of_main = f"main model {human_count(main)}, {human_count(active)} active for a token"
    yield "parameters", f"{human_count(network.parameters)}: {of_main}; MTP {human_count(mtp)}"
    block = config.weight_block_size
    yield "FP8", f"blocks of {block[0]} x {block[1]}" if block else "not quantised"
    for number, module in enumerate(network.mtp, start=1):
        yield f"MTP module {number}", _mtp_module(module)
    if not network.mtp:
        yield "MTP modules", "none: num_nextn_predict_layers is 0"


def _mtp_module(module: MtpModule) -> str:
    where = f"model.layers.{module.layer}"
    if not module.tensors:
        return f"{where}, absent"
    size = f"{plural(module.tensors, 'tensor')}, {human_count(module.parameters)} parameters"
    copies = ", ".join(name.removesuffix(".weight") for name in module.copies) or "absent"
    return f"{where}, {size}; copies: {copies}"


def _network_grid(network: Network) -> Grid:
    rows = [
        (part, f"{t.tensors:,}", human_count(t.parameters), human_bytes(t.bytes))
        for part, t in network.groups.items()
    ]
    return Grid(("part", "tensors", "parameters", "bytes"), rows)


def imported(summary: ImportSummary, notes: Sequence[str], seconds: float) -> Iterator[Section]:
    """What `import` prints."""
    pairs = [
        ("checkpoint", str(summary.path)),
        ("read", f"{plural(summary.num_tensors, 'tensor')}, {human_bytes(summary.source_bytes)}"),
        ("written", human_bytes(summary.stored_bytes)),
        ("time", _time(summary.source_bytes, seconds)),
    ]
    index, count = summary.worker
    if count > 1:
        pairs.append(("worker", f"{index + 1} of {count}, {plural(summary.num_units, 'piece')}"))
    if summary.resumed_units:
        resumed = f"{summary.resumed_units:,} of {summary.num_units:,} pieces were there"
        pairs.append(("continued", f"{resumed} already"))
    pairs += [("stale copy", note) for note in notes]
    if not summary.finished:
        others = "this share is done, others are not; the last of them finishes the checkpoint"
        pairs.append(("unfinished", others))
    yield Facts(pairs)


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
    yield "time", _time(summary.written_bytes, seconds)
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


def _time(nbytes: int, seconds: float) -> str:
    return f"{seconds:,.1f} s, {human_bytes(nbytes / max(seconds, 1e-9))}/s"


def verification(found: Verification) -> Iterator[Section]:
    """What `verify` prints and what its report says."""
    pairs = [("source", found.source)] if found.source else []
    pairs += [("checkpoint", found.checkpoint), ("digests", _digests(found))]
    yield Facts(pairs)
    if not found.digests.holds:
        yield problem_report(found.checkpoint, found.digests.problems)
    if found.storage:
        yield from _storage(found.storage)
        if found.storage.files:
            yield problem_report(found.source or found.checkpoint, found.storage.files)
    if found.logits:
        yield from _logits(found.logits)
    yield Facts([("result", "; ".join(_verdicts(found)))])


def _digests(found: Verification) -> str:
    files = plural(found.digests.files, "chunk file")
    state = "as they were written" if found.digests.holds else "NOT as they were written"
    return f"{files}, {human_bytes(found.digests.bytes)}, {state}"


def _storage(storage: StorageCheck) -> Iterator[Section]:
    rows = [_part_row(part, tally) for part, tally in storage.parts.items()]
    columns = ("part", "tensors", "bytes", "identical", "differing", "worst relative difference")
    yield Grid(columns, [*rows, _part_row("total", storage.total)])
    yield from _differing(storage)


def _part_row(name: str, part: Part) -> tuple[str, ...]:
    differing = (f"{part.differing:,}", f"{part.worst:.2e}") if part.differing else ("0", "")
    identical = f"{part.tensors - part.differing:,}"
    return name, f"{part.tensors:,}", human_bytes(part.bytes), identical, *differing


def _differing(storage: StorageCheck) -> Iterator[Section]:
    names = [d.name for d in storage.differences if not d.replaced]
    if names:
        lines = [
            f"  {name} ({n:,} tensors)" if n > 1 else f"  {name}" for name, n in group_names(names)
        ]
        yield "\n".join(["differing:", *cut(lines, _MOST_NAMES)])
    stale = [f"  {d.name}" for d in storage.differences if d.replaced]
    if stale:
        why = "stale in the source, export writes the main model's (import --copies main):"
        yield "\n".join([why, *stale])


def _logits(logits: LogitsCheck) -> Iterator[Section]:
    rows = [
        (
            f"MTP depth {d.depth}" if d.depth else "main model",
            f"{d.rows:,}",
            f"{d.relative_difference:.1e}",
            f"{logits.tolerance:.0e}",
            f"{100 * d.argmax_agreement:.2f} %",
        )
        for d in logits.depths
    ]
    columns = ("logits", "positions", "largest difference", "allowed", "same argmax")
    yield Grid(columns, rows)
    if logits.rounded_leaves:
        leaves = plural(len(logits.rounded_leaves), "trained leaf", "trained leaves")
        yield f"{leaves} of CKPT, finer than SRC: compared as export rounds and quantises them."


def _verdicts(found: Verification) -> Iterator[str]:
    damaged = len(found.digests.problems)
    yield f"FAILED: {plural(damaged, 'damaged file')}" if damaged else "digests hold"
    if found.storage:
        total = found.storage.total
        if total.differing:
            yield f"FAILED: {total.differing:,} of {total.tensors:,} tensors differ from the source"
        else:
            yield f"export writes the source's bytes for all {total.tensors:,} tensors"
        if found.storage.files:
            yield f"FAILED: {plural(len(found.storage.files), 'file')} would be written otherwise"
    if found.logits:
        yield "logits agree" if found.logits.holds else "FAILED: logits differ by more than allowed"

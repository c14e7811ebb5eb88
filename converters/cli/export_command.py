"""`convert-deepseek export`: a checkpoint directory to safetensors, and to the Hub."""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.cli.arguments import Export
from converters.cli.common import (
    checkpoint_of,
    print_result,
    raise_if_module_goes,
    source_of,
    time_and_rate,
)
from converters.exporting.adapters import settings_of, write_adapters
from converters.exporting.destination import forget_record
from converters.exporting.exporter import export_checkpoint
from converters.exporting.result import ExportSummary
from converters.format.listing import SUFFIX, list_checkpoint
from converters.publishing.measured import MeasuredAcceptance, read_measured
from converters.publishing.serving import (
    ENGINES,
    MAIN_MODEL,
    PRE_NORM,
    RECYCLING,
    SAMPLING,
    main_was_trained,
    num_drafts,
    serve_lines,
)
from mtp_model.checkpoint.directory import Checkpoint, open_checkpoint
from mtp_model.files.open import is_address
from mtp_model.problems import Problem, ProblemsError
from mtp_model.progress import progress
from mtp_model.reporting import (
    Facts,
    Grid,
    Section,
    human_bytes,
    plural,
    problem_report,
)

if TYPE_CHECKING:
    from converters.publishing.push import Pushed
    from converters.verifying.export_gate import ExportCheck
    from converters.verifying.logits.check import LogitsCheck

_MOST_NAMES = 12
_MOST_REQUANTISED = 8


def run_export(command: Export) -> int:
    """Export, check what was written, push if asked to; 1 where the check does not hold."""
    checkpoint = open_checkpoint(command.ckpt)
    if (adapters := settings_of(checkpoint)) is not None:
        return _export_adapters(command, checkpoint, adapters)
    raise_if_module_goes(command.dst, command.mtp_from)
    measured = read_measured(command.acceptance, command.ckpt, checkpoint.digest)
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
            draft=command.draft,
            workers=command.workers,
            overwrite=command.overwrite,
            continuable=command.push is not None,
            progress=report,
        )
    seconds = time.monotonic() - began_s
    checked = _check(checkpoint, summary, command) if command.verify else None
    holds = checked is None or checked.holds
    pushed = None
    if command.push and holds:
        pushed = _push(command, command.push, checkpoint, checked, measured)
    model = command.push or (command.dst if not is_address(command.dst) else "DIR")
    servable = holds and summary.mtp_modules > 0
    drafts = num_drafts(checkpoint.provenance, checkpoint.config_dict) if servable else 0
    plain = {
        **dataclasses.asdict(summary),
        "changed": summary.changed,
        "requantised": [dataclasses.asdict(cost) for cost in summary.requantised],
        "seconds": seconds,
        "verified": checked.to_dict() if checked else None,
        "pushed": dataclasses.asdict(pushed) if pushed else None,
        "serve": _serve_lines(command, model, drafts) if drafts else [],
    }
    sections = [*exported(summary, seconds, pushed), *verified(checked)]
    sections += serving(checkpoint, plain["serve"], drafts, is_draft=command.draft is not None)
    print_result(sections, plain, as_json=command.json)
    return 0 if holds else 1


def _export_adapters(command: Export, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> int:
    """A run's adapters, kept apart from the model that has them merged in."""
    given = [
        f"--{name}" for name in ("draft", "base", "push", "acceptance") if getattr(command, name)
    ]
    if given or command.dtype != "keep":
        asked = ", ".join([*given, *(["--dtype"] if command.dtype != "keep" else [])])
        detail = f"of adapters alone; for {asked} export the run's final"
        raise ProblemsError(command.ckpt, [Problem("usage", "it", f"is {detail}")])
    made = write_adapters(checkpoint, settings, command.dst, overwrite=command.overwrite)
    told = f"{made.path}, {made.adapters} adapters, {human_bytes(made.nbytes)}"
    plain = {"path": str(made.path), "adapters": made.adapters, "bytes": made.nbytes}
    print_result([Facts([("written", told)])], plain, as_json=command.json)
    return 0


def _serve_lines(command: Export, model: str, drafts: int) -> list[str]:
    """The commands of vLLM and SGLang; of a draft that of its engine, beside the main model."""
    if not command.draft:
        return [*serve_lines(model, drafts)]
    lines = serve_lines(MAIN_MODEL, drafts, draft=model)
    return [lines[command.draft != "vllm"]]


def _check(checkpoint: Checkpoint, summary: ExportSummary, command: Export) -> "ExportCheck":
    """What was written, before it is shown or pushed."""
    keeps_dtypes = command.dtype == "keep"
    if command.draft:
        from converters.verifying.export_gate import check_draft

        workers = command.workers
        return check_draft(checkpoint, summary, keeps_dtypes=keeps_dtypes, workers=workers)
    import jax

    # Both sides of the logits run on this machine's cores: an accelerator may be busy.
    jax.config.update("jax_platforms", "cpu")
    from converters.verifying.export_gate import check_export

    with progress("logits", unit="layers") as report:
        return check_export(checkpoint, summary, keeps_dtypes=keeps_dtypes, progress=report)


def _push(
    command: Export,
    repo_id: str,
    checkpoint: Checkpoint,
    checked: "ExportCheck | None",
    measured: Sequence[MeasuredAcceptance],
) -> "Pushed":
    """Upload what was exported; on failure ProblemsError that says how to go on."""
    folder = Path(command.dst)
    # Here and not above: it loads huggingface_hub, which folders don't need.
    from converters.publishing.push import push_folder

    sent, total = 0, None
    try:
        with progress("push") as show_progress:

            def report(done: int, of: int) -> None:
                nonlocal sent, total
                sent, total = done, of
                show_progress(done, of)

            pushed = push_folder(
                folder,
                repo_id,
                provenance=checkpoint.provenance,
                verified=checked.to_dict() if checked else None,
                measured=measured,
                draft=command.draft,
                progress=report,
            )
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
    if summary.draft:
        yield "draft", f"the MTP module alone, for {summary.draft}"
    else:
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


def verified(checked: "ExportCheck | None") -> Iterator[Section]:
    """What `export` prints of its own check."""
    if checked is None:
        yield Facts([("verified", "no (--no-verify)")])
        return
    from converters.verifying.report import logits_sections

    pairs = [("verified", _storage_verdict(checked))]
    if checked.logits:
        ran = [layer.name for layer in checked.logits.layers]
        where = f"on {', '.join(ran)}" if checked.logits.layers_left_out else "on every layer"
        pairs.append(("logits", f"{_logits_verdict(checked.logits)} ({where})"))
    else:
        pairs.append(("logits", f"NOT checked: {checked.logits_left_out}"))
    yield Facts([*pairs, *(("WARNING", warning) for warning in checked.warnings)])
    if checked.problems:
        yield problem_report("what was written", checked.problems)
    if checked.logits and checked.logits.first_wrong:
        yield from logits_sections(checked.logits)


def _logits_verdict(logits: "LogitsCheck") -> str:
    from converters.verifying.report import logits_verdict

    if logits.holds or logits.first_wrong:
        return logits_verdict(logits)
    largest = max(depth.relative_difference for depth in logits.depths)
    return f"every layer agrees, and rounding adds up to {largest:.1e} after all of them"


def _storage_verdict(checked: "ExportCheck") -> str:
    if checked.problems:
        return f"FAILED: {plural(len(checked.problems), 'problem')}; do not use what was written"
    parts = [f"headers, config and {plural(checked.tensors, 'tensor')} agree"]
    if checked.copies:
        parts.append("copies are the main model's")
    if checked.main_changed is not None:
        rounded = f", {checked.rounded:,} only rounded by the import's --dtype"
        changed = f"{checked.main_changed:,} tensors" if checked.main_changed else "no"
        parts.append(f"main model changed: {changed}{rounded if checked.rounded else ''}")
    if checked.mtp_changed is not None and checked.mtp_tensors:
        changed = f"{checked.mtp_changed:,} of {checked.mtp_tensors:,} tensors"
        parts.append(f"MTP module changed: {changed if checked.mtp_changed else 'no'}")
    return "; ".join(parts)


def serving(
    checkpoint: Checkpoint, lines: Sequence[str], drafts: int, *, is_draft: bool
) -> Iterator[Section]:
    """How to serve what was exported with its MTP module drafting so many; nothing for none."""
    if not drafts:
        return
    yield "\n".join([f"to serve it with its MTP module ({ENGINES}):", *lines])
    notes = [_main_model(checkpoint), SAMPLING] if is_draft else [SAMPLING]
    if drafts > checkpoint.config.num_nextn_predict_layers:
        notes.append(RECYCLING)
    if checkpoint.config.mtp_hidden_state == "pre_norm":
        notes.append(PRE_NORM)
    yield Facts([("note", note) for note in notes])


def _main_model(checkpoint: Checkpoint) -> str:
    """Which model a draft of the checkpoint goes beside."""
    if main_was_trained(checkpoint.provenance):
        whole = f"`convert-deepseek export {checkpoint.path} DIR`"
        return f"{MAIN_MODEL} was trained with the module: {whole} writes it"
    return f"{MAIN_MODEL} is the one that the module was trained beside, in the same format"


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

"""What `verify` says, draws, and writes into the folder of --report."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.verifying.compare import (
    MAIN,
    MAIN_GROUPS,
    MTP,
    MTP_GROUPS,
    ChangedTensor,
    ComparedPart,
    Comparison,
)
from converters.verifying.logits.check import LogitsCheck
from converters.verifying.logits.depths import DepthCheck
from converters.verifying.verify import Part, StorageCheck, Verification
from mtp_model import report_folder
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import group_names
from mtp_model.report_folder import Findings
from mtp_model.reporting import (
    LEGEND,
    Facts,
    Grid,
    Picture,
    Section,
    cut,
    drawing,
    human_bytes,
    plural,
    problem_report,
)

LOGITS_PNG = "logits.png"
_MOST_NAMES = 12
_MOST_CHANGED = 10
_SMALLEST = 1e-10  # what a difference of exactly 0 is drawn as, on a logarithmic axis
_SMALLEST_KL = 1e-18
_MOST_LABELS = 32


def write_report(folder: str | Path, found: Verification | Comparison) -> None:
    """Write the report into `folder`, which is made when missing; an earlier one is replaced."""
    folder = Path(folder)
    if isinstance(found, Comparison):
        title, sections, logits = f"Comparison of {found.a} and {found.b}", comparison(found), None
    else:
        title, sections = f"Verification of {found.checkpoint}", verification(found)
        logits = found.logits
    report = Findings(
        title=title,
        plain=found.to_dict(),
        sections=[*sections],
        pictures=_pictures(logits) if logits else (),
        images={"difference by position": LOGITS_PNG} if logits else None,
    )
    report_folder.write_report(folder, report)
    if logits:
        _draw(logits, folder / LOGITS_PNG)


def make_report_folder(folder: str | Path) -> None:
    """The folder that a report will be in, without an earlier one; UserError where none can be."""
    report_folder.make_report_folder(folder)
    (Path(folder) / LOGITS_PNG).unlink(missing_ok=True)


def _draw(logits: LogitsCheck, file: Path) -> None:
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    _draw_positions(axes, logits, "black")
    axes.set_title("float32 logits against the torch reference")
    figure.savefig(file, dpi=120)


def _pictures(logits: LogitsCheck) -> list[Picture]:
    """What report.html shows of a comparison of logits."""
    wide, square = (9, 3.5), (5, 5)
    pictures = [
        drawing("error by layer", lambda axes: _draw_layers(axes, logits), wide),
        drawing("error by position", lambda axes: _draw_positions(axes, logits, "gray"), wide),
        drawing("divergence of our distribution", lambda axes: _draw_kl(axes, logits), wide),
    ]
    if any(depth.acceptance is not None for depth in logits.depths):
        title = "drafts that are the main model's greedy choice, with all before them"
        pictures.append(drawing(title, lambda axes: _draw_acceptance(axes, logits), wide))
    for depth in logits.depths:
        title = f"logits of the {_name(depth)}, some of all"
        pictures.append(drawing(title, functools.partial(_draw_sample, depth=depth), square))
    return pictures


def _draw_layers(axes: Any, logits: LogitsCheck) -> None:
    """Both errors of every part of the network, and what is allowed of it alone."""
    names = [layer.name.removeprefix("model.") for layer in logits.layers]
    for error, label in (("alone", "alone"), ("after", "after all before it")):
        values = [max(getattr(layer, error), _SMALLEST) for layer in logits.layers]
        axes.semilogy(range(len(names)), values, ".-", label=label)
    axes.axhline(logits.tolerance, color="gray", linestyle="--", label="allowed alone")
    step = -(-len(names) // _MOST_LABELS)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=45, ha="right")
    axes.set_ylabel("|ours - reference| / |reference|")
    axes.legend(loc=LEGEND)


def _draw_positions(axes: Any, logits: LogitsCheck, allowed: str) -> None:
    """A line for each depth: largest difference at each position, and what is allowed."""
    for depth in logits.depths:
        positions, differences = _points(depth)
        axes.semilogy(positions, differences, ".-", label=_name(depth))
    axes.axhline(logits.tolerance, color=allowed, linestyle="--", label="allowed")
    axes.set_xlabel("position (tokens)")
    axes.set_ylabel("max |ours - reference| / max |reference|")
    axes.legend(loc=LEGEND)


def _draw_kl(axes: Any, logits: LogitsCheck) -> None:
    """How many positions have how much, by powers of ten; those without a number are counted."""
    powers, labels = [], []
    for depth in logits.depths:
        finite = [kl for kl in depth.kl_by_row if math.isfinite(kl)]
        missing = len(depth.kl_by_row) - len(finite)
        powers.append([math.log10(max(kl, _SMALLEST_KL)) for kl in finite])
        labels.append(f"{_name(depth)}, {missing} not finite" if missing else _name(depth))
    axes.hist(powers, bins=40, label=labels)
    axes.set_xlabel("KL(reference || ours), log10 of nats")
    axes.set_ylabel("positions")
    axes.legend(loc=LEGEND)


def _draw_acceptance(axes: Any, logits: LogitsCheck) -> None:
    """Two bars for each MTP depth: the reference's share of accepted drafts, and ours."""
    depths = [depth for depth in logits.depths if depth.acceptance is not None]
    for side, label in enumerate(("reference", "ours")):
        rates = [(d.reference_acceptance, d.acceptance)[side] for d in depths]
        axes.bar([d.depth + 0.4 * side - 0.2 for d in depths], rates, width=0.35, label=label)
    axes.set_xticks([depth.depth for depth in depths])
    axes.set(xlabel="MTP depth", ylabel="accepted, share of positions", ylim=(0, 1))
    axes.legend(loc=LEGEND)


def _draw_sample(axes: Any, depth: DepthCheck) -> None:
    theirs, ours = zip(*depth.sample, strict=True)
    axes.plot(theirs, ours, ".", alpha=0.6)
    axes.axline((0, 0), slope=1, color="gray", linewidth=0.8)
    axes.set_xlabel("reference")
    axes.set_ylabel("ours")


def _points(depth: DepthCheck) -> tuple[list[int], list[float]]:
    pairs = [(i, max(d, _SMALLEST)) for i, d in enumerate(depth.by_position) if d is not None]
    return [i for i, _ in pairs], [d for _, d in pairs]


def _name(depth: DepthCheck) -> str:
    return f"MTP depth {depth.depth}" if depth.depth else "main model"


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
        yield Facts([("logits on", found.logits.devices)])
        yield from logits_sections(found.logits)
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
        yield "\n".join(["differing:", *_alike(names)])
    stale = [f"  {d.name}" for d in storage.differences if d.replaced]
    if stale:
        why = "stale in the source, export writes the main model's (import --copies main):"
        yield "\n".join([why, *stale])


def logits_sections(logits: LogitsCheck) -> Iterator[Section]:
    rows = [
        (
            _name(d),
            f"{d.rows:,}",
            f"{d.relative_difference:.1e}",
            f"{logits.tolerance:.0e}",
            f"{d.rms_relative_difference:.1e}",
            f"{1 - d.cosine:.1e}",
            f"{d.kl_largest:.1e}",
            f"{100 * d.argmax_agreement:.2f} %",
            f"{100 * d.top5_agreement:.2f} %",
        )
        for d in logits.depths
    ]
    if logits.text is not None:
        yield f"text of {plural(logits.tokens, 'token')}: {shown(logits.text)}"
    differences = ("largest difference", "allowed", "rms", "1 - cosine", "KL, nats")
    yield Grid(("logits", "positions", *differences, "same argmax", "same top 5"), rows)
    yield from _acceptance(logits)
    yield _layers(logits)
    if logits.rounded_leaves:
        leaves = plural(len(logits.rounded_leaves), "leaf", "leaves")
        yield f"{leaves} of CKPT, finer than SRC: compared as export rounds and quantises them."


def _acceptance(logits: LogitsCheck) -> Iterator[Section]:
    """Of each draft: how often it is accepted, and whether both sides decide alike."""
    rows = [
        (_name(d), *(f"{100 * rate:.2f} %" for rate in rates if rate is not None))
        for d in logits.depths
        for rates in [(d.reference_acceptance, d.acceptance, d.acceptance_agreement)]
        if d.acceptance is not None
    ]
    if rows:
        yield Grid(("greedy drafts accepted", "reference", "ours", "alike"), rows)
        if logits.text is None:
            yield "built-in tokens are random, and hardly any draft is accepted: see --text"


def _layers(logits: LogitsCheck) -> Grid:
    """Where the two part: each part of the network given the reference's state, and its own."""
    rows = [
        (
            layer.name,
            f"MTP depth {layer.depth}" if layer.depth else "",
            f"{layer.alone:.1e}",
            f"{layer.after:.1e}",
            f"{layer.seconds:.1f}",
            "" if layer.alone <= logits.tolerance else "WRONG",
        )
        for layer in logits.layers
    ]
    return Grid(("layer", "", "difference alone", "after all before it", "seconds", ""), rows)


def _verdicts(found: Verification) -> Iterator[str]:
    damaged = len(found.digests.problems)
    yield f"FAILED: {plural(damaged, 'damaged file')}" if damaged else "digests hold"
    if found.storage:
        total = found.storage.total
        if total.differing:
            yield f"FAILED: {total.differing:,} of {total.tensors:,} tensors differ from the source"
            yield from _changed_halves(found.storage.parts)
        else:
            stale = sum(difference.replaced for difference in found.storage.differences)
            all_or_most = f"{total.tensors - stale:,} of" if stale else "all"
            others = ", the main model's for the others, stale copies" if stale else ""
            told = f"export writes the source's bytes for {all_or_most} {total.tensors:,} tensors"
            yield told + others
        if found.storage.files:
            yield f"FAILED: {plural(len(found.storage.files), 'file')} would be written otherwise"
    if found.logits:
        yield logits_verdict(found.logits)


def _changed_halves(parts: Mapping[str, Part]) -> Iterator[str]:
    """Of the main model and its MTP modules, where both were compared: which of them differ."""
    if "attention" in parts and "MTP modules" in parts:
        for half, groups in ((MTP, MTP_GROUPS), (MAIN, MAIN_GROUPS)):
            differs = any(part.differing for group, part in parts.items() if group in groups)
            yield _said_of(half, differs, None)


def logits_verdict(logits: LogitsCheck) -> str:
    if logits.holds:
        return "logits agree"
    if logits.first_wrong is None:
        return "FAILED: logits differ by more than allowed; no layer alone does"
    layer = next(layer for layer in logits.layers if layer.name == logits.first_wrong)
    return (
        f"FAILED: first wrong layer {layer.name}: given the reference's state its output differs "
        f"by {layer.alone:.1e}, allowed {logits.tolerance:.0e}; see which of its tensors differ, "
        "and import again"
    )


def comparison(found: Comparison) -> Iterator[Section]:
    """What `verify A B` prints of two checkpoints."""
    yield Facts([("A", found.a), ("B", found.b)])
    columns = ("part", "tensors", "bytes in A", "identical", "equal values", "differing")
    errors = ("max error", "rms error", "only in A", "only in B")
    yield Grid((*columns, *errors), [_compared_row(n, part) for n, part in found.parts.items()])
    worst = found.differences[:_MOST_CHANGED]
    if worst:
        yield f"the {plural(len(worst), 'tensor')} that differ most, of {len(found.differences):,}:"
        columns = ("tensor", "A", "B", "values changed", "max error", "rms error")
        yield Grid(columns, [_changed_row(tensor) for tensor in worst])
    for where, names in (("only in A:", found.only_in_a), ("only in B:", found.only_in_b)):
        if names:
            yield "\n".join([where, *_alike(names)])
    if found.config:
        yield "\n".join(["config.json:", *(f"  {line}" for line in found.config)])
    halves = ((MTP, found.mtp_changed), (MAIN, found.main_changed))
    said = (_said_of(half, changed, found.not_compared.get(half)) for half, changed in halves)
    yield Facts([("result", "; ".join(said))])


def _compared_row(name: str, part: ComparedPart) -> tuple[str, ...]:
    counts = (part.identical, part.equal, part.differing)
    errors = (part.max_error, part.rms_error) if part.differing else ()
    return (
        name,
        f"{part.tensors:,}",
        human_bytes(part.bytes),
        *(f"{count:,}" for count in counts),
        *(f"{error:.1e}" for error in errors or ()),
        *(("",) * (2 - len(errors))),
        f"{part.only_in_a:,}",
        f"{part.only_in_b:,}",
    )


def _changed_row(tensor: ChangedTensor) -> tuple[str, ...]:
    name = f"{tensor.name} ({tensor.in_b} in B)" if tensor.in_b else tensor.name
    changed = "" if tensor.changed is None else f"{tensor.changed:,} of {tensor.values:,}"
    errors = (f"{tensor.max_error:.1e}", f"{tensor.rms_error:.1e}")
    formats = (tensor.a, tensor.b)
    if tensor.changed is not None:  # the shapes are the same: dtypes say enough
        formats = tuple(found.partition(" ")[0] for found in formats)
    return shown(name), *formats, changed, *errors


def _alike(names: Sequence[str]) -> list[str]:
    lines = [
        f"  {shown(n)} ({c:,} tensors)" if c > 1 else f"  {shown(n)}" for n, c in group_names(names)
    ]
    return cut(lines, _MOST_NAMES)


def _said_of(half: str, changed: bool | None, why_not: str | None) -> str:
    if why_not:
        return f"{half} not compared: {why_not}"
    return f"{half} changed: {'yes' if changed else 'no'}"

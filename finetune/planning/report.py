"""Plans as tables, and as JSON.

A file of its own: the command line shows what the plan finds, and plans know of no tables.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from finetune.planning.estimate import LINKS, MATRIX_UNITS, MEMORY
from finetune.planning.plan import Plan
from mtp_model.meshes import axes_in_words
from mtp_model.reporting import Facts, Grid, Section


def plan_sections(plans: Sequence[Plan]) -> list[Section]:
    """The last plan in full, and above it a line for each, where several were tried."""
    sections: list[Section] = []
    if len(plans) > 1:
        rows = [
            (_where(each), _fits(each), _gb(each.total_bytes), _s(each.step_s)) for each in plans
        ]
        sections.append(Grid(("", "fits", "GB a device", "s a step"), rows))
    best = plans[-1]
    facts = [
        ("slice", f"{best.topology}: {best.chips} chips, {best.devices} devices"),
        ("mesh", axes_in_words(best.mesh)),
        ("step", _step(best)),
        ("fits", _fits(best)),
        ("memory a device", f"{_gb(best.total_bytes)} of {_gb(best.limit_bytes)} GB"),
        ("weights, moments, batch", f"{_gb(best.argument_bytes)} GB"),
        ("temporaries", f"{_gb(best.temporary_bytes)} GB"),
        ("parameters", f"{best.parameters_trained:,} trained, {best.parameters_frozen:,} frozen"),
        ("a checkpoint of the run", f"{_gb(best.checkpoint_bytes)} GB"),
        (
            "operations a step",
            f"{best.flops_formula:.3e} by formula, {best.flops_compiled:.3e} in the program",
        ),
        ("sent a step", _sent(best)),
        ("compiling took", _compiling(best)),
    ]
    sections.append(Facts(facts))
    if best.step_s:
        terms = (
            f"computing {_s(best.compute_s)} s at {MATRIX_UNITS:.0%} of a chip's highest speed, "
            f"memory {_s(best.memory_s)} s at {MEMORY:.0%}, links {_s(best.interconnect_s)} s at "
            f"{LINKS:.0%}, one after the other"
        )
        speed = f"{best.step_s:.2f} s, {best.tokens_per_s:,.0f} tokens/s"
        sections.append(f"A step is estimated, not measured, at {speed}: {terms}.")
    return sections


def plan_json(plans: Sequence[Plan]) -> dict[str, Any]:
    """The last plan; with several, all of them under `tried`."""
    found = asdict(plans[-1])
    return found | ({"tried": [asdict(each) for each in plans]} if len(plans) > 1 else {})


def _step(found: Plan) -> str:
    captured = ", from captured states" if found.captured else ""
    rows = f"{found.rows} rows of {found.row_tokens:,} tokens"
    return f"--train {found.train}{captured}, {rows}, --remat {found.remat}"


def _compiling(found: Plan) -> str:
    how = (
        ""
        if found.compiled_in_full
        else ", with less optimisation than `train` (--in-full: with all)"
    )
    return f"{found.compile_s:.0f} s{how}"


def _where(found: Plan) -> str:
    return f"{found.topology}, {axes_in_words(found.mesh)}, --remat {found.remat}"


def _fits(found: Plan) -> str:
    if found.fits is None:
        return "unknown: this device does not say how much memory it has"
    if found.total_bytes is None or found.limit_bytes is None:
        return "yes" if found.fits else "no"
    spare = (found.limit_bytes - found.total_bytes) / 1e9
    return f"yes, {spare:.1f} GB to spare" if found.fits else f"no, {-spare:.1f} GB too much"


def _sent(found: Plan) -> str:
    """What a device receives, by kind of collective."""
    if found.collectives is None:
        return "?"
    kinds = found.collectives.items()
    words = [f"{each.count:,} {kind} ({_gb(each.received_bytes)} GB)" for kind, each in kinds]
    return ", ".join(words) or "nothing"


def _gb(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e9:.1f}"


def _s(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:.2f}"

"""curves.png: what a run did, drawn from the rows of its logs.

Thin lines are training batches; dots are evaluations on held-out text.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from finetune.run.metrics import Row
from mtp_model.reporting import LEGEND

Value = Callable[[Row], float | None]
MAIN_COLOUR = "0.35"
DEPTH_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def draw_curves(path: Path, steps: Sequence[Row], evaluations: Sequence[Row], title: str) -> None:
    """Write a PNG with loss, acceptance and learning rate by step.

    steps, evaluations: rows of metrics.jsonl and evaluations.jsonl, not both empty.
    """
    figure = Figure(figsize=(10, 10), layout="constrained")
    FigureCanvasAgg(figure)
    loss, acceptance, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    figure.suptitle(title, fontsize=13)
    _draw_losses(loss, steps, evaluations)
    _draw_acceptance(acceptance, steps, evaluations)
    _draw_line(rate, steps, lambda row: row.get("lr"), color="tab:gray", linewidth=1.5)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.set_xlabel("step")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (loss, acceptance, rate):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _draw_losses(axes: Axes, steps: Sequence[Row], evaluations: Sequence[Row]) -> None:
    _draw_both(axes, steps, evaluations, lambda row: row["main_loss"], MAIN_COLOUR, "main model")
    for depth in range(_num_depths(steps, evaluations)):
        _draw_both(axes, steps, evaluations, _entry("mtp_loss", depth), *_look(depth))
    axes.set_ylabel("loss (nats a token)")
    axes.legend(title="lines: training, dots: held-out", frameon=False, loc=LEGEND)


def _draw_acceptance(axes: Axes, steps: Sequence[Row], evaluations: Sequence[Row]) -> None:
    for depth in range(_num_depths(steps, evaluations)):
        _draw_both(axes, steps, evaluations, _entry("acceptance", depth), *_look(depth))
        _draw_intervals(axes, evaluations, depth)
    axes.set_ylabel("drafts accepted")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    title = "lines: training, dots: held-out (bars: 95 %)"
    axes.legend(title=title, frameon=False, loc=LEGEND)


def _draw_both(
    axes: Axes,
    steps: Sequence[Row],
    evaluations: Sequence[Row],
    value: Value,
    colour: str,
    label: str,
) -> None:
    _draw_line(axes, steps, value, color=colour, alpha=0.4, linewidth=1)
    _draw_line(axes, evaluations, value, color=colour, marker="o", linewidth=2, label=label)


def _draw_line(axes: Axes, rows: Sequence[Row], value: Value, **style: Any) -> None:
    points = [(row["step"], value(row)) for row in rows]
    known = [(step, y) for step, y in points if y is not None]
    axes.plot([step for step, _ in known], [y for _, y in known], **style)


def _draw_intervals(axes: Axes, evaluations: Sequence[Row], depth: int) -> None:
    """Bars from the low to the high end of the 95 % interval of each evaluation that has one."""
    for row in evaluations:
        intervals = row.get("acceptance_interval")
        if intervals and intervals[depth]:
            axes.vlines(row["step"], *intervals[depth], colors=_look(depth)[0], linewidth=1)


def _entry(name: str, depth: int) -> Value:
    return lambda row: row[name][depth] if depth < len(row[name]) else None


def _look(depth: int) -> tuple[str, str]:
    return DEPTH_COLOURS[depth % len(DEPTH_COLOURS)], f"MTP depth {depth + 1}"


def _num_depths(*logs: Sequence[Row]) -> int:
    return max((len(row["mtp_loss"]) for log in logs for row in log), default=0)

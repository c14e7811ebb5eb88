"""What a run did, drawn from the rows of its logs: curves.png, and report.html with its tables.

Thin lines are training batches; dots are evaluations on held-out text.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.run.directory import RunDirectory
from finetune.run.metrics import Row, Summary, Thinned, read_rows
from finetune.run.report import comparison_sections
from finetune.settings import RunSettings
from finetune.settings_file import as_plain
from mtp_model.files.open import written
from mtp_model.report_folder import Findings, write_report
from mtp_model.reporting import LEGEND, Facts, Picture, Section, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = Callable[[Row], float | None]
MAIN_COLOUR = "gray"  # seen on light and on dark
REDRAWN_AFTER_S = 10.0
_WIDE = (9.0, 3.5)  # inches
DEPTH_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def just_drawn(path: Path) -> bool:
    """Whether a drawing is as good as new: to draw it takes as long as short evaluations."""
    return path.is_file() and time.time() - path.stat().st_mtime < REDRAWN_AFTER_S


def draw_curves(path: Path, steps: Sequence[Row], evaluations: Sequence[Row], title: str) -> None:
    """Write a PNG with loss, acceptance and learning rate by step.

    steps, evaluations: rows of metrics.jsonl and evaluations.jsonl, not both empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 10), layout="constrained")
    FigureCanvasAgg(figure)
    loss, acceptance, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    figure.suptitle(title, fontsize=13)
    _draw_losses(loss, steps, evaluations)
    _draw_acceptance(acceptance, steps, evaluations)
    _draw_rate(rate, steps)
    _draw_steps(rate)
    for axes in (loss, acceptance, rate):
        _draw_grid(axes)
    figure.savefig(path, dpi=120)


def write_run_report(
    run: RunDirectory, settings: RunSettings, before: Summary | None, after: Summary | None
) -> None:
    """Write report.json, report.md and report.html of a finished run into its folder.

    before, after: its first and last evaluation.
    """
    sections: list[Section] = [Facts(_facts(settings))]
    sections += comparison_sections(before, after) if before and after else []
    steps, evaluations = (_thinned(file) for file in (run.metrics, run.evaluations))
    plain = {
        "run": str(run.place),
        "settings": as_plain(settings),
        "before": before and before.to_json(),
        "after": after and after.to_json(),
    }
    report = Findings(
        title=f"Run {run.place.name}",
        plain=plain,
        sections=sections,
        pictures=_pictures(steps, evaluations) if steps or evaluations else (),
        images={"loss, acceptance, learning rate": run.curves.name} if run.curves.is_file() else {},
    )
    write_report(run.path, report)


def _facts(settings: RunSettings) -> list[tuple[str, str]]:
    weights = settings.objective.weights()
    return [
        ("checkpoint", settings.checkpoint),
        ("data", ", ".join(map(written, settings.data))),
        ("trained", f"--train {settings.train}, {settings.steps:,} steps"),
        ("objective", ", ".join(f"{name} {weight:g}" for name, weight in weights.items())),
    ]


def _thinned(file: Path) -> list[Row]:
    kept = Thinned()
    for row in read_rows(file):
        kept.add(row)
    return kept.rows()


def _pictures(steps: Sequence[Row], evaluations: Sequence[Row]) -> list[Picture]:
    """The three parts of curves.png, each alone."""

    def drawn(title: str, draw: "Callable[[Axes], None]") -> Picture:
        def all_of(axes: "Axes") -> None:
            draw(axes)
            _draw_steps(axes)
            _draw_grid(axes)

        return drawing(title, all_of, _WIDE)

    return [
        drawn("loss", lambda axes: _draw_losses(axes, steps, evaluations)),
        drawn("acceptance", lambda axes: _draw_acceptance(axes, steps, evaluations)),
        drawn("learning rate", lambda axes: _draw_rate(axes, steps)),
    ]


def _draw_steps(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_grid(axes: "Axes") -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_rate(axes: "Axes", steps: Sequence[Row]) -> None:
    _draw_line(axes, steps, lambda row: row.get("lr"), color="tab:gray", linewidth=1.5)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)


def _draw_losses(axes: "Axes", steps: Sequence[Row], evaluations: Sequence[Row]) -> None:
    _draw_both(axes, steps, evaluations, lambda row: row["main_loss"], MAIN_COLOUR, "main model")
    for depth in range(_num_depths(steps, evaluations)):
        _draw_both(axes, steps, evaluations, _entry("mtp_loss", depth), *_look(depth))
    axes.set_ylabel("loss (nats a token)")
    axes.legend(title="lines: training, dots: held-out", frameon=False, loc=LEGEND)


def _draw_acceptance(axes: "Axes", steps: Sequence[Row], evaluations: Sequence[Row]) -> None:
    from matplotlib.ticker import PercentFormatter

    for depth in range(_num_depths(steps, evaluations)):
        _draw_both(axes, steps, evaluations, _entry("acceptance", depth), *_look(depth))
        _draw_intervals(axes, evaluations, depth)
    axes.set_ylabel("drafts accepted")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    title = "lines: training, dots: held-out (bars: 95 %)"
    axes.legend(title=title, frameon=False, loc=LEGEND)


def _draw_both(
    axes: "Axes",
    steps: Sequence[Row],
    evaluations: Sequence[Row],
    value: Value,
    colour: str,
    label: str,
) -> None:
    _draw_line(axes, steps, value, color=colour, alpha=0.4, linewidth=1)
    _draw_line(axes, evaluations, value, color=colour, marker="o", linewidth=2, label=label)


def _draw_line(axes: "Axes", rows: Sequence[Row], value: Value, **style: Any) -> None:
    points = [(row["step"], value(row)) for row in rows]
    known = [(step, y) for step, y in points if y is not None]
    axes.plot([step for step, _ in known], [y for _, y in known], **style)


def _draw_intervals(axes: "Axes", evaluations: Sequence[Row], depth: int) -> None:
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

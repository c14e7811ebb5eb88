"""The folder that `verify --report` leaves behind: report.json, report.md, logits.png."""

from datetime import UTC, datetime
from pathlib import Path

from converters.cli.views import verification
from converters.verifying.logits import DepthCheck, LogitsCheck
from converters.verifying.verify import Verification
from mtp_model.reporting import markdown, to_json

REPORT_JSON, REPORT_MD, LOGITS_PNG = "report.json", "report.md", "logits.png"
_SMALLEST = 1e-10  # what a difference of exactly 0 is drawn as, on a logarithmic axis


def write_report(folder: str | Path, found: Verification) -> None:
    """Write the report into `folder`, which is made when missing; files in it are replaced."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_JSON).write_text(to_json(found.to_dict()) + "\n", encoding="utf-8")
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = f"# Verification of {found.checkpoint}\n\n{when}\n\n" + markdown(verification(found))
    (folder / LOGITS_PNG).unlink(missing_ok=True)  # an earlier report's
    if found.logits:
        _draw(found.logits, folder / LOGITS_PNG)
        text += f"\n![difference by position]({LOGITS_PNG})\n"
    (folder / REPORT_MD).write_text(text, encoding="utf-8")


def _draw(logits: LogitsCheck, file: Path) -> None:
    """A line for each depth: largest difference at each position, and what is allowed."""
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for depth in logits.depths:
        positions, differences = _points(depth)
        axes.semilogy(positions, differences, ".-", label=_name(depth))
    axes.axhline(logits.tolerance, color="black", linestyle="--", label="allowed")
    axes.set_xlabel("position (tokens)")
    axes.set_ylabel("max |ours - reference| / max |reference|")
    axes.set_title("float32 logits against the torch reference")
    axes.legend()
    figure.savefig(file, dpi=120)


def _points(depth: DepthCheck) -> tuple[list[int], list[float]]:
    pairs = [(i, max(d, _SMALLEST)) for i, d in enumerate(depth.by_position) if d is not None]
    return [i for i, _ in pairs], [d for _, d in pairs]


def _name(depth: DepthCheck) -> str:
    return f"MTP depth {depth.depth}" if depth.depth else "main model"

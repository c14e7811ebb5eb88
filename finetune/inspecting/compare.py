"""`finetune-deepseek compare`: measured acceptance side by side, and what must not be compared."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from finetune.inspecting.results import TEXTS, AcceptanceResult, read_results
from finetune.run.report import between, number, percent
from finetune.settings import SettingsError
from mtp_model.report_folder import Findings, folder_fault, page_fault, write_report
from mtp_model.reporting import LEGEND, Facts, Grid, Picture, Section, drawing

PICTURE = (8.0, 4.0)  # inches
_PAGE = ".html"
SIDES = {"draft_tokens": "drafts a round", "sampling": "rule", "temperature": "temperature"}


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Acceptance side by side: of runs, of `evaluate`, of `generate`, and of a server.

    What was measured with another number of drafts, rule, temperature or text is named as not
    comparable.
    """

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs (first and last evaluation), files of what `evaluate --json` or
    `generate --speculate K --json` printed, and a server's metrics: JSON with vLLM's num_drafts,
    num_draft_tokens, num_accepted_tokens, num_accepted_tokens_per_pos, or its /metrics page."""
    report: Path | None = None
    """Write report.json, report.md and report.html into this folder; or, to a file whose name ends
    with .html, only that page with table and pictures, which needs nothing beside it."""
    json: bool = False
    """Print one JSON object instead of a table."""


class Incomparable(NamedTuple):
    """What makes results not comparable, or (known False) of which of them that is not known."""

    by: str  # draft_tokens, sampling, temperature or text
    known: bool
    between: list[str] | list[tuple[str, str]]  # letters; of text, pairs of letters
    values: dict[str, Any]  # by letter; nothing for text


class SideBySide(NamedTuple):
    """Results by letter, and why they cannot be compared."""

    results: dict[str, AcceptanceResult]
    incomparable: list[Incomparable]


def compare(settings: CompareSettings) -> SideBySide:
    """Read everything, and write the report. SettingsError, or ResultsError with all faults."""
    faults = []
    if not settings.results:
        faults.append("no result is given, needed at least one: a run's folder, or a file")
    twice = {path for path in settings.results if settings.results.count(path) > 1}
    faults += [f"{path} is given twice" for path in sorted(twice)]
    if settings.report and _is_other_file(settings.report):
        needed = "needed a folder, or a name that ends with .html"
        faults.append(f"--report is {settings.report}, {needed}")
    elif settings.report and (fault := _fault_of(settings.report)):
        faults.append(f"--report is {settings.report}, which {fault}")
    if faults:
        raise SettingsError("settings that cannot be used", faults)
    read = read_results(settings.results)
    results = {_letter(number): each for number, each in enumerate(read)}
    found = SideBySide(results, _incomparable(results))
    if settings.report:
        _write(settings.report, found)
    return found


def _is_other_file(report: Path) -> bool:
    """Whether it is named as a file that is no page: report.png, report.json."""
    return report.suffix[1:].isalpha() and report.suffix != _PAGE and not report.is_dir()


def _is_page(report: Path) -> bool:
    """Whether a page is asked for, and no folder, which may have any name."""
    return report.suffix == _PAGE and not report.is_dir()


def _fault_of(report: Path) -> str | None:
    return page_fault(report) if _is_page(report) else folder_fault(report)


def _write(where: Path, found: SideBySide) -> None:
    report = Findings(
        title="acceptance compared",
        plain=as_json(found),
        sections=sections(found),
        pictures=_pictures(found.results),
    )
    if _is_page(where):
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(report.page(), encoding="utf-8")
    else:
        write_report(where, report)


def _letter(number: int) -> str:
    """A, B, ..., Z, A1, B1, ..."""
    again, place = divmod(number, 26)
    return chr(ord("A") + place) + (str(again) if again else "")


def _incomparable(results: Mapping[str, AcceptanceResult]) -> list[Incomparable]:
    found = []
    for by in SIDES:
        values = {letter: getattr(each, by) for letter, each in results.items()}
        known = {letter: value for letter, value in values.items() if value is not None}
        if len(set(known.values())) > 1:
            found.append(Incomparable(by, True, [*known], known))
        if len(known) < len(values) > 1:
            unknown = [letter for letter in values if letter not in known]
            found.append(Incomparable(by, False, unknown, {}))
    pairs = [*itertools.combinations(results, 2)]
    same = {pair: _same_text(*(results[letter] for letter in pair)) for pair in pairs}
    for known, answer in ((True, False), (False, None)):
        if those := [pair for pair in pairs if same[pair] is answer]:
            found.append(Incomparable("text", known, those, {}))
    return found


def _same_text(one: AcceptanceResult, other: AcceptanceResult) -> bool | None:
    """Whether two results are of the same text; None where that cannot be known."""
    shared = [kind for kind in TEXTS if kind in one.texts and kind in other.texts]
    return one.texts[shared[0]] == other.texts[shared[0]] if shared else None


def sections(found: SideBySide) -> list[Section]:
    """Who is who, the table, and what in it is not comparable."""
    legend = [(letter, f"{each.name} ({each.kind})") for letter, each in found.results.items()]
    grid = Grid(("", *found.results), _rows([*found.results.values()]))
    said = [_sentence(each) for each in found.incomparable]
    said += dict.fromkeys(note for each in found.results.values() for note in each.notes)
    caption = "accepted: with all drafts of the round before it; intervals are of 95 %"
    return [Facts(legend), grid, "\n".join([caption, *said])]


def _rows(results: Sequence[AcceptanceResult]) -> list[list[str]]:
    """The table's rows; what nobody measured is left out."""
    depths = range(max(each.draft_tokens for each in results))
    rows = [
        ["drafts a round", *(str(each.draft_tokens) for each in results)],
        ["rule", *(_short(each.sampling) for each in results)],
        ["temperature", *(_short(each.temperature) for each in results)],
        ["rounds", *(f"{each.num_drafts:,.0f}" for each in results)],
        ["mean accepted length", *(number(each.mean_accepted_length) for each in results)],
        ["  95 %", *(between(each.intervals[0], number) for each in results)],
    ]
    for k in depths:
        rates = [each.acceptance[k] if k < each.draft_tokens else None for each in results]
        sure = [each.intervals[1][k] if k < each.draft_tokens else None for each in results]
        rows.append([f"accepted, draft {k + 1}", *map(percent, rates)])
        rows.append(["  95 %", *(between(each, percent) for each in sure)])
    known = [each.summary for each in results]
    shares = [each and each.greedy_share for each in known]
    rows.append(["greedy share of the text", *map(percent, shares)])
    rows.append(["main loss", *(number(each and each.main_loss) for each in known)])
    for k in depths:
        losses = [each.mtp_loss[k] if each and k < len(each.mtp_loss) else None for each in known]
        overlap = [each.overlap[k] if each and k < len(each.overlap) else None for each in known]
        rows.append([f"MTP loss, depth {k + 1}", *map(number, losses)])
        rows.append([f"overlap, depth {k + 1}", *map(percent, overlap)])
    return [row for row in rows if any(cell not in ("", "-") for cell in row[1:])]


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sentence(found: Incomparable) -> str:
    by, known, letters, values = found
    if by == "text":
        pairs = ", ".join(" and ".join(pair) for pair in letters)
        start = "not comparable, other text" if known else "not known, whether the text is the same"
        return f"{start}: {pairs}"
    if not known:
        return f"not known: {SIDES[by]} of {', '.join(map(str, letters))}"
    shown = ", ".join(f"{letter} {_short(value)}" for letter, value in values.items())
    return f"not comparable, other {SIDES[by]}: {shown}"


def as_json(found: SideBySide) -> dict[str, Any]:
    """The same for programs; `summary` has what `evaluate` and runs measure beside acceptance."""
    return {
        "results": {letter: _result(each) for letter, each in found.results.items()},
        "not_comparable": [_as_plain(each) for each in found.incomparable if each.known],
        "not_known": [_as_plain(each) for each in found.incomparable if not each.known],
    }


def _result(each: AcceptanceResult) -> dict[str, Any]:
    length, by_position = each.intervals
    plain = dataclasses.asdict(each) | {
        "draft_tokens": each.draft_tokens,
        "mean_accepted_length_interval": length,
        "acceptance_interval": by_position,
    }
    return plain | {"summary": each.summary and each.summary.to_json()}


def _as_plain(found: Incomparable) -> dict[str, Any]:
    values = {"values": found.values} if found.values else {}
    return {"by": found.by, "between": found.between} | values


def _pictures(results: Mapping[str, AcceptanceResult]) -> list[Picture]:
    return [
        drawing(
            "the first k drafts of a round are all accepted",
            lambda axes: _draw_positions(axes, results),
            PICTURE,
        ),
        drawing(
            "mean accepted length, tokens a round",
            lambda axes: _draw_lengths(axes, results),
            (PICTURE[0], 1.0 + 0.4 * len(results)),
        ),
    ]


def _draw_positions(axes: Any, results: Mapping[str, AcceptanceResult]) -> None:
    for letter, each in results.items():
        known = [k for k, rate in enumerate(each.acceptance) if rate is not None]
        rates = [each.acceptance[k] for k in known]
        spread = [_spread(rate, each.intervals[1][k]) for k, rate in zip(known, rates, strict=True)]
        axes.errorbar(
            [k + 1 for k in known], rates, [*zip(*spread, strict=True)] or None,
            marker="o", capsize=3, label=_label(letter, each),
        )  # fmt: skip
    axes.set_xticks(range(1, 1 + max(each.draft_tokens for each in results.values())))
    axes.set(xlabel="draft k", ylabel="accepted", ylim=(0, 1.02))
    axes.legend(loc=LEGEND)


def _draw_lengths(axes: Any, results: Mapping[str, AcceptanceResult]) -> None:
    for letter, each in reversed([*results.items()]):
        length = each.mean_accepted_length or 0.0
        spread = [[side] for side in _spread(length, each.intervals[0])]
        axes.barh(letter, length, xerr=spread, color="C0", ecolor="gray", capsize=3)
    axes.set(xlabel="tokens")


def _spread(value: float | None, interval: Any) -> tuple[float, float]:
    """How far an interval reaches below and above a value."""
    if value is None or interval is None:
        return 0.0, 0.0
    return max(0.0, value - interval.low), max(0.0, interval.high - value)


def _label(letter: str, each: AcceptanceResult) -> str:
    r"""For matplotlib, to which $ begins a formula."""
    return f"{letter}  {each.name}".replace("$", r"\$")

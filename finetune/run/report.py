"""What was measured, as tables and sentences for people."""

from collections.abc import Callable

from finetune.objective.intervals import Interval
from finetune.run.metrics import Summary
from mtp_model.reporting import Grid, Section

GREEDY_TEXT = 0.99  # with this share of greedy tokens a text is the main model's own


def evaluation_sections(summary: Summary, title: str) -> list[Section]:
    """Losses and acceptance, one row a depth."""
    rows = [("main model", number(summary.main_loss), "", "", "", "", "")]
    for k, loss in enumerate(summary.mtp_loss):
        interval = summary.acceptance_interval[k] if summary.acceptance_interval else None
        rates = (percent(summary.acceptance[k]), between(interval, percent))
        counted = f"{summary.accepted[k]:,} / {summary.reached[k]:,}"
        more = (percent(summary.conditional[k]), counted, percent(summary.agreement[k]))
        rows.append((f"draft {k + 1}", number(loss), *rates, *more))
    columns = ("", "loss", "accepted", "95 %", "if reached", "drafts", "agreement")
    return [title, Grid(columns, rows), _caption(summary)]


def _caption(summary: Summary) -> str:
    rounds = summary.reached[0] if summary.reached else 0
    length = number(summary.mean_accepted_length)
    sure = between(summary.mean_accepted_length_interval, number)
    said = (
        f"mean accepted length {length}{f' ({sure})' if sure else ''}, "
        f"{rounds:,} rounds on {summary.tokens:,} tokens\n"
        "accepted: with all drafts of the round before it; agreement: with the main\n"
        "model's greedy choice, on all of the text"
    )
    share = summary.greedy_share
    if share is None or share > GREEDY_TEXT:
        return said
    return said + (
        f"\nonly {percent(share)} of the text is what the main model would write greedily: these\n"
        "rates hold as long as it does; measure on the model's own answers to know what\n"
        "a server accepts"
    )


def comparison_sections(before: Summary, after: Summary) -> list[Section]:
    """Held-out text before and after training."""
    old, new = _by_name(before), _by_name(after)
    rows = [(name, old[name], new[name]) for name in old]
    return ["on held-out text", Grid(("", "before", "after"), rows)]


def _by_name(summary: Summary) -> dict[str, str]:
    depths = [
        ("MTP loss, depth", number, summary.mtp_loss),
        ("accepted, draft", percent, summary.acceptance),
        ("agreement, draft", percent, summary.agreement),
    ]
    found = {"main loss": number(summary.main_loss)}
    for name, shown, values in depths:
        found |= {f"{name} {k}": shown(value) for k, value in enumerate(values, start=1)}
    sure = between(summary.mean_accepted_length_interval, number)
    length = number(summary.mean_accepted_length) + (f" ({sure})" if sure else "")
    return found | {
        "mean accepted length (95 %)": length,
        "greedy share of the text": percent(summary.greedy_share),
    }


def evaluation_sentence(step: int, summary: Summary) -> str:
    """One line of progress."""
    depths = ", ".join(
        f"depth {k} loss {number(loss)} accepted {percent(rate)} of {reached}"
        for k, (loss, rate, reached) in enumerate(
            zip(summary.mtp_loss, summary.acceptance, summary.reached, strict=True), start=1
        )
    )
    return f"step {step}, held-out: main loss {number(summary.main_loss)}; {depths}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def between(interval: Interval | None, shown: Callable[[float | None], str]) -> str:
    """An interval as "low to high", empty where there is none."""
    return f"{shown(interval.low)} to {shown(interval.high)}" if interval else ""

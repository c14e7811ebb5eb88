"""What was measured, as tables and sentences for people."""

from finetune.run.metrics import Summary
from mtp_model.reporting import Grid, Section


def evaluation_sections(summary: Summary, title: str) -> list[Section]:
    """Losses and acceptance, one row a depth."""
    rows = [("main model", number(summary.main_loss), "", "", "", "")]
    for k, loss in enumerate(summary.mtp_loss):
        rates = (percent(summary.acceptance[k]), percent(summary.conditional[k]))
        counted = f"{summary.accepted[k]} / {summary.reached[k]}"
        agreement = percent(summary.agreement[k])
        rows.append((f"draft {k + 1}", number(loss), *rates, counted, agreement))
    columns = ("", "loss", "accepted", "if reached", "positions", "agreement")
    length = number(summary.mean_accepted_length)
    caption = (
        f"mean accepted length {length}, on {summary.tokens} tokens\n"
        "accepted: with all drafts before it; agreement: with the main\n"
        "model's greedy choice, on all of the text"
    )
    return [title, Grid(columns, rows), caption]


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
    return found | {"mean accepted length": number(summary.mean_accepted_length)}


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

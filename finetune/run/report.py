"""What was measured, as tables and sentences for people."""

from rich.table import Table

from finetune.run.metrics import Summary


def evaluation_table(summary: Summary, title: str) -> Table:
    """Losses and acceptance, one row a depth."""
    table = Table(title=title, title_justify="left")
    for name in ("", "loss", "accepted", "if reached", "positions", "agreement"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("main model", number(summary.main_loss), "", "", "", "")
    for k, loss in enumerate(summary.mtp_loss):
        rates = (summary.acceptance[k], summary.conditional[k])
        counted = f"{summary.accepted[k]} / {summary.reached[k]}"
        agreement = percent(summary.agreement[k])
        table.add_row(f"draft {k + 1}", number(loss), *map(percent, rates), counted, agreement)
    table.caption = (
        f"mean accepted length {number(summary.mean_accepted_length)}, on {summary.tokens} tokens\n"
        "accepted: with all drafts before it; agreement: with the main\n"
        "model's greedy choice, on all of the text"
    )
    table.caption_justify = "left"
    return table


def comparison_table(before: Summary, after: Summary) -> Table:
    """Held-out text before and after training."""
    table = Table(title="on held-out text", title_justify="left")
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    table.add_row("main loss", number(before.main_loss), number(after.main_loss))
    for k, (old, new) in enumerate(zip(before.mtp_loss, after.mtp_loss, strict=True), start=1):
        table.add_row(f"MTP loss, depth {k}", number(old), number(new))
    for k, (old, new) in enumerate(zip(before.acceptance, after.acceptance, strict=True), start=1):
        table.add_row(f"accepted, draft {k}", percent(old), percent(new))
    for k, (old, new) in enumerate(zip(before.agreement, after.agreement, strict=True), start=1):
        table.add_row(f"agreement, draft {k}", percent(old), percent(new))
    lengths = (before.mean_accepted_length, after.mean_accepted_length)
    table.add_row("mean accepted length", *map(number, lengths))
    return table


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

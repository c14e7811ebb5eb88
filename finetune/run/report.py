"""What was measured, as tables and sentences for people."""

from collections.abc import Callable, Mapping, Sequence

from jax.sharding import Mesh

from finetune.generation.answers import Counts
from finetune.objective.intervals import Interval
from finetune.run.metrics import SourceAcceptance, Summary
from finetune.settings import ComputeDtype, RunSettings
from finetune.state import Split, num_parameters
from mtp_model.meshes import describe_mesh
from mtp_model.reporting import Grid, Section

GREEDY_TEXT = 0.99  # with this share of greedy tokens a text is the main model's own
FOREIGN_NATS = 0.1  # a text's log-loss over the entropy, from which on it is somebody else's


def work_sentence(
    settings: RunSettings, computed_in: ComputeDtype, split: Split, mesh: Mesh | None
) -> str:
    """What a run will do, in numbers."""
    trainable, frozen = map(num_parameters, (split.trainable, split.frozen))
    what = {"mtp": "the MTP modules, main model frozen", "all": "main model and MTP modules"}
    what["lora"] = f"adapters of rank {settings.lora.rank} of {what[settings.part]}"
    row_tokens = settings.batch.rows * settings.batch.row_tokens
    return (
        f"training {what[settings.train]}: {trainable:,} parameters of {trainable + frozen:,}; "
        f"{settings.steps} steps of up to {row_tokens:,} tokens, computed in {computed_in} on "
        f"{describe_mesh(mesh)}"
    )


def evaluation_sections(summary: Summary, title: str) -> list[Section]:
    """Losses and acceptance, one row a depth."""
    overlap = summary.overlap or [None] * len(summary.mtp_loss)
    rows = [("main model", number(summary.main_loss), "", "", "", "", "", "")]
    for k, loss in enumerate(summary.mtp_loss):
        interval = summary.acceptance_interval[k] if summary.acceptance_interval else None
        rates = (percent(summary.acceptance[k]), between(interval, percent))
        counted = f"{summary.accepted[k]:,.0f} / {summary.reached[k]:,.0f}"
        loose = (percent(summary.agreement[k]), percent(overlap[k]))
        more = (percent(summary.conditional[k]), counted, *loose)
        rows.append((f"draft {k + 1}", number(loss), *rates, *more))
    columns = ("", "loss", "accepted", "95 %", "if reached", "drafts", "agreement", "overlap")
    return [title, Grid(columns, rows), _caption(summary)]


def controls_sections(measured: Summary, controls: Mapping[str, Summary]) -> list[Section]:
    """What is measured beside what should hardly be accepted; a warning where it is no better."""
    names = {"shifted": "targets shifted by one", "untrained": "module untrained"}
    named = {"measured": measured, **{names[name]: each for name, each in controls.items()}}
    rows = [
        _lengths(
            name, each.acceptance, each.mean_accepted_length, each.mean_accepted_length_interval
        )
        for name, each in named.items()
    ]
    said: list[Section] = ["controls", Grid(_length_columns(measured), rows)]
    interval = measured.acceptance_interval[0]
    least = interval.low if interval else measured.acceptance[0]
    rates = {names[name]: each.acceptance[0] for name, each in controls.items()}
    no_less = [
        name
        for name, rate in rates.items()
        if least is not None and rate is not None and rate >= least
    ]
    if no_less:
        said.append(
            f"warning: draft 1 is accepted no more often than with {' and '.join(no_less)}:\n"
            "what was measured says nothing of what the module has learnt"
        )
    return said


def reduced_sections(
    measured: Summary, reduced: Summary, tokens: int, coverage: float, *, counted_here: bool
) -> list[Section]:
    """Acceptance with drafts from all tokens, and from some; which these are."""
    named = {"all tokens": measured, f"{tokens:,} tokens": reduced}
    rows = [
        _lengths(
            name, each.acceptance, each.mean_accepted_length, each.mean_accepted_length_interval
        )
        for name, each in named.items()
    ]
    where = "this very text, which flatters them" if counted_here else "--draft-vocab-data"
    said = f"the most frequent of {where}: {percent(coverage)} of the tokens learnt there"
    return ["drafts from fewer tokens", Grid(_length_columns(measured), rows), said]


def sources_sections(sources: Sequence[SourceAcceptance], measured: Summary) -> list[Section]:
    """Acceptance in each part of the text."""
    rows = [
        _lengths(
            f"{each.source} ({each.documents:,})",
            each.acceptance,
            each.mean_accepted_length,
            each.mean_accepted_length_interval,
        )
        for each in sources
    ]
    return ["by source (documents with a round)", Grid(_length_columns(measured), rows)]


def _length_columns(summary: Summary) -> tuple[str, ...]:
    drafts = (f"draft {k + 1}" for k in range(len(summary.acceptance)))
    return ("", "mean accepted length", "95 %", *drafts)


def _lengths(
    name: str, rates: Sequence[float | None], length: float | None, interval: Interval | None
) -> tuple[str, ...]:
    """One row: a name, tokens a round, and how often each draft is accepted."""
    return (name, number(length), between(interval, number), *map(percent, rates))


def _caption(summary: Summary) -> str:
    rounds = summary.reached[0] if summary.reached else 0
    length = number(summary.mean_accepted_length)
    sure = between(summary.mean_accepted_length_interval, number)
    said = (
        f"mean accepted length {length}{f' ({sure})' if sure else ''}, "
        f"{rounds:,.0f} rounds on {summary.tokens:,} tokens\n"
        "accepted: with all drafts of the round before it; on all of the text: agreement with the\n"
        "main model's greedy choice, and overlap of the distributions, which rejection accepts"
    )
    foreign = _foreign(summary)
    return said if foreign is None else f"{said}\n{foreign}"


def _foreign(summary: Summary) -> str | None:
    """What makes the rates conditional: that the main model would not write this text."""
    if summary.sampling == "greedy":
        share = summary.greedy_share
        if share is None or share > GREEDY_TEXT:
            return None
        found = f"only {percent(share)} of the text is what the main model would write greedily"
    else:
        nll, entropy = summary.text_nll, summary.entropy
        if nll is None or entropy is None or nll < entropy + FOREIGN_NATS:
            return None
        found = (
            f"the text is not what the main model writes at temperature {summary.temperature:g} "
            f"(log-loss {number(nll)}, entropy {number(entropy)})"
        )
    return (
        f"{found}:\nthese rates hold as long as it does; measure on the model's own answers to "
        "know what\na server accepts"
    )


def comparison_sections(before: Summary, after: Summary) -> list[Section]:
    """Held-out text before and after training."""
    old, new = _by_name(before), _by_name(after)
    rows = [(name, old[name], new[name]) for name in old]
    return ["on held-out text", Grid(("", "before", "after"), rows)]


def _by_name(summary: Summary) -> dict[str, str]:
    depths = [
        ("MTP loss, depth", number, summary.mtp_loss),
        ("overlap, depth", percent, summary.overlap),
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


def generation_sections(counts: Counts, out: str) -> list[Section]:
    """What was written; with drafts, a row for each."""
    said = f"{out}: {counts.documents:,} answers, {counts.tokens:,} tokens"
    accepted = counts.num_accepted_tokens_per_pos
    if not accepted:
        return [said]
    rows = [
        (f"draft {k}", percent(count / max(counts.num_drafts, 1)), f"{count:,}")
        for k, count in enumerate(accepted, start=1)
    ]
    rounds = f"{counts.tokens_a_round:.3f} tokens a round, {counts.num_drafts:,} rounds"
    return [said, Grid(("", "accepted", "drafts"), rows), rounds]


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

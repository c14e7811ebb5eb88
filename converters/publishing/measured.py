"""Measured acceptance for the model card: what `finetune-deepseek evaluate --json` printed.

Files are from anywhere: what is shown of them is checked, and all faults are told together.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_model.files.untrusted_json import JsonError, parse, shown
from mtp_model.problems import Problem, raise_if_any

RULES = ("greedy", "target", "rejection")
_MOST_BYTES = 16 << 20
_MOST_DRAFTS = 64
_LENGTH, _INTERVAL = "mean_accepted_length", "mean_accepted_length_interval"


@dataclass(frozen=True, kw_only=True)
class MeasuredAcceptance:
    """Drafts on one domain under one rule; acceptance: the first k of a round are all accepted.

    interval: of the length, 95 %. None: not measured.
    """

    domain: str
    rule: str
    temperature: float
    acceptance: tuple[float | None, ...]
    mean_accepted_length: float | None
    interval: tuple[float, float] | None
    rounds: float


def read_measured(words: Sequence[str], ckpt: str, digest: str) -> tuple[MeasuredAcceptance, ...]:
    """What each FILE or NAME=FILE has, a row for each of its sources; NAME is the domain's.

    ckpt: what has to have been measured, the checkpoint of this digest. Raises ProblemsError with
    everything that is wrong.
    """
    found: list[MeasuredAcceptance] = []
    problems: list[Problem] = []
    for word in words:
        name, _, path = ("", "", word) if Path(word).is_file() else word.rpartition("=")
        faults, values = _read(Path(path))
        faults += [] if faults else [*_faults(values, ckpt, digest)]
        problems += [Problem("acceptance", path, fault) for fault in faults]
        found += [] if faults else _rows(name or Path(path).stem, values)
    raise_if_any("--acceptance", problems)
    return tuple(found)


def _read(path: Path) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with a file, and the object that it holds."""
    try:
        size = path.stat().st_size
        values = parse(path.read_bytes()) if size <= _MOST_BYTES else None
    except (OSError, JsonError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return [f"cannot be read: {reason}; {_NEEDED}"], {}
    if not isinstance(values, dict) or not {"checkpoint", "acceptance", "sampling"} <= set(values):
        return [f"is no evaluation; {_NEEDED}"], {}
    return [], values


_NEEDED = "needed what `finetune-deepseek evaluate --json` printed"


def _faults(values: Mapping[str, Any], ckpt: str, digest: str) -> Iterator[str]:
    of, of_digest = values["checkpoint"], values.get("checkpoint_digest")
    if of_digest is not None and of_digest != digest:
        yield f"is of {shown(of)} as it was then, not of {ckpt} as it is; evaluate what is exported"
    elif of_digest is None and not _is_path_of(ckpt, of):
        yield f"is of {shown(of)}, not of {ckpt}; evaluate what is exported"
    if values["sampling"] not in RULES:
        yield f"has sampling {shown(values['sampling'])}, needed one of {', '.join(RULES)}"
    if not _is_number(values.get("temperature")):
        yield f"has temperature {shown(values.get('temperature'))}, needed a number"
    sources = values.get("sources", [])
    if not isinstance(sources, list) or not all(isinstance(each, dict) for each in sources):
        yield f"has sources {shown(sources)}, needed a list of objects"
        return
    for each in (values, *sources):
        yield from _wrong_numbers(each)
        if each is not values and not isinstance(each.get("source"), str):
            yield f"has a source {shown(each.get('source'))}, needed a name"


def _is_path_of(ckpt: str, found: Any) -> bool:
    """Of evaluations without a digest, which earlier versions printed."""
    return isinstance(found, str) and Path(found).absolute() == Path(ckpt).absolute()


def _wrong_numbers(values: Mapping[str, Any]) -> Iterator[str]:
    rates, length, interval = (values.get(key) for key in ("acceptance", _LENGTH, _INTERVAL))
    known = rates if isinstance(rates, list) and len(rates) <= _MOST_DRAFTS else []
    if not known or not all(r is None or (_is_number(r) and r <= 1) for r in known):
        yield f"has acceptance {shown(rates)}, needed shares of 0 to 1"
    if length is not None and not _is_number(length):
        yield f"has {_LENGTH} {shown(length)}, needed a number"
    if interval is not None and not (
        isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval))
    ):
        yield f"has {_INTERVAL} {shown(interval)}, needed two numbers"
    if not _is_number(values.get("num_drafts")):
        yield f"has num_drafts {shown(values.get('num_drafts'))}, needed a count"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value < 1e18


def _rows(name: str, values: Mapping[str, Any]) -> Iterator[MeasuredAcceptance]:
    """One of the whole text, or one of each source, which is named without its folder."""
    sources = values.get("sources") or [values]
    for each in sources:
        domain = name if len(sources) == 1 else f"{name}: {Path(each['source']).name}"
        yield MeasuredAcceptance(
            domain=domain,
            rule=values["sampling"],
            temperature=0.0 if values["sampling"] == "greedy" else values["temperature"],
            acceptance=tuple(each["acceptance"]),
            mean_accepted_length=each.get(_LENGTH),
            interval=tuple(each[_INTERVAL]) if each.get(_INTERVAL) else None,
            rounds=each["num_drafts"],
        )


def measured_table(measured: Sequence[MeasuredAcceptance]) -> str:
    """As Markdown, ordered by domain, rule and number of drafts."""
    order = sorted(
        measured, key=lambda m: (m.domain, RULES.index(m.rule), m.temperature, len(m.acceptance))
    )
    columns = "domain|rule|temperature|drafts a round|mean accepted length (95 %)"
    head = f"|{columns}|accepted, draft by draft|rounds|"
    return "\n".join([head, "|---|---|--:|--:|---|---|--:|", *map(_row, order)])


def _row(each: MeasuredAcceptance) -> str:
    length = "-" if each.mean_accepted_length is None else f"{each.mean_accepted_length:.2f}"
    sure = f" ({each.interval[0]:.2f} to {each.interval[1]:.2f})" if each.interval else ""
    rates = ", ".join("-" if rate is None else f"{rate:.1%}" for rate in each.acceptance)
    domain = shown(each.domain).replace("|", "\\|")
    facts = (domain, each.rule, f"{each.temperature:g}", str(len(each.acceptance)))
    return f"|{'|'.join((*facts, length + sure, rates, f'{each.rounds:,.0f}'))}|"

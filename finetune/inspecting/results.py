"""Measured acceptance read from files: of runs, `evaluate`, `generate`, and a server's metrics.

Files are from anywhere: each key is known or an error, and counts have to agree with each other.
K drafts a round.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from finetune.objective.acceptance import Rule
from finetune.objective.intervals import Interval
from finetune.run.directory import RunDirectory
from finetune.run.metrics import Summary, first_and_last, read_rows
from mtp_model.files.untrusted_json import JsonError, parse, shown
from mtp_model.problems import UserError

Kind = Literal["run", "evaluate", "generate", "server"]
LARGEST = 1e18  # of numbers that are believed, NaN and infinity aside
MOST_BYTES = 64 << 20  # of a file; what is read is a few kB, a server's metrics some hundred
COUNTS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos")
EVALUATION = {each.name for each in fields(Summary)} | {*COUNTS, "mean_accepted_length", "held_out"}
KNOWN: Mapping[Kind, set[str]] = {
    "run": EVALUATION | {"step"},
    "evaluate": EVALUATION
    | {"checkpoint", "data", "sources", "controls", "draft_cost", "projected_speedup"}
    | {"draft_vocab", "checkpoint_digest", "captured"},
    "generate": {*COUNTS, "out", "documents", "tokens"}
    | {"sampling", "temperature", "prompts", "data"},
    # What a server does not say of itself may be written beside its counts.
    "server": {*COUNTS, "num_spec_tokens", "sampling", "temperature"},
}
NUMBERS = ("mtp_loss", "acceptance", "conditional", "agreement", "reached", "accepted")
TEXTS = ("held_out", "prompts", "data")  # the first that two results have says if text is the same
NEEDED = (
    "a run's folder, what `evaluate --json` or `generate --speculate K --json` printed, or a "
    f"server's counts ({', '.join(COUNTS)}, as JSON or as its /metrics page has them)"
)
SAMPLE = re.compile(r"vllm:spec_decode_(\w+?)(?:_total)?(\{.*\})?\s+(\S+)(?:\s+-?\d+)?\s*")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class ResultsError(UserError):
    """Results that cannot be compared, every reason a line."""

    def __init__(self, faults: Iterable[str]):
        super().__init__("\n  ".join(["results that cannot be read:", *faults]))


@dataclass(frozen=True, kw_only=True)
class AcceptanceResult:
    """One measurement. None: not known. acceptance: the first k drafts of a round are accepted."""

    name: str
    kind: Kind
    num_drafts: float  # rounds
    acceptance: list[float | None]
    mean_accepted_length: float | None
    sampling: Rule | None
    temperature: float | None  # 0 for greedy
    texts: dict[str, str] = field(default_factory=dict)  # by TEXTS, digests of what was measured
    summary: Summary | None = None  # what else `evaluate` and runs measure
    notes: tuple[str, ...] = ()

    @property
    def draft_tokens(self) -> int:
        """K."""
        return len(self.acceptance)

    @property
    def intervals(self) -> tuple[Interval | None, list[Interval | None]]:
        """Of the mean accepted length, and of each position's acceptance."""
        none: list[Interval | None] = [None] * self.draft_tokens
        if self.summary is None:
            return None, none
        own = self.summary.acceptance_interval
        return self.summary.mean_accepted_length_interval, own or none


def read_results(paths: Iterable[Path]) -> list[AcceptanceResult]:
    """All measurements of these files and runs; ResultsError with everything wrong with them."""
    found: list[AcceptanceResult] = []
    faults: list[str] = []
    for path in paths:
        try:
            found += _of_run(path) if path.is_dir() else [_of_file(path)]
        except ResultsError as error:
            faults += str(error).split("\n  ")[1:]
        except OSError as error:
            faults.append(f"{path} cannot be read: {error.strerror or error}")
    if faults:
        raise ResultsError(faults)
    return found


def _of_run(folder: Path) -> list[AcceptanceResult]:
    """The first and the last evaluation of a run on the same text."""
    run = RunDirectory(path=folder)
    file, measured = run.evaluations, first_and_last(run.evaluations)
    if measured is None and run.config.is_file():
        raise ResultsError(
            [
                f"{folder} is a run that measured nothing, for it had no held-out text; its result "
                "is measured by: finetune-deepseek evaluate --checkpoint "
                f"{folder / 'final'} --data TEXT --json"
            ]
        )
    if measured is None:
        raise ResultsError([f"{folder} has no evaluations.jsonl with an evaluation: it is no run"])
    with file.open("rb") as lines:
        broken = sum(1 for _ in lines) - sum(1 for _ in read_rows(file))
    said = (f"{file}: broken lines are left out: {broken}",) if broken else ()
    first, last = measured
    rows = [last] if first["step"] == last["step"] else [first, last]
    return [_evaluated(f"{folder} step {row['step']}", "run", row, said) for row in rows]


def _of_file(path: Path) -> AcceptanceResult:
    if path.stat().st_size > MOST_BYTES:
        raise ResultsError([f"{path} has more than {MOST_BYTES >> 20} MiB; needed {NEEDED}"])
    raw = path.read_bytes()
    if raw.lstrip()[:1] != b"{":
        return _counted(str(path), "server", _of_page(path, raw))
    try:
        values = parse(raw)
    except JsonError as error:
        raise ResultsError([f"{path} {error}"]) from error
    assert isinstance(values, dict)  # it begins with a brace
    if "acceptance" in values:
        return _evaluated(str(path), "evaluate", values)
    if "documents" in values:
        return _counted(str(path), "generate", values)
    if "num_drafts" in values:
        return _counted(str(path), "server", values)
    keys = ", ".join(map(shown, [*values][:8])) or "no keys"
    raise ResultsError([f"{path} has {keys}; needed {NEEDED}"])


def _of_page(path: Path, raw: bytes) -> dict[str, Any]:
    """The counts on a server's page of metrics, added up over its engines."""
    sums: dict[str, float] = {}
    by_position: dict[int, float] = {}
    models = set()
    for line in raw.decode("utf-8", "replace").splitlines():
        match = SAMPLE.fullmatch(line)
        if match is None or match[1] not in COUNTS:
            continue
        labels = dict(LABEL.findall(match[2] or ""))
        try:
            value = float(match[3])
            position = int(labels["position"]) if match[1] == COUNTS[3] else 0
        except (KeyError, ValueError):
            raise ResultsError([f"{path}: {shown(line)} is no count"]) from None
        models.add(labels.get("model_name"))
        if match[1] == COUNTS[3]:
            by_position[position] = by_position.get(position, 0.0) + value
        else:
            sums[match[1]] = sums.get(match[1], 0.0) + value
    if not sums and not by_position:
        raise ResultsError([f"{path} has no vllm:spec_decode_num_drafts; needed {NEEDED}"])
    if len(models) > 1:
        names = ", ".join(sorted(shown(model) for model in models))
        raise ResultsError([f"{path} counts several models together: {names}; keep one's lines"])
    if sorted(by_position) != [*range(len(by_position))]:
        raise ResultsError([f"{path} has {COUNTS[3]} of positions {sorted(by_position)}"])
    return sums | {COUNTS[3]: [by_position[k] for k in sorted(by_position)]}


def _evaluated(
    name: str, kind: Kind, values: Mapping[str, Any], notes: tuple[str, ...] = ()
) -> AcceptanceResult:
    """What `evaluate` printed, or a line of a run's evaluations."""
    faults = _unknown(name, kind, values)
    missing = [key for key in (*NUMBERS, "tokens", "main_loss") if key not in values]
    faults += [f"{name}: {key} is missing" for key in missing]
    lists = [
        key for key in (*NUMBERS, "overlap", "kl") if values.get(key, []) != [] or key in NUMBERS
    ]
    depths = len(values["acceptance"]) if isinstance(values["acceptance"], list) else 0
    for key in lists:
        may_be_unknown = key not in ("reached", "accepted")
        if key in values and not _is_list(values[key], depths, may_be_unknown):
            faults.append(f"{name}: {key} is {shown(values[key])}, needed {depths or 'some'} rates")
    for key in ("main_loss", "greedy_share", "entropy", "text_nll"):
        if values.get(key) is not None and not _is_number(values[key]):
            faults.append(f"{name}: {key} is {shown(values[key])}, needed a number")
    length = values.get("mean_accepted_length_interval")
    by_position = values.get("acceptance_interval") or []
    listed = isinstance(by_position, list) and len(by_position) in (0, depths)
    if not listed or not all(each is None or _is_list(each, 2) for each in (length, *by_position)):
        faults.append(f"{name}: intervals are not pairs of numbers, one for each depth")
    faults += _wrong_rule(name, values) + _wrong_texts(name, values)
    if faults:
        raise ResultsError(faults)
    summary = Summary.from_json(dict(values))
    return AcceptanceResult(
        name=name,
        kind=kind,
        num_drafts=summary.reached[0],
        acceptance=summary.acceptance,
        mean_accepted_length=summary.mean_accepted_length,
        sampling=summary.sampling,
        temperature=0.0 if summary.sampling == "greedy" else summary.temperature,
        texts=_texts(values),
        summary=summary,
        notes=notes,
    )


def _counted(name: str, kind: Kind, values: Mapping[str, Any]) -> AcceptanceResult:
    """What a decoder counted: `generate --speculate`, or a server."""
    if kind == "generate" and values.get(COUNTS[3]) == []:
        raise ResultsError([f"{name} drafted nothing: `generate` it with --speculate K"])
    needed = COUNTS if kind == "server" else (COUNTS[0], COUNTS[3])
    faults = _unknown(name, kind, values)
    faults += [f"{name}: {key} is missing" for key in needed if key not in values]
    faults += [
        f"{name}: {key} is {shown(values[key])}, needed a count"
        for key in COUNTS[:3]
        if key in values and not (_is_number(values[key]) and values[key] >= 0)
    ]
    accepted = values.get(COUNTS[3], [0])
    if not isinstance(accepted, list) or not _is_list(accepted, len(accepted)):
        faults.append(f"{name}: {COUNTS[3]} is {shown(accepted)}, needed a count for each position")
    faults += _wrong_rule(name, values) + _wrong_texts(name, values)
    faults = faults or _contradictions(name, values)
    if faults:
        raise ResultsError(faults)
    rounds = values["num_drafts"]
    sampling = values.get("sampling")
    return AcceptanceResult(
        name=name,
        kind=kind,
        num_drafts=rounds,
        acceptance=[count / rounds for count in accepted],
        mean_accepted_length=1 + sum(accepted) / rounds,
        sampling=sampling,
        temperature=0.0 if sampling == "greedy" else values.get("temperature"),
        texts=_texts(values),
    )


def _contradictions(name: str, values: Mapping[str, Any]) -> list[str]:
    """What counts say of each other that cannot be."""
    rounds, accepted = values["num_drafts"], values[COUNTS[3]]
    falling = [rounds, *accepted]
    total, drafted = values.get("num_accepted_tokens"), values.get("num_draft_tokens")
    rules = (
        (rounds > 0, "num_drafts is 0: nothing was drafted"),
        (bool(accepted), f"{COUNTS[3]} is empty: nothing was drafted"),
        (
            all(before >= after for before, after in itertools.pairwise(falling)),
            f"{COUNTS[3]} {shown(accepted)} rises, or begins above num_drafts {rounds}",
        ),
        (
            total is None or math.isclose(total, sum(accepted), abs_tol=0.5),
            f"num_accepted_tokens is {total}, {COUNTS[3]} gives {sum(accepted)}",
        ),
        (
            drafted is None or drafted <= rounds * max(len(accepted), 1) * (1 + 1e-9),
            f"num_draft_tokens is {drafted}, more than {len(accepted)} in each of {rounds} rounds",
        ),
    )
    return [f"{name}: {why}" for holds, why in rules if not holds]


def _unknown(name: str, kind: Kind, values: Mapping[str, Any]) -> list[str]:
    extra = [shown(key) for key in values if key not in KNOWN[kind]]
    return [f"{name}: unknown {', '.join(extra)}"] if extra else []


def _wrong_rule(name: str, values: Mapping[str, Any]) -> list[str]:
    found, rules = [], get_args(Rule)
    if values.get("sampling") not in (None, *rules):
        wanted = ", ".join(rules)
        found.append(f"{name}: sampling is {shown(values['sampling'])}, needed one of {wanted}")
    heat = values.get("temperature")
    if heat is not None and not (_is_number(heat) and heat >= 0):
        found.append(f"{name}: temperature is {shown(heat)}, needed a number")
    return found


def _wrong_texts(name: str, values: Mapping[str, Any]) -> list[str]:
    wrong = [key for key in TEXTS if not isinstance(values.get(key, ""), str)]
    return [f"{name}: {key} is {shown(values[key])}, needed a digest" for key in wrong]


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: values[key] for key in TEXTS if key in values}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST


def _is_list(value: Any, length: int, unknown: bool = False) -> bool:
    """Whether it is a list of so many numbers, at least one. unknown: some may be null."""
    known = isinstance(value, list) and len(value) == length > 0
    return known and all(_is_number(each) or (unknown and each is None) for each in value)

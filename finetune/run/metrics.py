"""Sums of a batch as the numbers people read, and the files those go to.

RUN/metrics.jsonl has one object a step, RUN/evaluations.jsonl one for each evaluation on held-out
text; TensorBoard has both.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from finetune.data.packing import Batch
from finetune.objective.acceptance import Rounds, Rule
from finetune.objective.head import Asked
from finetune.objective.intervals import DocumentCounts, Interval, acceptance_by_position
from finetune.objective.losses import ONE_DRAFT_EACH, Measured

Row = dict[str, Any]
"""A line of metrics.jsonl or evaluations.jsonl."""
MOST_POINTS = 2000  # of a curve: more than a picture has columns
_LISTS = ("mtp_loss", "acceptance")  # in every row, beside `main_loss`


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was measured on some text; lists have one entry a depth. None: nothing to measure.

    Losses are nats a target. `acceptance[k-1]` is the probability that the first k drafts of a
    round are all accepted: the product of `conditional`, which is accepted / reached (see
    objective/acceptance.py). greedy_share: learnt tokens that are the main model's greedy choice.
    Intervals are of 95 % confidence, by a bootstrap over documents.

    overlap: mean over targets of sum over v of min(p, q), the probability that rejection sampling
    accepts a draft at any place; kl: KL(p || q), nats; entropy of p, and text_nll of the text under
    p, nats a token. All of these at `temperature`, and only where distributions were compared. A
    text that the main model sampled at that temperature has a text_nll near the entropy.
    """

    tokens: int
    main_loss: float | None
    mtp_loss: list[float | None]
    acceptance: list[float | None]
    conditional: list[float | None]
    agreement: list[float | None]
    reached: list[int] | list[float]  # expected numbers with `sampling` rejection
    accepted: list[int] | list[float]
    greedy_share: float | None = None
    acceptance_interval: list[Interval | None] = field(default_factory=list)
    mean_accepted_length_interval: Interval | None = None
    sampling: Rule = "greedy"
    temperature: float = 1.0
    overlap: list[float | None] = field(default_factory=list)
    kl: list[float | None] = field(default_factory=list)
    entropy: float | None = None
    text_nll: float | None = None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens a decoding step yields: 1 + sum over k of P(the first k drafts are accepted)."""
        if any(rate is None for rate in self.acceptance):
            return None
        return 1.0 + sum(rate for rate in self.acceptance if rate is not None)

    def to_json(self) -> dict[str, Any]:
        """The values, and the counts under the names that vLLM reports them by.

        num_draft_tokens: drafts that the text decides about; vLLM counts K a round.
        """
        return asdict(self) | {
            "mean_accepted_length": self.mean_accepted_length,
            "num_drafts": self.reached[0] if self.reached else 0,
            "num_draft_tokens": self._decided(),
            "num_accepted_tokens": sum(self.accepted),
            "num_accepted_tokens_per_pos": self.accepted,
        }

    def _decided(self) -> float:
        """Drafts that are accepted, refused, or behind a refused one."""
        refused = [
            reached - kept for reached, kept in zip(self.reached, self.accepted, strict=True)
        ]
        behind = sum(count * (len(refused) - k) for k, count in enumerate(refused, start=1))
        return sum(self.reached) + behind

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Summary":
        """The values of `to_json`; earlier versions wrote fewer."""
        values = {entry.name: row[entry.name] for entry in fields(cls) if entry.name in row}
        if length := values.get("mean_accepted_length_interval"):
            values["mean_accepted_length_interval"] = Interval(*length)
        if rates := values.get("acceptance_interval"):
            values["acceptance_interval"] = [each and Interval(*each) for each in rates]
        return cls(**values)


def add_up(measured: Iterable[Measured]) -> Measured:
    """Sums over several batches, exact in float64 and int64 on the host."""
    total: Any = None
    for each in measured:
        host = jax.tree.map(_wide, jax.device_get(each))
        total = host if total is None else jax.tree.map(np.add, total, host)
    if total is None:
        raise ValueError("no batch was measured")
    return total


def _wide(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float64 if np.issubdtype(x.dtype, np.floating) else np.int64)


def measure_text(
    step: Callable[[Batch], tuple[Measured, Rounds]],
    batches: Iterable[tuple[Batch, Sequence[Sequence[int]]]],
    asked: Asked,
) -> Summary:
    """Run `step` on each batch and sum up what it finds, with intervals.

    batches: each with the numbers of its documents (`Packer.documents_of_rows`). asked: what `step`
    measures.
    """
    return measure_documents(step, batches, asked)[0]


def measure_documents(
    step: Callable[[Batch], tuple[Measured, Rounds]],
    batches: Iterable[tuple[Batch, Sequence[Sequence[int]]]],
    asked: Asked,
) -> tuple[Summary, DocumentCounts]:
    """As `measure_text`, with what became of each document's drafts."""
    documents: DocumentCounts | None = None

    def measured() -> Iterator[Measured]:
        nonlocal documents
        for batch, documents_of_rows in batches:
            found, rounds = jax.device_get(step(batch))
            documents = documents or DocumentCounts(len(found.acceptance.reached_K))
            documents.add(rounds, batch.segment_ids_BT, documents_of_rows)
            yield found

    total = add_up(measured())
    assert documents is not None  # add_up had a batch
    length, acceptance = documents.intervals()
    summary = summarise(total, asked)
    intervals = {"acceptance_interval": acceptance, "mean_accepted_length_interval": length}
    return replace(summary, **intervals), documents


@dataclass(frozen=True, kw_only=True)
class SourceAcceptance:
    """What became of drafts in the documents of one source, as `Summary` has it of all of them."""

    source: str
    documents: int  # those with a round
    num_drafts: float
    acceptance: list[float | None]
    acceptance_interval: list[Interval | None]
    mean_accepted_length: float | None
    mean_accepted_length_interval: Interval | None

    @classmethod
    def of(cls, source: str, counts: DocumentCounts) -> "SourceAcceptance":
        documents, reached_K, accepted_K = counts.totals()
        acceptance = _acceptance(_rates(accepted_K, reached_K))
        known = [rate for rate in acceptance if rate is not None]
        length, by_position = counts.intervals()
        return cls(
            source=source,
            documents=documents,
            num_drafts=float(reached_K[0]) if len(reached_K) else 0.0,
            acceptance=acceptance,
            acceptance_interval=by_position,
            mean_accepted_length=1 + sum(known) if len(known) == len(acceptance) else None,
            mean_accepted_length_interval=length,
        )


def summarise(measured: Measured, asked: Asked = ONE_DRAFT_EACH) -> Summary:
    """Sums of one batch or several, on the host, as rates and means."""
    main_loss, *mtp_loss = _rates(measured.nll_sum_K1, measured.num_targets_K1)
    main_targets, *mtp_targets = measured.num_targets_K1
    counts = measured.acceptance
    conditional = _rates(counts.accepted_K, counts.reached_K)
    found = Summary(
        tokens=int(measured.num_tokens),
        main_loss=main_loss,
        mtp_loss=mtp_loss,
        acceptance=_acceptance(conditional),
        conditional=conditional,
        agreement=_rates(counts.agreed_K, counts.compared_K),
        reached=_numbers(counts.reached_K, asked),
        accepted=_numbers(counts.accepted_K, asked),
        greedy_share=_rates([counts.greedy], [counts.learnt])[0],
        sampling=asked.rule,
        temperature=asked.temperature,
    )
    if not asked.distributions:
        return found
    entropy, text_nll = (
        _rates([x], [main_targets])[0] for x in (measured.entropy_sum, measured.text_nll_sum)
    )
    return replace(
        found,
        overlap=_rates(measured.overlap_sum_K, mtp_targets),
        kl=_rates(measured.kl_sum_K, mtp_targets),
        entropy=entropy,
        text_nll=text_nll,
    )


def _numbers(counts_K: Any, asked: Asked) -> list[int] | list[float]:
    """Counts; expected ones need not be whole."""
    values = np.asarray(counts_K)
    if asked.rule == "rejection":
        return [float(n) for n in values]
    return [round(float(n)) for n in values]


def _rates(parts: Any, wholes: Any) -> list[float | None]:
    pairs = zip(np.asarray(parts), np.asarray(wholes), strict=True)
    return [float(part / whole) if whole else None for part, whole in pairs]


def _acceptance(rates: list[float | None]) -> list[float | None]:
    """By position, of the rates of drafts that are reached; None where nothing says what it is."""
    found_K = acceptance_by_position(np.array(rates, np.float64))
    return [None if math.isnan(each) else float(each) for each in found_K]


class RunLog:
    """Appends to the files of a run; `last_step` is what the run continues after.

    writes: False for a process of a cluster that only has to know what the files say.
    step_rows, evaluation_rows: for the curves. faults: what was wrong with the files, a line each.
    seen: the last step that the files told of.
    """

    def __init__(
        self,
        metrics: Path,
        evaluations: Path,
        tensorboard: Path,
        last_step: int,
        writes: bool = True,
    ):
        self.metrics, self.evaluations = metrics, evaluations
        self._writer = _events(tensorboard, last_step) if writes else None
        self.faults: list[str] = []
        self.seen = 0
        self.step_rows, self.evaluation_rows = Thinned(), Thinned()
        self._trim(metrics, self.step_rows, last_step)
        self._trim(evaluations, self.evaluation_rows, last_step)

    def step(self, row: Row) -> None:
        """One training step; row has `step`."""
        self.step_rows.add(row)
        self._append(self.metrics, row, "train")

    def evaluation(self, row: Row) -> None:
        """One evaluation on held-out text; row has `step`."""
        self.evaluation_rows.add(row)
        self._append(self.evaluations, row, "held_out")

    def close(self) -> None:
        """Close the files. What TensorBoard misses on a full disk is in metrics.jsonl or told."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError:
            # It would try again when Python ends, and say so with a traceback.
            events: Any = self._writer.file_writer.event_writer  # pyright: ignore
            events._worker.stop()
            events._closed = True

    def _trim(self, file: Path, kept: "Thinned", last_step: int) -> None:
        """Drop the rows after a step, which will be computed again, and lines that are broken."""
        whole = file.with_name(file.name + ".partial")
        with whole.open("w", encoding="utf-8") if self._writer else nullcontext() as out:
            for number, row in _lines(file):
                if row is None:
                    self.faults.append(f"{file} line {number} is broken and left out")
                    continue
                self.seen = max(self.seen, row["step"])
                if row["step"] <= last_step:
                    kept.add(row)
                    if out:
                        out.write(json.dumps(row) + "\n")
        if out:
            whole.replace(file)

    def _append(self, file: Path, row: Row, group: str) -> None:
        if self._writer is None:
            return
        try:
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
        except OSError as error:  # of a full disk, which doesn't say where
            raise OSError(error.errno, error.strerror, str(file)) from error
        for name, value in row.items():
            if isinstance(value, list):
                for depth, each in enumerate(value, start=1):
                    self._scalar(f"{group}/{name}/depth_{depth}", each, row["step"])
            elif name != "step":
                self._scalar(f"{group}/{name}", value, row["step"])

    def _scalar(self, tag: str, value: Any, step: int) -> None:
        if isinstance(value, int | float):  # neither unknown nor an interval
            assert self._writer is not None
            self._writer.add_scalar(tag, value, step)


def _events(folder: Path, last_step: int) -> Any:
    """TensorBoard's file, which goes on behind a step."""
    # tensorboardX imports these where they are installed: seconds, for what nobody asks of it.
    unwanted: Any = dict.fromkeys({"torch", "google.cloud.storage"} - sys.modules.keys())
    sys.modules.update(unwanted)  # None: as if it were not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in unwanted:
            del sys.modules[name]
    return SummaryWriter(str(folder), purge_step=last_step + 1)


class Thinned:
    """At most a few thousand rows out of any number: the first, every n-th, and the last."""

    def __init__(self) -> None:
        self._kept: list[Row] = []
        self._every, self._count = 1, 0
        self.last: Row | None = None

    def add(self, row: Row) -> None:
        if self._count % self._every == 0:
            self._kept.append(row)
        self._count, self.last = self._count + 1, row
        if len(self._kept) == MOST_POINTS:
            self._kept, self._every = self._kept[::2], 2 * self._every

    def rows(self) -> list[Row]:
        if self.last is None or self._kept[-1] is self.last:
            return [*self._kept]
        return [*self._kept, self.last]


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a .jsonl file, one at a time, without lines that are broken."""
    return (row for _, row in _lines(file) if row is not None)


def first_and_last(evaluations: Path) -> tuple[Row, Row] | None:
    """The last evaluation, and the first one on the same held-out text; None without any."""
    firsts: dict[str | None, Row] = {}
    last: Row | None = None
    for last in read_rows(evaluations):
        firsts.setdefault(last.get("held_out"), last)
    if last is None:
        return None
    # Earlier versions did not write which text it was.
    return firsts.get(None) or firsts[last.get("held_out")], last


def _lines(file: Path) -> Iterator[tuple[int, Row | None]]:
    """Number and row of each line; None for one that a killed process left half, or is damaged."""
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield number, _row(line) if line.endswith(b"\n") else None


def _row(line: bytes) -> Row | None:
    """The row that a line holds, None where it is none that the curves can be drawn from."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    drawn = all(isinstance(row.get(name), list) for name in _LISTS) and "main_loss" in row
    return row if drawn else None

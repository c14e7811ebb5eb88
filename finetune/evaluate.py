"""`finetune-deepseek evaluate`, a file of its own as `train` has: measure a checkpoint on text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

from finetune.data.packing import Batch, Packer, Position, first_rows
from finetune.data.run_text import add_rows, open_documents
from finetune.objective.acceptance import Rule
from finetune.objective.losses import Asked
from finetune.run.metrics import Summary, measure_text
from finetune.settings import ComputeDtype, DataPaths, SettingsError
from finetune.state import Split, make_measure_step
from finetune.weights import compute_dtype, open_trainable
from mtp_model.load import load
from mtp_model.progress import Report, progress


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Measure losses and the acceptance of drafts on text, without generating.

    The text is read once. Acceptance is counted in rounds, as a decoder drafts: exact where the
    main model wrote the text; on other text it is what holds as long as the two agree.
    """

    checkpoint: str
    """Checkpoint directory, as `convert-deepseek import` or training writes it; local or gs://."""
    data: DataPaths
    draft_tokens: int | None = None
    """Tokens drafted a step; more than there are MTP modules reuses them (default: one each)."""
    sampling: Rule = "greedy"
    """How the decoder samples: greedy (temperature 0); target (the main model samples, drafts are
    greedy, what servers do unless told otherwise); rejection (drafts are sampled too)."""
    temperature: float = 1.0
    """Of target and rejection, and of the distributions that are compared."""
    rows: int = 8
    """Rows in a batch."""
    row_tokens: int = 1024
    """Tokens in a row."""
    max_rows: int | None = None
    """Stop after this many rows (default: all of the text)."""
    compute_dtype: ComputeDtype = "auto"
    """Precision of activations; auto is float32 on CPU and bfloat16 elsewhere."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured, and digests that say of which text: its rows, and its files."""

    summary: Summary
    held_out: str  # as in a run's evaluations.jsonl
    data: str

    def to_json(self) -> dict[str, Any]:
        """For programs: what was measured, under the names of `Summary`, and of which text."""
        return self.summary.to_json() | {"held_out": self.held_out, "data": self.data}


def check(settings: EvaluateSettings) -> None:
    """Raise SettingsError with everything that is wrong with the values."""
    minimum = {"draft_tokens": 1, "rows": 1, "row_tokens": 2, "max_rows": 1}
    faults = [
        f"--{name.replace('_', '-')} is {value}, needed {least} or more"
        for name, least in minimum.items()
        if (value := getattr(settings, name)) is not None and value < least
    ]
    if not settings.temperature > 0:
        faults.append(f"--temperature is {settings.temperature}, needed more than 0")
    faults += [] if settings.data else ["--data is empty, needed at least one path"]
    if faults:
        raise SettingsError("settings that cannot be used", faults)


def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Measure on all of the text (or `max_rows` of it)."""
    check(settings)
    _, config = open_trainable(settings.checkpoint)
    documents = open_documents(settings.checkpoint, settings.data, config)
    dtype = compute_dtype(settings.compute_dtype)
    split = Split.of(load(settings.checkpoint, compute_dtype=dtype), "mtp")
    asked = Asked(settings.draft_tokens, True, settings.sampling, settings.temperature)
    step = make_measure_step(split.graphdef, asked)
    weights = (split.trainable, split.biases, split.frozen)
    rows = settings.rows
    most = settings.max_rows and -(-settings.max_rows // rows)
    packer = Packer(documents, rows=rows, row_tokens=settings.row_tokens, seed=0, epochs=1)
    batches = first_rows(packer, settings.max_rows) if settings.max_rows else packer
    rows_seen = xxhash.xxh3_128()

    def measured(batch: Batch) -> Any:
        add_rows(rows_seen, batch)
        return step(*weights, batch)

    with progress("evaluate", "batches", total=most) as report:
        reported = _reported(batches, report, most, len(documents))
        named = ((batch, packer.documents_of_rows) for batch in reported)
        summary = measure_text(measured, named, asked)
    return Evaluation(summary=summary, held_out=rows_seen.hexdigest(), data=documents.corpus.digest)


def _reported(
    batches: Iterable[tuple[Batch, Position]],
    report: Report,
    most: int | None,
    num_documents: int,
) -> Iterator[Batch]:
    """The batches; each is reported when the next is asked for, which is when it is measured."""
    for done, (batch, position) in enumerate(batches, start=1):
        yield batch
        epoch, begun = position.next
        report(done, most, f"document {num_documents if epoch else begun:,} of {num_documents:,}")

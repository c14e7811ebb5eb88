"""`finetune-deepseek evaluate`, a file of its own as `train` has: measure a checkpoint on text."""

import functools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import xxhash
from flax import nnx
from jax.sharding import Mesh

from finetune.captured.measured_text import MeasuredText, text_of, text_of_states
from finetune.data.draft_vocab import most_frequent, write_token_map
from finetune.data.packing import Batch, Packer, Position, first_rows
from finetune.data.run_text import add_rows, open_documents
from finetune.devices import Workload, devices_for, on_mesh, spread
from finetune.objective.acceptance import Rule
from finetune.objective.head import Asked
from finetune.objective.intervals import DocumentCounts
from finetune.run.changes import given_to_all
from finetune.run.metrics import SourceAcceptance, Summary, measure_documents
from finetune.settings import (
    ClusterSettings,
    ComputeDtype,
    DataPaths,
    MeshSettings,
    SettingsError,
    too_small,
)
from finetune.settings_rules import short_rows
from finetune.state import Split, make_measure_step
from finetune.weights import compute_dtype, open_trainable
from mtp_model import ModelConfig, cluster
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.files.open import is_address, written
from mtp_model.layers import FP8, INIT_STD
from mtp_model.load import load
from mtp_model.progress import Report, progress


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Measure losses and the acceptance of drafts on text, without generating.

    The text is read once; of several paths, acceptance is told of each too. Acceptance is counted
    in rounds, as a decoder drafts: exact where the main model wrote the text; on other text it is
    what holds as long as the two agree.
    """

    checkpoint: str
    """Checkpoint directory, as `convert-deepseek import` or training writes it; local or gs://."""
    data: DataPaths = ()
    states: tuple[Path, ...] = ()
    """Instead of --data: folders of hidden states that `capture` or vLLM wrote, local or gs://. No
    main model is loaded then, and the checkpoint may be of --scope mtp."""
    skip_unusable: bool = False
    """Leave out, and name, captured samples that are damaged, cut short or of another model."""
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
    controls: bool = False
    """Measure two modules more, whose drafts should hardly be accepted: this one with its targets
    shifted by one place, and one with fresh weights. Takes three times as long."""
    draft_cost: float | None = None
    """Time of one draft, relative to a step of the main model: print the projected speed-up, tokens
    a round / (1 + drafts * cost)."""
    draft_vocab: int | None = None
    """Measure once more with drafts from so many tokens only, the most frequent of the data: what a
    smaller head of the module would cost in acceptance."""
    draft_vocab_data: DataPaths = ()
    """The text whose tokens are counted for that (default: --data itself, which flatters)."""
    token_map: Path | None = None
    """Write these tokens to this file, as SGLang's --speculative-token-map reads them (.pt)."""
    compute_dtype: ComputeDtype = "auto"
    """Precision of activations; auto is float32 on CPU and bfloat16 elsewhere."""
    mesh: MeshSettings = field(default_factory=MeshSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True, kw_only=True)
class ReducedHead:
    """The same measured with drafts from some tokens only. coverage: their share of the learnt
    tokens that were counted; data: digest of the files that these are of."""

    tokens: int
    coverage: float
    data: str
    summary: Summary


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured, and digests that say of which text, its rows and its files, and of which
    checkpoint: its path may hold another one later."""

    summary: Summary
    checkpoint_digest: str
    held_out: str  # as in a run's evaluations.jsonl
    data: str
    sources: list[SourceAcceptance] = field(default_factory=list)  # where there are several
    controls: dict[str, Summary] = field(default_factory=dict)  # by name, where they are asked for
    draft_cost: float | None = None
    reduced: ReducedHead | None = None
    captured: tuple[str, ...] = ()  # of captured states: in which precisions they were kept

    def speedup(self, length: float | None) -> float | None:
        """Projected from a mean accepted length; None without a cost."""
        if self.draft_cost is None or length is None:
            return None
        return length / (1 + len(self.summary.acceptance) * self.draft_cost)

    def to_json(self) -> dict[str, Any]:
        """For programs: what was measured, under the names of `Summary`, of which text, and what
        was asked for beside that."""
        found = self.summary.to_json() | {"held_out": self.held_out, "data": self.data}
        found |= {"checkpoint_digest": self.checkpoint_digest}
        if self.captured:
            found["captured"] = list(self.captured)
        if self.sources:
            found["sources"] = [
                asdict(each) | self._projected(each.mean_accepted_length) for each in self.sources
            ]
        if self.controls:
            found["controls"] = {name: each.to_json() for name, each in self.controls.items()}
        if self.reduced:
            summary = self.reduced.summary.to_json()
            found["draft_vocab"] = asdict(self.reduced) | {"summary": summary}
        return found | self._projected(self.summary.mean_accepted_length)

    def _projected(self, length: float | None) -> dict[str, Any]:
        if self.draft_cost is None:
            return {}
        return {"draft_cost": self.draft_cost, "projected_speedup": self.speedup(length)}


def check(settings: EvaluateSettings) -> None:
    """Raise SettingsError with everything that is wrong with the values."""
    minimum = {"draft_tokens": 1, "rows": 1, "row_tokens": 2, "max_rows": 1, "draft_cost": 0}
    minimum |= {"draft_vocab": 1}
    faults = too_small(settings, minimum)
    if settings.temperature <= 0:
        faults.append(f"--temperature is {settings.temperature}, needed a number above 0")
    if settings.draft_vocab is None and (settings.draft_vocab_data or settings.token_map):
        faults.append("--draft-vocab-data and --token-map need --draft-vocab N")
    if settings.token_map and settings.token_map.exists():
        faults.append(f"--token-map {settings.token_map} is there already; name another file")
    if settings.token_map and is_address(settings.token_map):
        faults.append(f"--token-map {written(settings.token_map)} needs a place on this machine")
    elif settings.token_map and not settings.token_map.parent.is_dir():
        folder = settings.token_map.parent
        faults.append(f"--token-map {settings.token_map} is in no folder; make {folder} first")
    if bool(settings.data) == bool(settings.states):
        found = "both are given" if settings.data else "--data is empty, needed at least one path"
        faults.append(f"{found}: needed --data, or --states")
    if settings.skip_unusable and not settings.states:
        faults.append("--skip-unusable needs --states: it is for captured samples")
    if faults:
        raise SettingsError("settings that cannot be used", faults)


def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Measure on all of the text (or `max_rows` of it)."""
    check(settings)
    checkpoint, config = open_trainable(settings.checkpoint, captured=bool(settings.states))
    _raise_unless_fitting(settings, config)
    scope = "mtp" if settings.states else "all"
    mesh = devices_for(settings.mesh, Workload.of(checkpoint, None, settings.rows, scope))
    dtype = compute_dtype(settings.compute_dtype)
    text = _text(settings, checkpoint, dtype, config)
    digests = {"data": text.digest, "checkpoint": checkpoint.digest}
    cluster.raise_unless_alike(given_to_all(settings) | digests)
    split = Split.of(load(settings.checkpoint, mesh, scope=scope, compute_dtype=dtype), "mtp")
    asked = Asked(settings.draft_tokens, True, settings.sampling, settings.temperature)
    step = make_measure_step(split.graphdef, asked)
    rows_seen = xxhash.xxh3_128()
    summary, counts = _measure(
        settings, text, _with_weights(step, split, mesh), asked, "evaluate", rows_seen
    )
    reduced = None
    if settings.draft_vocab:
        reduced = _reduced(settings, text, asked, split, mesh, config)
    controls: dict[str, Summary] = {}
    if settings.controls:
        shifted = asked._replace(shifted=True)
        moved = _with_weights(make_measure_step(split.graphdef, shifted), split, mesh)
        title = "evaluate, targets shifted"
        controls["shifted"], _ = _measure(settings, text, moved, shifted, title)
        split = untrained(split, initializer_range(checkpoint))
        fresh, title = _with_weights(step, split, mesh), "evaluate, module untrained"
        controls["untrained"], _ = _measure(settings, text, fresh, asked, title)
    return Evaluation(
        summary=summary,
        checkpoint_digest=digests["checkpoint"],
        held_out=rows_seen.hexdigest(),
        data=text.digest,
        sources=[SourceAcceptance.of(path, counts.of(of)) for path, of in text.sources.items()],
        controls=controls,
        draft_cost=settings.draft_cost,
        reduced=reduced,
        captured=text.captured,
    )


def _raise_unless_fitting(settings: EvaluateSettings, config: ModelConfig) -> None:
    """SettingsError for what this model has no room for."""
    drafts, modules = settings.draft_tokens or 0, config.num_nextn_predict_layers
    faults = short_rows("--row-tokens", settings.row_tokens, drafts, modules)
    if (settings.draft_vocab or 0) > config.vocab_size:
        found = f"--draft-vocab is {settings.draft_vocab}"
        faults.append(f"{found}, the model has {config.vocab_size} tokens")
    if faults:
        raise SettingsError("settings that cannot be used", faults)


def _text(
    settings: EvaluateSettings, checkpoint: Checkpoint, dtype: str, config: ModelConfig
) -> MeasuredText:
    """What is to be measured; what of it is left out is said."""

    def say(line: str) -> None:
        if cluster.is_first():
            print(line, file=sys.stderr)

    if not settings.states:
        return text_of(settings.checkpoint, settings.data, config)
    skip = say if settings.skip_unusable else None
    return text_of_states(settings.states, checkpoint, dtype, settings.row_tokens, skip)


def _reduced(
    settings: EvaluateSettings,
    text: MeasuredText,
    asked: Asked,
    split: Split,
    mesh: Mesh | None,
    config: ModelConfig,
) -> ReducedHead:
    """The same text once more, with drafts from the most frequent tokens only; their file."""
    assert settings.draft_vocab
    counted, digest = text.documents, text.digest
    if settings.draft_vocab_data:
        counted = open_documents(settings.checkpoint, settings.draft_vocab_data, config)
        digest = counted.corpus.digest
    vocab = most_frequent(counted, config.vocab_size, settings.draft_vocab)
    fewer = asked._replace(drafted=vocab.tokens)
    step = _with_weights(make_measure_step(split.graphdef, fewer), split, mesh)
    summary, _ = _measure(settings, text, step, fewer, "evaluate, fewer tokens")
    if settings.token_map and cluster.is_first():
        write_token_map(settings.token_map, vocab.tokens)
    return ReducedHead(
        tokens=len(vocab.tokens),
        coverage=vocab.coverage,
        data=digest,
        summary=summary,
    )


def _with_weights(step: Any, split: Split, mesh: Mesh | None) -> Any:
    """The step as a function of a batch."""

    def of_batch(batch: Batch) -> Any:
        with on_mesh(mesh):
            return step(split.trainable, split.biases, split.frozen, spread(batch, mesh))

    return of_batch


def _measure(
    settings: EvaluateSettings,
    text: MeasuredText,
    step: Any,
    asked: Asked,
    title: str,
    rows_seen: xxhash.xxh3_128 | None = None,
) -> tuple[Summary, DocumentCounts]:
    """Go over the text once. rows_seen: a digest that the rows are added to."""
    rows = settings.rows
    most = settings.max_rows and -(-settings.max_rows // rows)
    packer = Packer(text.documents, rows=rows, row_tokens=settings.row_tokens, seed=0, epochs=1)
    batches = first_rows(packer, settings.max_rows) if settings.max_rows else packer

    def measured(batch: Batch) -> Any:
        if rows_seen is not None:
            add_rows(rows_seen, batch)
        return step(batch)

    with progress(title, "batches", total=most) as report:
        reported = _reported(batches, report, most, len(text.documents))
        named = ((batch, packer.documents_of_rows) for batch in reported)
        return measure_documents(measured, named, asked)


def initializer_range(checkpoint: Checkpoint) -> float:
    """The deviation that the model's weights began with, by its config.json."""
    found: Any = checkpoint.config_dict.get("initializer_range")
    return float(found) if type(found) in (int, float) and found > 0 else INIT_STD


def untrained(split: Split, deviation: float) -> Split:
    """The model with MTP modules as they are before training; what is FP8 stays FP8.

    Matrices are normal with this deviation, norms 1, router biases 0.
    """
    params = dict(nnx.to_flat_state(split.trainable))
    is_fp8 = {path[:-1]: leaf.dtype == FP8 for path, leaf in params.items()}
    numbers = {path: number for number, path in enumerate(sorted(params))}

    def fresh(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
        value = leaf[...]
        if value.ndim < 3:  # [modules, size]: a norm
            return leaf.replace(jax.device_put(jnp.ones_like(value), value.sharding))
        key = jax.random.fold_in(jax.random.key(0), numbers[path])
        drawn = 1.0 if is_fp8[path[:-1]] else deviation  # of FP8 the scales are the deviation
        return leaf.replace(_normal(key, value, drawn))

    def scaled(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
        enters = path[-1] == "weight_scale_inv" and is_fp8.get(path[:-1], False)
        if not enters:
            return leaf
        scales = jnp.full_like(leaf[...], deviation)
        return leaf.replace(jax.device_put(scales, leaf[...].sharding))

    return split._replace(
        trainable=nnx.map_state(fresh, split.trainable),
        biases=nnx.map_state(lambda _, leaf: leaf.replace(leaf[...] * 0), split.biases),
        frozen=nnx.map_state(scaled, split.frozen),
    )


def _normal(key: jax.Array, like: jax.Array, deviation: float) -> jax.Array:
    """Normal values of a leaf's shape, dtype and place, a matrix at a time."""
    *stack, rows, columns = like.shape

    def matrix(key: jax.Array) -> jax.Array:
        return (jax.random.normal(key, (rows, columns)) * deviation).astype(like.dtype)

    def all_of(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, functools.reduce(int.__mul__, stack, 1))
        return jax.lax.map(matrix, keys).reshape(like.shape)

    return jax.jit(all_of, out_shardings=like.sharding)(key)


def _reported(
    batches: Iterable[tuple[Batch, Position]],
    report: Report,
    most: int | None,
    num_documents: int,
) -> Iterator[Batch]:
    """The batches; each is reported when the next is asked for, which is when it is measured."""
    for done, (batch, position) in enumerate(batches, start=1):
        yield batch
        epoch, begun, _ = position.next[0]
        report(done, most, f"document {num_documents if epoch else begun:,} of {num_documents:,}")

"""`finetune-deepseek capture`: run the main model over text once, and keep what it made of it.

Text is packed into rows as training packs it; each document of a row becomes a sample file. What is
held is one batch. A capture that was interrupted goes on after the last batch that was written; of
one whose samples are no longer all there, the batches that lack one are computed again.
Of a cluster each process writes the samples of its devices' rows, the first one how far all are.
"""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from finetune.captured.folder import PROGRESS_FILE, SamplesThere, sample_name
from finetune.captured.sample import (
    Content,
    StateName,
    StoredAs,
    main_model_digest,
    write_sample,
)
from finetune.data.packing import Batch, Packer, Position
from finetune.data.run_text import open_documents
from finetune.devices import Workload, devices_for, on_mesh, over_rows, rows_here, spread
from finetune.objective.losses import context_of
from finetune.run.changes import given_to_all
from finetune.settings import (
    ClusterSettings,
    ComputeDtype,
    DataPaths,
    MeshSettings,
    SettingsError,
    too_small,
)
from finetune.weights import compute_dtype
from mtp_model import DeepSeekV3, cluster
from mtp_model.checkpoint.directory import Checkpoint, CheckpointError, open_checkpoint
from mtp_model.files.open import as_place
from mtp_model.files.place import Place
from mtp_model.files.untrusted_json import parse
from mtp_model.load import load
from mtp_model.meshes import compiler_options
from mtp_model.problems import UserError
from mtp_model.progress import progress
from mtp_model.threads import in_threads

LOCK = "lock"
_AT_ONCE = 8  # samples that are sent to a bucket


class CaptureError(UserError):
    """A capture that cannot be made, or a folder that it cannot go to."""


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """Keep the main model's hidden states of text, for `train --states`: no main model then.

    The same command continues a capture that was interrupted, and writes samples that are missing.
    """

    checkpoint: str
    """Checkpoint directory with a main model; local or gs://."""
    data: DataPaths
    out: Path
    """Folder for the samples, a file each; local or gs://."""
    state: StateName = "pre_norm"
    """Before or after the main model's final norm; before it is what vLLM writes."""
    stored: StoredAs = "bfloat16"
    """Precision of what is kept; float8 has a scale for each token, and is half of bfloat16."""
    rows: int = 8
    """Rows in a batch."""
    row_tokens: int = 1024
    """Tokens in a row; a longer document is cut, and begins anew for the main model, as in
    training."""
    compute_dtype: ComputeDtype = "auto"
    """Precision of activations; auto is float32 on CPU and bfloat16 elsewhere."""
    mesh: MeshSettings = field(default_factory=MeshSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    json: bool = False
    """Print one JSON object instead of a sentence."""


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What a folder of samples has: of which inputs, how far, and where packing goes on."""

    inputs: dict[str, Any]
    samples: int = 0
    tokens: int = 0
    position: dict[str, Any] | None = None
    finished: bool = False


def capture(settings: CaptureSettings) -> Captured:
    """Write all samples, or those that an interrupted capture left.

    Raises SettingsError, CaptureError, DataError or CheckpointError for what cannot be done.
    """
    _check(settings)
    checkpoint = open_checkpoint(settings.checkpoint)
    config = checkpoint.config
    if checkpoint.provenance["scope"] == "mtp":
        raise CheckpointError(f"{settings.checkpoint} has no main model: it is of --scope mtp")
    if settings.state == "post_norm" and config.mtp_hidden_state == "pre_norm":
        found = "--state is post_norm, but this model's MTP modules are fed states before the norm"
        raise SettingsError("settings that cannot be used", [f"{found}: give --state pre_norm"])
    mesh = devices_for(settings.mesh, Workload.of(checkpoint, None, settings.rows, "main"))
    documents = open_documents(settings.checkpoint, settings.data, config)
    computed_in = compute_dtype(settings.compute_dtype)
    inputs = {
        "checkpoint": checkpoint.digest,
        "data": documents.corpus.digest,
        "computed_in": computed_in,
        **{name: getattr(settings, name) for name in ("state", "stored", "rows", "row_tokens")},
    }
    digests = {name: inputs[name] for name in ("checkpoint", "data")}
    cluster.raise_unless_alike(given_to_all(settings) | digests)
    out = as_place(settings.out)
    with contextlib.ExitStack() as held:
        begun, written = cluster.by_first(lambda: _claimed(out, inputs, held))
        at, written = Captured(**begun), SamplesThere(**written)
        if cluster.is_anywhere(not (out / LOCK).is_file()):
            raise CaptureError(f"--out is {out}, needed a folder that all hosts share")
        if not written.has(range(at.samples)):
            at = Captured(inputs=inputs)
        if at.finished:
            return at
        model = load(settings.checkpoint, mesh, scope="main", compute_dtype=computed_in)
        packer = Packer(
            documents,
            rows=settings.rows,
            row_tokens=settings.row_tokens,
            seed=0,
            epochs=1,
            position=Position.from_json(at.position) if at.position else None,
        )
        return _capture(settings, checkpoint, model, mesh, packer, at, written)


def _check(settings: CaptureSettings) -> None:
    least = {"rows": 1, "row_tokens": 2}
    faults = too_small(settings, least)
    faults += [] if settings.data else ["--data is empty, needed at least one path"]
    if faults:
        raise SettingsError("settings that cannot be used", faults)


def _claimed(
    out: Place, inputs: dict[str, Any], held: contextlib.ExitStack
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How far a capture to this folder is, which is held against others until the stack ends, and
    which of its samples are there."""
    out.make_folder()
    if not held.enter_context((out / LOCK).locked()):
        who = (out / LOCK).holder()
        raise CaptureError(f"another process captures to {out}{who}; wait or end it")
    at = _begun(out, inputs)
    if not (out / PROGRESS_FILE).is_file():
        _save(out, at)  # before the first sample: without it these would be nobody's
    return dataclasses.asdict(at), dataclasses.asdict(SamplesThere.among(out.sizes()))


def _begun(out: Place, inputs: dict[str, Any]) -> Captured:
    """How far a capture to this folder is; CaptureError where it is another's."""
    file = out / PROGRESS_FILE
    if not file.is_file():
        if any(entry.name not in ("", LOCK) for entry in out.entries()):
            raise CaptureError(f"{out} is not empty and no capture; give --out another place")
        return Captured(inputs=inputs)
    try:
        values: Any = parse(file.read_bytes())
        found = Captured(**values)
        before = {name: found.inputs[name] for name in inputs}
    except (UserError, TypeError, KeyError) as error:
        raise CaptureError(f"{file} is damaged ({error}); give --out another place") from error
    changed = [
        f"{name} was {before[name]}, is now {now}"
        for name, now in inputs.items()
        if before[name] != now
    ]
    if changed:
        what = "is a capture of something else; give --out another place"
        raise CaptureError("\n  ".join([f"{out} {what}:", *changed]))
    return found


def _capture(
    settings: CaptureSettings,
    checkpoint: Checkpoint,
    model: DeepSeekV3,
    mesh: Mesh | None,
    packer: Packer,
    at: Captured,
    written: SamplesThere,
) -> Captured:
    out = as_place(settings.out)
    graph, weights = nnx.split(model)
    post_norm = settings.state == "post_norm"

    def states(weights: nnx.State, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, weights)
        x_BTD, _ = model.residual(batch.tokens_BT, context_of(batch))
        return model.norm(x_BTD) if post_norm else x_BTD

    where = over_rows(mesh) if mesh is not None else None
    step = jax.jit(states, out_shardings=where, compiler_options=compiler_options())
    of_model = main_model_digest(checkpoint)

    def write(sample: tuple[Place, Content]) -> None:
        write_sample(*sample, settings.state, of_model, settings.stored)

    def write_all(batch: Batch, found: list[tuple[int, np.ndarray]], first: int) -> None:
        rows = rows_here(step(weights, spread(batch, mesh)))
        if cluster.is_anywhere(not all(_is_finite(batch, *each) for each in rows.items())):
            raise CaptureError(
                "NaN or infinity in the main model's states; verify the checkpoint, or try "
                "--compute-dtype float32"
            )
        contents = (
            (out / sample_name(number), _content(batch, rows[row], row, part_T))
            for number, (row, part_T) in enumerate(found, start=first)
            if row in rows
        )
        collections.deque(in_threads(write, contents, _AT_ONCE if out.is_far else 1), maxlen=0)
        cluster.wait("the batch is written")

    with progress("capture", "batches") as report, on_mesh(mesh):
        for done, (batch, position) in enumerate(packer, start=1):
            found = list(_documents(batch))
            if not written.has(range(at.samples, at.samples + len(found))):
                write_all(batch, found, at.samples)
            at = dataclasses.replace(
                at,
                samples=at.samples + len(found),
                tokens=at.tokens + sum(int(part_T.sum()) for _, part_T in found),
                position=position.to_json(),
            )
            _save(out, at)
            report(done, None, f"{at.samples:,} samples, {at.tokens:,} tokens")
    at = dataclasses.replace(at, finished=True)
    _save(out, at)
    return at


def _documents(batch: Batch) -> Iterator[tuple[int, np.ndarray]]:
    """Of each document of a batch: its row, and which tokens of that it is, bool [T]."""
    for row, segments_T in enumerate(np.asarray(batch.segment_ids_BT)):
        for segment in range(1, int(segments_T.max()) + 1):
            yield row, segments_T == segment


def _content(batch: Batch, states_TD: np.ndarray, row: int, part_T: np.ndarray) -> Content:
    """The document that is a part of a row."""
    return Content(batch.tokens_BT[row, part_T], batch.loss_mask_BT[row, part_T], states_TD[part_T])


def _is_finite(batch: Batch, row: int, states_TD: np.ndarray) -> bool:
    documents_T = np.asarray(batch.segment_ids_BT)[row] != 0
    return bool(np.isfinite(states_TD[documents_T].astype(np.float32)).all())


def _save(out: Place, at: Captured) -> None:
    """Say how far all are; the first process of a cluster does."""
    if not cluster.is_first():
        return
    text = json.dumps(dataclasses.asdict(at)) + "\n"
    (out / PROGRESS_FILE).write_pieces([text.encode()])

"""`finetune-deepseek capture`: run the main model over text once, and keep what it made of it.

Text is packed into rows as training packs it; each document of a row becomes a sample file. What is
held is one batch. A capture that was interrupted goes on after the last batch that was written.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from finetune.captured.documents import PROGRESS_FILE
from finetune.captured.sample import (
    SUFFIX,
    Content,
    StateName,
    StoredAs,
    main_model_digest,
    write_sample,
)
from finetune.data.packing import Batch, Packer, Position
from finetune.data.run_text import open_documents
from finetune.devices import Workload, devices_for, on_mesh, spread
from finetune.objective.losses import context_of
from finetune.settings import ComputeDtype, DataPaths, MeshSettings, SettingsError, too_small
from finetune.weights import compute_dtype
from mtp_model import DeepSeekV3
from mtp_model.checkpoint.directory import Checkpoint, CheckpointError, open_checkpoint
from mtp_model.files.open import as_place
from mtp_model.files.untrusted_json import parse
from mtp_model.load import load
from mtp_model.problems import UserError
from mtp_model.progress import progress


class CaptureError(UserError):
    """A capture that cannot be made, or a folder that it cannot go to."""


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """Keep the main model's hidden states of text, for `train --states`: no main model then.

    The same command continues a capture that was interrupted.
    """

    checkpoint: str
    """Checkpoint directory with a main model; local or gs://."""
    data: DataPaths
    out: Path
    """Folder for the samples, a file each."""
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
    mesh = devices_for(settings.mesh, Workload.of(checkpoint, None, settings.rows, "main"))
    documents = open_documents(settings.checkpoint, settings.data, config)
    computed_in = compute_dtype(settings.compute_dtype)
    inputs = {
        "checkpoint": checkpoint.digest,
        "data": documents.corpus.digest,
        "computed_in": computed_in,
        **{name: getattr(settings, name) for name in ("state", "stored", "rows", "row_tokens")},
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    with as_place(settings.out / "lock").locked() as got:
        if not got:
            raise CaptureError(f"another process captures to {settings.out}; wait or end it")
        at = _begun(settings.out, inputs)
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
        return _capture(settings, checkpoint, model, mesh, packer, at)


def _check(settings: CaptureSettings) -> None:
    least = {"rows": 1, "row_tokens": 2}
    faults = too_small(settings, least)
    faults += [] if settings.data else ["--data is empty, needed at least one path"]
    if settings.out.parts[:1] == ("gs:",):
        faults.append(f"--out is {settings.out}, needed a path on this machine")
    if faults:
        raise SettingsError("settings that cannot be used", faults)


def _begun(out: Path, inputs: dict[str, Any]) -> Captured:
    """How far a capture to this folder is; CaptureError where it is another's."""
    file = out / PROGRESS_FILE
    if not file.is_file():
        if any(path.name != "lock" for path in out.iterdir()):
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
) -> Captured:
    graph, weights = nnx.split(model)
    post_norm = settings.state == "post_norm"

    def states(weights: nnx.State, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, weights)
        x_BTD, _ = model.residual(batch.tokens_BT, context_of(batch))
        return model.norm(x_BTD) if post_norm else x_BTD

    step, of_model = jax.jit(states), main_model_digest(checkpoint)
    with progress("capture", "batches") as report, on_mesh(mesh):
        for done, (batch, position) in enumerate(packer, start=1):
            states_BTD = np.asarray(jax.device_get(step(weights, spread(batch, mesh))))
            for content in _contents(batch, states_BTD):
                if not np.isfinite(content.states_TD.astype(np.float32)).all():
                    raise CaptureError(
                        "NaN or infinity in the main model's states; verify the checkpoint, or try "
                        "--compute-dtype float32"
                    )
                path = settings.out / f"sample-{at.samples:08}{SUFFIX}"
                write_sample(path, content, settings.state, of_model, settings.stored)
                tokens = at.tokens + len(content.token_ids)
                at = dataclasses.replace(at, samples=at.samples + 1, tokens=tokens)
            at = dataclasses.replace(at, position=position.to_json())
            _save(settings.out, at)
            report(done, None, f"{at.samples:,} samples, {at.tokens:,} tokens")
    at = dataclasses.replace(at, finished=True)
    _save(settings.out, at)
    return at


def _contents(batch: Batch, states_BTD: np.ndarray) -> list[Content]:
    """The documents of a batch's rows."""
    found = []
    for row, segments_T in enumerate(batch.segment_ids_BT):
        for segment in range(1, int(segments_T.max()) + 1):
            part = (row, segments_T == segment)
            tokens, mask = batch.tokens_BT[part], batch.loss_mask_BT[part]
            found.append(Content(tokens, mask, states_BTD[part]))
    return found


def _save(out: Path, at: Captured) -> None:
    text = json.dumps(dataclasses.asdict(at)) + "\n"
    as_place(out / PROGRESS_FILE).write_pieces([text.encode()])

"""Between a checkpoint directory and training: what can be trained, loaded so, and written back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from finetune.settings import ComputeDtype, TrainMode
from finetune.state import TRAINABLE, Split, TrainState
from mtp_model import ModelConfig
from mtp_model.checkpoint.directory import Checkpoint, CheckpointError, open_checkpoint
from mtp_model.checkpoint.writer import ChangedLeaf, write_derived
from mtp_model.load import cast_weights, checkpoint_config, load


def open_trainable(path: str) -> tuple[Checkpoint, ModelConfig]:
    """A checkpoint with a main model and MTP modules; CheckpointError says what it lacks."""
    checkpoint = open_checkpoint(path)
    config = checkpoint_config(checkpoint)
    scope = checkpoint.provenance["scope"]
    if scope != "all":
        raise CheckpointError(
            f"{path} was imported with --scope {scope}; main model and MTP modules are both "
            "needed: import it with --scope all"
        )
    if not config.num_nextn_predict_layers:
        raise CheckpointError(
            f"{path} has no MTP modules (num_nextn_predict_layers is 0): nothing to train or "
            "measure"
        )
    return checkpoint, config


def compute_dtype(choice: ComputeDtype) -> ComputeDtype:
    """The precision that `auto` stands for on this machine, else the choice itself."""
    if choice != "auto":
        return choice
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load_for_training(path: str, mode: TrainMode, dtype: str) -> Split:
    """The model with float32 trainable parameters; what is frozen stays as stored, FP8 too.

    An FP8 weight cannot move by less than its own rounding: trained ones are dequantised.
    """
    model = load(path, compute_dtype=dtype)
    cast_weights(model, jnp.float32, only=TRAINABLE[mode])
    return Split.of(model, mode)


def matrices(checkpoint: Checkpoint) -> frozenset[str]:
    """Paths of the leaves that stack matrices, not vectors: those that weight decay is for."""
    return frozenset(name for name, leaf in checkpoint.leaves.items() if len(leaf.tensor_shape) > 1)


def write_final(
    base: Checkpoint, final: Path, state: TrainState, record: Mapping[str, Any]
) -> Checkpoint:
    """Write a checkpoint directory with the trained leaves (float32) over those of `base`.

    All other leaves are hard links. record: goes into provenance.json.
    """
    trained = [*nnx.to_flat_state(state.trainable), *nnx.to_flat_state(state.biases)]
    changed = {".".join(map(str, path)): _changed(variable[...]) for path, variable in trained}
    return write_derived(base, final, changed, record)


def _changed(leaf: jax.Array) -> ChangedLeaf:
    def rows(index: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        # Indexed on the host: a slice of a sharded jax array can turn -0.0 into 0.0.
        return np.asarray(leaf)[index][start:stop]

    return ChangedLeaf(dtype=np.dtype(leaf.dtype), rows=rows)

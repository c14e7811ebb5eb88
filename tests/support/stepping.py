"""Three steps of training, alone, on a mesh or in a cluster, and how much two of them differ."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx
from imported import import_tiny
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from trained import SIZES

from finetune.data.packing import Batch
from finetune.devices import on_mesh, spread
from finetune.optimizer import make_optimizer
from finetune.planning.collectives import Sent, collectives_of
from finetune.settings import ObjectiveSettings, OptimizerSettings, RunSettings
from finetune.state import TrainState, make_train_step, start
from finetune.weights import load_for_training
from mtp_model import cluster

KINDS = {"mtp, FP8": ("mtp", "fp8"), "all, bf16": ("all", "bf16")}
# A moment's root is as nothing beside this epsilon: steps are as long as gradients, which Adam's
# own are not where gradients are of the size of rounding.
SMOOTH = {
    "objective": ObjectiveSettings(ce=0.5, kl=0.5),
    "optimizer": OptimizerSettings(learning_rate=0.3, epsilon=1.0, warmup_fraction=0.0),
}
STEPS = 3
TOLERANCE = 2e-6


def store(folder: Path) -> dict[str, Path]:
    """Checkpoints of 12 experts, whose one dense, one MoE and one MTP layer differ."""
    sizes = SIZES | {"num_attention_heads": 6, "num_key_value_heads": 6}
    return {
        dtype: import_tiny(folder / dtype, dtype=dtype, sizes=sizes) for dtype in ("fp8", "bf16")
    }


def make_batches() -> list[Batch]:
    """Packed rows of two documents and padding."""
    rng = np.random.default_rng(0)
    rows, length = 8, 12
    segments = np.tile(np.repeat(np.array([1, 2, 0], np.int32), [5, 5, 2]), (rows, 1))
    positions = np.tile(np.r_[0:5, 0:5, 0:2].astype(np.int32), (rows, 1))
    return [
        Batch(
            rng.integers(3, 300, (rows, length)).astype(np.int32),
            segments,
            positions,
            np.minimum(segments, 1),
        )
        for _ in range(STEPS)
    ]


def three_steps(settings: RunSettings, checkpoint: Path, batches: list[Batch], mesh=None):
    """Losses of the steps, and the trained leaves after them."""
    losses = []
    with on_mesh(mesh):
        step, state, frozen = _first_step(settings, checkpoint, mesh)
        for batch in batches:
            state, result = step(state, frozen, spread(batch, mesh))
            losses.append(float(result.loss))
    leaves = jax.tree_util.tree_leaves_with_path((state.trainable, state.biases))
    return np.array(losses), {jax.tree_util.keystr(path): _whole(x) for path, x in leaves}


def sent(settings: RunSettings, checkpoint: Path, batch: Batch, mesh: Mesh) -> dict[str, Sent]:
    """What devices send each other in a step."""
    with on_mesh(mesh):
        step, state, frozen = _first_step(settings, checkpoint, mesh)
        compiled = step.lower(state, frozen, spread(batch, mesh)).compile()
    return collectives_of(compiled.as_text() or "")


def _first_step(
    settings: RunSettings, checkpoint: Path, mesh: Mesh | None
) -> tuple[jax.stages.Wrapped, TrainState, nnx.State]:
    """What takes it, and the state and frozen weights that it takes."""
    optimizer = make_optimizer(settings.optimizer, 10, lambda _: True)
    split = load_for_training(str(checkpoint), settings.train, "float32", mesh=mesh)
    step = make_train_step(split.graphdef, optimizer, settings)
    return step, start(split, optimizer), split.frozen


def _whole(x: jax.Array) -> np.ndarray:
    if cluster.count() == 1:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def worst(got, want) -> float:
    """The largest relative difference of a loss, or of a leaf's largest value."""
    of_losses = np.abs(got[0] / want[0] - 1).max()
    of_leaves = [np.abs(got[1][n] - x).max() / np.abs(x).max() for n, x in want[1].items()]
    return max(of_losses, *of_leaves)

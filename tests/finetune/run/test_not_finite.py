"""NaN and infinity are named: in the weights that are loaded, in a step, and where in it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trained import QUIET

from finetune.data.packing import Batch
from finetune.optimizer import make_optimizer
from finetune.run.not_finite import cause, not_finite, raise_unless_finite
from finetune.settings import CheckpointSettings, EvaluationSettings, OptimizerSettings, RunSettings
from finetune.state import Split, StepResult, TrainState, make_train_step, start
from finetune.train import StoppedError, train
from finetune.weights import load_for_training
from mtp_model.checkpoint.directory import CheckpointError

EXPERTS = ("moe_layers", "mlp", "experts", "down_proj", "weight_scale_inv")


@pytest.fixture(scope="module")
def split(checkpoint: Path) -> Split:
    return load_for_training(str(checkpoint), "mtp", "float32")


@pytest.fixture(scope="module")
def batch() -> Batch:
    tokens = np.random.default_rng(0).integers(3, 300, (2, 32)).astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), tokens.shape)
    return Batch(tokens, ones, positions, ones)


@pytest.fixture(scope="module")
def step(split: Split, settings: RunSettings):
    """The compiled step: (state, frozen, batch) -> (state, result)."""
    optimizer = make_optimizer(settings.optimizer, 10, lambda _: True)
    return make_train_step(split.graphdef, optimizer, settings)


def harmed(part: nnx.State, path: tuple, value: float) -> nnx.State:
    """The same with one element of one leaf replaced."""
    flat = []
    for at, leaf in nnx.to_flat_state(part):
        old = leaf[...]
        new = old.at[(-1,) * old.ndim].set(value) if at == path else jnp.copy(old)
        flat.append((at, leaf.replace(new)))
    return nnx.from_flat_state(flat)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_loaded_weights_are_named(split: Split, value: float):
    raise_unless_finite(split, "CKPT")
    bad = split._replace(frozen=harmed(split.frozen, EXPERTS, value))
    with pytest.raises(CheckpointError) as caught:
        raise_unless_finite(bad, "CKPT")
    where = "moe_layers.mlp.experts.down_proj.weight_scale_inv[0]"
    assert str(caught.value).startswith(f"CKPT: NaN or infinity in {where}; nothing was trained.")
    assert "learning-rate" not in str(caught.value)


def test_fp8_weights_too(split: Split):
    weight = (*EXPERTS[:-1], "weight")
    assert not_finite(harmed(split.frozen, weight, np.nan)) == [".".join(weight) + "[0]"]


def test_training_says_so_before_the_first_step(
    settings: RunSettings, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And leaves a run that goes on with a checkpoint that is whole."""
    bad = split._replace(trainable=harmed(split.trainable, ("mtp", "enorm", "weight"), np.nan))
    run = dataclasses.replace(settings, out=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("finetune.train.load_for_training", lambda *_: bad)
        with pytest.raises(CheckpointError, match=r"infinity in mtp\.enorm\.weight\[0\]; nothing"):
            train(run, QUIET)
    assert not (run.out / "metrics.jsonl").exists()


# --- in a step


def stepped(step: Any, split: Split, state: TrainState, batch: Batch) -> str:
    """Why a step was not finite. It leaves the state as it was."""
    before = jax.device_get(state)
    after, result = step(state, split.frozen, batch)
    result: StepResult = jax.device_get(result)
    assert not (np.isfinite(result.loss) and np.isfinite(result.grad_norm))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)
    return cause(split, after, batch, result, 5)


def begun(split: Split, settings: RunSettings) -> TrainState:
    copied = split._replace(trainable=jax.tree.map(jnp.copy, split.trainable))
    copied = copied._replace(biases=jax.tree.map(jnp.copy, split.biases))
    return start(copied, make_optimizer(settings.optimizer, 10, lambda _: True))


@pytest.mark.parametrize(
    ("part", "path", "value", "words"),
    [
        ("trainable", ("mtp", "enorm", "weight"), np.nan, "infinity in mtp.enorm.weight[0];"),
        ("trainable", ("mtp", "eh_proj", "weight"), 3e38, "what the MTP module of depth 1 comp"),
        ("frozen", ("moe_layers", "input_layernorm", "weight"), 3e38, "what layer 1 computes is"),
        ("frozen", ("dense_layers", "input_layernorm", "weight"), 3e38, "what layer 0 computes is"),
        ("frozen", ("norm", "weight"), np.inf, "what the final norm computes is not"),
        ("frozen", ("lm_head", "weight"), np.inf, "the loss of the main model is not"),
    ],
)
def test_a_step_names_where_it_began(
    step: Any,
    split: Split,
    batch: Batch,
    settings: RunSettings,
    part: str,
    path: tuple,
    value: float,
    words: str,
):
    state = begun(split, settings)
    if part == "trainable":
        state = state._replace(trainable=harmed(state.trainable, path, value))
    else:
        split = split._replace(frozen=harmed(split.frozen, path, value))
    assert words in stepped(step, split, state, batch)


def test_a_gradient_is_named(step: Any, split: Split, batch: Batch, settings: RunSettings):
    """Where all that was computed forward is finite."""
    state = begun(split, settings)
    _, result = step(state, split.frozen, batch)
    result = jax.device_get(result)
    assert result.finite_grads.all()
    state = begun(split, settings)
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state.trainable)]
    bad = np.array([name != "mtp.hnorm.weight" for name in names])
    assert not bad.all()
    said = cause(split, state, batch, result._replace(finite_grads=bad), 5)
    assert "the gradient of mtp.hnorm.weight is not; try a lower" in said


def test_the_first_step_blames_the_checkpoint_not_the_rate(
    step: Any, split: Split, batch: Batch, settings: RunSettings
):
    path = ("moe_layers", "input_layernorm", "weight")
    split = split._replace(frozen=harmed(split.frozen, path, 3e38))
    state = begun(split, settings)
    after, result = step(state, split.frozen, batch)
    said = cause(split, after, batch, jax.device_get(result), 1)
    assert "verify the checkpoint" in said
    assert "learning-rate" not in said


def test_weights_that_an_update_broke_are_told_from_a_checkpoint_that_was(
    settings: RunSettings, tmp_path: Path
):
    broken = dataclasses.replace(
        settings,
        out=tmp_path / "run",
        optimizer=OptimizerSettings(learning_rate=1e38, warmup_fraction=0),
        checkpoints=CheckpointSettings(every=1),
        evaluation=EvaluationSettings(holdout_every=0),
    )
    with pytest.raises(StoppedError, match=r"step 2: loss nan, .* is kept in .*try a lower") as e:
        train(broken, QUIET)
    assert "; the checkpoint of step 1 is kept in" in str(e.value)
    never = dataclasses.replace(
        broken, out=tmp_path / "never", checkpoints=CheckpointSettings(every=99)
    )
    with pytest.raises(StoppedError, match=r"; there is no checkpoint yet\. ") as none_yet:
        train(never, QUIET)
    assert "is kept" not in str(none_yet.value)
    assert "all weights are finite" in str(e.value) or "the step before it left" in str(e.value)

"""The learning rate, what weight decay is for, and in which precision things are kept."""

import dataclasses
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from imported import import_tiny
from trained import QUIET, assert_same_result, read_rows, unfinished_copy

from finetune.data.packing import Batch
from finetune.optimizer import Halved, halve, join, joined, learning_rates, make_optimizer
from finetune.run.directory import RunError
from finetune.settings import CheckpointSettings, Kept, OptimizerSettings, RunSettings
from finetune.settings_file import read_yaml
from finetune.state import make_train_step, start
from finetune.train import Result, train
from finetune.weights import load_for_training, matrices
from mtp_model.checkpoint.directory import open_checkpoint


def test_learning_rate_warms_up_and_falls_to_its_last_value():
    settings = OptimizerSettings(learning_rate=2.0, warmup_fraction=0.25, final_fraction=0.1)
    rate = learning_rates(settings, steps=8)
    rates = [float(rate(step)) for step in range(1, 9)]
    assert rates[:2] == [1.0, 2.0]
    assert all(a > b for a, b in itertools.pairwise(rates[1:]))
    assert rates[-1] == pytest.approx(0.2)
    assert float(learning_rates(OptimizerSettings(warmup_fraction=0), 1)(1)) > 0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),
        ("constant", [0.5] + [1] * 9),
        ("wsd", [0.5] + [1] * 7 + [0.7, 0.2]),
        ("cosine", [0.5, 1, 0.96955, 0.88284, 0.75307, 0.6, 0.44693, 0.31716, 0.23045, 0.2]),
    ],
)
def test_schedules(schedule, expected):
    """By hand: two of ten steps up, eight down to a fifth."""
    settings = OptimizerSettings(
        learning_rate=1.0, warmup_fraction=0.2, final_fraction=0.2, schedule=schedule
    )
    rate = learning_rates(settings, steps=10)
    found = [float(rate(step)) for step in range(1, 11)]
    assert found == pytest.approx(expected, abs=1e-5)


def test_weight_decay_is_for_matrices_only(tmp_path):
    """With gradients of zero, decay is all that moves."""
    sizes = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    checkpoint = import_tiny(tmp_path, dtype="fp8", sizes=sizes, num_files=1)
    is_matrix = matrices(open_checkpoint(checkpoint))
    split = load_for_training(checkpoint, "mtp", "float32")
    settings = OptimizerSettings(learning_rate=0.1, warmup_fraction=0, weight_decay=0.5)
    optimizer = make_optimizer(settings, 10, is_matrix)

    @jax.jit
    def updates_of(trainable):
        zeros = jax.tree.map(jnp.zeros_like, trainable)
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(zeros, optimizer.init(trainable), trainable)[0]

    updates = updates_of(split.trainable)
    decayed = {
        ".".join(name) for name, leaf in nnx.to_flat_state(updates) if np.asarray(leaf[...]).any()
    }
    norms = {name for name in map(".".join, dict(nnx.to_flat_state(updates))) if "norm" in name}
    assert len(norms) == 7
    assert not decayed & norms
    assert decayed | norms == {".".join(name) for name in dict(nnx.to_flat_state(updates))}


def bit_patterns() -> np.ndarray:
    """Random float32 values of every size, and those between two bfloat16."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 100_000, dtype=np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    edges = np.array([0, 1 << 31, 0x8000, 0x7FFF, 0xFFFF, 0x3F80FFFF, 0x7F7F7FFF], np.uint32)
    values = np.concatenate([bits, ties[:1000], edges]).view(np.float32)
    return values[np.abs(values) < 3e38]


def test_halves_are_the_same_number():
    """The upper half is the nearest bfloat16, ties away from 0; nothing is lost."""
    values = bit_patterns()
    high, low = jax.jit(halve)(values)
    assert (high.dtype, low.dtype) == (jnp.bfloat16, jnp.int16)
    assert jax.jit(join)(high, low).tobytes() == values.tobytes()
    assert join(np.asarray(high), np.asarray(low), np).tobytes() == values.tobytes()
    nearest = values.astype(jnp.bfloat16)
    tie = (values.view(np.uint32) & 0xFFFF) == 0x8000
    assert (np.asarray(high)[~tie] == nearest[~tie]).all()
    assert (np.abs(np.asarray(high, np.float32)[tie]) > np.abs(values[tie])).all()
    assert np.asarray(high, np.float32).tobytes() != values.tobytes()  # negative control


def moved_by(settings: RunSettings, kept: Kept, batch: Batch) -> tuple[list[float], np.ndarray]:
    """Losses of two steps in bfloat16, no rounding left out, and how they moved the parameters."""
    run = dataclasses.replace(settings, compute_dtype="bfloat16")
    split = load_for_training(settings.checkpoint, "mtp", "bfloat16")
    before = jax.device_get(split.trainable)
    optimizer = make_optimizer(OptimizerSettings(learning_rate=2e-4), 10, lambda _: True)
    state = start(split, optimizer, kept)
    step = make_train_step(split.graphdef, optimizer, run).lower(state, split.frozen, batch)
    # XLA may otherwise compute with float32 parameters where it is told to round them.
    compiled = step.compile(compiler_options={"xla_allow_excess_precision": False})
    losses = []
    for _ in range(2):
        state, result = compiled(state, split.frozen, batch)
        losses.append(float(result.loss))
    after = state.trainable
    if isinstance(state.opt_state, Halved):
        after = joined(after, state.opt_state.low)
    pairs = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
    moved = [(np.asarray(new, np.float32) - old).reshape(-1) for new, old in pairs]
    return losses, np.concatenate(moved)


def test_steps_in_halves_are_the_steps(settings):
    """No part of a step is lost; with bfloat16 alone small ones are."""
    tokens = np.random.default_rng(0).integers(3, 300, (2, 16)).astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    batch = Batch(tokens, ones, positions, ones)
    (whole, expected), (in_halves, moved), (_, alone) = (
        moved_by(settings, kept, batch) for kept in ("float32", "halves", "bfloat16")
    )
    assert in_halves == pytest.approx(whole, rel=1e-6)
    length = np.linalg.norm(expected)
    assert np.linalg.norm(moved - expected) < 1e-3 * length
    assert np.linalg.norm(alone - expected) > 0.1 * length


KEPT = {"whole": {}, "short moments": {"moments": "bfloat16", "parameters": "halves"}}


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory) -> dict[str, Result]:
    """Short runs that compute in bfloat16, by how they keep what they train."""
    folder = tmp_path_factory.mktemp("kept")
    short = dataclasses.replace(settings, steps=4, compute_dtype="bfloat16")
    return {
        name: train(
            dataclasses.replace(
                short,
                out=folder / name,
                optimizer=dataclasses.replace(settings.optimizer, **kept, learning_rate=2e-4),
                checkpoints=CheckpointSettings(every=2),
            ),
            QUIET,
        )
        for name, kept in KEPT.items()
    }


def test_short_moments_are_nearly_the_run(trained):
    losses = {
        name: [row["loss"] for row in read_rows(result.run.metrics)]
        for name, result in trained.items()
    }
    assert losses["short moments"] != losses["whole"]
    np.testing.assert_allclose(losses["short moments"], losses["whole"], rtol=2e-3)


def test_what_is_kept_short_goes_on_bit_for_bit(trained, tmp_path):
    """From a checkpoint in the middle; and not with parameters kept otherwise."""
    whole = trained["short moments"]
    settings = read_yaml(whole.run.path / "config.yaml")
    copy = unfinished_copy(whole, settings, tmp_path / "again")
    shutil.rmtree(copy.out / "checkpoints" / "4")
    otherwise = dataclasses.replace(settings.optimizer, parameters="float32")
    with pytest.raises(RunError, match=r"--optimizer.parameters was halves, is now float32"):
        train(dataclasses.replace(copy, optimizer=otherwise), QUIET)
    assert_same_result(train(copy, QUIET).run.path, whole.run.path)

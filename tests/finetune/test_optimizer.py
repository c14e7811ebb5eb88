"""The learning rate, what weight decay is for, and in which precision things are kept."""

import dataclasses
import itertools
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from imported import import_tiny
from jax.sharding import NamedSharding, PartitionSpec
from trained import QUIET, assert_same_result, read_rows, unfinished_copy

from finetune.data.packing import Batch
from finetune.optimizer import (
    Halved,
    advance,
    averaged,
    halve,
    initial,
    join,
    joined,
    make_optimizer,
    steps_taken,
)
from finetune.run.checkpoints import Checkpoints
from finetune.run.directory import RunError
from finetune.run.learning_rate import learning_rates
from finetune.settings import (
    CheckpointSettings,
    EvaluationSettings,
    Kept,
    OptimizerSettings,
    RunSettings,
)
from finetune.settings_file import read_yaml
from finetune.state import as_served, make_train_step, start
from finetune.train import Result, train
from finetune.weights import load_for_training, matrices
from mtp_model import make_mesh
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.model import leaf_name


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
    # Programs of their own: where one rounds a gradient to bfloat16 the other way, the loss after
    # it differs by 1e-6, and 0.002 of what AdamW moves; what bfloat16 alone loses is 1.4.
    assert in_halves == pytest.approx(whole, rel=1e-5)
    length = np.linalg.norm(expected)
    assert np.linalg.norm(moved - expected) < 0.01 * length
    assert np.linalg.norm(alone - expected) > 0.1 * length


def updates_by(settings: OptimizerSettings, grads: list[np.ndarray]) -> np.ndarray:
    """How a stack of two projections is moved by the last of several gradients."""
    weight = nnx.State({"o_proj": {"weight": nnx.Param(jnp.asarray(grads[0]) * 0.1)}})
    optimizer = make_optimizer(settings, 10, lambda _: True)

    @jax.jit
    def after_all(weight, grads):
        state, updates = optimizer.init(weight), None
        for grad in grads:
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(grad, state, weight)
        return updates

    stacks = [jax.tree.map(lambda _, g=g: jnp.asarray(g), weight) for g in grads]
    return np.asarray(jax.tree.leaves(after_all(weight, stacks))[0])


@pytest.fixture
def two_gradients() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.normal(size=(2, 130, 192)).astype(np.float32) for _ in range(2)]


CONSTANT = {"learning_rate": 0.1, "warmup_fraction": 0.0, "schedule": "constant", "clip_norm": 1e9}


def test_adamw_is_optaxs(two_gradients):
    """Clipped and with weight decay, after a step that counts, one that does not, and another."""
    settings = OptimizerSettings(weight_decay=0.05, **(CONSTANT | {"clip_norm": 0.5}))
    optimizer = make_optimizer(settings, 10, lambda _: True)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(0.1, settings.beta1, settings.beta2, settings.epsilon, weight_decay=0.05),
    )
    weight = nnx.State({"o_proj": {"weight": nnx.Param(jnp.asarray(two_gradients[0]) * 0.1)}})
    wanted = jax.tree.leaves(weight)[0]
    state, their_state = optimizer.init(weight), theirs.init(wanted)
    for grad, counts in zip([*two_gradients, two_gradients[0]], [True, False, True], strict=True):
        before = weight, state
        grads = jax.tree.map(lambda _, grad=grad: jnp.asarray(grad), weight)
        weight, state = advance(optimizer, grads, state, weight, jnp.asarray(counts))
        if counts:
            with jax.numpy_dtype_promotion("standard"):
                updates, their_state = theirs.update(jnp.asarray(grad), their_state, wanted)
            wanted = wanted + updates
        else:
            for new, old in zip(*map(jax.tree.leaves, ((weight, state), before)), strict=True):
                np.testing.assert_array_equal(new, old)
        np.testing.assert_allclose(jax.tree.leaves(weight)[0], wanted, rtol=1e-6, atol=1e-7)
    assert steps_taken(state) == 2
    assert np.abs(wanted - two_gradients[0] * 0.1).max() > 0.1  # negative control: it moved


def test_a_step_on_cpu_copies_no_moment():
    """What it takes beside its arguments, which it writes its results over, is less than one."""
    weight = nnx.State({"o_proj": {"weight": nnx.Param(jnp.zeros((1024, 1536)))}})

    def temporary_bytes(optimizer, after) -> int:
        def step(weight, state, grads, counts):
            return after(optimizer, grads, state, weight, counts)

        jitted = jax.jit(step, donate_argnums=(0, 1))
        lowered = jitted.lower(weight, optimizer.init(weight), weight, jnp.asarray(True))
        used: Any = lowered.compile().memory_analysis()
        return used.temp_size_in_bytes

    def by_optax(optimizer, grads, state, weight, counts):
        updates, moved = optimizer.update(grads, state, weight)
        new = optax.apply_updates(weight, updates), moved
        return jax.tree.map(lambda x, y: jnp.where(counts, x, y), new, (weight, state))

    ours = make_optimizer(OptimizerSettings(), 10, lambda _: True)
    assert temporary_bytes(ours, advance) < 4 * 1024 * 1536
    with jax.numpy_dtype_promotion("standard"):  # negative control
        assert temporary_bytes(optax.adamw(0.1), by_optax) >= 2 * 4 * 1024 * 1536


def test_muon_is_torchs_on_each_matrix_of_a_stack(two_gradients):
    """In the first step: later optax corrects the mean for its beginning, and torch does not."""
    torch = pytest.importorskip("torch")
    settings = OptimizerSettings(name="muon", beta1=0.9, weight_decay=0.05, **CONSTANT)
    found = updates_by(settings, two_gradients[:1])
    wanted = np.zeros(0)
    for number in range(2):
        before = torch.tensor(two_gradients[0][number] * 0.1)
        weight = torch.nn.Parameter(before.clone())
        theirs = torch.optim.Muon(
            [weight], lr=0.1, weight_decay=0.05, momentum=0.9, adjust_lr_fn="match_rms_adamw"
        )
        weight.grad = torch.tensor(two_gradients[0][number])
        theirs.step()
        wanted = (weight.data - before).numpy()
        # torch iterates in bfloat16: two digits of each singular value.
        assert np.linalg.norm(found[number] - wanted) < 0.03 * np.linalg.norm(wanted)
    swapped = found[::-1]  # negative control
    assert np.linalg.norm(swapped[1] - wanted) > np.linalg.norm(wanted)


def test_adafactor_divides_by_the_means_of_rows_and_columns(two_gradients):
    """By its formula in float64 (arXiv 1804.04235, algorithm 4), without the parameter's scale."""
    settings = OptimizerSettings(name="adafactor", weight_decay=0.05, **CONSTANT)
    found = updates_by(settings, two_gradients)
    rows, columns, wanted = np.zeros((2, 130)), np.zeros((2, 192)), np.zeros(0)
    for step, grad in enumerate(np.float64(two_gradients), start=1):
        decay = 1 - step**-0.8
        rows = decay * rows + (1 - decay) * np.mean(grad**2, axis=2)
        columns = decay * columns + (1 - decay) * np.mean(grad**2, axis=1)
        second = rows[:, :, None] * columns[:, None, :] / rows.mean(axis=1)[:, None, None]
        wanted = grad / np.sqrt(second)
    wanted /= max(1.0, np.sqrt(np.mean(wanted**2)))
    wanted = -0.1 * (wanted + 0.05 * np.float64(two_gradients[0]) * 0.1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_moments_live_with_their_parameters(name):
    """On a mesh: those of a parameter's shape; what is narrower, and counts, on every device."""
    mesh, rng = make_mesh(expert=2, tensor=2, devices=jax.devices()[:4]), np.random.default_rng(0)
    shapes = {("norm", "weight"): (8,), ("mlp", "up_proj", "weight"): (2, 256, 128)}
    specs = {(8,): PartitionSpec("expert"), (2, 256, 128): PartitionSpec(None, "tensor", "expert")}
    trainable = nnx.from_flat_state(
        [
            (
                path,
                nnx.Param(
                    jax.device_put(
                        rng.normal(size=shape).astype(np.float32), NamedSharding(mesh, specs[shape])
                    )
                ),
            )
            for path, shape in shapes.items()
        ]
    )
    optimizer = make_optimizer(OptimizerSettings(name=name), 10, lambda _: True)
    _, state = initial(optimizer, trainable)
    leaves = jax.tree.leaves(state)
    for leaf in leaves:
        assert leaf.sharding.spec == specs.get(leaf.shape, PartitionSpec()), leaf.shape
    large = sum(leaf.shape == (2, 256, 128) for leaf in leaves)
    assert large == {"adamw": 2, "muon": 1, "adafactor": 0}[name]
    assert int(steps_taken(state)) == 0


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_weights_of_a_group_decay_as_if_all_did(name):
    """The longest end counts; what no end names decays as before, vectors not at all."""
    rng = np.random.default_rng(5)
    shapes = {
        ("mlp", "experts", "up_proj", "weight"): (2, 12, 10),
        ("mlp", "shared", "up_proj", "weight"): (8, 10),
        ("embed_tokens", "weight"): (14, 6),
        ("norm", "weight"): (6,),
    }

    def drawn() -> nnx.State:
        values = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
        return nnx.from_flat_state(
            [(path, nnx.Param(jnp.asarray(x))) for path, x in values.items()]
        )

    weights, grads = drawn(), drawn()

    def updates(decay: float, *groups: str) -> dict[tuple, np.ndarray]:
        settings = OptimizerSettings(
            name=name, weight_decay=decay, weight_decay_of=groups, **CONSTANT
        )
        optimizer = make_optimizer(settings, 10, lambda leaf: "norm" not in leaf)

        @jax.jit
        def first(weights, grads):
            with jax.numpy_dtype_promotion("standard"):
                return optimizer.update(grads, optimizer.init(weights), weights)[0]

        found = nnx.to_flat_state(first(weights, grads))
        return {path: np.asarray(leaf[...]) for path, leaf in found}

    grouped = updates(0.3, "up_proj=0.7", "experts.up_proj=0", "embed_tokens=0.3")
    for path, decay in zip(shapes, (0.0, 0.7, 0.3, 0.0), strict=True):
        np.testing.assert_allclose(grouped[path], updates(decay)[path], rtol=1e-5, atol=1e-7)
    experts = next(iter(shapes))
    assert np.abs(grouped[experts] - updates(0.7)[experts]).max() > 0.01  # negative control


def test_a_mean_of_the_parameters_is_kept():
    """By its formula in float64, with the decay that grows; what moves is moved as without it."""
    rng = np.random.default_rng(7)
    drawn = rng.normal(size=(5, 12, 10)).astype(np.float32)
    weight = nnx.State({"o_proj": {"weight": nnx.Param(jnp.asarray(drawn[0]))}})
    settings = OptimizerSettings(ema=0.25, **CONSTANT)

    @jax.jit
    def after_all(weight, grads, settings=settings):
        optimizer = make_optimizer(settings, 10, lambda _: True)
        state, passed = optimizer.init(weight), []
        for grad in grads:
            weight, state = advance(optimizer, grad, state, weight, jnp.asarray(True))
            passed.append(weight)
        return passed, averaged(state)

    grads = [jax.tree.map(lambda _, g=g: jnp.asarray(g), weight) for g in drawn[1:]]
    passed, mean = after_all(weight, grads)
    wanted = np.float64(drawn[0])
    for step, weights in enumerate(passed, start=1):
        decay = min(0.25, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * np.float64(jax.tree.leaves(weights)[0])
    np.testing.assert_allclose(jax.tree.leaves(mean)[0], wanted, rtol=1e-6, atol=1e-6)
    assert np.abs(wanted - jax.tree.leaves(passed[-1])[0]).max() > 1e-3  # negative control


KEPT = {
    "whole": {},
    "short moments": {"moments": "bfloat16", "parameters": "halves", "ema": 0.5},
    "muon": {"name": "muon", "moments": "bfloat16", "weight_decay_of": ("o_proj=0.5",)},
}


NOT_MEASURED = EvaluationSettings(holdout_every=0)


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
                batch=dataclasses.replace(settings.batch, accumulation=1 + (name == "muon")),
                # The others are compared with each other, and have to learn from the same text.
                evaluation=NOT_MEASURED if name == "muon" else settings.evaluation,
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


def test_the_mean_is_the_result(trained):
    """What `final/` has, and not the weights of the last step."""
    run = trained["short moments"].run
    settings = read_yaml(run.path / "config.yaml")
    split = load_for_training(settings.checkpoint, "mtp", "bfloat16")
    optimizer = make_optimizer(
        settings.optimizer, settings.steps, matrices(open_checkpoint(settings.checkpoint))
    )
    first = start(split, optimizer, settings.optimizer.parameters)
    kept = Checkpoints(run.checkpoints, settings.checkpoints)
    state = kept.restore(settings.steps, first)
    kept.close()
    final = open_checkpoint(run.final)
    for path, leaf in nnx.to_flat_state(as_served(state).trainable):
        value, stored = np.asarray(leaf[...]), final.leaves[leaf_name(path)]
        outer = value.ndim - len(stored.tensor_shape)
        for index in np.ndindex(value.shape[:outer]):
            written = final.read_rows(leaf_name(path), index, 0, value.shape[outer])
            np.testing.assert_array_equal(written, value[index])
    assert isinstance(state.opt_state, Halved)
    last = joined(state.trainable, state.opt_state.low)
    pairs = zip(*map(jax.tree.leaves, (last, as_served(state).trainable)), strict=True)
    apart = max(float(jnp.abs(new - mean).max()) for new, mean in pairs)
    assert apart > 1e-5


@pytest.mark.parametrize(
    ("name", "setting", "change"),
    [("short moments", "parameters", ("halves", "float32")), ("muon", "name", ("muon", "adamw"))],
)
def test_what_is_kept_short_goes_on_bit_for_bit(trained, tmp_path, name, setting, change):
    """From a checkpoint in the middle; and not with an optimizer that keeps something else."""
    whole = trained[name]
    settings = read_yaml(whole.run.path / "config.yaml")
    copy = unfinished_copy(whole, settings, tmp_path / "again")
    shutil.rmtree(copy.out / "checkpoints" / "4")
    was, now = change
    otherwise = dataclasses.replace(settings.optimizer, **{setting: now})
    with pytest.raises(RunError, match=rf"--optimizer.{setting} was {was}, is now {now}"):
        train(dataclasses.replace(copy, optimizer=otherwise), QUIET)
    assert_same_result(train(copy, QUIET).run.path, whole.run.path)

"""The state of training and one step of it: which weights move, and which stay as they are.

A training mode is a filter on the parameters. The gradient is taken with respect to those it
selects only: JAX then keeps no residuals of a frozen main model and runs no backward pass in it.
L layers, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from finetune.data.packing import Batch
from finetune.objective.acceptance import Rounds
from finetune.objective.head import Asked
from finetune.objective.losses import (
    ExpertLoad,
    Measured,
    TargetCounts,
    counts_of,
    main_nll,
    main_states,
    measure,
    targets_by_depth,
)
from finetune.objective.objectives import lambdas, objective, sums_of
from finetune.optimizer import (
    abstract_initial,
    advance,
    averaged,
    initial,
    norm_of,
    squares,
    steps_taken,
)
from finetune.settings import Kept, ObjectiveSettings, Part, RunSettings, TrainMode
from mtp_model import DeepSeekV3, RouterBias
from mtp_model.meshes import compiler_options
from mtp_model.sharding import BATCH_AXES, active_mesh, everywhere, placement

T = TypeVar("T")

_IN_MTP = nnx.PathContains("mtp")
TRAINABLE = {"mtp": nnx.All(nnx.Param, _IN_MTP), "all": nnx.Param, "lora": nnx.LoRAParam}
BALANCED = {"mtp": nnx.All(RouterBias, _IN_MTP), "all": RouterBias, "lora": nnx.Nothing()}


class TrainState(NamedTuple):
    """What changes from step to step; a checkpoint holds exactly this and the data position."""

    trainable: nnx.State  # parameters: float32, or bfloat16
    biases: nnx.State  # router biases of the trained layers
    opt_state: optax.OptState


class Split(NamedTuple):
    """A model taken apart: its structure, what training moves, what it doesn't."""

    graphdef: Any
    trainable: nnx.State
    biases: nnx.State
    frozen: nnx.State

    @classmethod
    def of(cls, model: DeepSeekV3, mode: TrainMode) -> "Split":
        return cls(*nnx.split(model, TRAINABLE[mode], BALANCED[mode], ...))


class StepResult(NamedTuple):
    """What a step measured, before its update."""

    loss: jax.Array  # float32 scalar
    grad_norm: jax.Array  # float32 scalar, before clipping
    measured: Measured
    finite_grads: jax.Array  # bool, one entry a trainable leaf: of the sum of its squares


def num_parameters(state: nnx.State) -> int:
    """Weights in a part of a model; router biases and scales are none."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.filter_state(state, nnx.Param)))


def start(
    split: Split, optimizer: optax.GradientTransformation, kept: Kept = "float32"
) -> TrainState:
    """The state before the first step."""
    trainable, opt_state = initial(optimizer, split.trainable, kept)
    return TrainState(trainable, split.biases, opt_state)


def as_served(state: TrainState) -> TrainState:
    """What is measured and written: the mean of the parameters, where one is kept."""
    mean = averaged(state.opt_state)
    return state if mean is None else TrainState(mean, state.biases, ())


def balance(biases: nnx.State, load: ExpertLoad, rate: float) -> nnx.State:
    """Router biases after one step of `bias += rate * sign(mean load - load)`, layer by layer.

    Source: DeepSeek-V3 report (arXiv 2412.19437) section 2.1.2. No gradient; float32.
    """
    loads = {"moe_layers": load.moe_layers_LE, "mtp": load.mtp_ME}

    def moved(path: tuple, bias: nnx.Variable) -> nnx.Variable:
        load_LE = loads[path[0]]
        mean_LE = jnp.mean(load_LE, axis=-1, keepdims=True)
        return bias.replace(bias[...] + rate * jnp.sign(mean_LE - load_LE))

    return nnx.map_state(moved, biases)


def asked_by(settings: RunSettings) -> Asked:
    """What a run measures of a batch: what its objective needs."""
    mixture = settings.objective.or_default(settings.part)
    return Asked(settings.draft_tokens or None, mixture.compares_distributions)


def make_train_step(
    graphdef: Any, optimizer: optax.GradientTransformation, settings: RunSettings
) -> jax.stages.Wrapped:
    """The jitted step: (state, frozen, batch) -> (state, what was measured); donates the state."""
    part, mixture = settings.part, settings.objective.or_default(settings.part)
    head_learns = part == "all" and not settings.detach_main
    asked = asked_by(settings)._replace(
        own_tokens=settings.draft_input == "own",
        head_learns=head_learns,
        learnt=() if head_learns else sums_of(mixture),
    )
    mtp_lambda = lambdas(settings)

    def step(state: TrainState, frozen: nnx.State, batch: Batch):
        mtp_weight = mtp_lambda(steps_taken(state.opt_state) + 1)

        def loss_of(trainable: nnx.State, rows: Batch, whole: TargetCounts | None):
            """Of some rows, sums over which are divided by the counts of the whole batch."""
            model = nnx.merge(graphdef, trainable, state.biases, frozen)
            main = main_states(model, rows)
            own_nll = None
            if part == "all" and settings.detach_main:
                own_nll = main_nll(model, rows, main)
                model = nnx.merge(graphdef, _held(trainable), state.biases, frozen)
            if part == "mtp" or settings.detach_main:  # no gradient enters the main model
                main = jax.lax.stop_gradient(main)
            measured, load, *_ = measure(model, rows, main, asked)
            loss = objective(measured, part, mixture, mtp_weight, own_nll, whole)
            return loss, (measured, load)

        config = nnx.merge(graphdef, state.trainable, state.biases, frozen).config
        depths = asked.num_draft_tokens or config.num_nextn_predict_layers
        gradient = jax.grad(loss_of, has_aux=True)
        grads, (measured, load) = _accumulated(
            lambda rows, whole: gradient(state.trainable, rows, whole),
            batch,
            settings.batch.accumulation,
            counts_of(targets_by_depth(batch, depths), asked),
        )
        loss = objective(measured, part, mixture, mtp_weight)
        sums = squares(grads)
        norm, finite_grads = norm_of(sums), jnp.isfinite(sums)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        # Without a target, or a finite loss, no weight, no moment and no router bias moves.
        counts = finite & jnp.any(_targets(measured, part, mixture) > 0)
        trainable, opt_state = advance(optimizer, grads, state.opt_state, state.trainable, counts)
        biases = balance(state.biases, load, settings.router_bias_rate)
        biases = jax.tree.map(lambda new, old: jnp.where(counts, new, old), biases, state.biases)
        result = StepResult(loss, norm, measured, finite_grads)
        return _placed((TrainState(trainable, biases, opt_state), result))

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())


def traced_step(
    split: Split, optimizer: optax.GradientTransformation, settings: RunSettings, batch: Batch
) -> tuple[TrainState, jax.stages.Traced]:
    """The step of `make_train_step` of parts without memory, and the state that it begins with."""
    kept = settings.optimizer.parameters
    trainable, opt_state = abstract_initial(optimizer, split.trainable, kept)
    state = TrainState(trainable, split.biases, opt_state)
    step = make_train_step(split.graphdef, optimizer, settings)
    return state, step.trace(state, split.frozen, batch)


def _widened(grad: jax.Array) -> jax.Array:
    """A gradient as float32, where it is used."""
    if grad.dtype == jnp.float32:
        return grad
    # XLA for TPU would widen it before its last reshape, into an array of its own.
    return jax.lax.optimization_barrier(grad).astype(jnp.float32)


def _accumulated(
    gradient: Callable[[Batch, TargetCounts | None], Any],
    batch: Batch,
    parts: int,
    whole: TargetCounts,
) -> tuple[nnx.State, tuple[Measured, ExpertLoad]]:
    """Float32 gradients and sums of a batch whose rows are computed in parts, one after another.

    Each device takes a part of its own rows at a time.
    """

    def of(
        rows: Batch, whole: TargetCounts | None
    ) -> tuple[nnx.State, tuple[Measured, ExpertLoad]]:
        grads, sums = gradient(rows, whole)
        return jax.tree.map(_widened, _placed(grads)), sums

    if parts == 1:
        return of(batch, None)
    split = jax.tree.map(lambda x: _in_parts(x, parts), batch)

    def add(total: Any, rows: Batch) -> tuple[Any, None]:
        return _placed(jax.tree.map(jnp.add, total, of(rows, whole))), None

    shapes = jax.eval_shape(lambda rows: of(rows, whole), jax.tree.map(lambda x: x[0], split))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, _placed(nothing), split)[0]


def _in_parts(x_BT: jax.Array, parts: int) -> jax.Array:
    """[parts, B / parts, T, ...], each with rows of every device that has rows."""
    rows = x_BT.shape[0]
    split = x_BT.reshape(rows // parts, parts, *x_BT.shape[1:]).swapaxes(0, 1)
    if active_mesh() is None:
        return split
    return jax.lax.with_sharding_constraint(split, PartitionSpec(None, BATCH_AXES))


def _held(trainable: nnx.State) -> nnx.State:
    """Parameters of which only those of the MTP modules have a gradient."""

    def held(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
        return leaf if path[0] == "mtp" else leaf.replace(jax.lax.stop_gradient(leaf[...]))

    return nnx.map_state(held, trainable)


def _targets(measured: Measured, part: Part, mixture: ObjectiveSettings) -> jax.Array:
    """Numbers of targets that the loss of what learns is a mean over, int32 [depths or 1]."""
    if part == "all":
        return measured.num_targets_K1
    return measured.num_anchors[None] if mixture.joins_depths else measured.num_targets_K1[1:]


def _placed(tree: T) -> T:
    """On a mesh: weights, and what has their shape, as they are stored; all else on each device.

    So a step's state is placed as the next step takes it, and each host has its results.
    """
    mesh = active_mesh()
    if mesh is None:
        return tree

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return jax.lax.with_sharding_constraint(leaf, everywhere(mesh))
        axes, value = leaf.get_metadata("out_sharding"), leaf.get_value()
        if not isinstance(value, jax.Array):  # of another optimizer's parameter
            return leaf
        narrower = value.ndim != len(axes)  # what an optimizer keeps of rows or columns
        where = everywhere(mesh) if narrower else placement(axes, value.shape, mesh)
        return leaf.replace(jax.lax.with_sharding_constraint(value, where))

    return jax.tree.map(placed, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def make_measure_step(
    graphdef: Any, asked: Asked
) -> Callable[[nnx.State, nnx.State, nnx.State, Batch], tuple[Measured, Rounds]]:
    """The jitted measurement without gradients, of (trainable, biases, frozen, batch)."""

    def step(trainable: nnx.State, biases: nnx.State, frozen: nnx.State, batch: Batch):
        model = nnx.merge(graphdef, trainable, biases, frozen)
        main = main_states(model, batch)
        found = measure(model, batch, main, asked)
        return _placed((found.measured, found.rounds))

    return jax.jit(step, compiler_options=compiler_options())

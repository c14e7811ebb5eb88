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

from finetune.data.packing import Batch
from finetune.objective.acceptance import Rounds
from finetune.objective.losses import Asked, ExpertLoad, Measured, context_of, main_loss, measure
from finetune.objective.objectives import lambdas, objective
from finetune.optimizer import advance, initial, steps_taken
from finetune.settings import Kept, Part, RunSettings, TrainMode
from mtp_model import DeepSeekV3, RouterBias
from mtp_model.sharding import active_mesh, everywhere, placement

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
    finite_grads: jax.Array  # bool, one entry a trainable leaf


def num_parameters(state: nnx.State) -> int:
    """Weights in a part of a model; router biases and scales are none."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.filter_state(state, nnx.Param)))


def start(
    split: Split, optimizer: optax.GradientTransformation, kept: Kept = "float32"
) -> TrainState:
    """The state before the first step."""
    trainable, opt_state = initial(optimizer, split.trainable, kept)
    return TrainState(trainable, split.biases, opt_state)


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
    asked = asked_by(settings)._replace(own_tokens=settings.draft_input == "own")
    mtp_lambda = lambdas(settings)

    def step(state: TrainState, frozen: nnx.State, batch: Batch):
        def loss_of(trainable: nnx.State):
            model = nnx.merge(graphdef, trainable, state.biases, frozen)
            main = model.main(batch.tokens_BT, context_of(batch))
            own_loss = None
            if part == "all" and settings.detach_main:
                own_loss = main_loss(model, batch, main)
                model = nnx.merge(graphdef, _held(trainable), state.biases, frozen)
            if part == "mtp" or settings.detach_main:  # no gradient enters the main model
                main = jax.lax.stop_gradient(main)
            measured, load, *_ = measure(model, batch, main, asked)
            weight = mtp_lambda(steps_taken(state.opt_state) + 1)
            loss = objective(measured, part, mixture, weight, own_loss)
            return loss, (measured, load)

        grad_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (measured, load)), grads = grad_of(state.trainable)
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), _placed(grads))
        trainable, opt_state = advance(optimizer, grads, state.opt_state, state.trainable)
        biases = balance(state.biases, load, settings.router_bias_rate)
        moved = TrainState(trainable, biases, opt_state)
        norm = optax.tree.norm(grads)
        finite_grads = jnp.stack([jnp.isfinite(grad).all() for grad in jax.tree.leaves(grads)])
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        learnt = jnp.any(_targets(measured, part) > 0)
        result = StepResult(loss, norm, measured, finite_grads)
        return _placed((_where(learnt & finite, moved, state), result))

    return jax.jit(step, donate_argnums=0)


def _held(trainable: nnx.State) -> nnx.State:
    """Parameters of which only those of the MTP modules have a gradient."""

    def held(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
        return leaf if path[0] == "mtp" else leaf.replace(jax.lax.stop_gradient(leaf[...]))

    return nnx.map_state(held, trainable)


def _targets(measured: Measured, part: Part) -> jax.Array:
    """Numbers of targets that the loss of what learns is a mean over, int32 [depths]."""
    return measured.num_targets_K1[1:] if part == "mtp" else measured.num_targets_K1


def _where(good: jax.Array, moved: TrainState, state: TrainState) -> TrainState:
    """What a step leaves: without a target, or a finite loss, nothing moves.

    That is no weight, no moment and no router bias.
    """
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, state)


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
        where = placement(leaf.get_metadata("out_sharding"), leaf.shape, mesh)
        return leaf.replace(jax.lax.with_sharding_constraint(leaf[...], where))

    return jax.tree.map(placed, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def make_measure_step(
    graphdef: Any, asked: Asked
) -> Callable[[nnx.State, nnx.State, nnx.State, Batch], tuple[Measured, Rounds]]:
    """The jitted measurement without gradients, of (trainable, biases, frozen, batch)."""

    def step(trainable: nnx.State, biases: nnx.State, frozen: nnx.State, batch: Batch):
        model = nnx.merge(graphdef, trainable, biases, frozen)
        main = model.main(batch.tokens_BT, context_of(batch))
        found = measure(model, batch, main, asked)
        return _placed((found.measured, found.rounds))

    return jax.jit(step)

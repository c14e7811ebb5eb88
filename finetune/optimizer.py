"""The optimizer of a run: learning rate, AdamW, and where its moments are placed."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding

from finetune.settings import OptimizerSettings
from mtp_model.model import leaf_name
from mtp_model.sharding import everywhere


def learning_rates(settings: OptimizerSettings, steps: int) -> Callable[[Any], Any]:
    """Learning rate of a step (counted from 1): linear up to the highest, then a cosine down.

    The last step has `final_fraction` of the highest.
    """
    warmup = math.ceil(settings.warmup_fraction * steps)
    falling = max(steps - warmup, 1)
    low = settings.final_fraction

    def rate(step):
        rising = step / max(warmup, 1)
        progress = jnp.clip((step - warmup) / falling, 0.0, 1.0)
        fallen = low + (1.0 - low) * 0.5 * (1.0 + jnp.cos(math.pi * progress))
        return settings.learning_rate * jnp.where(step < warmup, rising, fallen)

    return rate


def make_optimizer(
    settings: OptimizerSettings, steps: int, is_matrix: Callable[[str], bool]
) -> optax.GradientTransformation:
    """AdamW after clipping; weight decay on the leaves whose path `is_matrix` accepts."""
    rate = learning_rates(settings, steps)

    def decayed(trainable: nnx.State) -> nnx.State:
        return nnx.map_state(lambda path, _: is_matrix(leaf_name(path)), trainable)

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            lambda count: rate(count + 1),
            b1=settings.beta1,
            b2=settings.beta2,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            mask=decayed,
        ),
    )


def steps_taken(opt_state: optax.OptState) -> jax.Array:
    """Steps that moved the weights so far, int32: what the learning rate follows."""

    def is_of_the_rate(path: tuple, _: Any) -> bool:
        return getattr(path[-1], "tuple_name", None) == "ScaleByScheduleState"

    return optax.tree.get(opt_state, "count", filtering=is_of_the_rate)


def initial(optimizer: optax.GradientTransformation, trainable: nnx.State) -> optax.OptState:
    """The optimizer's state before the first step; moments are placed as their parameters are."""
    placements = _placements(jax.eval_shape(optimizer.init, trainable), trainable)
    return jax.jit(optimizer.init, out_shardings=placements)(trainable)


def abstract_initial(
    optimizer: optax.GradientTransformation, trainable: nnx.State
) -> optax.OptState:
    """The same without memory, of parameters without memory."""
    shapes = jax.eval_shape(optimizer.init, trainable)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        _placements(shapes, trainable),
    )


def _placements(opt_state: optax.OptState, trainable: nnx.State) -> optax.OptState:
    """Where each leaf lives: a moment with its parameter, a count of steps on every device.

    Left to JAX, the first step's state would be placed otherwise than the second's, and the step
    would be compiled twice.
    """
    of_parameters = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    of_counts = jax.tree.leaves(of_parameters)[0]
    if isinstance(of_counts, NamedSharding):
        of_counts = everywhere(of_counts.mesh)

    def is_moments(node: Any) -> bool:
        return isinstance(node, nnx.State)

    return jax.tree.map(
        lambda node: of_parameters if is_moments(node) else of_counts,
        opt_state,
        is_leaf=is_moments,
    )

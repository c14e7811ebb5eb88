"""The optimizer of a run: weight decay, and how parameters and moments are kept."""

import itertools
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.tree_util import DictKey

from finetune.run.learning_rate import learning_rates
from finetune.settings import Kept, OptimizerSettings
from mtp_model.lora import named_by
from mtp_model.model import leaf_name
from mtp_model.sharding import everywhere

T = TypeVar("T")


def make_optimizer(
    settings: OptimizerSettings, steps: int, is_matrix: Callable[[str], bool]
) -> optax.GradientTransformation:
    """The optimizer after clipping; weight decay on the leaves whose path `is_matrix` accepts,
    unless the settings say another one for a leaf.
    """
    rate = learning_rates(settings, steps)

    def moved_by(settings: OptimizerSettings, decayed: Any) -> optax.GradientTransformation:
        return _OPTIMIZERS[settings.name](settings, lambda count: rate(count + 1), decayed)

    def of_leaves(value_of: Callable[[str], Any]) -> Callable[[nnx.State], nnx.State]:
        return lambda state: nnx.map_state(lambda path, _: value_of(leaf_name(path)), state)

    if groups := decay_groups(settings):

        def group_of(name: str) -> float:
            return groups.get(group(name, groups), settings.weight_decay * is_matrix(name))

        values = {settings.weight_decay, 0.0, *groups.values()}
        by_value = {value: replace(settings, weight_decay=value) for value in values}
        every: dict[Hashable, Any] = {
            str(value): moved_by(each, None) for value, each in by_value.items()
        }
        found = optax.partition(every, of_leaves(lambda name: str(group_of(name))))
    else:
        found = moved_by(settings, of_leaves(is_matrix))
    if settings.moments == "bfloat16":
        found = _with_short_moments(found)
    means = [_averaging(settings.ema)] if settings.ema else []
    return optax.chain(_clip(settings.clip_norm), found, *means)


def squares(grads: Any) -> jax.Array:
    """The sum of each leaf's squares, float32 [leaves]."""
    return jnp.stack([jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)])


def norm_of(sums: jax.Array) -> jax.Array:
    """The norm of all leaves together, of the sums of their squares."""
    return jnp.sqrt(jnp.sum(sums))


def _clip(longest: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` as one factor: its quotient takes a loop of its own on CPUs."""

    def clipped(updates: Any, params: Any) -> Any:
        del params
        norm = norm_of(squares(updates))
        short, factor = norm < longest, longest / norm
        # Multiplied by 1, all gradients would be there a second time: XLA for TPU.
        return jax.tree.map(lambda grad: jnp.where(short, grad, grad * factor), updates)

    return optax.stateless(clipped)


def decay_groups(settings: OptimizerSettings) -> dict[str, float]:
    """Weight decays by the end of what a weight's path names; ValueError of what is no number."""
    pairs = (each.rpartition("=") for each in settings.weight_decay_of)
    return {name: float(value) for name, _, value in pairs}


def group(name: str, ends: Iterable[str]) -> str:
    """The end that a leaf's owner has, the longest where they are several; "" where it has none."""
    owner = name.rpartition(".")[0]
    return max((end for end in ends if named_by([end], [owner])[end]), key=len, default="")


class Averaged(NamedTuple):
    """The optimizer's last state where a mean of the parameters is kept."""

    steps: jax.Array  # that are in it, int32
    ema: Any  # as the parameters, float32


def _averaging(decay: float) -> optax.GradientTransformation:
    """Moves nothing: keeps a mean of the parameters, in which the last steps count most, at first
    all the more, as in tf.train.ExponentialMovingAverage: a short run's would be its beginning.
    """

    def init(params: Any) -> Averaged:
        # Copied: the step gives the memory of its parameters to the next ones.
        return Averaged(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Averaged]:
        steps = state.steps + 1
        weight = 1 - jnp.minimum(decay, (1 + steps) / (10 + steps))
        moved = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda old, new: old + weight * (new - old), state.ema, moved)
        return updates, Averaged(steps, mean)

    return optax.GradientTransformation(init, update)


def averaged(opt_state: Any) -> nnx.State | None:
    """The mean of the parameters, float32, where one is kept."""
    inner: Any = opt_state.optimizer if isinstance(opt_state, Halved) else opt_state
    last = inner[-1]
    return last.ema if isinstance(last, Averaged) else None


class _Moments(optax.ScaleByAdamState):
    """Those of Adam, as they stay: of a step that does not count, those before it."""


def _scale_by_adam(settings: OptimizerSettings) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, whose updates are on CPUs made of the moments that the step leaves.

    Made of those of a step that may not count, as on TPUs, where it takes less memory, they need
    the moments before it too: XLA for CPU, where a loop writes one array, copies them all.
    """
    b1, b2, epsilon = settings.beta1, settings.beta2, settings.epsilon
    adam = optax.scale_by_adam(b1, b2, epsilon)

    def init(params: Any) -> _Moments:
        begun: Any = adam.init(params)
        return _Moments(*begun)

    def update(
        updates: Any, state: Any, params: Any = None, *, counts: Any = True, **_: Any
    ) -> tuple[Any, _Moments]:
        del params
        moved: Any = adam.update(updates, state)[1]
        moved = _Moments(*moved)
        kept = jax.tree.map(lambda x, y: jnp.where(counts, x, y), moved, state)
        of = jax.lax.platform_dependent(kept, moved, cpu=lambda x, _: x, default=lambda _, x: x)
        mean: Any = optax.tree.bias_correction(of.mu, b1, of.count)
        square: Any = optax.tree.bias_correction(of.nu, b2, of.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mean, square), kept

    return optax.GradientTransformationExtraArgs(init, update)


def _adamw(settings: OptimizerSettings, rate: Any, decayed: Any) -> optax.GradientTransformation:
    """`optax.adamw`."""
    return optax.chain(
        _scale_by_adam(settings),
        optax.add_decayed_weights(settings.weight_decay, decayed),
        optax.scale_by_learning_rate(rate),
    )


def _muon(settings: OptimizerSettings, rate: Any, decayed: Any) -> optax.GradientTransformation:
    """Each matrix of a stack for itself, with updates as large as AdamW's (arXiv 2502.16982)."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)

    def dimensions(trainable: Any) -> Any:
        return nnx.map_state(lambda path, _: matrix if _is_projection(path) else None, trainable)

    return optax.contrib.muon(
        rate,
        beta=settings.beta1,
        weight_decay=settings.weight_decay,
        weight_decay_mask=decayed,
        adam_b1=settings.beta1,
        adam_b2=settings.beta2,
        adam_weight_decay=settings.weight_decay,
        muon_weight_dimension_numbers=dimensions,  # pyright: ignore[reportArgumentType]
        consistent_rms=_RMS_OF_ADAMW,
    )


def _adafactor(settings: OptimizerSettings, rate: Any, decayed: Any) -> Any:
    """Without a mean of the gradient; steps are not scaled by the size of what they move."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(settings.weight_decay, decayed),
        optax.scale_by_learning_rate(rate),
    )


_RMS_OF_ADAMW = 0.2
_OPTIMIZERS: dict[str, Callable[[OptimizerSettings, Any, Any], Any]] = {
    "adamw": _adamw,
    "muon": _muon,
    "adafactor": _adafactor,
}


def _with_short_moments(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, its moments bfloat16 between steps and float32 in them."""
    with_more = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> optax.OptState:
        return _cast_floats(optimizer.init(params), jnp.bfloat16)

    def update(
        updates: Any, state: optax.OptState, params: Any = None, **more: Any
    ) -> tuple[Any, Any]:
        whole = _cast_floats(state, jnp.float32)
        updates, state = with_more.update(updates, whole, params, **more)
        return updates, _cast_floats(state, jnp.bfloat16)

    return optax.GradientTransformationExtraArgs(init, update)


def _cast_floats(tree: T, dtype: Any) -> T:
    """What belongs to parameters, as another float; counts and constants stay."""

    def cast(path: tuple, leaf: Any) -> Any:
        is_moment = _parameter(path) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if is_moment else leaf

    return jax.tree_util.tree_map_with_path(cast, tree)


def _parameter(path: tuple) -> tuple:
    """The path of the parameter that a leaf of an optimizer's state belongs to; () of none."""
    within = itertools.dropwhile(lambda key: not isinstance(key, DictKey), reversed(path))
    names = itertools.takewhile(lambda key: isinstance(key, DictKey), within)
    return tuple(key.key for key in names)[::-1]


def steps_taken(opt_state: optax.OptState) -> jax.Array:
    """Steps that moved the weights so far, int32: what the learning rate follows."""

    def is_of_the_rate(path: tuple, _: Any) -> bool:
        return getattr(path[-1], "tuple_name", None) == "ScaleByScheduleState"

    counts = optax.tree.get_all_with_path(opt_state, "count", filtering=is_of_the_rate)
    return counts[0][1]  # where there are two, of muon and adamw, both count all steps


class Halved(NamedTuple):
    """The optimizer's state where parameters are kept in halves."""

    optimizer: optax.OptState  # of the whole parameters
    low: nnx.State  # int16, of the parameters that are kept in halves


def _is_projection(path: tuple) -> bool:
    """Whether a step uses the leaf in the dtype that it computes in and no other: projections.

    Norms are small; routers are used in float32; of embedding and head, gradients add up in the
    dtype that they are kept in.
    """
    return path[-1] == "weight" and str(path[-2]).endswith("_proj")


def halve(whole: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A float32 array as bfloat16, ties rounded away from 0, and the int16 that is missing."""
    bits = jax.lax.bitcast_convert_type(whole, jnp.uint32)
    high = (bits + jnp.uint32(0x8000)) >> jnp.uint32(16)
    low = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.int16)
    return jax.lax.bitcast_convert_type(high.astype(jnp.uint16), jnp.bfloat16), low


def join(high: Any, low: Any, numbers: Any = jnp) -> Any:
    """The float32 array that was halved, by jax.numpy or numpy."""
    upper = high.view(numbers.uint16).astype(numbers.uint32)
    lower = low.view(numbers.uint16).astype(numbers.uint32)
    # Bits were carried over to the upper half where the lower has its highest bit set.
    upper = upper - (lower >> numbers.uint32(15))
    return ((upper << numbers.uint32(16)) | lower).view(numbers.float32)


def halved(trainable: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Float32 parameters with projections in bfloat16, and what these are missing."""
    high, low = [], []
    for path, leaf in nnx.to_flat_state(trainable):
        if _is_projection(path):
            upper, lower = halve(leaf[...])
            low.append((path, leaf.replace(lower)))
            leaf = leaf.replace(upper)
        high.append((path, leaf))
    return nnx.from_flat_state(high), nnx.from_flat_state(low)


def joined(trainable: nnx.State, low: nnx.State) -> nnx.State:
    """Float32 parameters from halves."""
    lower = dict(nnx.to_flat_state(low))
    return nnx.from_flat_state(
        [
            (path, leaf.replace(join(leaf[...], lower[path][...])) if path in lower else leaf)
            for path, leaf in nnx.to_flat_state(trainable)
        ]
    )


def advance(
    optimizer: optax.GradientTransformation,
    grads: nnx.State,
    opt_state: Any,
    trainable: nnx.State,
    counts: jax.Array,
) -> tuple[nnx.State, optax.OptState]:
    """Parameters and the optimizer's state after a step, each kept as it was.

    counts: bool; without it nothing moves.
    """
    in_halves = isinstance(opt_state, Halved)
    whole = joined(trainable, opt_state.low) if in_halves else _cast_floats(trainable, jnp.float32)
    inner = opt_state.optimizer if in_halves else opt_state
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its int32 count with floats
        update = optax.with_extra_args_support(optimizer).update
        updates, inner = update(grads, inner, whole, counts=counts)
    moved = cast(nnx.State, optax.apply_updates(whole, updates))
    if in_halves:
        high, low = halved(moved)
        found = high, Halved(inner, low)
    else:
        found = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, trainable), inner

    def kept(new: Any, old: Any) -> Any:
        return new if isinstance(new, _Moments) else jnp.where(counts, new, old)

    return jax.tree.map(
        kept, found, (trainable, opt_state), is_leaf=lambda node: isinstance(node, _Moments)
    )


def initial(
    optimizer: optax.GradientTransformation, trainable: nnx.State, kept: Kept = "float32"
) -> tuple[nnx.State, optax.OptState]:
    """Parameters and the optimizer's state before the first step, moments placed as parameters are.

    trainable: float32; of those that are kept otherwise the memory is freed.
    """
    placements = _placements(jax.eval_shape(optimizer.init, trainable), trainable)
    state = jax.jit(optimizer.init, out_shardings=placements)(trainable)
    if kept == "float32":
        return trainable, state
    high, low = halved(trainable)
    for path, leaf in nnx.to_flat_state(trainable):
        if _is_projection(path):
            leaf[...].delete()
    return high, _as_kept(state, low, kept)


def abstract_initial(
    optimizer: optax.GradientTransformation, trainable: nnx.State, kept: Kept = "float32"
) -> tuple[nnx.State, optax.OptState]:
    """The same without memory, of parameters without memory."""
    shapes = jax.eval_shape(optimizer.init, trainable)
    state = jax.tree.map(_described, shapes, _placements(shapes, trainable))
    if kept == "float32":
        return trainable, state
    where = {path: leaf.get_value().sharding for path, leaf in nnx.to_flat_state(trainable)}

    def placed(part: nnx.State) -> nnx.State:
        return nnx.map_state(
            lambda path, leaf: leaf.replace(_described(leaf.get_value(), where[path])), part
        )

    high, low = map(placed, jax.eval_shape(halved, trainable))
    return high, _as_kept(state, low, kept)


def _as_kept(state: optax.OptState, low: nnx.State, kept: Kept) -> optax.OptState:
    return Halved(state, low) if kept == "halves" else state


def _described(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _placements(opt_state: optax.OptState, trainable: nnx.State) -> optax.OptState:
    """Where each leaf lives: a moment with its parameter; counts, and what is narrower than its
    parameter, on every device.

    Left to JAX, the first step's state would be placed otherwise than the second's, and the step
    would be compiled twice.
    """
    leaves = {
        _parameter(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)
    }
    elsewhere: Any = jax.tree.leaves(trainable)[0].sharding
    if isinstance(elsewhere, NamedSharding):
        elsewhere = everywhere(elsewhere.mesh)

    def place(path: tuple, leaf: Any) -> Any:
        owner = leaves.get(_parameter(path))
        return elsewhere if owner is None or owner.shape != leaf.shape else owner.sharding

    return jax.tree_util.tree_map_with_path(place, opt_state)

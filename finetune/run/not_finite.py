"""Where NaN or infinity is: in which weight, in what a layer computed, or in which gradient."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from finetune.data.packing import Batch
from finetune.objective.losses import context_of, main_states
from finetune.state import Split, StepResult, TrainState
from mtp_model import DeepSeekV3
from mtp_model.block import DecoderLayer, take_layer
from mtp_model.checkpoint.directory import CheckpointError
from mtp_model.narrow import scan_parts

_NAMED = 3  # leaves in a message
_LOWER = "try a lower --optimizer.learning-rate or --optimizer.clip-norm with another --out"


def raise_unless_finite(split: Split, checkpoint: str) -> None:
    """CheckpointError with the names of loaded weights that hold NaN or infinity."""
    bad = not_finite((split.trainable, split.biases, split.frozen))
    if bad:
        raise CheckpointError(
            f"{checkpoint}: NaN or infinity in {_named(bad)}; nothing was trained. Its files are "
            "damaged, or it was trained to this: import it again, or take another; `convert-"
            "deepseek verify SOURCE CHECKPOINT` compares it with what it was imported from"
        )


def cause(split: Split, state: TrainState, batch: Batch, result: StepResult, step: int) -> str:
    """Why a step's loss or gradient is not finite, and what to do, in a sentence or two.

    state: as it was before the step, which is how the step leaves it then.
    """
    if bad := not_finite(state):
        return f"the step before it left NaN or infinity in {_named(bad)}; {_LOWER}"
    model = nnx.merge(split.graphdef, state.trainable, state.biases, split.frozen)
    if layer := _first_layer(model, batch):
        first = "the loaded weights are finite, but what they compute is not: verify the checkpoint"
        advice = f"{first}, or try --compute-dtype float32" if step == 1 else _LOWER
        return f"all weights are finite, what {layer} computes is not; {advice}"
    if (heads := np.flatnonzero(~np.isfinite(result.measured.nll_sum_K1))).size:
        of = f"MTP depth {heads[0]}" if heads[0] else "the main model"
        return f"all weights and hidden states are finite, the loss of {of} is not; {_LOWER}"
    names = _names(state.trainable)
    finite = np.asarray(result.finite_grads)
    if bad := [name for name, good in zip(names, finite, strict=True) if not good]:
        where = f"the gradient of {_named(bad)} is not"
        return f"all weights and what the layers compute are finite, {where}; {_LOWER}"
    return f"all weights and gradients are finite, their sum is not; {_LOWER}"


def not_finite(tree: Any) -> list[str]:
    """Names of the leaves that hold NaN or infinity, with the first place in them that does."""
    bad = jax.device_get(_bad_rows_of(_floats(tree)))
    return [
        f"{name}[{rows.argmax()}]" if rows.ndim else name
        for name, rows in zip(_names(tree), bad, strict=True)
        if rows.any()
    ]


def _floats(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _names(tree: Any) -> list[str]:
    """Paths of the leaves of floating point, without what wraps them."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            moment = [key.name for key in path if getattr(key, "name", "") in ("mu", "nu")]
            found.append(".".join(map(str, (*names, *(f"(moment {name})" for name in moment)))))
    return found


@jax.jit
def _bad_rows_of(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_bad_rows(leaf) for leaf in leaves]


def _bad_rows(leaf: jax.Array) -> jax.Array:
    """Which entries of the first dimension (the layers, in a stack) hold a bad value."""
    if not leaf.ndim:
        return ~jnp.isfinite(leaf)
    return scan_parts(lambda _, part: (None, ~jnp.isfinite(part).all()), None, leaf)[1]


def _first_layer(model: DeepSeekV3, batch: Batch) -> str | None:
    """The first part of the network that computes NaN or infinity from this batch."""
    context = context_of(batch)
    run = jax.jit(lambda layer, x_BTD, context: layer(x_BTD, context)[0])
    x_BTD = model.embed_tokens.lookup(jnp.asarray(batch.tokens_BT), model.compute_dtype)
    if _is_bad(x_BTD):
        return "the embedding"
    computed = () if batch.states is not None else _layers(model)  # else captured
    for number, layer in enumerate(computed):
        x_BTD = run(layer, x_BTD, context)
        if _is_bad(x_BTD):
            return f"layer {number}"
    main = jax.jit(main_states)(model, batch)
    if _is_bad(main.hidden_BTD):
        return "the final norm"
    depths = jax.jit(DeepSeekV3.draft)(model, main.state_BTD, batch.tokens_BT, context).hidden
    bad = [depth for depth, hidden_BTD in enumerate(depths, start=1) if _is_bad(hidden_BTD)]
    return f"the MTP module of depth {bad[0]}" if bad else None


def _layers(model: DeepSeekV3) -> Iterator[DecoderLayer]:
    """The main model's layers, from the first on."""
    if model.config.num_dense_layers:
        yield from (take_layer(model.dense_layers, i) for i in range(model.config.num_dense_layers))
    if model.config.num_moe_layers:
        yield from (take_layer(model.moe_layers, i) for i in range(model.config.num_moe_layers))


def _is_bad(x_BTD: jax.Array) -> bool:
    return not bool(jnp.isfinite(x_BTD).all())


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

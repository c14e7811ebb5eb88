"""Decoding token by token: the caches of attention, and the parts of the network that use them.

A cache holds one latent vector a token (MLA), in the slot of the token's position. What is fed
later overwrites what was drafted and refused, so a slot beyond a row's position is never seen.
B batch, T tokens fed at a time, S slots, D hidden, C kv-lora, R rotary size, L layers, M modules.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtp_model.block import DecoderLayer, take_layer
from mtp_model.context import Context, LatentCache
from mtp_model.model import DeepSeekV3
from mtp_model.mtp import MultiTokenPredictor
from mtp_model.narrow import scan_parts
from mtp_model.sharding import spread_batch


class Caches(NamedTuple):
    """Of every layer, stacked as the layers are; None for a stack that the model lacks."""

    dense_layers: LatentCache | None  # [L, B, S, ...]
    moe_layers: LatentCache | None
    mtp: LatentCache | None  # [M, B, S, ...]


def spread_caches(caches: Caches) -> Caches:
    """The caches with the texts of each device of a mesh on that device."""
    return jax.tree.map(partial(spread_batch, dim=1), caches)


class Fed(NamedTuple):
    """What the main model made of the tokens it was fed."""

    hidden_BTD: Float[Array, "B T D"]  # after model.norm: what the head reads
    state_BTD: Float[Array, "B T D"]  # what MTP depth 1 is fed
    caches: Caches


class Drafted(NamedTuple):
    """What an MTP module made of the rows it was fed."""

    state_BTD: Float[Array, "B T D"]  # after shared_head.norm: the head and the next step read it
    caches: Caches


def empty_caches(model: DeepSeekV3, rows: int, slots: int) -> Caches:
    """Caches for `rows` texts of at most `slots` tokens each."""
    config = model.config

    def of(count: int) -> LatentCache | None:
        if not count:
            return None
        sizes = (config.kv_lora_rank, config.qk_rope_head_dim)
        shapes = ((count, rows, slots, size) for size in sizes)
        return LatentCache(*(jnp.zeros(shape, model.compute_dtype) for shape in shapes))

    modules = 0 if model.scope == "main" else config.num_nextn_predict_layers
    return Caches(of(config.num_dense_layers), of(config.num_moe_layers), of(modules))


def feed(
    model: DeepSeekV3,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    caches: Caches,
) -> Fed:
    """Run the main model on the next tokens of each text, at `positions`, which are their slots."""
    x_BTD = model.embed(tokens_BT)
    context = _context(positions_BT)
    dense = moe = None
    if caches.dense_layers is not None:
        x_BTD, dense = _run_stack(model.dense_layers, x_BTD, context, caches.dense_layers)
    if caches.moe_layers is not None:
        x_BTD, moe = _run_stack(model.moe_layers, x_BTD, context, caches.moe_layers)
    return Fed(*model.main_states(x_BTD), Caches(dense, moe, caches.mtp))


def draft(
    model: DeepSeekV3,
    state_BTD: Float[Array, "B T D"],
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    caches: Caches,
    module: int = 0,
    slots_BT: Int[Array, "B T"] | None = None,
) -> Drafted:
    """Run an MTP module on states and the tokens after them.

    state: of the main model for text that is verified, of the module's last step within a round.
    positions: of the states; a later step of a round goes on behind them.
    slots: of the module's cache, where they are not the positions: when it is one of several, a
        module's later uses in a round stand so many positions apart, with no key between them.
    """
    assert caches.mtp is not None
    predictor: MultiTokenPredictor = take_layer(model.mtp, module)
    here = jax.tree.map(lambda leaf: leaf[module], caches.mtp)
    context = _context(positions_BT)._replace(cache=here, slots_BT=slots_BT)
    step = predictor(state_BTD, model.embed(tokens_BT), context)
    mtp = jax.tree.map(lambda leaf, new: leaf.at[module].set(new), caches.mtp, step.new)
    return Drafted(step.state_BTD, caches._replace(mtp=mtp))


def _context(positions_BT: Int[Array, "B T"]) -> Context:
    ones_BT = jnp.ones_like(positions_BT)
    return Context(ones_BT, positions_BT, ones_BT)


def _run_stack(layers: DecoderLayer, x_BTD, context: Context, caches: LatentCache):
    """Stacked layers one after the other; returns the residual stream and the caches."""

    def step(x_BTD, layer_and_cache):
        layer, cache = layer_and_cache
        out = layer(x_BTD, context._replace(cache=cache))
        return out.x_BTD, out.new

    return scan_parts(step, x_BTD, (layers, caches))

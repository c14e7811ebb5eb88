"""What a layer is told about the tokens of a batch besides their states, as one value.

B batch, T position, N heads, H head size of keys, G of values.
S slots of a cache, C kv-lora, R rotary size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Ids = Int[Array | np.ndarray, "B T"]  # tokens, segments or positions, of JAX or numpy


class KeysValues(NamedTuple):
    """What one run of attention lets later tokens see."""

    k_BTNH: Float[Array, "B T N H"]
    v_BTNG: Float[Array, "B T N G"]


class EarlierUses(NamedTuple):
    """What an MTP module that drafts more than once in a round sees of its earlier uses.

    first: of its first use, in every row; a row sees those up to itself, as a decoder's cache of
    the text holds them. chain: of its later uses; a row sees its own, of its own round, only.
    """

    first: KeysValues
    chain: tuple[KeysValues, ...]


class LatentCache(NamedTuple):
    """What a decoder keeps of a text for one layer: what keys and values are made of.

    Slot s is of position s, but for drafts of several modules.
    """

    latent_BSC: Float[Array, "*stack B S C"]  # after kv_a_layernorm
    rope_BSR: Float[Array, "*stack B S R"]  # the rotated part of the key, which all heads share


class Context(NamedTuple):
    """Which document each token belongs to, where it stands there, and whether it counts."""

    segment_ids_BT: Int[Array, "B T"]  # tokens attend within their segment; 0 is padding
    positions_BT: Int[Array, "B T"]  # for the rotary embedding
    counted_BT: Int[Array, "B T"]  # 1 where the token counts as load of the experts it chose
    earlier: EarlierUses | None = None  # attended instead of the other rows of this run
    cache: LatentCache | None = None  # attended instead, with these rows written to their slots
    slots_BT: Int[Array, "B T"] | None = None  # of the cache, where they are not the positions


def make_context(segment_ids_BT: Ids, positions_BT: Ids | None = None) -> Context:
    """The context of packed rows: all tokens count but padding.

    positions: by default from 0 in every document.
    """
    segment_ids_BT = jnp.asarray(segment_ids_BT)
    if positions_BT is None:
        positions_BT = _positions_in_segments(segment_ids_BT)
    counted_BT = (segment_ids_BT != 0).astype(jnp.int32)
    return Context(segment_ids_BT, jnp.asarray(positions_BT), counted_BT)


def _positions_in_segments(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0, 1, 2, ... from the start of each run of equal segment ids."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    starts_BT = jnp.pad(
        segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], [(0, 0), (1, 0)], constant_values=True
    )
    start_BT = jnp.where(starts_BT, index_T[None], 0)
    return index_T[None] - jax.lax.cummax(start_BT, axis=1)

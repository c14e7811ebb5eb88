"""Multi-head latent attention (MLA), computed for a chunk of queries at a time.

Source: DeepSeek-V3 report (arXiv 2412.19437) section 2.1.1.
B batch, T position, S key position, D hidden, N heads, H head size, C kv-lora, R rotary size.
"""

import itertools
from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtp_model.config import ModelConfig
from mtp_model.context import Context, KeysValues, LatentCache
from mtp_model.layers import Linear, RMSNorm
from mtp_model.products import product
from mtp_model.rope import rotate, softmax_scale
from mtp_model.sharding import axis_size, rows_here

Tree = TypeVar("Tree")

QUERY_CHUNK = 256  # scores exist for this many queries at a time: [B, N, 256, S] float32
SCORES_BYTES = 64 << 20  # of one device at a time, about; above it heads take turns
PARTS = 4  # of a sequence, whose queries see different numbers of keys: 5/8 of all scores
KEPT_SCORES_BYTES = 64 << 20  # a layer's float32 scores up to this are kept for the backward pass


def keeps_scores(rows: int, length: int, num_heads: int) -> bool:
    """Whether a layer's scores [B, N, T, T] are kept for the backward pass, on one device."""
    return 4 * rows_here(rows) * num_heads * length**2 <= KEPT_SCORES_BYTES


def turns_of_heads(rows: int, length: int, num_heads: int) -> int:
    """In how many groups, one after the other, heads attend."""
    if axis_size("tensor") > 1:  # which splits them already
        return 1
    chunk = min(QUERY_CHUNK, length)
    wanted = 4 * rows_here(rows) * num_heads * chunk * length / SCORES_BYTES
    turns = (turns for turns in range(1, num_heads) if num_heads % turns == 0)
    return next((each for each in turns if each >= wanted), num_heads)


def _attend_chunk(q_BNTH, keys: KeysValues, own: KeysValues | None, places, scale):
    """Attention of one chunk of queries over all keys [B, N, S, H], and over each query's own.

    own: [B, T, J, N, H], keys that one query sees and no other; places: which document each query
    and each key belongs to, and the rows of the sequence that the queries are.
    """
    segments_BT, key_segments_BS, rows_T = places
    scores = product("bnth,bnsh->bnts", q_BNTH, keys[0], dtype=jnp.float32)
    same = segments_BT[:, :, None] == key_segments_BS[:, None, :]
    causal = rows_T[:, None] >= jnp.arange(key_segments_BS.shape[1])[None, :]
    scores = jnp.where((same & causal[None])[:, None], scores * scale, -jnp.inf)
    if own is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(q_BNTH.dtype)
        return product("bnts,bnsg->btng", weights, keys[1])
    own_scores = product("bnth,btjnh->bntj", q_BNTH, own[0], dtype=jnp.float32)
    both = jnp.concatenate([scores, own_scores * scale], axis=-1)
    weights = jax.nn.softmax(both, axis=-1).astype(q_BNTH.dtype)
    of_keys, of_own = jnp.split(weights, [scores.shape[-1]], axis=-1)
    return product("bnts,bnsg->btng", of_keys, keys[1]) + product(
        "bntj,btjng->btng", of_own, own[1]
    )


def attend(
    q_BTNH: Float[Array, "B T N H"],
    new: KeysValues,
    context: Context,
    scale: float,
) -> Float[Array, "B T N G"]:
    """Causal attention within segments; scores are multiplied by `scale`.

    new: keys and values of the same rows as the queries. With `context.earlier` a row sees those
    of its own row only, and what earlier uses of the module left for it.

    Every layer attends through this function: another way to compute attention is chosen here.
    Queries go chunk by chunk and each chunk's scores are recomputed in the backward pass, so
    that [T, T] never exists, unless all of it is small. A row attends at least to itself, padding
    too: no NaN.
    """
    shared, own = new, None
    if context.earlier is not None:
        shared = context.earlier.first
        own = jax.tree.map(lambda *each: jnp.stack(each, axis=2), *context.earlier.chain, new)
    turns = turns_of_heads(*q_BTNH.shape[:3])

    def of_heads(heads):
        q_BTNH, shared, own = heads
        return _attend_heads(q_BTNH, shared, own, context.segment_ids_BT, scale)

    def in_turns(x):  # [..., N, size]
        return jnp.moveaxis(x.reshape(*x.shape[:-2], turns, -1, x.shape[-1]), -3, 0)

    if not keeps_scores(*q_BTNH.shape[:3]):
        # Of a turn is kept what goes in: keys of each part would be 2.5 times all keys.
        of_heads = jax.checkpoint(of_heads)
    heads = q_BTNH, shared, own
    if turns == 1:
        return of_heads(heads)
    out = jnp.moveaxis(jax.lax.map(of_heads, jax.tree.map(in_turns, heads)), 0, 2)
    return out.reshape(*q_BTNH.shape[:3], -1)


def _attend_heads(
    q_BTNH, shared: KeysValues, own: KeysValues | None, segment_ids_BT, scale
) -> Float[Array, "B T N G"]:
    length = q_BTNH.shape[1]
    chunk = min(QUERY_CHUNK, length)
    count = -(-length // chunk)
    missing = count * chunk - length

    def to_whole_chunks(x):
        return jnp.concatenate([x, jnp.repeat(x[:, -1:], missing, axis=1)], axis=1)

    def in_chunks(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def attend_part(queries, seen_keys: KeysValues, seen_segments) -> Float[Array, "B part N G"]:
        """Some chunks in a row, of which no query sees a key behind the last one."""

        def attend_chunk(chunk_of):
            q, own_of, segments, rows_1T = chunk_of
            places = (segments, seen_segments, rows_1T[0])
            return _attend_chunk(q.swapaxes(1, 2), seen_keys, own_of, places, scale)

        if not keeps_scores(q_BTNH.shape[0], length, q_BTNH.shape[2]):
            attend_chunk = jax.checkpoint(attend_chunk)
        out = jnp.moveaxis(jax.lax.map(attend_chunk, jax.tree.map(in_chunks, queries)), 0, 1)
        return out.reshape(out.shape[0], -1, *out.shape[3:])

    # Heads first, once for all chunks: on CPU the products are up to twice as fast.
    keys = KeysValues(*(x.swapaxes(1, 2) for x in shared))
    rows_1T = jnp.arange(length)[None]
    queries = q_BTNH, own, segment_ids_BT, rows_1T
    queries = jax.tree.map(to_whole_chunks, queries) if missing else queries
    parts = min(count, PARTS)
    ends = [chunk * (count * part // parts) for part in range(1, parts)]
    seen = _all_up_to(keys, ends, 2), _all_up_to(segment_ids_BT, ends, 1)
    out = map(attend_part, _split(queries, ends, 1), *seen)
    return jnp.concatenate([*out], axis=1)[:, :length]


def _split(tree: Tree, ends: list[int], axis: int) -> Iterator[Tree]:
    """Parts of arrays. Their gradient is put together, where that of slices would be padded to the
    whole and added up."""
    leaves, form = jax.tree.flatten(tree)
    parts = (jnp.split(leaf, ends, axis) for leaf in leaves)
    return (jax.tree.unflatten(form, part) for part in zip(*parts, strict=True))


def _all_up_to(tree: Tree, ends: list[int], axis: int) -> Iterator[Tree]:
    """The same parts, each with all before it."""

    def join(first: Tree, second: Tree) -> Tree:
        return jax.tree.map(lambda *each: jnp.concatenate(each, axis), first, second)

    return itertools.accumulate(_split(tree, ends, axis), join)


class MultiHeadLatentAttention(nnx.Module):
    """MLA with low-rank queries (or plain ones where `q_lora_rank` is null)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = self.config = config
        hidden, heads = c.hidden_size, c.num_attention_heads
        up = ("heads_of_lora", "lora")
        if c.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * c.qk_head_dim, ("heads", "hidden"), c, rngs)
        else:
            self.q_a_proj = Linear(hidden, c.q_lora_rank, ("lora", "hidden"), c, rngs)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, c)
            self.q_b_proj = Linear(c.q_lora_rank, heads * c.qk_head_dim, up, c, rngs)
        latent = c.kv_lora_rank + c.qk_rope_head_dim
        self.kv_a_proj_with_mqa = Linear(hidden, latent, ("lora", "hidden"), c, rngs)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c)
        expanded = heads * (c.qk_nope_head_dim + c.v_head_dim)
        self.kv_b_proj = Linear(c.kv_lora_rank, expanded, up, c, rngs)
        self.o_proj = Linear(heads * c.v_head_dim, hidden, ("hidden", "heads"), c, rngs)

    def _queries(self, x_BTD, positions_BT):
        """The part without and the part with rotation, [B, T, N, ...] each."""
        c = self.config
        if c.q_lora_rank is None:
            q = self.q_proj(x_BTD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q_BTNH = q.reshape(*q.shape[:2], c.num_attention_heads, c.qk_head_dim)
        nope, rope = jnp.split(q_BTNH, [c.qk_nope_head_dim], axis=-1)
        return nope, rotate(rope, positions_BT, c)

    def _latents(self, x_BTD, positions_BT) -> LatentCache:
        """What keys and values are made of, [B, T, ...]."""
        c = self.config
        latent, rope_BTR = jnp.split(self.kv_a_proj_with_mqa(x_BTD), [c.kv_lora_rank], axis=-1)
        rope_BTR = rotate(rope_BTR[:, :, None], positions_BT, c)[:, :, 0]  # one head, of all
        return LatentCache(self.kv_a_layernorm(latent), rope_BTR)

    def _keys_values(self, latents: LatentCache) -> KeysValues:
        c = self.config
        kv = self.kv_b_proj(latents.latent_BSC)
        kv_BTNH = kv.reshape(*kv.shape[:2], c.num_attention_heads, -1)
        k_nope, v_BTNG = jnp.split(kv_BTNH, [c.qk_nope_head_dim], axis=-1)
        rope_shape = (*k_nope.shape[:3], c.qk_rope_head_dim)
        k_rope = jnp.broadcast_to(latents.rope_BSR[:, :, None], rope_shape)
        return KeysValues(jnp.concatenate([k_nope, k_rope], axis=-1), v_BTNG)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: Context,
    ) -> tuple[Float[Array, "B T D"], KeysValues | LatentCache]:
        """The output, and the keys and values of these rows, or the cache with them in it."""
        nope, rope = self._queries(x_BTD, context.positions_BT)
        latents = self._latents(x_BTD, context.positions_BT)
        if context.cache is not None:
            slots_BT = context.positions_BT if context.slots_BT is None else context.slots_BT
            new = _written(context.cache, latents, slots_BT)
            out_BTNG = self._attend_cache(nope, rope, new, slots_BT)
        else:
            new = self._keys_values(latents)
            q_BTNH = jnp.concatenate([nope, rope], axis=-1)
            out_BTNG = attend(q_BTNH, new, context, softmax_scale(self.config))
        return self.o_proj(out_BTNG.reshape(*out_BTNG.shape[:2], -1)), new

    def _attend_cache(
        self, nope_BTNH, rope_BTNR, cache: LatentCache, slots_BT
    ) -> Float[Array, "B T N G"]:
        """Attention over slots up to each query's own, in the latent space.

        kv_b_proj goes to the queries and the output instead of to all slots: q (W c) = (q W) c.
        Source: DeepSeek-V2 report (arXiv 2405.04434) section 2.1.2.
        """
        c = self.config
        up = self.kv_b_proj.dense(nope_BTNH.dtype)
        up_NHC = up.reshape(c.num_attention_heads, -1, c.kv_lora_rank)
        w_k_NHC, w_v_NGC = jnp.split(up_NHC, [c.qk_nope_head_dim], axis=1)
        latent_BSC, rope_BSR = cache
        q_BTNC = product("btnh,nhc->btnc", nope_BTNH, w_k_NHC)
        scores = product("btnc,bsc->bnts", q_BTNC, latent_BSC, dtype=jnp.float32) + product(
            "btnr,bsr->bnts", rope_BTNR, rope_BSR, dtype=jnp.float32
        )
        slots_S = jnp.arange(latent_BSC.shape[1])
        seen_BTS = slots_S[None, None] <= slots_BT[:, :, None]
        scores = jnp.where(seen_BTS[:, None], scores * softmax_scale(c), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(latent_BSC.dtype)
        of_latent = product("bnts,bsc->btnc", weights, latent_BSC)
        return product("btnc,ngc->btng", of_latent, w_v_NGC)


def _written(cache: LatentCache, latents: LatentCache, slots_BT) -> LatentCache:
    """The cache with rows in their slots, those beyond the last slot dropped."""
    row_B1 = jnp.arange(slots_BT.shape[0])[:, None]

    def write(slots, rows):
        return slots.at[row_B1, slots_BT].set(rows.astype(slots.dtype), mode="drop")

    return LatentCache(*map(write, cache, latents))

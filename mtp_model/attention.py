"""Multi-head latent attention (MLA), computed for a chunk of queries at a time.

Source: DeepSeek-V3 report (arXiv 2412.19437) section 2.1.1.
B batch, T position, S key position, D hidden, N heads, H head size, C kv-lora, R rotary size.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtp_model.config import ModelConfig
from mtp_model.context import Context
from mtp_model.layers import Linear, RMSNorm
from mtp_model.rope import rotate, softmax_scale

QUERY_CHUNK = 512  # scores exist for this many queries at a time: [B, N, 512, S] float32


def _attend_chunk(q_BNTH, k_BNSH, v_BNSG, query_segments_BT, key_segments_BS, rows_T, scale):
    """Attention of one chunk of queries (rows `rows_T` of the sequence) over all keys."""
    scores = jnp.einsum("bnth,bnsh->bnts", q_BNTH, k_BNSH, preferred_element_type=jnp.float32)
    scores = scores * scale
    same = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    causal = rows_T[:, None] >= jnp.arange(k_BNSH.shape[2])[None, :]
    allowed = (same & causal[None])[:, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1).astype(v_BNSG.dtype)
    return jnp.einsum("bnts,bnsg->btng", weights, v_BNSG)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BTNH: Float[Array, "B T N H"],
    v_BTNG: Float[Array, "B T N G"],
    context: Context,
    scale: float,
) -> Float[Array, "B T N G"]:
    """Causal attention within segments; scores are multiplied by `scale`.

    Every layer attends through this function: another way to compute attention is chosen here.
    Queries go chunk by chunk and each chunk's scores are recomputed in the backward pass, so
    that [T, T] never exists. A row attends at least to itself, padding too: no NaN.
    """
    segment_ids_BT = context.segment_ids_BT
    length = q_BTNH.shape[1]
    chunk = min(QUERY_CHUNK, length)
    count = -(-length // chunk)

    def in_chunks(x):
        padding = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2)
        split = jnp.pad(x, padding, mode="edge").reshape(x.shape[0], count, chunk, *x.shape[2:])
        return jnp.moveaxis(split, 1, 0)

    # Heads first, once for all chunks: on CPU the products are up to twice as fast.
    k_BNTH, v_BNTG = k_BTNH.swapaxes(1, 2), v_BTNG.swapaxes(1, 2)
    rows = jnp.minimum(jnp.arange(count * chunk), length - 1).reshape(count, chunk)
    chunks = (in_chunks(q_BTNH), in_chunks(segment_ids_BT), rows)

    @jax.checkpoint
    def attend_chunk(chunk_of):
        q, segments, rows_T = chunk_of
        q = q.swapaxes(1, 2)
        return _attend_chunk(q, k_BNTH, v_BNTG, segments, segment_ids_BT, rows_T, scale)

    if count == 1:
        return attend_chunk(jax.tree.map(lambda x: x[0], chunks))
    out = jnp.moveaxis(jax.lax.map(attend_chunk, chunks), 0, 1)
    return out.reshape(out.shape[0], count * chunk, *out.shape[3:])[:, :length]


class MultiHeadLatentAttention(nnx.Module):
    """MLA with low-rank queries (or plain ones where `q_lora_rank` is null)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = self.config = config
        hidden, heads = c.hidden_size, c.num_attention_heads
        up = ("heads", "lora")
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
        c = self.config
        if c.q_lora_rank is None:
            q = self.q_proj(x_BTD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q_BTNH = q.reshape(*q.shape[:2], c.num_attention_heads, c.qk_head_dim)
        nope, rope = jnp.split(q_BTNH, [c.qk_nope_head_dim], axis=-1)
        return jnp.concatenate([nope, rotate(rope, positions_BT, c)], axis=-1)

    def _keys_values(self, x_BTD, positions_BT):
        c = self.config
        latent, k_rope_BTR = jnp.split(self.kv_a_proj_with_mqa(x_BTD), [c.kv_lora_rank], axis=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))
        kv_BTNH = kv.reshape(*kv.shape[:2], c.num_attention_heads, -1)
        k_nope, v_BTNG = jnp.split(kv_BTNH, [c.qk_nope_head_dim], axis=-1)
        k_rope = rotate(k_rope_BTR[:, :, None], positions_BT, c)  # one head, shared by all
        k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:3], c.qk_rope_head_dim))
        return jnp.concatenate([k_nope, k_rope], axis=-1), v_BTNG

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: Context,
    ) -> Float[Array, "B T D"]:
        q_BTNH = self._queries(x_BTD, context.positions_BT)
        k_BTNH, v_BTNG = self._keys_values(x_BTD, context.positions_BT)
        out_BTNG = attend(q_BTNH, k_BTNH, v_BTNG, context, softmax_scale(self.config))
        return self.o_proj(out_BTNG.reshape(*out_BTNG.shape[:2], -1))

"""The Multi-Token Prediction modules: each drafts one token further.

Source: DeepSeek-V3 report (arXiv 2412.19437) section 2.2. The concatenation is embedding first,
as the released weights need (equation 21 prints the reverse). B batch, T position, D hidden.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from mtp_model.block import DecoderLayer
from mtp_model.config import ModelConfig
from mtp_model.context import Context, KeysValues, LatentCache
from mtp_model.layers import Linear, RMSNorm


class SharedHead(nnx.Module):
    """The norm before the shared output head: a weight of its own, not `model.norm`."""

    def __init__(self, config: ModelConfig):
        self.norm = RMSNorm(config.hidden_size, config)


class Shifted(NamedTuple):
    """Tokens `k` places further on, within their document."""

    tokens_BT: Int[Array, "B T"]
    inside_BT: Int[Array, "B T"]


def shift_left(x_BT: Shaped[Array, "B T"], k: int, fill: int) -> Shaped[Array, "B T"]:
    """x[i + k], `fill` past the end."""
    return jnp.pad(x_BT[:, k:], [(0, 0), (0, min(k, x_BT.shape[1]))], constant_values=fill)


def shift_within_segments(
    tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"], k: int
) -> Shifted:
    """t[i + k] where i + k is in the document of i; elsewhere token 0, not `inside`."""
    inside_BT = shift_left(segment_ids_BT, k, -1) == segment_ids_BT
    shifted_BT = shift_left(tokens_BT, k, 0)
    tokens = jnp.where(inside_BT, shifted_BT, jnp.zeros((), shifted_BT.dtype))
    return Shifted(tokens, inside_BT & (segment_ids_BT != 0))


class DraftStep(NamedTuple):
    """What one run of an MTP module gives."""

    state_BTD: Float[Array, "B T D"]  # h_k, which the head reads and the next depth is fed
    expert_load_E: Float[Array, "E"]
    new: KeysValues | LatentCache  # for a later use of the module in the same round


class MultiTokenPredictor(nnx.Module):
    """One MTP module (or a stack of them): h_k[i] from h_{k-1}[i] and the embedding of t[i+k]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.enorm = RMSNorm(hidden, config)
        self.hnorm = RMSNorm(hidden, config)
        self.eh_proj = Linear(2 * hidden, hidden, ("hidden", None), config, rngs, quantised=False)
        self.block = DecoderLayer(config, rngs, moe=True)
        self.shared_head = SharedHead(config)

    def __call__(
        self,
        state_BTD: Float[Array, "B T D"],
        e_BTD: Float[Array, "B T D"],
        context: Context,
        remat: bool = False,
    ) -> DraftStep:
        pair = [self.enorm(e_BTD), self.hnorm(state_BTD)]
        x_BTD = self.eh_proj(jnp.concatenate(pair, axis=-1))  # embedding first
        y_BTD, load_E, new = self.block(x_BTD, context, remat)
        return DraftStep(self.shared_head.norm(y_BTD), load_E, new)

"""The decoder layer, and stacks of them run by one scan."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtp_model.attention import MultiHeadLatentAttention
from mtp_model.config import ModelConfig
from mtp_model.context import Context, KeysValues, LatentCache
from mtp_model.layers import RMSNorm
from mtp_model.moe import FeedForward, MixtureOfExperts
from mtp_model.narrow import scan_parts
from mtp_model.sharding import spread_batch

M = TypeVar("M", bound=nnx.Module)


class LayerOutput(NamedTuple):
    """What a decoder layer gives; of a dense layer the expert load is zeros."""

    x_BTD: Float[Array, "B T D"]  # the residual stream
    expert_load_E: Float[Array, "E"]
    new: KeysValues | LatentCache  # of these rows, for a later use of the same layer


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, moe: bool):
        self.num_experts = config.n_routed_experts
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = MultiHeadLatentAttention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        if moe:
            self.mlp = MixtureOfExperts(config, rngs)
        else:
            self.mlp = FeedForward(config.intermediate_size, config, rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: Context,
        remat: bool = False,
    ) -> LayerOutput:
        """remat: what attention keeps for the backward pass is not there while that of the
        feed-forward runs; of use where the whole layer is computed again."""
        attend = type(self.self_attn).__call__
        attend = jax.checkpoint(attend) if remat else attend
        attended_BTD, new = attend(self.self_attn, self.input_layernorm(x_BTD), context)
        x_BTD = x_BTD + attended_BTD
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MixtureOfExperts):
            out_BTD, load_E = self.mlp(normed_BTD, context.counted_BT)
        else:
            out_BTD = self.mlp(normed_BTD)
            load_E = jnp.zeros((self.num_experts,), jnp.float32)
        return LayerOutput(spread_batch(x_BTD + out_BTD), load_E, new)


def stack(count: int, make: Callable[[nnx.Rngs], M], rngs: nnx.Rngs) -> M:
    """`count` modules as one whose leaves have a leading `layers` dimension."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def build(rngs: nnx.Rngs) -> M:
        return make(rngs)

    return build(rngs)


def run_stack(layers: DecoderLayer, x_BTD, context: Context, remat: bool):
    """Run stacked layers one after the other. Returns the residual stream and loads [layers, E].

    remat: activations inside a layer are computed again in the backward pass, not kept for it.
    """

    def step(x_BTD, layer: DecoderLayer):
        out = layer(x_BTD, context, remat)
        return out.x_BTD, out.expert_load_E

    return scan_parts(step, x_BTD, layers, remat)


def take_layer(layers: M, index: int) -> M:
    """One module of a stack."""
    return jax.tree.map(lambda leaf: leaf[index], layers)

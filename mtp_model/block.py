"""The decoder layer, and stacks of them run by one scan."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtp_model.attention import MultiHeadLatentAttention
from mtp_model.config import ModelConfig
from mtp_model.context import Context
from mtp_model.layers import RMSNorm
from mtp_model.moe import FeedForward, MixtureOfExperts
from mtp_model.sharding import spread_batch

M = TypeVar("M", bound=nnx.Module)


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
    ) -> tuple[Float[Array, "B T D"], Float[Array, "E"]]:
        """The residual stream after the layer, and the expert load (zeros for a dense layer)."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), context)
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MixtureOfExperts):
            out_BTD, load_E = self.mlp(normed_BTD, context.counted_BT)
        else:
            out_BTD = self.mlp(normed_BTD)
            load_E = jnp.zeros((self.num_experts,), jnp.float32)
        return spread_batch(x_BTD + out_BTD), load_E


def stack(count: int, make: Callable[[nnx.Rngs], M], rngs: nnx.Rngs) -> M:
    """`count` modules as one whose leaves have a leading `layers` dimension."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def build(rngs: nnx.Rngs) -> M:
        return make(rngs)

    return build(rngs)


def run_stack(layers: DecoderLayer, x_BTD, context: Context):
    """Run stacked layers one after the other; activations inside a layer are recomputed in the
    backward pass. Returns the residual stream and the loads [layers, E]."""

    @jax.checkpoint
    def step(x_BTD, layer: DecoderLayer):
        return layer(x_BTD, context)

    return jax.lax.scan(step, x_BTD, layers)


def take_layer(layers: M, index: int) -> M:
    """One module of a stack."""
    return jax.tree.map(lambda leaf: leaf[index], layers)

"""Mixture of experts: the router, the routed experts, the shared ones.

Source: DeepSeek-V3 report (arXiv 2412.19437) section 2.1.2. B batch, T position, D hidden,
E experts, G groups, K experts a token, F expert hidden.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mtp_model.config import ModelConfig
from mtp_model.dispatch import Served, through_experts
from mtp_model.grouped import expert_ffn, expert_ffn_gradient
from mtp_model.layers import (
    Gathered,
    Linear,
    RouterBias,
    Weight,
    annotated,
    dequantise,
    init_normal,
)
from mtp_model.products import product
from mtp_model.sharding import BATCH_AXES, active_mesh, axis_size, gather_for_use
from mtp_model.swiglu import Adapted, Projection


class Routing(NamedTuple):
    """The experts of each token and what their outputs are multiplied by."""

    choices_BTK: Int[Array, "B T K"]
    weights_BTK: Float[Array, "B T K"]


def count_load(
    choices_BTK: Int[Array, "B T K"], counted_BT: Int[Array, "B T"], num_experts: int
) -> Float[Array, "E"]:
    """How many counted tokens chose each expert (what router-bias balancing needs)."""
    chosen = jax.nn.one_hot(choices_BTK, num_experts, dtype=jnp.float32)
    return product("btke,bt->e", chosen, counted_BT.astype(jnp.float32))


class Router(nnx.Module):
    """Sigmoid scores in float32; a bias that only selects; experts from the best groups."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        shape = (config.n_routed_experts, config.hidden_size)
        self.axes = ("router", "hidden")
        self.weight = annotated(nnx.Param, init_normal(rngs, shape), self.axes)
        bias = jnp.zeros((config.n_routed_experts,), jnp.float32)
        self.e_score_correction_bias = annotated(RouterBias, bias, ("router",))

    def _selectable(self, biased_BTE):
        """Scores with -inf outside the `topk_group` best groups (a group's score is the sum of
        its two highest)."""
        c = self.config
        grouped = biased_BTE.reshape(*biased_BTE.shape[:2], c.n_group, -1)
        group_BTG = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
        best = jax.lax.top_k(group_BTG, c.topk_group)[1]
        kept_BTG = jnp.any(jax.nn.one_hot(best, c.n_group, dtype=jnp.bool_), axis=-2)
        return jnp.where(kept_BTG[..., None], grouped, -jnp.inf).reshape(biased_BTE.shape)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Routing:
        c = self.config
        weight_ED = gather_for_use(self.weight[...], self.axes).astype(jnp.float32)
        logits_BTE = product("btd,ed->bte", x_BTD.astype(jnp.float32), weight_ED)
        scores_BTE = jax.nn.sigmoid(logits_BTE)
        bias_E = jax.lax.stop_gradient(self.e_score_correction_bias[...])
        selectable = self._selectable(scores_BTE + bias_E[None, None])
        choices_BTK = jax.lax.top_k(selectable, c.num_experts_per_tok)[1]
        weights_BTK = jnp.take_along_axis(scores_BTE, choices_BTK, axis=-1)
        if c.norm_topk_prob:
            weights_BTK = weights_BTK / (jnp.sum(weights_BTK, axis=-1, keepdims=True) + 1e-20)
        return Routing(choices_BTK, weights_BTK * c.routed_scaling_factor)


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); a dense layer's, and the shared experts'."""

    def __init__(self, inner_size: int, config: ModelConfig, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.gate_proj = Linear(hidden, inner_size, ("ffn", "hidden"), config, rngs)
        self.up_proj = Linear(hidden, inner_size, ("ffn", "hidden"), config, rngs)
        self.down_proj = Linear(inner_size, hidden, ("hidden", "ffn"), config, rngs)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nnx.Module):
    """The routed experts of one layer, stacked [E, out, in]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.num_experts = config.n_routed_experts
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        into, out_of = (self.num_experts, inner, hidden), (self.num_experts, hidden, inner)
        into_axes = ("experts", "expert_ffn", "expert_hidden")
        self.gate_proj = Weight(into, into_axes, config, rngs)
        self.up_proj = Weight(into, into_axes, config, rngs)
        self.down_proj = Weight(out_of, ("experts", "expert_hidden", "expert_ffn"), config, rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"], routing: Routing) -> Float[Array, "B T D"]:
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        if axis_size("tensor") > 1:  # which splits blocks of FP8 scales too
            stored = tuple(projection.dequantised(x_BTD.dtype) for projection in projections)
        else:
            stored = tuple(projection.gathered(x_BTD.dtype) for projection in projections)
        if active_mesh() is None:
            return self._local(x_BTD, *routing, stored)
        batch = PartitionSpec(BATCH_AXES)
        into, out_of = _parts("tensor", None), _parts(None, "tensor")
        return jax.shard_map(
            self._local,
            in_specs=(batch, batch, batch, (into, into, out_of)),
            out_specs=batch,
            check_vma=False,
        )(x_BTD, *routing, stored)

    def _local(self, x_BTD, choices_BTK, weights_BTK, stored):
        """The part of one device: its tokens, its experts, its part of their width."""
        num_peers = axis_size("expert")
        out_TD = through_experts(
            x_BTD.reshape(-1, x_BTD.shape[-1]),
            choices_BTK.reshape(-1, choices_BTK.shape[-1]),
            weights_BTK.reshape(-1, weights_BTK.shape[-1]),
            _served(self.gate_proj.block, x_BTD.dtype),
            stored,
            self.num_experts,
            num_peers,
            "expert" if num_peers > 1 else None,
        )
        if axis_size("tensor") > 1:
            out_TD = jax.lax.psum(out_TD, "tensor")
        return out_TD.reshape(x_BTD.shape)


def _parts(out_axis: str | None, in_axis: str | None) -> Gathered:
    """The mesh axes over which experts, and the sides of their matrices, are split while used."""
    return Gathered(
        weight=PartitionSpec("expert", out_axis, in_axis),
        scale=PartitionSpec("expert"),
        lora_A=PartitionSpec("expert", None, in_axis),
        lora_B=PartitionSpec("expert", out_axis),
    )


def _served(block: tuple[int, int] | None, dtype: jnp.dtype) -> Served:
    """Experts whose projections are stored matrices. What is FP8, or has an adapter, is not trained
    and has no gradient. FP8 weights are dequantised where they are used."""

    def ready(stored: tuple[Gathered, ...]):
        for weight, scale, a, b in stored:
            if scale is not None:
                assert block is not None
                weight = dequantise(weight, scale, block, dtype)
            yield weight if a is None or b is None else Adapted(weight, a, b)

    def run(rows_MD, expert_M, stored):
        return expert_ffn(rows_MD, expert_M, *ready(stored))

    def gradient(d_out_MD, rows_MD, scale_M, expert_M, stored):
        d_rows_MD, d_scale_M, d_weights = expert_ffn_gradient(
            d_out_MD, rows_MD, scale_M, expert_M, *ready(stored)
        )
        return d_rows_MD, d_scale_M, tuple(map(_of_trained, stored, d_weights))

    return Served(run, gradient)


def _of_trained(stored: Gathered, gradient: Projection) -> Gathered:
    """The gradient of what is trained of a stored matrix."""
    if isinstance(gradient, Adapted):
        return Gathered(None, None, gradient.a_LRI, gradient.b_LOR)
    return Gathered(gradient if stored.scale is None else None, None, None, None)


class MixtureOfExperts(nnx.Module):
    """Routed experts plus the shared ones (unscaled)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.gate = Router(config, rngs)
        self.experts = Experts(config, rngs)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = FeedForward(shared, config, rngs)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], counted_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "E"]]:
        """The layer's output, and the load of each expert in counted tokens."""
        routing = self.gate(x_BTD)
        load_E = count_load(routing.choices_BTK, counted_BT, self.experts.num_experts)
        return self.experts(x_BTD, routing) + self.shared_experts(x_BTD), load_E

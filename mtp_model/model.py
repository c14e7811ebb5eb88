"""The whole network: main model and MTP modules. Knows nothing of files, losses or optimisers.

Source: DeepSeek-V3 report (arXiv 2412.19437). B batch, T position, D hidden, V vocab, L layers,
E experts. Depth k = 1, 2, ... drafts the token after the k next ones.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mtp_model.block import DecoderLayer, run_stack, stack, take_layer
from mtp_model.config import ModelConfig
from mtp_model.layers import Embedding, RMSNorm
from mtp_model.mtp import run_module, shift_within_segments, stack_modules
from mtp_model.sharding import spread_batch

Scope = Literal["all", "main", "mtp"]
Ids = Int[Array | np.ndarray, "B T"]  # tokens, segments, positions: of JAX or numpy


class MainStates(NamedTuple):
    """What the main model computed."""

    hidden_BTD: Float[Array, "B T D"]  # after model.norm: what the head reads
    state_BTD: Float[Array, "B T D"]  # what MTP depth 1 is fed
    expert_load_LE: Float[Array, "L E"]  # tokens that chose each expert, MoE layers only


class DraftStates(NamedTuple):
    """What the MTP modules computed, depth by depth."""

    hidden: tuple[Float[Array, "B T D"], ...]  # after shared_head.norm: what the head reads
    expert_load_LE: Float[Array, "L E"]  # one row a depth


class Output(NamedTuple):
    """Float32 logits: row i of the main model predicts token i+1, of depth k token i+k+1."""

    logits_BTV: Float[Array, "B T V"]
    hidden_BTD: Float[Array, "B T D"]
    mtp_logits: tuple[Float[Array, "B T V"], ...]


class DeepSeekV3(nnx.Module):
    """The module tree; attribute paths are the leaf paths of the checkpoint directory.

    scope: `all`; `main` has no MTP modules; `mtp` has only them, embedding, norm and head.
    """

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        scope: Scope = "all",
        compute_dtype: jnp.dtype | None = None,
    ):
        self.config, self.scope = config, scope
        self.compute_dtype = jnp.dtype(compute_dtype or config.dtype)
        self.embed_tokens = Embedding(config, rngs)
        if scope != "mtp" and config.num_dense_layers:
            self.dense_layers = _layers(config, rngs, config.num_dense_layers, moe=False)
        if scope != "mtp" and config.num_moe_layers:
            self.moe_layers = _layers(config, rngs, config.num_moe_layers, moe=True)
        self.norm = RMSNorm(config.hidden_size, config)
        self.lm_head = Embedding(config, rngs)
        if scope != "main" and config.num_nextn_predict_layers:
            self.mtp = stack_modules(config, rngs)

    def main(
        self,
        tokens_BT: Ids,
        segment_ids_BT: Ids,
        positions_BT: Ids,
    ) -> MainStates:
        """Hidden states of the main model. Segment 0 is padding and not counted as load."""
        tokens_BT, segment_ids_BT, positions_BT = _as_jax(tokens_BT, segment_ids_BT, positions_BT)
        if self.scope == "mtp":
            raise ValueError("this model was loaded with scope='mtp': it has no main layers")
        x_BTD = spread_batch(self.embed_tokens.lookup(tokens_BT, self.compute_dtype))
        counted_BT = (segment_ids_BT != 0).astype(jnp.int32)
        load_LE = jnp.zeros((0, self.config.n_routed_experts), jnp.float32)
        where = (segment_ids_BT, positions_BT, counted_BT)
        if self.config.num_dense_layers:
            x_BTD, _ = run_stack(self.dense_layers, x_BTD, *where)
        if self.config.num_moe_layers:
            x_BTD, load_LE = run_stack(self.moe_layers, x_BTD, *where)
        hidden_BTD = self.norm(x_BTD)
        post_norm = self.config.mtp_hidden_state == "post_norm"
        return MainStates(hidden_BTD, hidden_BTD if post_norm else x_BTD, load_LE)

    def draft(
        self,
        state_BTD: Float[Array, "B T D"],
        tokens_BT: Ids,
        segment_ids_BT: Ids,
        positions_BT: Ids,
        num_draft_tokens: int | None = None,
        zero_first_embedding: bool = False,
    ) -> DraftStates:
        """Hidden states of the MTP depths, each fed the true next token.

        num_draft_tokens: depths to run; beyond the modules that exist they are reused in turn.
        zero_first_embedding: vLLM's habit of a zero embedding at position 0, for parity checks.
        """
        tokens_BT, segment_ids_BT, positions_BT = _as_jax(tokens_BT, segment_ids_BT, positions_BT)
        depths = self._num_depths(num_draft_tokens)
        hidden, loads = [], []
        for k in range(1, depths + 1):
            shifted = shift_within_segments(tokens_BT, segment_ids_BT, k)
            e_BTD = spread_batch(self.embed_tokens.lookup(shifted.tokens_BT, self.compute_dtype))
            if zero_first_embedding:
                e_BTD = jnp.where((positions_BT == 0)[..., None], jnp.zeros((), e_BTD.dtype), e_BTD)
            module = take_layer(self.mtp, (k - 1) % self.config.num_nextn_predict_layers)
            counted_BT = shifted.inside_BT.astype(jnp.int32)
            state_BTD, load_E = run_module(
                module, state_BTD, e_BTD, segment_ids_BT, positions_BT, counted_BT
            )
            hidden.append(state_BTD)
            loads.append(load_E)
        load_LE = jnp.stack(loads) if loads else jnp.zeros((0, self.config.n_routed_experts))
        return DraftStates(tuple(hidden), load_LE)

    def __call__(
        self,
        tokens_BT: Ids,
        segment_ids_BT: Ids | None = None,
        positions_BT: Ids | None = None,
        num_draft_tokens: int | None = None,
    ) -> Output:
        """Logits of the main model and of every depth. Whole [B, T, V] float32: for small inputs.

        segment_ids: 1, 2, ... a packed document, 0 padding (default: one document a row).
        positions: for RoPE (default: from 0 in every document).
        """
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = positions_in_segments(jnp.asarray(segment_ids_BT))
        main = self.main(tokens_BT, segment_ids_BT, positions_BT)
        where = (tokens_BT, segment_ids_BT, positions_BT)
        drafts = self.draft(main.state_BTD, *where, num_draft_tokens)
        mtp_logits = tuple(self.lm_head.logits(h_BTD) for h_BTD in drafts.hidden)
        return Output(self.lm_head.logits(main.hidden_BTD), main.hidden_BTD, mtp_logits)

    def _num_depths(self, requested: int | None) -> int:
        available = 0 if self.scope == "main" else self.config.num_nextn_predict_layers
        if requested and not available:
            raise ValueError(f"{requested} draft tokens asked of a model without MTP modules")
        return available if requested is None else requested


def _layers(config: ModelConfig, rngs: nnx.Rngs, count: int, moe: bool) -> DecoderLayer:
    return stack(count, lambda rngs: DecoderLayer(config, rngs, moe), rngs)


def _as_jax(*ids: Ids) -> tuple[Int[Array, "B T"], ...]:
    return tuple(jnp.asarray(array) for array in ids)


def positions_in_segments(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0, 1, 2, ... from the start of each run of equal segment ids."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    starts_BT = jnp.pad(
        segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], [(0, 0), (1, 0)], constant_values=True
    )
    start_BT = jnp.where(starts_BT, index_T[None], 0)
    return index_T[None] - jax.lax.cummax(start_BT, axis=1)


def abstract_leaves(config: ModelConfig, scope: Scope = "all") -> dict[str, nnx.Variable]:
    """Every leaf by its path (`moe_layers.mlp.gate.weight`): shape and logical axes, no memory."""
    model = nnx.eval_shape(lambda: DeepSeekV3(config, nnx.Rngs(0), scope))
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}

"""The whole network, main model and MTP modules, with weights or without.

Source: DeepSeek-V3 report (arXiv 2412.19437). B batch, T position, D hidden, V vocab, L layers,
E experts. Depth k = 1, 2, ... drafts the token after the k next ones.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mtp_model.block import DecoderLayer, run_stack, stack, take_layer
from mtp_model.config import ModelConfig
from mtp_model.context import Context, EarlierUses, Ids, KeysValues, make_context
from mtp_model.layers import Embedding, RMSNorm
from mtp_model.mtp import (
    DraftStep,
    MultiTokenPredictor,
    shift_within_segments,
)
from mtp_model.sharding import AnyMesh, placement, spread_batch

Scope = Literal["all", "main", "mtp"]
StackName = Literal["dense_layers", "moe_layers", "mtp"]  # the stacked modules of the tree
Layer = DecoderLayer | MultiTokenPredictor


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
    remat (an attribute): the backward pass computes what is inside a layer or an MTP module again
    instead of keeping it. True unless whoever trains sets it otherwise.
    """

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        scope: Scope = "all",
        compute_dtype: jnp.dtype | None = None,
    ):
        self.config, self.scope, self.remat = config, scope, True
        self.compute_dtype = jnp.dtype(compute_dtype or config.dtype)
        self.embed_tokens = Embedding(config, rngs)
        if scope != "mtp" and config.num_dense_layers:
            self.dense_layers = _layers(config, rngs, config.num_dense_layers, moe=False)
        if scope != "mtp" and config.num_moe_layers:
            self.moe_layers = _layers(config, rngs, config.num_moe_layers, moe=True)
        self.norm = RMSNorm(config.hidden_size, config)
        self.lm_head = Embedding(config, rngs)
        if scope != "main" and config.num_nextn_predict_layers:
            count = config.num_nextn_predict_layers
            self.mtp = stack(count, lambda rngs: MultiTokenPredictor(config, rngs), rngs)

    def main(self, tokens_BT: Ids, context: Context) -> MainStates:
        """Hidden states of the main model."""
        x_BTD, load_LE = self.residual(tokens_BT, context)
        return MainStates(*self.main_states(x_BTD), load_LE)

    def residual(self, tokens_BT: Ids, context: Context) -> tuple[jax.Array, jax.Array]:
        """The residual stream after the last layer, [B, T, D], and the load of its experts."""
        if self.scope == "mtp":
            raise ValueError("this model was loaded with scope='mtp': it has no main layers")
        x_BTD = self.embed(tokens_BT)
        load_LE = jnp.zeros((0, self.config.n_routed_experts), jnp.float32)
        if self.config.num_dense_layers:
            x_BTD, _ = run_stack(self.dense_layers, x_BTD, context, self.remat)
        if self.config.num_moe_layers:
            x_BTD, load_LE = run_stack(self.moe_layers, x_BTD, context, self.remat)
        return x_BTD, load_LE

    def main_states(self, x_BTD: Float[Array, "B T D"]) -> tuple[jax.Array, jax.Array]:
        """hidden and state of `MainStates`, from the residual stream after the last layer."""
        hidden_BTD = self.norm(x_BTD)
        post_norm = self.config.mtp_hidden_state == "post_norm"
        return hidden_BTD, hidden_BTD if post_norm else x_BTD

    def draft(
        self,
        state_BTD: Float[Array, "B T D"],
        tokens_BT: Ids,
        context: Context,
        num_draft_tokens: int | None = None,
        likeliest: Callable[[Float[Array, "B T D"]], Int[Array, "B T"]] | None = None,
    ) -> DraftStates:
        """Hidden states of the MTP depths, each fed the true next token, as a decoder drafts.

        state: `state_BTD` of the main model; tokens: those that the main model was fed.
        num_draft_tokens: depths to run. Beyond the modules that exist they are reused in turn, as
        serving engines do: a reused module sees the keys of its first use up to the row that the
        round starts from, and those of its later uses in this round, at positions that go on.
        likeliest: the tokens that the head finds likeliest of such states; with it, depths from 2
        on are fed what the depth before them drafts, not the text. For one module: of several, a
        row would see keys that drafts left in the rows before it, where decoding has text's.
        """
        tokens_BT = jnp.asarray(tokens_BT)
        count = self.config.num_nextn_predict_layers
        assert count <= 1 or likeliest is None
        earlier: dict[int, EarlierUses] = {}
        hidden, loads = [], []
        for k in range(1, self._num_depths(num_draft_tokens) + 1):
            shifted = shift_within_segments(tokens_BT, context.segment_ids_BT, k)
            module = (k - 1) % count
            used = earlier.get(module)
            here = context._replace(
                counted_BT=shifted.inside_BT.astype(jnp.int32),
                positions_BT=context.positions_BT + (k - 1 - module),
                earlier=used,
            )
            fed_BT = shifted.tokens_BT
            if likeliest is not None and k > 1:
                fed_BT = jnp.where(shifted.inside_BT, likeliest(state_BTD), fed_BT)
            step = self.draft_step(state_BTD, fed_BT, here, k)
            state_BTD = step.state_BTD
            assert isinstance(step.new, KeysValues)  # the context has no cache
            if used is None:
                earlier[module] = EarlierUses(step.new, ())
            else:
                earlier[module] = used._replace(chain=(*used.chain, step.new))
            hidden.append(state_BTD)
            loads.append(step.expert_load_E)
        load_LE = jnp.stack(loads) if loads else jnp.zeros((0, self.config.n_routed_experts))
        return DraftStates(tuple(hidden), load_LE)

    def draft_step(
        self,
        state_BTD: Float[Array, "B T D"],
        tokens_BT: Ids,
        context: Context,
        depth: int,
    ) -> DraftStep:
        """One depth (1, 2, ...) from the state of the depth before it.

        tokens: those it is fed; in row i the token that is `depth` places after token i.
        context: what the module sees besides; `earlier` where it was used in this round before.
        """
        module = take_layer(self.mtp, (depth - 1) % self.config.num_nextn_predict_layers)
        run = functools.partial(type(module).__call__, remat=self.remat)
        run = jax.checkpoint(run) if self.remat else run
        return run(module, state_BTD, self.embed(tokens_BT), context)

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
        context = make_context(segment_ids_BT, positions_BT)
        main = self.main(tokens_BT, context)
        drafts = self.draft(main.state_BTD, tokens_BT, context, num_draft_tokens)
        mtp_logits = tuple(self.lm_head.logits(h_BTD) for h_BTD in drafts.hidden)
        return Output(self.lm_head.logits(main.hidden_BTD), main.hidden_BTD, mtp_logits)

    def embed(self, tokens_BT: Ids) -> Float[Array, "B T D"]:
        """Embeddings of tokens, in the dtype that is computed in."""
        found_BTD = self.embed_tokens.lookup(jnp.asarray(tokens_BT), self.compute_dtype)
        return spread_batch(found_BTD)

    def _num_depths(self, requested: int | None) -> int:
        available = 0 if self.scope == "main" else self.config.num_nextn_predict_layers
        if requested and not available:
            raise ValueError(f"{requested} draft tokens asked of a model without MTP modules")
        return available if requested is None else requested


def _layers(config: ModelConfig, rngs: nnx.Rngs, count: int, moe: bool) -> DecoderLayer:
    return stack(count, lambda rngs: DecoderLayer(config, rngs, moe), rngs)


def abstract_model(
    config: ModelConfig,
    scope: Scope = "all",
    dtypes: Mapping[str, Any] | None = None,
    mesh: AnyMesh | None = None,
    compute_dtype: Any = None,
) -> DeepSeekV3:
    """The network without memory: every leaf has shape, dtype and, on a mesh, its placement.

    dtypes: of leaves, by path; a leaf that is not in it is float32.
    """
    model = nnx.eval_shape(lambda: DeepSeekV3(config, nnx.Rngs(0), scope, compute_dtype))
    graph, state = nnx.split(model)
    return nnx.merge(graph, nnx.map_state(functools.partial(_described, dtypes or {}, mesh), state))


def abstract_layer(config: ModelConfig, stack_name: StackName) -> Layer:
    """One module of a stack without memory: a decoder layer, or an MTP module."""

    def make() -> Layer:
        if stack_name == "mtp":
            return MultiTokenPredictor(config, nnx.Rngs(0))
        return DecoderLayer(config, nnx.Rngs(0), moe=stack_name == "moe_layers")

    return nnx.eval_shape(make)


def _described(
    dtypes: Mapping[str, Any], mesh: AnyMesh | None, path: tuple, leaf: nnx.Variable
) -> nnx.Variable:
    """A leaf of `eval_shape` with the dtype and the placement it is to have."""
    dtype = dtypes.get(leaf_name(path), leaf.dtype)
    axes = leaf.get_metadata("out_sharding")
    placed = placement(axes, leaf.shape, mesh) if mesh is not None else None
    return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=placed))


def leaf_name(path: tuple) -> str:
    """The path of a leaf as the checkpoint directory names it, `moe_layers.mlp.gate.weight`."""
    return ".".join(map(str, path))


def leaves_by_name(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Every leaf of a module by its path."""
    return {leaf_name(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}

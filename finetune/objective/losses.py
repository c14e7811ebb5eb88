"""Losses of a packed batch: the main model's and each MTP depth's.

Depth 0 is the main model; depth k = 1, 2, ... predicts k tokens further.
Source: DeepSeek-V3 report (arXiv 2412.19437) section 2.2.
B batch, T position, K depths, L layers, M MTP modules, E experts; p is the main model's
distribution at a target, q that of a depth.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from finetune.data.packing import Batch, PostNorm
from finetune.objective.acceptance import (
    AcceptanceCounts,
    Rounds,
    count_acceptance,
    is_learnt,
)
from finetune.objective.head import Asked, Targets, is_anchor, likeliest, sum_where, through_head
from mtp_model import Context, DeepSeekV3, MainStates, make_context
from mtp_model.mtp import shift_left

ONE_DRAFT_EACH = Asked()


class Measured(NamedTuple):
    """Sums over a batch, which add up over batches; row 0 of *_K1 is the main model.

    Those from kl_sum_K on compare the distributions of the MTP depths with the main model's, at
    the temperature that was asked for; zeros where that was not asked for.
    """

    nll_sum_K1: Float[Array, "K1"]  # nats, over valid targets
    num_targets_K1: Int[Array, "K1"]
    acceptance: AcceptanceCounts
    num_tokens: jax.Array  # int32 scalar, padding not counted
    kl_sum_K: Float[Array, "K"]  # KL(p || q), nats, over valid targets
    overlap_sum_K: Float[Array, "K"]  # sum over v of min(p, q): what rejection sampling accepts
    joint_sum: jax.Array  # over anchors, of the mean over j of the overlaps' product up to j
    num_anchors: jax.Array  # int32: positions where every depth has a valid target
    entropy_sum: jax.Array  # of p, nats, over the main model's valid targets
    text_nll_sum: jax.Array  # of the text under p, over the same


class ExpertLoad(NamedTuple):
    """Real tokens that chose each expert; one row a MoE layer, one row an MTP module."""

    moe_layers_LE: Float[Array, "L E"]
    mtp_ME: Float[Array, "M E"]


class Measurement(NamedTuple):
    """A batch run through the depths."""

    measured: Measured
    load: ExpertLoad
    rounds: Rounds


def targets(batch: Batch, k: int) -> Targets:
    """t[i+k+1] for each position i of depth k.

    Valid iff i+k+1 is in the row, in the same document as i, and the loss mask of the *target*
    token is 1; padding (segment 0) never is.
    """
    return Targets(shift_left(batch.tokens_BT, k + 1, 0), is_learnt(batch, k + 1))


def targets_by_depth(batch: Batch, depths: int) -> tuple[Targets, ...]:
    """Those of the main model, then of each depth."""
    return tuple(targets(batch, k) for k in range(depths + 1))


def context_of(batch: Batch) -> Context:
    """What the layers are told about the tokens of a batch."""
    return make_context(batch.segment_ids_BT, batch.positions_BT)


def main_states(model: DeepSeekV3, batch: Batch) -> MainStates:
    """What the main model makes of a batch: computed, or as it was captured."""
    if batch.states is None:
        return model.main(batch.tokens_BT, context_of(batch))
    x_BTD = batch.states.x_BTD.astype(model.compute_dtype)
    normed = isinstance(batch.states, PostNorm)
    hidden_BTD, state_BTD = (x_BTD, x_BTD) if normed else model.main_states(x_BTD)
    c = model.config
    return MainStates(
        hidden_BTD, state_BTD, jnp.zeros((c.num_moe_layers, c.n_routed_experts), jnp.float32)
    )


def measure(
    model: DeepSeekV3, batch: Batch, main: MainStates, asked: Asked = ONE_DRAFT_EACH
) -> Measurement:
    """Run the depths on a batch, and add up all losses.

    main: `main_states` of the batch; a gradient flows back into it unless it is stopped there.
    """
    context = context_of(batch)
    own = functools.partial(likeliest, model.lm_head) if asked.own_tokens else None
    drafts = model.draft(main.state_BTD, batch.tokens_BT, context, asked.num_draft_tokens, own)
    drafted = drafts.hidden
    if asked.shifted:  # what comes round from a row's beginning to its end has no target there
        drafted = tuple(jnp.roll(h_BTD, -1, axis=1) for h_BTD in drafted)
    hidden = (main.hidden_BTD, *drafted)
    target = targets_by_depth(batch, len(drafted))
    sums, choices = through_head(model.lm_head, hidden, target, asked)
    acceptance, rounds = count_acceptance(batch, choices, asked.rule)
    counts = counts_of(target, asked)
    text_nll = -sum_where(target[0].valid_BT & asked.distributions, choices.log_prob[0])
    measured = Measured(
        nll_sum_K1=sums.nll_K1,
        num_targets_K1=counts.num_targets_K1,
        acceptance=acceptance,
        num_tokens=jnp.sum(batch.segment_ids_BT != 0, dtype=jnp.int32),
        kl_sum_K=sums.kl_K,
        overlap_sum_K=sums.overlap_K,
        joint_sum=sums.joint,
        num_anchors=counts.num_anchors,
        entropy_sum=sums.entropy,
        text_nll_sum=text_nll,
    )
    load = ExpertLoad(main.expert_load_LE, _by_module(drafts.expert_load_LE, model))
    return Measurement(measured, load, rounds)


def main_nll(model: DeepSeekV3, batch: Batch, main: MainStates) -> jax.Array:
    """Negative log-likelihood of the text under the main model alone, summed over its targets."""
    asked = Asked(head_learns=True)
    sums, _ = through_head(model.lm_head, (main.hidden_BTD,), (targets(batch, 0),), asked)
    return sums.nll_K1[0]


class TargetCounts(NamedTuple):
    """What sums over a batch are divided by; of the text alone."""

    num_targets_K1: Int[Array, "K1"]
    num_anchors: jax.Array  # int32


def counts_of(target: tuple[Targets, ...], asked: Asked) -> TargetCounts:
    """The counts of `measure` of a batch, of which a part may be computed at a time."""
    anchors_BT = is_anchor(target) & (asked.distributions and len(target) > 1)
    valid = [jnp.sum(each.valid_BT, dtype=jnp.int32) for each in target]
    return TargetCounts(jnp.stack(valid), jnp.sum(anchors_BT, dtype=jnp.int32))


def _by_module(load_KE: Float[Array, "K E"], model: DeepSeekV3) -> Float[Array, "M E"]:
    """The load of each MTP module: of all depths that it was used for."""
    count = max(1, model.config.num_nextn_predict_layers)
    return jnp.stack([jnp.sum(load_KE[module::count], axis=0) for module in range(count)])


def mean_losses(measured: Measured) -> Float[Array, "K1"]:
    """Mean over its valid targets, for the main model and each depth; 0 where there are none."""
    counts_K1 = jnp.maximum(measured.num_targets_K1, 1).astype(jnp.float32)
    return measured.nll_sum_K1 / counts_K1

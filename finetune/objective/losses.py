"""Losses of a packed batch: the main model's and each MTP depth's, in chunks of the sequence.

Depth 0 is the main model; depth k = 1, 2, ... predicts k tokens further.
Source: DeepSeek-V3 report (arXiv 2412.19437) section 2.2.
B batch, T position, C chunk of positions, D hidden, V vocab, K depths, L layers, M MTP modules,
E experts; p is the main model's distribution at a target, q that of a depth.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from finetune.data.packing import Batch, PostNorm
from finetune.objective.acceptance import (
    AcceptanceCounts,
    Choices,
    Rounds,
    Rule,
    count_acceptance,
    is_learnt,
)
from mtp_model import Context, DeepSeekV3, MainStates, make_context
from mtp_model.layers import Embedding, Head
from mtp_model.mtp import shift_left
from mtp_model.sharding import BATCH_AXES, axis_size

# Float32 logits that exist at a time on one device; the whole [B, T, V] never does.
LOGITS_BYTES = 256 << 20


class Asked(NamedTuple):
    """What is measured of a batch."""

    num_draft_tokens: int | None = None  # depths to run: as many as modules; more reuse them
    distributions: bool = False  # compare each depth's with the main model's of the same target
    rule: Rule = "greedy"  # how drafts are accepted
    temperature: float = 1.0  # of the distributions that are compared, and of the rule
    own_tokens: bool = False  # depths from 2 on are fed what the one before drafts, not the text
    shifted: bool = False  # a control: what is drafted for a place is measured one place before it
    drafted: tuple[int, ...] = ()  # the only tokens that a draft may be; none: all of them
    head_learns: bool = False  # a gradient is asked of the head


ONE_DRAFT_EACH = Asked()


class Targets(NamedTuple):
    """What each position is to predict, and whether that counts."""

    tokens_BT: Int[Array, "B T"]
    valid_BT: Bool[Array, "B T"]


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


class HeadSums(NamedTuple):
    """What the head's logits say of a chunk, or of all of it."""

    nll_K1: Float[Array, "K1"]
    kl_K: Float[Array, "K"]
    overlap_K: Float[Array, "K"]
    joint: jax.Array
    entropy: jax.Array


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


def chunk_length(rows: int, length: int, vocab_size: int, num_logits: int) -> int:
    """Positions whose float32 logits, `num_logits` at each, take at most LOGITS_BYTES a device."""
    rows_here = max(1, rows // math.prod(map(axis_size, BATCH_AXES)))
    vocab_here = max(1, vocab_size // axis_size("tensor"))
    return min(length, max(1, LOGITS_BYTES // (4 * rows_here * vocab_here * num_logits)))


def through_head(
    lm_head: Embedding,
    hidden: tuple[Float[Array, "B T D"], ...],
    target: tuple[Targets, ...],
    asked: Asked,
) -> tuple[HeadSums, Choices]:
    """One pass over the logits of the main model and all depths, a chunk of positions at a time.

    Of several chunks, each one's logits are computed again in the backward pass. No gradient goes
    through the main model's distribution. nll is of temperature 1, all else of the temperature
    that is asked for.
    """
    rows, length, _ = hidden[0].shape
    depths = len(hidden) - 1
    num_logits = len(hidden) + 2 * asked.distributions
    chunk = chunk_length(rows, length, lm_head.weight.shape[0], num_logits)
    count = -(-length // chunk)
    # Gradients of a head that is gathered once would add up on each device, as large as the head.
    head = lm_head if asked.head_learns else lm_head.ready(hidden[0].dtype)

    def behind_chunks(x_BTD):
        """The `depths` rows behind each chunk, where the targets of its last rows are predicted."""
        ends = range(chunk, count * chunk + 1, chunk)
        padded = jnp.pad(x_BTD, [(0, 0), (0, count * chunk + depths - length), (0, 0)])
        return jnp.stack([padded[:, end : end + depths] for end in ends])

    def of_chunk(args):
        return _of_chunk(head, *args, temperature=asked.temperature, drafted=asked.drafted)

    behind = behind_chunks(jax.lax.stop_gradient(hidden[0])) if asked.distributions else None
    chunks = (*jax.tree.map(lambda x: _in_chunks(x, chunk), (hidden, target)), behind)
    sums, choices = jax.lax.map(jax.checkpoint(of_chunk) if count > 1 else of_chunk, chunks)
    whole = jax.tree.map(lambda x: _joined(x, length), choices)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums), whole


def _in_chunks(x_BT, chunk: int):
    """Positions, and what else follows, as [chunks, B, chunk, ...]; the last one is padded."""
    rows, length, *others = x_BT.shape
    count = -(-length // chunk)
    padding = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * len(others)
    return jnp.moveaxis(jnp.pad(x_BT, padding).reshape(rows, count, chunk, *others), 1, 0)


def _joined(x_NBC, length: int):
    """What was computed in chunks, by position [B, T]."""
    count, rows, chunk = x_NBC.shape
    return jnp.moveaxis(x_NBC, 0, 1).reshape(rows, count * chunk)[:, :length]


def _of_chunk(
    head: Head | Embedding,
    hidden,
    target,
    behind_BKD,
    *,
    temperature: float,
    drafted: tuple[int, ...],
):
    """Sums and choices of one chunk; of one depth after the other.

    Losses and KL are of the whole head whatever may be drafted: of a part they would be infinite.
    """
    logits_BCV = head.logits(hidden[0])
    log_p = None
    if behind_BKD is not None:
        further = jnp.concatenate([logits_BCV, head.logits(behind_BKD)], axis=1)
        log_p = jax.nn.log_softmax(jax.lax.stop_gradient(further) / temperature, axis=-1)
    nll, kl, overlap = [], [], []
    greedy, log_prob = [], []
    entropy = jnp.zeros((), jnp.float32)
    product_BC = jnp.ones(logits_BCV.shape[:2], jnp.float32)
    joint_BC = jnp.zeros_like(product_BC)
    for k, (h_BCD, target_k) in enumerate(zip(hidden, target, strict=True)):
        logits_BCV = head.logits(h_BCD) if k else logits_BCV
        log_q = jax.nn.log_softmax(logits_BCV, axis=-1)
        nll.append(-_sum_where(target_k.valid_BT, _at(log_q, target_k.tokens_BT)))
        if temperature != 1.0:
            log_q = jax.nn.log_softmax(logits_BCV / temperature, axis=-1)
        log_d = log_q  # of what is drafted
        if k and drafted:
            logits_BCV = _only(logits_BCV, drafted)
            log_d = jax.nn.log_softmax(logits_BCV / temperature, axis=-1)
        greedy.append(_largest(logits_BCV))
        log_prob.append(jax.lax.stop_gradient(_at(log_d, target_k.tokens_BT)))
        if log_p is None:
            continue
        same = log_p[:, k : k + log_q.shape[1]]
        p = jnp.exp(same)
        if k == 0:
            entropy = -_sum_where(target_k.valid_BT, jnp.sum(p * same, axis=-1))
            continue
        kl.append(_sum_where(target_k.valid_BT, jnp.sum(p * (same - log_q), axis=-1)))
        q = jnp.exp(log_d)
        overlap_BC = jnp.sum(jnp.where(q >= p, p, q), axis=-1)  # NaN where q is
        overlap.append(_sum_where(target_k.valid_BT, overlap_BC))
        product_BC *= overlap_BC
        joint_BC += product_BC / (len(hidden) - 1)
    none_K = jnp.zeros((len(hidden) - 1,), jnp.float32)
    sums = HeadSums(
        nll_K1=jnp.stack(nll),
        kl_K=jnp.stack(kl) if kl else none_K,
        overlap_K=jnp.stack(overlap) if overlap else none_K,
        joint=_sum_where(_is_anchor(target), joint_BC),
        entropy=entropy,
    )
    return sums, Choices(tuple(greedy), tuple(log_prob))


def _only(logits_BCV, tokens: tuple[int, ...]) -> Float[Array, "B C V"]:
    """Logits of these tokens; all others are impossible."""
    allowed_V = np.zeros(logits_BCV.shape[-1], np.bool_)
    allowed_V[list(tokens)] = True
    return jnp.where(allowed_V[None, None], logits_BCV, -jnp.inf)


def _at(values_BCV, tokens_BC) -> Float[Array, "B C"]:
    """Each position's value of its token.

    As a sum, the others 0: the gradient is a comparison that XLA fuses with what follows, where
    that of an index fills zeros and scatters into them.
    """
    here_BCV = _tokens_of(values_BCV) == tokens_BC[..., None]
    return jnp.sum(jnp.where(here_BCV, values_BCV, 0.0), axis=-1)


def _largest(logits_BCV) -> Int[Array, "B C"]:
    """The first token with the largest logit: argmax, whose loop XLA does not vectorise on CPU."""
    largest_BC1 = jnp.max(logits_BCV, axis=-1, keepdims=True)
    last = logits_BCV.shape[-1] - 1  # also where the largest is NaN, which nothing equals
    tokens_BCV = jnp.where(logits_BCV == largest_BC1, _tokens_of(logits_BCV), last)
    return jnp.min(tokens_BCV, axis=-1)


def _tokens_of(values_BCV) -> Int[Array, "B C V"]:
    return jax.lax.broadcasted_iota(jnp.int32, values_BCV.shape, values_BCV.ndim - 1)


def _sum_where(valid_BC, values_BC) -> jax.Array:
    return jnp.sum(jnp.where(valid_BC, values_BC, 0.0))


def _is_anchor(target: tuple[Targets, ...]) -> Bool[Array, "B T"]:
    """Where every MTP depth has a valid target: drafts of a whole round."""
    anchor_BT = jnp.ones_like(target[0].valid_BT)
    for each in target[1:]:
        anchor_BT &= each.valid_BT
    return anchor_BT


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
    own = functools.partial(_likeliest, model.lm_head) if asked.own_tokens else None
    drafts = model.draft(main.state_BTD, batch.tokens_BT, context, asked.num_draft_tokens, own)
    drafted = drafts.hidden
    if asked.shifted:  # what comes round from a row's beginning to its end has no target there
        drafted = tuple(jnp.roll(h_BTD, -1, axis=1) for h_BTD in drafted)
    hidden = (main.hidden_BTD, *drafted)
    target = targets_by_depth(batch, len(drafted))
    sums, choices = through_head(model.lm_head, hidden, target, asked)
    acceptance, rounds = count_acceptance(batch, choices, asked.rule)
    counts = counts_of(target, asked)
    text_nll = -_sum_where(target[0].valid_BT & asked.distributions, choices.log_prob[0])
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


def _likeliest(lm_head: Embedding, h_BTD: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    """The token with the largest logit at each position; no gradient goes through the choice."""
    rows, length, _ = h_BTD.shape
    chunk = chunk_length(rows, length, lm_head.weight.shape[0], 1)
    chunks, head = _in_chunks(jax.lax.stop_gradient(h_BTD), chunk), lm_head.ready(h_BTD.dtype)
    tokens = jax.lax.map(lambda h_BCD: _largest(head.logits(h_BCD)), chunks)
    return _joined(tokens, length)


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
    anchors_BT = _is_anchor(target) & (asked.distributions and len(target) > 1)
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

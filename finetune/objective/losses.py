"""Losses of a packed batch: the main model's and each MTP depth's, in chunks of the sequence.

Depth 0 is the main model; depth k = 1, 2, ... predicts k tokens further.
Source: DeepSeek-V3 report (arXiv 2412.19437) section 2.2.
B batch, T position, C chunk of positions, D hidden, V vocab, K depths, L layers, E experts.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from finetune.data.packing import Batch
from finetune.objective.acceptance import (
    AcceptanceCounts,
    Rounds,
    count_acceptance,
    is_learnt,
)
from finetune.settings import TrainMode
from mtp_model import Context, DeepSeekV3, MainStates, make_context
from mtp_model.layers import Embedding
from mtp_model.mtp import shift_left
from mtp_model.sharding import BATCH_AXES, axis_size

# Float32 logits that exist at a time on one device; the whole [B, T, V] never does.
LOGITS_BYTES = 256 << 20


class Targets(NamedTuple):
    """What each position is to predict, and whether that counts."""

    tokens_BT: Int[Array, "B T"]
    valid_BT: Bool[Array, "B T"]


class TokenLoss(NamedTuple):
    """Negative log-likelihood in nats summed over valid targets, their number, and the argmax."""

    nll_sum: jax.Array  # float32 scalar
    num_targets: jax.Array  # int32 scalar
    greedy_BT: Int[Array, "B T"]


class Measured(NamedTuple):
    """Sums over a batch, which add up over batches; row 0 of *_K1 is the main model."""

    nll_sum_K1: Float[Array, "K1"]
    num_targets_K1: Int[Array, "K1"]
    acceptance: AcceptanceCounts
    num_tokens: jax.Array  # int32 scalar, padding not counted


class ExpertLoad(NamedTuple):
    """Real tokens that chose each expert; one row a MoE layer, one row a depth."""

    moe_layers_LE: Float[Array, "L E"]
    mtp_KE: Float[Array, "K E"]


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


def chunk_length(rows: int, length: int, vocab_size: int) -> int:
    """Positions whose float32 logits take at most LOGITS_BYTES on one device."""
    rows_here = max(1, rows // math.prod(map(axis_size, BATCH_AXES)))
    vocab_here = max(1, vocab_size // axis_size("tensor"))
    return min(length, max(1, LOGITS_BYTES // (4 * rows_here * vocab_here)))


def token_loss(
    lm_head: Embedding,
    hidden_BTD: Float[Array, "B T D"],
    target: Targets,
) -> TokenLoss:
    """Cross entropy of the head's logits, a chunk of positions at a time.

    Each chunk's logits are computed again in the backward pass.
    """
    rows, length, _ = hidden_BTD.shape
    chunk = chunk_length(rows, length, lm_head.weight.shape[0])
    count = -(-length // chunk)

    @jax.checkpoint
    def of_chunk(args):
        h_BCD, target_BC, valid_BC = args
        logits_BCV = lm_head.logits(h_BCD)
        log_sum_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        chosen_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1)[..., 0]
        nll_BC = jnp.where(valid_BC, log_sum_BC - chosen_BC, 0.0)
        return jnp.sum(nll_BC), jnp.argmax(logits_BCV, axis=-1).astype(jnp.int32)

    def in_chunks(x_BT):
        padding = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x_BT.ndim - 2)
        split = jnp.pad(x_BT, padding).reshape(rows, count, chunk, *x_BT.shape[2:])
        return jnp.moveaxis(split, 1, 0)

    chunks = jax.tree.map(in_chunks, (hidden_BTD, target.tokens_BT, target.valid_BT))
    nll_sums, greedy = jax.lax.map(of_chunk, chunks)
    greedy_BT = jnp.moveaxis(greedy, 0, 1).reshape(rows, count * chunk)[:, :length]
    num_targets = jnp.sum(target.valid_BT, dtype=jnp.int32)
    return TokenLoss(jnp.sum(nll_sums), num_targets, greedy_BT)


def context_of(batch: Batch) -> Context:
    """What the layers are told about the tokens of a batch."""
    return make_context(batch.segment_ids_BT, batch.positions_BT)


def measure(
    model: DeepSeekV3, batch: Batch, main: MainStates, num_draft_tokens: int | None = None
) -> Measurement:
    """Run the depths on a batch, each fed the true next token, and add up all losses.

    main: what the main model made of the batch, `model.main(batch.tokens_BT, context_of(batch))`;
    a gradient flows back into it unless it is stopped there.
    num_draft_tokens: depths to run (default: the modules there are; more reuse them).
    """
    drafts = model.draft(main.state_BTD, batch.tokens_BT, context_of(batch), num_draft_tokens)
    losses = [
        token_loss(model.lm_head, hidden_BTD, targets(batch, k))
        for k, hidden_BTD in enumerate((main.hidden_BTD, *drafts.hidden))
    ]
    greedy, *drafted = (loss.greedy_BT for loss in losses)
    acceptance, rounds = count_acceptance(batch, greedy, tuple(drafted))
    measured = Measured(
        nll_sum_K1=jnp.stack([loss.nll_sum for loss in losses]),
        num_targets_K1=jnp.stack([loss.num_targets for loss in losses]),
        acceptance=acceptance,
        num_tokens=jnp.sum(batch.segment_ids_BT != 0, dtype=jnp.int32),
    )
    load = ExpertLoad(main.expert_load_LE, drafts.expert_load_LE)
    return Measurement(measured, load, rounds)


def mean_losses(measured: Measured) -> Float[Array, "K1"]:
    """Mean over its valid targets, for the main model and each depth; 0 where there are none."""
    counts_K1 = jnp.maximum(measured.num_targets_K1, 1).astype(jnp.float32)
    return measured.nll_sum_K1 / counts_K1


def objective(measured: Measured, mode: TrainMode, mtp_lambda: float) -> jax.Array:
    """What training lowers: L_main + lambda / K * sum of the depths' losses.

    With the main model frozen, L_main is a constant and lambda only a factor: the mean of the
    depths' losses is lowered.
    """
    losses_K1 = mean_losses(measured)
    mtp = jnp.mean(losses_K1[1:])
    return mtp if mode == "mtp" else losses_K1[0] + mtp_lambda * mtp

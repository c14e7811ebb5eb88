"""What the output head says of hidden states, in chunks of the sequence: sums, choices, gradients.

A file of its own: whole logits are the largest thing in a step, and never exist.
B batch, T position, C chunk of positions, D hidden, V vocab, K depths; p is the main model's
distribution at a target, q that of a depth.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from finetune.objective.acceptance import Choices, Rule
from mtp_model.layers import Embedding, Head
from mtp_model.sharding import axis_size, rows_here

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
    # Of HeadSums, beside a frozen head: those that the drafts, and nothing else, learn by.
    learnt: tuple[str, ...] = ()


class Targets(NamedTuple):
    """What each position is to predict, and whether that counts."""

    tokens_BT: Int[Array, "B T"]
    valid_BT: Bool[Array, "B T"]


class HeadSums(NamedTuple):
    """What the head's logits say of a chunk, or of all of it."""

    nll_K1: Float[Array, "K1"]
    kl_K: Float[Array, "K"]
    overlap_K: Float[Array, "K"]
    joint: jax.Array
    entropy: jax.Array


def chunk_length(rows: int, length: int, vocab_size: int, num_logits: int) -> int:
    """Positions whose float32 logits, `num_logits` at each, take at most LOGITS_BYTES a device."""
    vocab_here = max(1, vocab_size // axis_size("tensor"))
    return min(length, max(1, LOGITS_BYTES // (4 * rows_here(rows) * vocab_here * num_logits)))


def through_head(
    lm_head: Embedding,
    hidden: tuple[Float[Array, "B T D"], ...],
    target: tuple[Targets, ...],
    asked: Asked,
) -> tuple[HeadSums, Choices]:
    """One pass over the logits of the main model and all depths, a chunk of positions at a time.

    Without sums that are said to be learnt, each of several chunks' logits are computed again in
    the backward pass. No gradient goes through the main model's distribution. nll is of temperature
    1, all else of the temperature that is asked for.
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

    of_chunk = functools.partial(_of_chunk, temperature=asked.temperature, drafted=asked.drafted)
    if asked.learnt:
        of_chunk = _with_kept_gradient(of_chunk, asked.learnt)
    elif count > 1:
        of_chunk = jax.checkpoint(of_chunk)

    behind = behind_chunks(jax.lax.stop_gradient(hidden[0])) if asked.distributions else None
    chunks = (*jax.tree.map(lambda x: _in_chunks(x, chunk), (hidden, target)), behind)
    sums, choices = jax.lax.map(lambda args: of_chunk(head, *args), chunks)
    whole = jax.tree.map(lambda x: _joined(x, length), choices)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums), whole


def _with_kept_gradient(of_chunk: Callable[..., Any], learnt: tuple[str, ...]) -> Any:
    """What `of_chunk` gives, and the gradient of the drafts' hidden states made beside it.

    So no logits are there, or computed, a second time. How much a sum weighs is known in the end
    only, and is a factor for each draft. No gradient goes elsewhere.
    """
    kept = jax.custom_vjp(of_chunk)

    def forward(head, hidden, *others):
        def of_drafts(drafts):
            sums, choices = of_chunk(head, (hidden[0], *drafts), *others)
            return {name: getattr(sums, name) for name in learnt}, (sums, choices)

        found, pull, out = jax.vjp(of_drafts, hidden[1:], has_aux=True)
        nothing = jax.tree.map(jnp.zeros_like, found)
        made = {
            name: pull({**nothing, name: jnp.ones_like(each)})[0] for name, each in found.items()
        }
        return out, made

    def backward(made, cotangents):
        sums, _ = cotangents

        def of_draft(k: int):
            parts = []
            for name, drafts in made.items():
                weight = getattr(sums, name)
                weight = weight[k - len(drafts)] if weight.ndim else weight
                parts.append(drafts[k].astype(jnp.float32) * weight)
            return functools.reduce(jnp.add, parts).astype(made[learnt[0]][k].dtype)

        drafts = tuple(map(of_draft, range(len(made[learnt[0]]))))
        return None, (None, *drafts), None, None

    kept.defvjp(forward, backward)
    return kept


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
        nll.append(-sum_where(target_k.valid_BT, at_tokens(log_q, target_k.tokens_BT)))
        if temperature != 1.0:
            log_q = jax.nn.log_softmax(logits_BCV / temperature, axis=-1)
        log_d = log_q  # of what is drafted
        if k and drafted:
            logits_BCV = _only(logits_BCV, drafted)
            log_d = jax.nn.log_softmax(logits_BCV / temperature, axis=-1)
        greedy.append(largest(logits_BCV))
        log_prob.append(jax.lax.stop_gradient(at_tokens(log_d, target_k.tokens_BT)))
        if log_p is None:
            continue
        same = log_p[:, k : k + log_q.shape[1]]
        p = jnp.exp(same)
        if k == 0:
            entropy = -sum_where(target_k.valid_BT, jnp.sum(p * same, axis=-1))
            continue
        kl.append(sum_where(target_k.valid_BT, jnp.sum(p * (same - log_q), axis=-1)))
        q = jnp.exp(log_d)
        overlap_BC = jnp.sum(jnp.where(q >= p, p, q), axis=-1)  # NaN where q is
        overlap.append(sum_where(target_k.valid_BT, overlap_BC))
        product_BC *= overlap_BC
        joint_BC += product_BC / (len(hidden) - 1)
    none_K = jnp.zeros((len(hidden) - 1,), jnp.float32)
    sums = HeadSums(
        nll_K1=jnp.stack(nll),
        kl_K=jnp.stack(kl) if kl else none_K,
        overlap_K=jnp.stack(overlap) if overlap else none_K,
        joint=sum_where(is_anchor(target), joint_BC),
        entropy=entropy,
    )
    return sums, Choices(tuple(greedy), tuple(log_prob))


def _only(logits_BCV, tokens: tuple[int, ...]) -> Float[Array, "B C V"]:
    """Logits of these tokens; all others are impossible."""
    allowed_V = np.zeros(logits_BCV.shape[-1], np.bool_)
    allowed_V[list(tokens)] = True
    return jnp.where(allowed_V[None, None], logits_BCV, -jnp.inf)


def at_tokens(values_BCV, tokens_BC) -> Float[Array, "B C"]:
    """Each position's value of its token.

    As a sum, the others 0: the gradient is a comparison that XLA fuses with what follows, where
    that of an index fills zeros and scatters into them.
    """
    here_BCV = _tokens_of(values_BCV) == tokens_BC[..., None]
    return jnp.sum(jnp.where(here_BCV, values_BCV, 0.0), axis=-1)


def largest(logits_BCV) -> Int[Array, "B C"]:
    """The first token with the largest logit: argmax, whose loop XLA does not vectorise on CPU."""
    largest_BC1 = jnp.max(logits_BCV, axis=-1, keepdims=True)
    last = logits_BCV.shape[-1] - 1  # also where the largest is NaN, which nothing equals
    tokens_BCV = jnp.where(logits_BCV == largest_BC1, _tokens_of(logits_BCV), last)
    return jnp.min(tokens_BCV, axis=-1)


def _tokens_of(values_BCV) -> Int[Array, "B C V"]:
    return jax.lax.broadcasted_iota(jnp.int32, values_BCV.shape, values_BCV.ndim - 1)


def sum_where(valid_BC, values_BC) -> jax.Array:
    return jnp.sum(jnp.where(valid_BC, values_BC, 0.0))


def is_anchor(target: tuple[Targets, ...]) -> Bool[Array, "B T"]:
    """Where every MTP depth has a valid target: drafts of a whole round."""
    anchor_BT = jnp.ones_like(target[0].valid_BT)
    for each in target[1:]:
        anchor_BT &= each.valid_BT
    return anchor_BT


def likeliest(lm_head: Embedding, h_BTD: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    """The token with the largest logit at each position; no gradient goes through the choice."""
    rows, length, _ = h_BTD.shape
    chunk = chunk_length(rows, length, lm_head.weight.shape[0], 1)
    chunks, head = _in_chunks(jax.lax.stop_gradient(h_BTD), chunk), lm_head.ready(h_BTD.dtype)
    tokens = jax.lax.map(lambda h_BCD: largest(head.logits(h_BCD)), chunks)
    return _joined(tokens, length)

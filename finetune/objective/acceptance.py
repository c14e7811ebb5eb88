"""How many drafted tokens a greedy decoder would accept on a text: a definition, apart from losses.

B batch, T position, K depths.

With g[i] the main model's greedy choice at position i (its prediction of t[i+1]) and d_k[i] the
choice of depth k (its prediction of t[i+k+1]), both fed the text. A decoder goes over a document in
*rounds*. The first is at the position before the first learnt token (a prompt's tokens don't
count). In the round at i the decoder has t[i+1], and drafts t[i+2], t[i+3], ...:

* draft k is *reached* iff drafts 1..k-1 are accepted, the text goes on with them, and its place,
  t[i+k+1], is a learnt token of the document;
* it is *accepted* iff it is reached and d_k[i] == g[i+k].

The round ends at the first draft that is not accepted, or after K. The main model gives one token
more, so the next round is at i + a + 1, where a is the number of accepted drafts that are in the
text. Averages over all positions would count the easy places inside an accepted run again and
again, which a decoder jumps over.

On text that the main model wrote greedily this is what a greedy decoder does, token for token.
Other text ends a round early where it leaves what the main model would write; drafts after that
place are not reached. So accepted_k / reached_k is the rate of draft k given that those before it
are accepted; the product of these rates up to k is the probability that the first k drafts are all
accepted, *acceptance* of position k as serving engines report it, and 1 + the sum of the products
is the mean accepted length.

*Agreement* is the looser share of d_k[i] == g[i+k] over all positions whose t[i+k+1] is learnt.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from finetune.data.packing import Batch
from mtp_model.mtp import shift_left


class AcceptanceCounts(NamedTuple):
    """int32; entry k-1 of [K] is depth k's. Counts of several batches add up."""

    reached_K: Int[Array, "K"]
    accepted_K: Int[Array, "K"]
    compared_K: Int[Array, "K"]
    agreed_K: Int[Array, "K"]
    learnt: jax.Array  # scalar: learnt tokens that the main model predicts
    greedy: jax.Array  # scalar: those of them that are its greedy choice


class Rounds(NamedTuple):
    """Drafts reached and accepted in the round at each position; 0 where no round is."""

    reached_BT: Int[Array, "B T"]
    accepted_BT: Int[Array, "B T"]


def count_acceptance(
    batch: Batch, greedy_BT: Int[Array, "B T"], drafted: tuple[Int[Array, "B T"], ...]
) -> tuple[AcceptanceCounts, Rounds]:
    """Counts over a batch, and its rounds. greedy: the main model's choices; drafted: each depth's.

    A segment is taken as a document.
    """
    is_greedy_BT, follows_BT = _ahead(batch.tokens_BT, 1) == greedy_BT, is_learnt(batch, 1)
    compared = [is_learnt(batch, k + 1) for k in range(1, len(drafted) + 1)]
    agreed = [
        inside_BT & (draft_BT == _ahead(greedy_BT, k))
        for k, (draft_BT, inside_BT) in enumerate(zip(drafted, compared, strict=True), start=1)
    ]
    rounds = _rounds(follows_BT, is_greedy_BT, compared, agreed)
    depths = range(1, len(drafted) + 1)
    counts = AcceptanceCounts(
        reached_K=_counts([rounds.reached_BT >= k for k in depths]),
        accepted_K=_counts([rounds.accepted_BT >= k for k in depths]),
        compared_K=_counts(compared),
        agreed_K=_counts(agreed),
        learnt=jnp.sum(follows_BT, dtype=jnp.int32),
        greedy=jnp.sum(follows_BT & is_greedy_BT, dtype=jnp.int32),
    )
    return counts, rounds


def _ahead(x_BT, k: int) -> Int[Array, "B T"]:
    """x[i + k]; past the end a number that is no token."""
    return shift_left(jnp.asarray(x_BT), k, -1)


def is_learnt(batch: Batch, k: int) -> Bool[Array, "B T"]:
    """Whether t[i + k] is in the row, in the document of i, and its own loss mask is 1.

    Padding (segment 0) is no document.
    """
    segments_BT = jnp.asarray(batch.segment_ids_BT)
    inside_BT = (_ahead(segments_BT, k) == segments_BT) & (segments_BT != 0)
    return inside_BT & (_ahead(batch.loss_mask_BT, k) == 1)


def _rounds(
    follows_BT: Bool[Array, "B T"],
    is_greedy_BT: Bool[Array, "B T"],
    compared: list[Bool[Array, "B T"]],
    agreed: list[Bool[Array, "B T"]],
) -> Rounds:
    """Walk each row from its first position: where rounds are, and what becomes of their drafts.

    follows: t[i+1] is learnt, which a round needs; is_greedy: t[i+1] == g[i].
    """
    on_text_BT = follows_BT  # drafts before this one are accepted, and the text goes on with them
    zero_BT = jnp.zeros(follows_BT.shape, jnp.int32)
    reached_BT = accepted_BT = kept_BT = zero_BT
    for k, (inside_BT, agrees_BT) in enumerate(zip(compared, agreed, strict=True), start=1):
        reached = on_text_BT & inside_BT
        accepted = reached & agrees_BT
        on_text_BT = accepted & (_ahead(is_greedy_BT.astype(jnp.int32), k) == 1)
        reached_BT += reached.astype(jnp.int32)
        accepted_BT += accepted.astype(jnp.int32)
        kept_BT += on_text_BT.astype(jnp.int32)
    visited_BT = _visited(jnp.arange(follows_BT.shape[1])[None] + 1 + kept_BT)
    return Rounds(*(jnp.where(visited_BT, x_BT, zero_BT) for x_BT in (reached_BT, accepted_BT)))


def _visited(next_BT: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """The positions of a walk that begins at 0 and goes from i to next[i] > i.

    In log2(T) parallel steps: from all places of the first 2^s steps to those 2^s further on.
    """
    rows, length = next_BT.shape
    row_B1 = jnp.arange(rows)[:, None]
    visited_BT = jnp.zeros((rows, length), jnp.bool_).at[:, 0].set(True)
    for _ in range(length.bit_length()):
        visited_BT = visited_BT.at[row_B1, next_BT].max(visited_BT, mode="drop")
        ended_BT = next_BT >= length
        further_BT = jnp.take_along_axis(next_BT, jnp.minimum(next_BT, length - 1), axis=1)
        next_BT = jnp.where(ended_BT, length, further_BT)
    return visited_BT


def _counts(masks) -> Int[Array, "K"]:
    counts = [jnp.sum(mask_BT, dtype=jnp.int32) for mask_BT in masks]
    return jnp.stack(counts) if counts else jnp.zeros((0,), jnp.int32)

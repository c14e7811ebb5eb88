"""How many drafted tokens a decoder would accept on a text: a definition, apart from losses.

B batch, T position, K depths.

With g[i] the main model's greedy choice at position i (its prediction of t[i+1]), d_k[i] the choice
of depth k (its prediction of t[i+k+1]), p and q_k their distributions, all fed the text. A decoder
goes over a document in *rounds*. The first is at the position before the first learnt token (a
prompt's tokens don't count). In the round at i the decoder has t[i+1], and drafts t[i+2], t[i+3],
...:

* draft k is *reached* iff drafts 1..k-1 are accepted, the text goes on with them, and its place,
  t[i+k+1], is a learnt token of the document;
* it is *accepted* if it is reached, by the rule of the decoder:
  - `greedy` (temperature 0): iff d_k[i] == g[i+k];
  - `target` (the main model samples, drafts are greedy; what serving engines do unless told
    otherwise): iff d_k[i] == t[i+k+1], the token that was sampled;
  - `rejection` (drafts are sampled too, and accepted with probability min(1, p/q)): given the token
    x = t[i+k+1] that came out, with probability min(1, q_k(x) / p(x)).

The round ends at the first draft that is not accepted, or after K. The main model gives one token
more, so the next round is at i + a + 1, where a is the number of accepted drafts that are in the
text. Averages over all positions would count the easy places inside an accepted run again and
again, which a decoder jumps over. Where acceptance is a matter of chance, so is where rounds are:
all counts are then expected ones over all ways that a decoder may go.

On text that the main model wrote by the rule's own sampling this is what a decoder does: for greedy
token for token, otherwise on average. Other text ends a greedy round early where it leaves what the
main model would write; drafts after that place are not reached. So accepted_k / reached_k is the
rate of draft k given that those before it are accepted; the product of these rates up to k is the
probability that the first k drafts are all accepted, *acceptance* of position k as serving engines
report it, and 1 + the sum of the products is the mean accepted length.

*Agreement* is the looser share of d_k[i] == g[i+k] over all positions whose t[i+k+1] is learnt.

Sources: speculative sampling (arXiv 2211.17192, 2302.01318); rounds as vLLM's metrics count them.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from finetune.data.packing import Batch
from mtp_model.mtp import shift_left

Rule = Literal["greedy", "target", "rejection"]


class Choices(NamedTuple):
    """By position, main model first: the argmax, and the log-probability of the target."""

    greedy: tuple[Int[Array, "B T"], ...]
    log_prob: tuple[Float[Array, "B T"], ...]


class AcceptanceCounts(NamedTuple):
    """Entry k-1 of [K] is depth k's; reached and accepted float32, the others int32.

    Counts of several batches add up.
    """

    reached_K: Float[Array, "K"]
    accepted_K: Float[Array, "K"]
    compared_K: Int[Array, "K"]
    agreed_K: Int[Array, "K"]
    learnt: jax.Array  # scalar: learnt tokens that the main model predicts
    greedy: jax.Array  # scalar: those of them that are its greedy choice


class Rounds(NamedTuple):
    """How often draft k of a round at each position is reached and accepted; 0 where no round is.

    0 or 1, with the rule `rejection` the probability.
    """

    reached_KBT: Float[Array, "K B T"]
    accepted_KBT: Float[Array, "K B T"]


class _Draft(NamedTuple):
    """Draft k of a round at each position that reaches it."""

    compared_BT: Bool[Array, "B T"]  # t[i+k+1] is learnt
    agrees_BT: Bool[Array, "B T"]  # with the main model's greedy choice
    accepted_BT: Float[Array, "B T"]  # with which probability it is accepted
    goes_on_BT: Float[Array, "B T"]  # accepted, and in the text


def count_acceptance(
    batch: Batch, choices: Choices, rule: Rule = "greedy"
) -> tuple[AcceptanceCounts, Rounds]:
    """Counts over a batch, and its rounds. A segment is taken as a document."""
    follows_BT, drafts = is_learnt(batch, 1), _drafts(batch, choices, rule)
    is_greedy_BT = _ahead(batch.tokens_BT, 1) == choices.greedy[0]
    rounds = _rounds(follows_BT, drafts)
    counts = AcceptanceCounts(
        reached_K=jnp.sum(rounds.reached_KBT, axis=(1, 2)),
        accepted_K=jnp.sum(rounds.accepted_KBT, axis=(1, 2)),
        compared_K=_counts([draft.compared_BT for draft in drafts]),
        agreed_K=_counts([draft.compared_BT & draft.agrees_BT for draft in drafts]),
        learnt=jnp.sum(follows_BT, dtype=jnp.int32),
        greedy=jnp.sum(follows_BT & is_greedy_BT, dtype=jnp.int32),
    )
    return counts, rounds


def _ahead(x_BT, k: int) -> Array:
    """x[i + k]; past the end -1, which is no token, or False."""
    x_BT = jnp.asarray(x_BT)
    return shift_left(x_BT, k, 0 if x_BT.dtype == jnp.bool_ else -1)


def is_learnt(batch: Batch, k: int) -> Bool[Array, "B T"]:
    """Whether t[i + k] is in the row, in the document of i, and its own loss mask is 1.

    Padding (segment 0) is no document.
    """
    segments_BT = jnp.asarray(batch.segment_ids_BT)
    inside_BT = (_ahead(segments_BT, k) == segments_BT) & (segments_BT != 0)
    return inside_BT & (_ahead(batch.loss_mask_BT, k) == 1)


def _drafts(batch: Batch, choices: Choices, rule: Rule) -> list[_Draft]:
    """What becomes of draft 1, 2, ... of a round at each position that reaches it."""
    greedy_BT, *drafted = choices.greedy
    log_p_BT, *log_q = choices.log_prob
    is_greedy_BT = _ahead(batch.tokens_BT, 1) == greedy_BT
    found = []
    for k, (draft_BT, log_q_BT) in enumerate(zip(drafted, log_q, strict=True), start=1):
        agrees_BT = draft_BT == _ahead(greedy_BT, k)
        if rule == "rejection":
            accepted_BT = jnp.exp(jnp.minimum(log_q_BT - _ahead(log_p_BT, k), 0.0))
        elif rule == "target":
            accepted_BT = (draft_BT == _ahead(batch.tokens_BT, k + 1)).astype(jnp.float32)
        else:
            accepted_BT = agrees_BT.astype(jnp.float32)
        in_text_BT = _ahead(is_greedy_BT, k) | (rule != "greedy")
        goes_on_BT = jnp.where(in_text_BT, accepted_BT, 0.0)
        found.append(_Draft(is_learnt(batch, k + 1), agrees_BT, accepted_BT, goes_on_BT))
    return found


def _rounds(follows_BT: Bool[Array, "B T"], drafts: list[_Draft]) -> Rounds:
    """Walk each row from its first position: where rounds are, and what becomes of their drafts.

    follows: t[i+1] is learnt, which a round needs.
    """
    reached, accepted = [], []
    on_text = [follows_BT.astype(jnp.float32)]  # all drafts so far are accepted and in the text
    for draft in drafts:
        reached_BT = jnp.where(draft.compared_BT, on_text[-1], 0.0)
        reached.append(reached_BT)
        accepted.append(reached_BT * draft.accepted_BT)
        on_text.append(reached_BT * draft.goes_on_BT)
    in_text = jnp.stack([jnp.ones_like(on_text[0]), *on_text[1:], jnp.zeros_like(on_text[0])])
    visited_BT = _visited(in_text[:-1] - in_text[1:])
    none_KBT = jnp.zeros((0, *follows_BT.shape), jnp.float32)
    parts = (jnp.stack(x) if x else none_KBT for x in (reached, accepted))
    return Rounds(*(x_KBT * visited_BT[None] for x_KBT in parts))


def _visited(kept_NBT: Float[Array, "N B T"]) -> Float[Array, "B T"]:
    """The probability that a walk from position 0 comes by; from i it goes to i + n + 1 with
    probability kept[n, i]."""

    def step(coming_NB, kept_NB):
        here_B = coming_NB[0]
        further_NB = jnp.concatenate([coming_NB[1:], jnp.zeros_like(coming_NB[:1])])
        return further_NB + here_B[None] * kept_NB, here_B

    start_NB = jnp.zeros(kept_NBT.shape[:2], jnp.float32).at[0].set(1.0)
    return jax.lax.scan(step, start_NB, jnp.moveaxis(kept_NBT, 2, 0), unroll=16)[1].T


def _counts(masks) -> Int[Array, "K"]:
    counts = [jnp.sum(mask_BT, dtype=jnp.int32) for mask_BT in masks]
    return jnp.stack(counts) if counts else jnp.zeros((0,), jnp.int32)

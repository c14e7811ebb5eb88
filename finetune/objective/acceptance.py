"""How many drafted tokens greedy decoding would accept: a definition, apart from the losses.

B batch, T position, K depths.

With g[i] the main model's greedy choice at position i (its prediction of t[i+1]) and d_k[i] the
choice of depth k (its prediction of t[i+k+1]), both fed the text:

* position i is *eligible* at depth k iff t[i+1..i+k] are in the document of i and equal
  g[i..i+k-1]: the text goes on as greedy decoding would, so decoding would be in this state;
* draft k is *reached* there iff drafts 1..k-1 are accepted;
* it is *accepted* there iff it is reached and d_k[i] == g[i+k].

accepted_k / reached_k is the rate of draft k given that those before it are accepted. Their product
up to k is the probability that the first k drafts are all accepted: *acceptance* of position k, as
serving engines report it, and its sum plus 1 is the mean accepted length. Each single count is
exact for greedy decoding; text that goes on greedily is easier than text at large, and the product
keeps that bias small where accepted_k / eligible_k does not (a small model, 3 drafts, against
really continuing 1,529 contexts greedily: length 2.18, product 2.29, the other 2.68).
*Agreement* is the looser share of d_k[i] == g[i+k] over all positions with t[i+k] in the document,
whether or not the text is what greedy decoding would write: defined where nothing is eligible.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from finetune.data.packing import Batch
from mtp_model.mtp import shift_left


class AcceptanceCounts(NamedTuple):
    """Positions, int32 [K], entry k-1 for depth k; counts of several batches add up."""

    reached_K: Int[Array, "K"]
    accepted_K: Int[Array, "K"]
    compared_K: Int[Array, "K"]
    agreed_K: Int[Array, "K"]


def count_acceptance(
    batch: Batch, greedy_BT: Int[Array, "B T"], drafted: tuple[Int[Array, "B T"], ...]
) -> AcceptanceCounts:
    """Count over a batch. greedy: the main model's choices (argmax); drafted: each depth's."""
    segments_BT = batch.segment_ids_BT
    accepted_BT = segments_BT != 0
    masks = []
    for k, draft_BT in enumerate(drafted, start=1):
        inside_BT = (shift_left(segments_BT, k, 0) == segments_BT) & (segments_BT != 0)
        text_is_greedy_BT = shift_left(batch.tokens_BT, k, -1) == shift_left(greedy_BT, k - 1, -2)
        agrees_BT = inside_BT & (draft_BT == shift_left(greedy_BT, k, -1))
        # accepted at k - 1 implies eligible at k - 1: one more token has to be greedy
        reached_BT = accepted_BT & inside_BT & text_is_greedy_BT
        accepted_BT = reached_BT & agrees_BT
        masks.append((reached_BT, accepted_BT, inside_BT, agrees_BT))
    columns = zip(*masks, strict=True) if masks else ((),) * len(AcceptanceCounts._fields)
    return AcceptanceCounts(*map(_counts, columns))


def _counts(masks) -> Int[Array, "K"]:
    counts = [jnp.sum(mask_BT, dtype=jnp.int32) for mask_BT in masks]
    return jnp.stack(counts) if counts else jnp.zeros((0,), jnp.int32)

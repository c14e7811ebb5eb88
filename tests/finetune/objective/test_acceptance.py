"""Acceptance follows its definition, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import choices_of, measured_of, packed

from finetune.data.packing import Batch
from finetune.data.tokens import Tokens
from finetune.objective.acceptance import count_acceptance
from finetune.run.metrics import add_up, summarise


def acceptance_by_loop(batch: Batch, greedy, drafted, rule="greedy"):
    """The definition of finetune/objective/acceptance.py, round by round.

    Counts by name, and [reached, accepted] of the documents of each row.
    """
    tokens, segments, mask = map(np.asarray, (batch.tokens_BT, batch.segment_ids_BT, batch[3]))
    names = ("reached", "accepted", "compared", "agreed")
    counts = {name: [0] * len(drafted) for name in names}
    learnt = is_greedy = 0

    for row in range(len(tokens)):
        for segment in range(1, segments[row].max() + 1):
            places = np.flatnonzero(segments[row] == segment)
            end = places[-1] + 1

            def is_learnt(place, row=row, end=end):
                return place < end and mask[row, place] == 1

            i = places[0]
            while i < end:
                kept = 0
                for k, draft in enumerate(drafted, start=1):
                    if not (is_learnt(i + 1) and is_learnt(i + k + 1)):
                        break
                    counts["reached"][k - 1] += 1
                    wanted = greedy[row, i + k] if rule == "greedy" else tokens[row, i + k + 1]
                    if draft[row, i] != wanted:
                        break
                    counts["accepted"][k - 1] += 1
                    if tokens[row, i + k + 1] != wanted:
                        break
                    kept += 1
                i += kept + 1
            for i in places:
                learnt += int(is_learnt(i + 1))
                is_greedy += int(is_learnt(i + 1) and tokens[row, i + 1] == greedy[row, i])
                for k, draft in enumerate(drafted, start=1):
                    if is_learnt(i + k + 1):
                        counts["compared"][k - 1] += 1
                        counts["agreed"][k - 1] += int(draft[row, i] == greedy[row, i + k])
    return [*counts.values(), learnt, is_greedy]


def random_documents(rng) -> list[Tokens]:
    """Two tokens only, so that text, greedy choices and drafts often agree; prompts, two turns."""
    lengths = rng.integers(1, 16, 8)
    masks = [(rng.random(n) < 0.9) & (np.arange(n) >= rng.integers(0, 5)) for n in lengths]
    return [
        Tokens(rng.integers(0, 2, mask.size).astype(np.int32), mask.astype(np.int32))
        for mask in masks
    ]


@pytest.mark.parametrize("rule", ["greedy", "target"])
@pytest.mark.parametrize("seed", range(8))
def test_acceptance_follows_its_definition(seed, rule):
    rng = np.random.default_rng(seed)
    batch = packed(random_documents(rng), rows=8, row_tokens=32)
    greedy, *drafted = rng.integers(0, 2, (4, *batch.tokens_BT.shape))
    counts, rounds = count_acceptance(batch, choices_of(greedy, drafted), rule)
    expected = acceptance_by_loop(batch, greedy, drafted, rule)
    assert [column.tolist() for column in counts] == expected
    assert counts.accepted_K[1] > 0
    assert rounds.reached_KBT.sum((1, 2)).tolist() == counts.reached_K.tolist()
    assert rounds.accepted_KBT.sum((1, 2)).tolist() == counts.accepted_K.tolist()


def test_a_round_begins_behind_what_the_last_one_accepted():
    """The text is greedy throughout; only at place 2 and 3 do drafts agree."""
    tokens = np.arange(10, dtype=np.int32)
    batch = packed([Tokens(tokens, np.ones(10, np.int32))], rows=1, row_tokens=10)
    greedy = batch.tokens_BT + 1
    good = jnp.isin(jnp.arange(10), jnp.array([2, 3]))[None]
    drafted = tuple(jnp.where(good, batch.tokens_BT + 1 + k, 0) for k in (1, 2))
    counts, rounds = count_acceptance(batch, choices_of(greedy, drafted))
    begin = np.flatnonzero(rounds.reached_KBT[0, 0])
    assert begin.tolist() == [0, 1, 2, 5, 6, 7]  # 3 and 4 were accepted: averages would count 3
    assert counts.reached_K.tolist() == [6, 1]
    assert counts.accepted_K.tolist() == [1, 1]
    assert counts.agreed_K.tolist() == [2, 2]


def test_a_prompt_does_not_count():
    tokens = np.arange(10, dtype=np.int32)
    mask = (np.arange(10) >= 6).astype(np.int32)
    batch = packed([Tokens(tokens, mask)], rows=1, row_tokens=10)
    nothing = jnp.zeros_like(batch.tokens_BT)
    counts, rounds = count_acceptance(batch, choices_of(nothing, [nothing - 1]))
    # token 6 is the main model's own; the first draft is of 7
    assert np.flatnonzero(rounds.reached_KBT[0, 0]).tolist() == [5, 6, 7]
    assert counts.learnt == 4


def test_a_perfect_drafter_is_always_accepted():
    """Text that the main model continues greedily, drafts that equal its choices."""
    tokens = np.arange(12, dtype=np.int32)
    batch = packed([Tokens(tokens, np.ones(12, np.int32))], rows=1, row_tokens=12)
    greedy = batch.tokens_BT + 1
    drafted = tuple(batch.tokens_BT + 1 + k for k in (1, 2, 3))
    measured = measured_of([1.0] * 4, [1] * 4)._replace(
        acceptance=count_acceptance(batch, choices_of(greedy, drafted))[0]
    )
    summary = summarise(jax.device_get(measured))
    assert summary.reached == [3, 3, 2]  # rounds from 0, 4 and 8; the last ends with the text
    assert summary.acceptance == [1.0, 1.0, 1.0]
    assert summary.mean_accepted_length == 4.0
    assert summary.greedy_share == 1.0
    assert summary.to_json()["num_drafts"] == 3
    assert summary.to_json()["num_draft_tokens"] == 8
    assert summary.to_json()["num_accepted_tokens_per_pos"] == [3, 3, 2]
    nothing = tuple(jnp.full_like(draft, -5) for draft in drafted)
    counts, _ = count_acceptance(batch, choices_of(greedy, nothing))
    assert counts.reached_K.tolist() == [10, 0, 0]
    assert counts.accepted_K.tolist() == [0, 0, 0]
    refused = summarise(jax.device_get(measured._replace(acceptance=counts)))
    assert refused.to_json()["num_draft_tokens"] == 30  # all that were drafted


def measured_with(reached: list[int], accepted: list[int]):
    """A batch of three depths with so many drafts reached and accepted in rounds."""
    measured = measured_of([0.0] * 4, [0] * 4)
    counts = measured.acceptance._replace(
        reached_K=np.array(reached),
        accepted_K=np.array(accepted),
        compared_K=np.array([200, 200, 200]),
        agreed_K=np.array([100, 80, 60]),
    )
    return measured._replace(acceptance=counts)


def test_acceptance_is_the_product_of_conditional_rates():
    measured = measured_with([100, 40, 0], [60, 20, 0])
    summary = summarise(jax.device_get(measured))
    assert summary.conditional == [0.6, 0.5, None]
    assert summary.acceptance == [0.6, 0.3, None]
    assert summary.agreement == [0.5, 0.4, 0.3]
    assert summary.mean_accepted_length is None
    counts = measured.acceptance
    by_depth = [name for name in counts._fields if name.endswith("_K")]
    two = counts._replace(**{name: getattr(counts, name)[:2] for name in by_depth})
    shorter = summarise(jax.device_get(measured._replace(acceptance=two)))
    assert shorter.mean_accepted_length == pytest.approx(1.9)


def test_behind_a_position_where_nothing_is_accepted_acceptance_is_zero():
    """Not unknown, though no draft reaches it: the mean accepted length would be unknown too."""
    summary = summarise(jax.device_get(measured_with([100, 40, 0], [60, 0, 0])))
    assert summary.conditional == [0.6, 0.0, None]
    assert summary.acceptance == [0.6, 0.0, 0.0]
    assert summary.mean_accepted_length == pytest.approx(1.6)


def test_sums_of_batches_add_up():
    first, second = measured_of([8.0, 9.0], [4, 3]), measured_of([2.0, 1.0], [1, 2])
    total = add_up([first, second])
    assert (total.nll_sum_K1.tolist(), total.num_targets_K1.tolist()) == ([10.0, 10.0], [5, 5])
    with pytest.raises(ValueError, match="no batch"):
        add_up([])

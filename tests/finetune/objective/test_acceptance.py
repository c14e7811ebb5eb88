"""Acceptance follows its definition, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import measured_of, packed

from finetune.data.packing import Batch
from finetune.data.tokens import Tokens
from finetune.objective.acceptance import count_acceptance
from finetune.run.metrics import add_up, summarise


def acceptance_by_loop(batch: Batch, greedy, drafted):
    """The definition of finetune/objective/acceptance.py, one position at a time."""
    tokens, segments = np.asarray(batch.tokens_BT), np.asarray(batch.segment_ids_BT)
    names = ("reached", "accepted", "compared", "agreed")
    counts = {name: [0] * len(drafted) for name in names}
    for row, i in np.argwhere(segments != 0):
        document_end = i + int((segments[row, i:] == segments[row, i]).sum())
        before_accepted = True
        for k, draft in enumerate(drafted, start=1):
            if i + k >= document_end:
                break
            agrees = draft[row, i] == greedy[row, i + k]
            eligible = all(tokens[row, i + j] == greedy[row, i + j - 1] for j in range(1, k + 1))
            counts["compared"][k - 1] += 1
            counts["agreed"][k - 1] += int(agrees)
            counts["reached"][k - 1] += int(eligible and before_accepted)
            counts["accepted"][k - 1] += int(eligible and before_accepted and agrees)
            before_accepted = before_accepted and agrees
    return list(counts.values())


@pytest.mark.parametrize("seed", range(5))
def test_acceptance_follows_its_definition(seed):
    """Two tokens only, so that text, greedy choices and drafts often agree."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 16, 8)
    documents = [
        Tokens(rng.integers(0, 2, n).astype(np.int32), np.ones(n, np.int32)) for n in lengths
    ]
    batch = packed(documents, rows=8, row_tokens=32)
    greedy, *drafted = rng.integers(0, 2, (4, *batch.tokens_BT.shape))
    counts = count_acceptance(batch, jnp.asarray(greedy), tuple(map(jnp.asarray, drafted)))
    assert [column.tolist() for column in counts] == acceptance_by_loop(batch, greedy, drafted)
    assert counts.accepted_K[1] > 0


def test_a_perfect_drafter_is_always_accepted():
    """Text that the main model continues greedily, drafts that equal its choices."""
    tokens = np.arange(12, dtype=np.int32)
    batch = packed([Tokens(tokens, np.ones(12, np.int32))], rows=1, row_tokens=12)
    greedy = batch.tokens_BT + 1
    drafted = tuple(batch.tokens_BT + 1 + k for k in (1, 2, 3))
    measured = measured_of([1.0] * 4, [1] * 4)._replace(
        acceptance=count_acceptance(batch, greedy, drafted)
    )
    summary = summarise(jax.device_get(measured))
    assert summary.reached == [11, 10, 9]
    assert summary.acceptance == [1.0, 1.0, 1.0]
    assert summary.mean_accepted_length == 4.0
    nothing = tuple(batch.tokens_BT for _ in range(3))  # negative control
    counts = count_acceptance(batch, greedy, nothing)
    assert (counts.accepted_K.tolist(), counts.reached_K.tolist()) == ([0, 0, 0], [11, 0, 0])


def test_acceptance_is_the_product_of_conditional_rates():
    measured = measured_of([0.0] * 4, [0] * 4)
    counts = measured.acceptance._replace(
        reached_K=np.array([100, 40, 0]),
        accepted_K=np.array([60, 20, 0]),
        compared_K=np.array([200, 200, 200]),
        agreed_K=np.array([100, 80, 60]),
    )
    summary = summarise(jax.device_get(measured._replace(acceptance=counts)))
    assert summary.conditional == [0.6, 0.5, None]
    assert summary.acceptance == [0.6, 0.3, None]
    assert summary.agreement == [0.5, 0.4, 0.3]
    assert summary.mean_accepted_length is None
    two = counts._replace(**{name: getattr(counts, name)[:2] for name in counts._fields})
    shorter = summarise(jax.device_get(measured._replace(acceptance=two)))
    assert shorter.mean_accepted_length == pytest.approx(1.9)


def test_sums_of_batches_add_up():
    first, second = measured_of([8.0, 9.0], [4, 3]), measured_of([2.0, 1.0], [1, 2])
    total = add_up([first, second])
    assert (total.nll_sum_K1.tolist(), total.num_targets_K1.tolist()) == ([10.0, 10.0], [5, 5])
    with pytest.raises(ValueError, match="no batch"):
        add_up([])

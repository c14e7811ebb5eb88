"""Intervals of acceptance hold the true value as often as they say."""

import numpy as np
import pytest

from finetune.objective.acceptance import Rounds
from finetune.objective.intervals import CONFIDENCE, DocumentCounts

RATE = 0.6


def rounds_of(reached_BT, accepted_BT) -> Rounds:
    """Rounds with two drafts, from how many are reached and accepted."""
    depths = np.arange(1, 3)[:, None, None]
    return Rounds(reached_BT >= depths, accepted_BT >= depths)


def counted(rng, num_documents: int, num_rounds: int, spread: float, together: bool):
    """Documents of rounds with one draft; its rate varies from document to document by `spread`.

    together False: every round is called a document of its own, which is the mistake.
    """
    counts = DocumentCounts(1)
    for number in range(num_documents):
        rate = np.clip(rng.normal(RATE, spread), 0, 1)
        accepted = (rng.random((1, num_rounds)) < rate).astype(np.int32)
        segments = np.ones((1, num_rounds), np.int32)
        documents = [[number]]
        if not together:
            segments = np.arange(1, num_rounds + 1)[None]
            documents = [[number * num_rounds + k for k in range(num_rounds)]]
        counts.add(Rounds(np.ones_like(accepted)[None], accepted[None]), segments, documents)
    return counts


def coverage(together: bool) -> float:
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(150):
        length, (rate,) = counted(rng, 40, 10, 0.25, together).intervals()
        assert length is not None
        assert rate is not None
        assert np.allclose(length, np.add(rate, 1))
        inside.append(rate.low <= RATE <= rate.high)
    return float(np.mean(inside))


def test_an_interval_holds_the_true_rate():
    """0.95 of intervals within three standard errors of the share of 150; clipping moves little."""
    assert coverage(together=True) == pytest.approx(CONFIDENCE, abs=0.055)


def test_rounds_of_one_document_are_not_independent():
    assert coverage(together=False) < 0.85


def test_parts_of_a_document_are_one():
    """Two rows, and two batches: what counts is the document."""
    rng = np.random.default_rng(1)
    accepted = rng.integers(0, 3, (4, 12)).astype(np.int32)
    reached = np.minimum(accepted + 1, 2)
    segments = np.repeat([[1] * 6 + [2] * 6], 4, axis=0)
    numbers = [[0, 1], [2, 0], [3, 4], [0, 5]]
    whole, parts = DocumentCounts(2), DocumentCounts(2)
    whole.add(rounds_of(reached, accepted), segments, numbers)
    for half in (slice(0, 2), slice(2, 4)):
        parts.add(rounds_of(reached[half], accepted[half]), segments[half], numbers[half])
    assert whole.intervals() == parts.intervals()
    alone = DocumentCounts(2)
    alone.add(rounds_of(reached, accepted), segments, [[2 * r, 2 * r + 1] for r in range(4)])
    assert alone.intervals() != whole.intervals()


def test_one_document_says_nothing_about_others():
    counts = DocumentCounts(2)
    ones = np.ones((1, 5), np.int32)
    counts.add(rounds_of(ones, ones), ones, [[3]])
    assert counts.intervals() == (None, [None, None])


def test_a_draft_that_hardly_any_document_reaches_has_no_interval():
    counts = DocumentCounts(2)
    reached = np.ones((3, 5), np.int32)
    reached[0, 0] = 2
    counts.add(rounds_of(reached, reached), np.ones((3, 5), np.int32), [[0], [1], [2]])
    length, (first, second) = counts.intervals()
    assert length is None
    assert first is not None
    assert second is None


def test_drafts_that_none_can_reach_are_never_accepted():
    counts = DocumentCounts(2)
    reached = np.ones((3, 5), np.int32)
    counts.add(rounds_of(reached, 0 * reached), np.ones((3, 5), np.int32), [[0], [1], [2]])
    length, by_position = counts.intervals()
    assert length == (1.0, 1.0)
    assert by_position == [(0.0, 0.0)] * 2

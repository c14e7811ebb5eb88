"""How sure a measured acceptance is: a bootstrap over documents.

Rounds of one document are alike, so documents are what is drawn anew, all rounds of one together.
N documents, R resamples, K depths.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from finetune.objective.acceptance import Rounds

RESAMPLES = 1000
CONFIDENCE = 0.95
AT_ONCE = 1 << 22  # counts that are drawn at a time


class Interval(NamedTuple):
    """Where the true value lies with 95 % confidence."""

    low: float
    high: float


def acceptance_by_position(rates_K: Float[np.ndarray, "*R K"]) -> Float[np.ndarray, "*R K"]:
    """The probability that the first k drafts of a round are all accepted, by k.

    rates: of those that are reached, nan where none is. The result is nan from there on; but behind
    a position where nothing is accepted it is 0, for nothing can reach what follows.
    """
    known_K = np.logical_and.accumulate(~np.isnan(rates_K), axis=-1)
    product_K = np.nancumprod(rates_K, axis=-1)
    return np.where(known_K | (product_K == 0), product_K, np.nan)


class DocumentCounts:
    """Drafts reached and accepted, by depth, of each document by its number."""

    def __init__(self, num_depths: int):
        self.num_depths = num_depths
        self._counts: dict[int, np.ndarray] = {}  # document -> [reached or accepted, K]

    def add(
        self, rounds: Rounds, segment_ids_BT: np.ndarray, documents_of_rows: Sequence[Sequence[int]]
    ) -> None:
        """The rounds of one batch; documents_of_rows: of each row's segments 1, 2, ..."""
        for row, documents in enumerate(documents_of_rows):
            segments_T = np.asarray(segment_ids_BT[row])
            for kind, x_KBT in enumerate(rounds):
                sums_SK = np.zeros((len(documents) + 1, self.num_depths))
                np.add.at(sums_SK, segments_T, np.asarray(x_KBT)[:, row].T)
                for document, sums_K in zip(documents, sums_SK[1:], strict=True):
                    empty = np.zeros((2, self.num_depths))
                    self._counts.setdefault(document, empty)[kind] += sums_K

    def of(self, documents: Iterable[int]) -> "DocumentCounts":
        """Those of some documents."""
        found = DocumentCounts(self.num_depths)
        found._counts = {each: self._counts[each] for each in documents if each in self._counts}
        return found

    def totals(self) -> tuple[int, np.ndarray, np.ndarray]:
        """How many documents have a round, and their drafts reached and accepted, by depth."""
        counts = [each for each in self._counts.values() if each[0].any()]
        reached_K, accepted_K = sum(counts, np.zeros((2, self.num_depths)))
        return len(counts), reached_K, accepted_K

    def intervals(self) -> tuple[Interval | None, list[Interval | None]]:
        """Of the mean accepted length, and of the acceptance of each position.

        None with fewer than two documents that have a round, or where hardly any has such a draft.
        """
        counts = [each for each in self._counts.values() if each[0].any()]
        if len(counts) < 2:
            return None, [None] * self.num_depths
        acceptance_RK = _resampled(np.stack(counts))
        return _interval(1 + acceptance_RK.sum(axis=1)), [_interval(a_R) for a_R in acceptance_RK.T]


def _resampled(counts_N2K: np.ndarray) -> np.ndarray:
    """Acceptance by position [R, K] of documents drawn with replacement."""
    rng, num_documents = np.random.default_rng(0), len(counts_N2K)
    flat_NC = counts_N2K.reshape(num_documents, -1).astype(np.float64)
    at_once = max(1, AT_ONCE // num_documents)
    found = []
    for begin in range(0, RESAMPLES, at_once):
        number = min(at_once, RESAMPLES - begin)
        times_RN = rng.multinomial(num_documents, np.full(num_documents, 1 / num_documents), number)
        reached_RK, accepted_RK = np.split(times_RN @ flat_NC, 2, axis=1)
        with np.errstate(invalid="ignore"):
            rates_RK = accepted_RK / reached_RK
        found.append(acceptance_by_position(rates_RK))
    return np.concatenate(found)


def _interval(values_R: np.ndarray) -> Interval | None:
    known_R = values_R[~np.isnan(values_R)]
    if known_R.size < CONFIDENCE * values_R.size:
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known_R, [tail, 1 - tail])
    return Interval(float(low), float(high))

"""Logits of ours and of the reference, depth by depth, in numbers.

B batch, T position, V vocab, K depths: the main model's, and one of each MTP module.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-5  # max |a - b| / max |b| of logits, |a - b| / |b| of a state, float32
_SAMPLE = 200  # pairs of logits of a depth, for who draws them


@dataclass(frozen=True, kw_only=True)
class DepthCheck:
    """Logits of the main model (depth 0) or of an MTP depth, where both have a defined input.

    relative_difference: max |ours - reference| / max |reference|; rms_relative_difference: root
    mean square over root mean square. by_position: the first one's numerator at each position of a
    row, the larger of the batch's rows; None where no row has one.
    argmax_agreement: share of rows of logits whose largest entry is the same; top5_agreement: the
    mean share of the five largest that are.
    cosine: of the vectors of logits of a position, the smallest. kl, kl_largest: Kullback-Leibler
    divergence of our distribution from the reference's in nats, mean and largest.
    acceptance: share of these positions at which this draft and all before it are the main model's
    greedy choice, on our side and the reference's; acceptance_agreement: share at which both sides
    accept it or both do not. None without a main model beside it, and for the main model.
    """

    depth: int
    rows: int
    relative_difference: float
    rms_relative_difference: float
    cosine: float
    kl: float
    kl_largest: float
    argmax_agreement: float
    top5_agreement: float
    acceptance: float | None
    reference_acceptance: float | None
    acceptance_agreement: float | None
    by_position: tuple[float | None, ...]
    kl_by_row: tuple[float, ...]
    sample: tuple[tuple[float, float], ...]
    """Some logits, as (reference, ours)."""

    @property
    def holds(self) -> bool:
        return self.relative_difference <= TOLERANCE


def compare_depths(
    first: int, ours: np.ndarray, theirs: np.ndarray, valid: np.ndarray
) -> tuple[DepthCheck, ...]:
    """Logits [K, B, T, V] of depths from `first` on, at the positions bool [K, B, T] whose input
    token is in their document."""
    none = [None] * len(ours)
    accepted = [none, none] if first else [accepted_drafts(logits) for logits in (ours, theirs)]
    return tuple(
        _compare(first + k, ours[k], theirs[k], valid[k], [side[k] for side in accepted])
        for k in range(len(ours))
    )


def accepted_drafts(logits: np.ndarray) -> list[np.ndarray | None]:
    """Whether the drafts 1..k of row i are all the main model's greedy choices, bool [B, T] for
    each depth k of logits [K, B, T, V]; None for the main model, which is the first of them.

    Row i of depth k and row i + k of the main model predict the same token, i + k + 1. What is said
    of the last k rows, and of those at the end of a document, means nothing.
    """
    choices = logits.argmax(-1)
    found: list[np.ndarray | None] = [None]
    accepted = np.ones(choices.shape[1:], bool)
    for depth in range(1, len(choices)):
        accepted = accepted & (choices[depth] == np.roll(choices[0], -depth, axis=-1))
        found.append(accepted)
    return found


def _compare(
    depth: int,
    ours: np.ndarray,
    theirs: np.ndarray,
    valid: np.ndarray,
    accepted: Sequence[np.ndarray | None],
) -> DepthCheck:
    """One depth. accepted: of ours and theirs, as `accepted_drafts` has it."""
    a, b = ours[valid], theirs[valid]
    peak = np.abs(b).max()
    difference_BT = np.where(valid, np.abs(ours - theirs).max(axis=-1), 0) / peak
    kl = _divergences(a, b)
    return DepthCheck(
        depth=depth,
        rows=int(valid.sum()),
        relative_difference=float(difference_BT.max()),
        rms_relative_difference=float(np.linalg.norm(a - b) / np.linalg.norm(b)),
        cosine=float(_cosines(a, b).min()),
        kl=float(kl.mean()),
        kl_largest=float(kl.max()),
        argmax_agreement=float((a.argmax(-1) == b.argmax(-1)).mean()),
        top5_agreement=_shared_largest(a, b),
        acceptance=_share(accepted[0], valid),
        reference_acceptance=_share(accepted[1], valid),
        acceptance_agreement=_share_alike(accepted[0], accepted[1], valid),
        by_position=tuple(
            float(worst) if any_valid else None
            for worst, any_valid in zip(difference_BT.max(0), np.any(valid, axis=0), strict=True)
        ),
        kl_by_row=tuple(kl.tolist()),
        sample=_sample(a, b),
    )


def _share(accepted: np.ndarray | None, valid: np.ndarray) -> float | None:
    return None if accepted is None else float(accepted[valid].mean())


def _share_alike(
    ours: np.ndarray | None, theirs: np.ndarray | None, valid: np.ndarray
) -> float | None:
    return None if ours is None or theirs is None else float((ours == theirs)[valid].mean())


def _sample(ours: np.ndarray, theirs: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Pairs of logits, evenly from all of [N, V]."""
    chosen = np.linspace(0, ours.size - 1, min(_SAMPLE, ours.size)).astype(int)
    return tuple(zip(theirs.ravel()[chosen].tolist(), ours.ravel()[chosen].tolist(), strict=True))


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of vectors [N, V], one each, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def _divergences(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """KL(theirs || ours) of logits [N, V], in nats, each at least 0."""
    p, q = _log_probabilities(theirs), _log_probabilities(ours)
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0)


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _shared_largest(a: np.ndarray, b: np.ndarray, count: int = 5) -> float:
    """The mean share of the `count` largest entries of a row that are so in both."""
    count = min(count, a.shape[-1])
    top = [np.argpartition(x, -count, axis=-1)[:, -count:] for x in (a, b)]
    return float((top[0][:, :, None] == top[1][:, None]).any(-1).mean())

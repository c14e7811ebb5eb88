"""What only a tensor's bytes tell: scales that scale nothing, copies that do not repeat.

Knows slots and the source; must not know config or table.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from converters.format.header import TensorInfo
from converters.format.listing import Listing
from converters.format.mapping import Slot
from mtp_model.problems import Problem

PIECE_BYTES = 4 << 20
OnBytes = Callable[[int], None]
"""Told the number of bytes of every read."""


def bytes_to_read(listing: Listing, slots: Mapping[str, Slot]) -> int:
    """Bytes of all scales, and of all copies with what they copy."""
    scales = sum(listing.tensors[name].nbytes for name in _scales(slots))
    copies = sum(listing.tensors[slot.name].nbytes for slot in _copies(slots))
    return scales + 2 * copies


def _scales(slots: Mapping[str, Slot]) -> Iterator[str]:
    return (slot.scale for slot in slots.values() if slot.scale and slot.scale in slots)


def _copies(slots: Mapping[str, Slot]) -> Iterator[Slot]:
    return (slot for slot in slots.values() if slot.copy_of in slots)


def scale_problems(
    listing: Listing, slots: Mapping[str, Slot], on_bytes: OnBytes
) -> Iterator[Problem]:
    """Scales that are not finite or not above 0: no weight comes out of those."""
    for name in _scales(slots):
        tensor = listing.tensors[name]
        raw = listing.source.read(tensor.file, tensor.begin, tensor.nbytes)
        values = np.frombuffer(raw, "<f4").reshape(tensor.shape)
        bad = ~(np.isfinite(values) & (values > 0))
        if bad.any():
            first = tuple(map(int, np.argwhere(bad)[0]))
            found = f"has {bad.sum()} of {bad.size} values that are not finite and above 0"
            yield Problem("value", name, f"{found}; the first is {values[first]} at {first}")
        on_bytes(tensor.nbytes)


def stale_copies(
    listing: Listing, slots: Mapping[str, Slot], on_bytes: OnBytes
) -> Iterator[Problem]:
    """Copies whose bytes are not those of the tensor that they repeat."""
    for slot in _copies(slots):
        assert slot.copy_of
        copy, original = listing.tensors[slot.name], listing.tensors[slot.copy_of]
        rows = np.concatenate([*_differing_rows(listing, copy, original, on_bytes)])
        if len(rows):
            found = f"differs from {slot.copy_of} in {len(rows)} of {copy.shape[0]} rows"
            yield Problem("copy", slot.name, f"{found}, the first is row {rows[0]}")


def _differing_rows(
    listing: Listing, copy: TensorInfo, original: TensorInfo, on_bytes: OnBytes
) -> Iterator[np.ndarray]:
    """Numbers of the rows that differ, piece by piece; both tensors have one shape and dtype."""
    row_bytes = copy.nbytes // copy.shape[0]
    step = max(PIECE_BYTES // row_bytes, 1)
    ours, theirs = np.empty((2, step * row_bytes), np.uint8)
    for start in range(0, copy.shape[0], step):
        nbytes = min(step, copy.shape[0] - start) * row_bytes
        for tensor, piece in ((copy, ours), (original, theirs)):
            begin = tensor.begin + start * row_bytes
            listing.source.read_into(tensor.file, begin, piece[:nbytes])
        on_bytes(2 * nbytes)
        differs = (ours[:nbytes] != theirs[:nbytes]).reshape(-1, row_bytes).any(axis=1)
        yield start + np.flatnonzero(differs)

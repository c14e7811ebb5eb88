"""What the values of a tensor may be: weights are finite, also as they are stored or computed with;
scales are finite and above 0.

The same rules for every source; import applies them to the bytes that it reads anyway.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from converters.format.header import TensorInfo
from converters.format.listing import Listing

_PIECE_BYTES = 4 << 20
_SCRATCH_BYTES = 128 << 10  # fits into a core's own cache

# Without its sign a number is finite exactly if its bits, as a whole number, are below these.
_FINITE_BELOW = {
    "F8_E4M3": np.uint8(0x7F),  # NaN alone: this format has no infinity
    "BF16": np.uint16(0x7F80),
    "F16": np.uint16(0x7C00),
    "F32": np.uint32(0x7F80_0000),
}
_BF16 = np.dtype(ml_dtypes.bfloat16)
_F32_FINITE_IN_BF16_BELOW = np.uint32(0x7F7F_8000)  # from there on it rounds to infinity
# 448, the largest code, times a larger scale is no finite bfloat16, in which weights are computed.
_LARGEST_SCALE = float(ml_dtypes.finfo(_BF16).max) / 448


def all_finite(raw: np.ndarray, dtype: str, stored: np.dtype | None = None) -> bool:
    """Whether bytes (uint8, 1-D, contiguous) of a safetensors dtype hold no NaN and no infinity.

    stored: the dtype that they are converted to, in which none may become infinite either.
    """
    rounded = dtype == "F32" and stored == _BF16
    limit = _F32_FINITE_IN_BF16_BELOW if rounded else _FINITE_BELOW[dtype]
    numbers = raw.view(limit.dtype)
    whole = len(raw) // 8 * 8
    words = raw[:whole].view(np.uint64)
    without_sign = np.uint64(int.from_bytes(_without_sign(limit.dtype), "little"))
    scratch = np.empty(min(_SCRATCH_BYTES // 8, len(words)), np.uint64)
    for begin in range(0, len(words), max(len(scratch), 1)):
        part = words[begin : begin + len(scratch)]
        part = np.bitwise_and(part, without_sign, out=scratch[: len(part)])
        if part.view(limit.dtype).max() >= limit:
            return False
    rest = numbers[whole // limit.itemsize :]
    sign = limit.dtype.type(1 << (8 * limit.itemsize - 1))
    return not (rest & ~sign >= limit).any()


def _without_sign(dtype: np.dtype) -> bytes:
    """Eight bytes of numbers of which every bit but the sign is set."""
    largest = (1 << (8 * dtype.itemsize - 1)) - 1
    return largest.to_bytes(dtype.itemsize, "little") * (8 // dtype.itemsize)


def weight_fault(values: np.ndarray, first_row: int, stored: np.dtype) -> str:
    """What to say of rows of a weight of which some value is not finite as it is stored."""
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(values.astype(stored).astype(np.float32))
    first = tuple(map(int, np.argwhere(bad)[0]))
    where = (first[0] + first_row, *first[1:])
    if np.isfinite(np.float32(values[first])):
        return f"holds {values[first]} at {where}, which is infinite as {stored.name}"
    return f"holds {_name(values[first])} at {where}, which no weight is"


def scale_fault(values: np.ndarray) -> str | None:
    """What is wrong with block scales (float32): no weight comes out of those."""
    good, needed = np.isfinite(values) & (values > 0), "not finite and above 0"
    if good.all():
        good = values <= _LARGEST_SCALE
        needed = f"above {_LARGEST_SCALE:.1e}: weights of such a scale are infinite in bfloat16"
    if good.all():
        return None
    first = tuple(map(int, np.argwhere(~good)[0]))
    found = f"has {(~good).sum()} of {good.size} values that are {needed}"
    return f"{found}; the first is {values[first]} at {first}"


def copy_fault(listing: Listing, copy: TensorInfo, original: TensorInfo) -> str:
    """How a copy differs from the tensor that it repeats. Reads both, piece by piece."""
    rows = np.concatenate([*_differing_rows(listing, copy, original)])
    found = f"differs from {original.name} in {len(rows)} of {copy.shape[0]} rows"
    return f"{found}, the first is row {rows[0]}"


def _differing_rows(
    listing: Listing, copy: TensorInfo, original: TensorInfo
) -> Iterator[np.ndarray]:
    """Numbers of the rows that differ; both tensors have one shape and dtype."""
    row_bytes = copy.nbytes // copy.shape[0]
    step = max(_PIECE_BYTES // row_bytes, 1)
    ours, theirs = np.empty((2, step * row_bytes), np.uint8)
    for start in range(0, copy.shape[0], step):
        nbytes = min(step, copy.shape[0] - start) * row_bytes
        for tensor, piece in ((copy, ours), (original, theirs)):
            begin = tensor.begin + start * row_bytes
            listing.source.read_into(tensor.file, begin, piece[:nbytes])
        differs = (ours[:nbytes] != theirs[:nbytes]).reshape(-1, row_bytes).any(axis=1)
        yield start + np.flatnonzero(differs)


def _name(value: np.generic) -> str:
    return "NaN" if np.isnan(np.float32(value)) else "infinity"

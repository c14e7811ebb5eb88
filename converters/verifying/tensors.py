"""Compares single tensors: of a source with what export writes for it, and of two checkpoints."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from converters.exporting.encode import EncodedRows, Encoder
from converters.format import fp8
from converters.format.header import DTYPES, TensorInfo
from converters.format.listing import Listing
from converters.format.mapping import Slot, group_of
from converters.sources.source import Read, Source
from mtp_model.config import ModelConfig
from mtp_model.files.memory import ThreadMemory

_PIECE_BYTES = 16 << 20  # of each side
_PIECE_VALUES = 4 << 20  # of each of two checkpoints: 16 MiB of float32
_LINE_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A tensor whose bytes are not the source's."""

    name: str
    group: str
    bytes: int
    worst: float
    """Largest difference of its values, dequantised, over the largest magnitude in the source's."""
    replaced: bool
    """A copy that was stale at import: export writes what it should have been."""


class TensorComparer:
    """The tensors of a source against those of a checkpoint directory; several threads may ask."""

    def __init__(
        self,
        listing: Listing,
        config: ModelConfig,
        slots: Mapping[str, Slot],
        encoder: Encoder,
        stale: frozenset[str],
    ):
        """config: the source's. slots: what is compared, all of it in the source.

        encoder: of what export writes for these, in the source's dtypes. stale: names of the copies
        that were not the main model's tensors at import.
        """
        self._listing, self._slots = listing, slots
        self._encoder, self._stale = encoder, stale
        self._block = config.weight_block_size or (1, 1)
        # Pieces of all large tensors need about as much, so that no thread takes more than another.
        self._memory = ThreadMemory(2 * _PIECE_BYTES)
        self.scales = frozenset(slot.scale for slot in slots.values() if slot.scale)

    def place(self, name: str) -> tuple[str, int]:
        """Where the source stores a tensor: file and offset."""
        tensor = self._listing.tensors[name]
        return tensor.file, tensor.begin

    def nbytes(self, slot: Slot) -> int:
        """Bytes of a tensor and its scales in the source."""
        return sum(nbytes for _, _, nbytes in self.reads(slot))

    def reads(self, slot: Slot) -> list[Read]:
        """Where the source stores these bytes."""
        tensors = (self._listing.tensors[name] for name in slot.with_scale)
        return [(tensor.file, tensor.begin, tensor.nbytes) for tensor in tensors]

    def differences(self, slot: Slot) -> list[Difference]:
        """Of a tensor and its scales; together, for quantising again makes both at once."""
        is_same, encoded_scales = True, []
        for ours, theirs in self._pieces(slot.name):
            is_same = is_same and np.array_equal(ours.data, theirs)
            if ours.scales is not None:
                encoded_scales.append(ours.scales)
        grids = self._grids(slot.scale, encoded_scales) if slot.scale else None
        found = []
        if not is_same:
            found.append(self._difference(slot, self._values(slot, grids)))
        if slot.scale and grids is not None and grids[0].tobytes() != grids[1].tobytes():
            found.append(self._difference(self._slots[slot.scale], [grids]))
        return found

    def _pieces(self, name: str) -> Iterator[tuple[EncodedRows, np.ndarray]]:
        """What export writes and what the source has (uint8), whole rows of blocks at a time."""
        row_bytes = self._encoder.row_bytes(name)
        file, begin = self.place(name)
        for rows in self._encoder.spans(name, _PIECE_BYTES):
            nbytes = len(rows) * row_bytes
            ours, theirs = self._memory.take(2 * nbytes).reshape(2, nbytes)
            self._listing.source.read_into(file, begin + rows.start * row_bytes, theirs)
            yield self._encoder.encode(name, rows, ours), theirs

    def _grids(self, scale: str, encoded: list[np.ndarray]) -> np.ndarray:
        """A weight's scales, float32 [2, ...]: as export writes them and as the source has them.

        encoded: those that came with the weight's codes, if it was quantised again.
        """
        shape, (file, begin) = self._slots[scale].shape, self.place(scale)
        grids = np.empty((2, *shape), np.float32)
        ours, theirs = grids.view(np.uint8).reshape(2, -1)
        self._listing.source.read_into(file, begin, theirs)
        if encoded:
            np.concatenate(encoded, out=grids[0])
        else:
            self._encoder.encode(scale, range(shape[0]), ours)
        return grids

    def _values(self, slot: Slot, grids: np.ndarray | None) -> Iterator[np.ndarray]:
        """Both sides' float32 values [2, rows, ...], dequantised, piece by piece."""
        dtype, row = DTYPES[self._listing.tensors[slot.name].dtype], 0
        for ours, theirs in self._pieces(slot.name):
            stored = np.stack([ours.data, theirs]).view(dtype).reshape(2, -1, *slot.shape[1:])
            if grids is None:
                yield stored.astype(np.float32)
            else:
                yield self._dequantised(stored, grids, row)
            row += stored.shape[1]

    def _dequantised(self, codes: np.ndarray, grids: np.ndarray, start: int) -> np.ndarray:
        """Float32 values of codes [2, rows, columns] that begin at row `start` of their tensor."""
        height = self._block[0]
        blocks = slice(start // height, -(-(start + codes.shape[1]) // height))
        values = np.empty(codes.shape, np.float32)
        for side in range(2):
            fp8.dequantise_into(values[side], codes[side], grids[side, blocks], self._block)
        return values

    def _difference(self, slot: Slot, values: Iterable[np.ndarray]) -> Difference:
        return Difference(
            name=slot.name,
            group=group_of(slot),
            bytes=self._listing.tensors[slot.name].nbytes,
            worst=_worst(values),
            replaced=slot.name in self._stale,
        )


def _worst(values: Iterable[np.ndarray]) -> float:
    """As in Difference; infinite where a value or a scale is no finite number."""
    worst, peak = [0.0], [0.0]
    try:
        for ours, theirs in values:
            with np.errstate(invalid="ignore"):  # infinity less infinity is not finite either
                worst.append(np.abs(ours - theirs).max())
            peak.append(np.abs(theirs).max())
    except fp8.Fp8Error:
        return float("inf")
    largest, of = float(np.max(worst)), float(np.max(peak))
    if not math.isfinite(largest + of):
        return float("inf")
    return largest / max(of, float(np.finfo(np.float32).tiny))


class Stored(NamedTuple):
    """A weight as a side stores it. block: of its scales, (1, 1) without any."""

    tensor: TensorInfo
    scale: TensorInfo | None
    block: fp8.Block

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes + (self.scale.nbytes if self.scale else 0)

    @property
    def format(self) -> str:
        return f"{self.tensor.dtype} {list(self.tensor.shape)}"

    @property
    def reads(self) -> list[Read]:
        return [(t.file, t.begin, t.nbytes) for t in (self.tensor, self.scale) if t]


class Errors:
    """How far the values of B are from A's, summed piece by piece."""

    def __init__(self, *, is_change: bool):
        """is_change: whether the tensor differs even if all its values are the same."""
        self._is_change = is_change
        self.changed = 0
        self.largest, self.peak = 0.0, 0.0
        self.squares, self.of = 0.0, 0.0

    @property
    def differs(self) -> bool:
        return self._is_change or self.changed > 0

    @property
    def max_error(self) -> float:
        return ratio(self.largest, self.peak)

    @property
    def rms_error(self) -> float:
        return math.sqrt(ratio(self.squares, self.of))

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Two pieces of float32."""
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.subtract(b, a)
            self.changed += int(np.count_nonzero(difference))  # NaN counts
            self.largest = _larger(self.largest, np.abs(difference).max(initial=0))
            self.peak = _larger(self.peak, np.abs(a).max(initial=0))
            self.squares += float(np.square(difference, dtype=np.float64).sum())
            self.of += float(np.square(a, dtype=np.float64).sum())


def _bytes(scales: np.ndarray | None) -> bytes | None:
    return None if scales is None else scales.tobytes()


def _larger(a: float, b: Any) -> float:
    return float(np.maximum(a, b))  # NaN stays


def ratio(error: float, of: float) -> float:
    """Infinite where one of them is no finite number."""
    if not math.isfinite(error + of):
        return math.inf
    return error / max(of, float(np.finfo(np.float32).tiny)) if error else 0.0


class PairComparer:
    """The weights of two checkpoints; several threads may ask."""

    def __init__(self, a: Source, b: Source):
        self._sources = (a, b)
        self._memory = ThreadMemory()

    def compare(self, a: Stored, b: Stored) -> Errors | None:
        """None where all bytes are the same, scales included."""
        stored = (a, b)
        tensors = stored[0].tensor, stored[1].tensor
        if tensors[0].shape != tensors[1].shape:
            errors = Errors(is_change=True)
            errors.largest = errors.squares = math.inf
            return errors
        scales = [
            self._scales(side, weight) for side, weight in zip(self._sources, stored, strict=True)
        ]
        is_same = tensors[0].dtype == tensors[1].dtype and stored[0].block == stored[1].block
        is_same = is_same and _bytes(scales[0]) == _bytes(scales[1])
        if is_same and all(np.array_equal(x, y) for _, x, y in self._pieces(stored)):
            return None
        errors = Errors(is_change=is_same and scales[0] is None)
        for rows, x, y in self._pieces(stored):
            errors.add(
                _values(x, rows, stored[0], scales[0], tensors[1].dtype),
                _values(y, rows, stored[1], scales[1], tensors[0].dtype),
            )
        return errors

    def _scales(self, source: Source, stored: Stored) -> np.ndarray | None:
        if stored.scale is None:
            return None
        scales = np.empty(stored.scale.shape, np.float32)
        source.read_into(stored.scale.file, stored.scale.begin, scales)
        return scales

    def _pieces(
        self, stored: tuple[Stored, Stored]
    ) -> Iterator[tuple[range, np.ndarray, np.ndarray]]:
        """Rows, whole rows of both sides' blocks, and their bytes (uint8) of both sides."""
        shape = stored[0].tensor.shape or (1,)
        height = math.lcm(*(weight.block[0] for weight in stored))
        step = max(_PIECE_VALUES // max(math.prod(shape[1:]), 1) // height, 1) * height
        for start in range(0, shape[0], step):
            rows = range(start, min(start + step, shape[0]))
            sizes = [weight.tensor.nbytes // shape[0] for weight in stored]
            lengths = [len(rows) * size for size in sizes]
            second = -(-lengths[0] // _LINE_BYTES) * _LINE_BYTES
            memory = self._memory.take(second + lengths[1])
            pieces = memory[: lengths[0]], memory[second : second + lengths[1]]
            for source, weight, size, piece in zip(
                self._sources, stored, sizes, pieces, strict=True
            ):
                begin = weight.tensor.begin + start * size
                source.read_into(weight.tensor.file, begin, piece)
            yield rows, *pieces


def _values(
    raw: np.ndarray, rows: range, stored: Stored, scales: np.ndarray | None, other: str
) -> np.ndarray:
    """Float32 values of rows of a tensor, as they are compared with one of dtype `other`."""
    codes = raw.view(DTYPES[stored.tensor.dtype]).reshape(
        len(rows), math.prod(stored.tensor.shape[1:])
    )
    if scales is None:
        return codes.astype(np.float32)
    height = stored.block[0]
    blocks = scales[rows.start // height : -(-rows.stop // height)]
    values = np.empty(codes.shape, ml_dtypes.bfloat16 if other == "BF16" else np.float32)
    try:
        fp8.dequantise_into(values, codes, blocks, stored.block)
    except fp8.Fp8Error:  # a scale that is no finite number
        values[...] = np.nan
    return values.astype(np.float32, copy=False)

"""Compares one tensor of a source, and its scales, with what export writes for it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from converters.exporting.encode import EncodedRows, Encoder
from converters.format.fp8 import Fp8Error, dequantise_into
from converters.format.header import DTYPES
from converters.format.listing import Listing
from converters.format.mapping import Slot, group_of
from converters.sources.source import Read
from mtp_model.config import ModelConfig
from mtp_model.files.memory import ThreadMemory

_PIECE_BYTES = 16 << 20  # of each side


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
            dequantise_into(values[side], codes[side], grids[side, blocks], self._block)
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
    except Fp8Error:
        return float("inf")
    largest, of = float(np.max(worst)), float(np.max(peak))
    if not math.isfinite(largest + of):
        return float("inf")
    return largest / max(of, float(np.finfo(np.float32).tiny))

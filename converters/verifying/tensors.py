"""Compares one tensor of a source with what export writes for it; knows no scope and no totals."""

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from converters.exporting.encode import Encoder
from converters.format.fp8 import Fp8Error, dequantise_into
from converters.format.groups import group_of
from converters.format.header import DTYPES
from converters.format.listing import Listing
from converters.format.mapping import Slot
from converters.sources.source import Read
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.config import ModelConfig
from mtp_model.files.local import AlignedBuffer

_PIECE_BYTES = 16 << 20  # of each side
_NO_MEMORY = AlignedBuffer(0)


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
        checkpoint: Checkpoint,
        config: ModelConfig,
        slots: Mapping[str, Slot],
    ):
        """config: the source's. slots: what is compared, all of it in the source."""
        self._listing, self._slots = listing, slots
        dtypes = {name: listing.tensors[name].dtype for name in slots}
        self._encoder = Encoder(checkpoint, dtypes)
        self._stale = frozenset(checkpoint.provenance["stale_copies"])
        self._block = config.weight_block_size or (1, 1)
        stored = ModelConfig.from_dict(checkpoint.config_dict).weight_block_size or (1, 1)
        self._row_multiple = stored[0]
        self._memory = threading.local()
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
        found = [
            self._difference(self._slots[name]) for name in slot.with_scale if not self._same(name)
        ]
        for name in slot.with_scale:
            self._encoder.forget(name)
        return found

    def _same(self, name: str) -> bool:
        return all(np.array_equal(ours, theirs) for ours, theirs in self._pieces(name))

    def _difference(self, slot: Slot) -> Difference:
        return Difference(
            name=slot.name,
            group=group_of(slot),
            bytes=self._listing.tensors[slot.name].nbytes,
            worst=self._worst(slot),
            replaced=slot.name in self._stale,
        )

    def _pieces(self, name: str) -> Iterator[np.ndarray]:
        """What export writes and what the source has, uint8 [2, bytes], whole rows at a time."""
        rows, step = self._encoder.num_rows(name), self._rows_at_once(name)
        row_bytes = self._encoder.row_bytes(name)
        file, begin = self.place(name)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            pair = self._buffers((stop - start) * row_bytes)
            self._encoder.encode_into(name, start, stop, pair[0])
            self._listing.source.read_into(file, begin + start * row_bytes, pair[1])
            yield pair

    def _rows_at_once(self, name: str) -> int:
        """Rows of a piece: whole rows of blocks, at most _PIECE_BYTES if it can be."""
        blocks = _PIECE_BYTES // (self._encoder.row_bytes(name) * self._row_multiple)
        most = max(blocks, 1) * self._row_multiple
        return min(most, self._encoder.rows_at_once(name))

    def _buffers(self, nbytes: int) -> np.ndarray:
        """Memory [2, nbytes] that this thread uses again and again; fresh memory is slow.

        Pieces of all large tensors need about as much, so that no thread takes more than another.
        """
        if getattr(self._memory, "pair", _NO_MEMORY).capacity < 2 * nbytes:
            self._memory.pair = AlignedBuffer(2 * max(nbytes, _PIECE_BYTES))
        return self._memory.pair.bytes[: 2 * nbytes].reshape(2, nbytes)

    def _worst(self, slot: Slot) -> float:
        """As in Difference; infinite where a value or a scale is no finite number."""
        step = self._rows_at_once(slot.name)
        # Copied: the next pieces come into the same memory.
        grids = np.concatenate([*map(np.copy, self._pieces(slot.scale))], 1) if slot.scale else None
        worst, peak = [0.0], [0.0]
        try:
            for number, pair in enumerate(self._pieces(slot.name)):
                ours, theirs = self._values(slot, pair, grids, number * step)
                with np.errstate(invalid="ignore"):  # infinity less infinity is not finite either
                    worst.append(np.abs(ours - theirs).max())
                peak.append(np.abs(theirs).max())
        except Fp8Error:
            return float("inf")
        largest, of = float(np.max(worst)), float(np.max(peak))
        if not math.isfinite(largest + of):
            return float("inf")
        return largest / max(of, float(np.finfo(np.float32).tiny))

    def _values(
        self, slot: Slot, pair: np.ndarray, grids: np.ndarray | None, start: int
    ) -> np.ndarray:
        """The float32 values [2, rows, ...] of a piece that begins at row `start`."""
        dtype = DTYPES[self._listing.tensors[slot.name].dtype]
        stored = pair.view(dtype).reshape(2, -1, *slot.shape[1:])
        if slot.scale is None or grids is None:
            return stored.astype(np.float32)
        scales = grids.view(np.float32).reshape(2, *self._slots[slot.scale].shape)
        blocks = start // self._block[0], -(-(start + stored.shape[1]) // self._block[0])
        values = np.empty(stored.shape, np.float32)
        for side in range(2):
            grid = np.ascontiguousarray(scales[side, slice(*blocks)])
            dequantise_into(values[side], stored[side], grid, self._block)
        return values

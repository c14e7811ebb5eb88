"""What export writes for each tensor, in pieces of rows.

Export and verify share it. A tensor whose leaf has the dtype that the file needs is its stored
bytes. FP8 weights that are kept in bfloat16 or float32 are quantised again, one row of blocks at a
time: with the stored scales where that loses nothing (so an unchanged tensor gets its original
bytes), with new ones elsewhere. So neither bytes nor scales depend on how the rows were divided.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from converters.format import fp8
from converters.format.header import DTYPES
from converters.format.mapping import Slot, buffers, slots
from converters.format.values import all_finite, weight_fault
from mtp_model.checkpoint.chunks import Leaf
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.files.memory import ThreadMemory
from mtp_model.problems import Problem, ProblemsError, raise_if_any

PIECE_BYTES = 32 << 20
_FP8 = DTYPES["F8_E4M3"]


@dataclass(frozen=True, kw_only=True)
class Requantisation:
    """A weight of which some rows of blocks got new scales, and what that cost these rows.

    max_rel_err: largest error, in units of the largest magnitude of its block.
    rms_rel_err: root mean square of the errors, over that of the weights.
    """

    name: str
    max_rel_err: float
    rms_rel_err: float


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """Rows of a tensor as they are written. data: their bytes (uint8).

    Of a weight that is quantised again also what came with its codes. scales: float32 [row blocks,
    column blocks]. costs: of every row of blocks that got new scales.
    """

    data: np.ndarray
    scales: np.ndarray | None = None
    costs: tuple[fp8.Cost, ...] = ()


def held_slots(checkpoint: Checkpoint) -> dict[str, Slot]:
    """The tensors of the network whose leaves the checkpoint has: its scope may leave out most."""
    found = {**slots(checkpoint.config), **buffers(checkpoint.config)}
    return {name: slot for name, slot in found.items() if slot.path in checkpoint.leaves}


class Encoder:
    """The bytes of a checkpoint's tensors in the dtypes that a safetensors checkpoint gives them.

    It remembers nothing of what it encoded, and several threads may use it at once.
    """

    def __init__(
        self, checkpoint: Checkpoint, slots: Mapping[str, Slot], dtypes: Mapping[str, str]
    ):
        """slots: held_slots. dtypes: of what is written, as safetensors names them, by tensor name.

        Raises ProblemsError for a tensor that the checkpoint's network does not have.
        """
        unknown = (Problem("unknown", name) for name in dtypes if name not in slots)
        raise_if_any(str(checkpoint.path), unknown)
        config = checkpoint.config
        self.slots = slots
        self._checkpoint = checkpoint
        self._dtypes = dtypes
        self._block: fp8.Block = config.weight_block_size or (1, 1)
        self._powers_of_two = config.power_of_two_scales
        self._weight_of = {slot.scale: slot.name for slot in slots.values() if slot.scale}
        self._memory = ThreadMemory()

    def row_bytes(self, name: str) -> int:
        """Bytes of a row, of a tensor's first dim, as it is written."""
        return math.prod(self.slots[name].shape[1:]) * DTYPES[self._dtypes[name]].itemsize

    def spans(self, name: str, most_bytes: int) -> Iterator[range]:
        """The rows of a tensor, piece by piece: whole rows of blocks.

        A piece is at most `most_bytes` of what is read or written, if it can be. New scales are one
        piece: they follow from all of their weight, and are small.
        """
        rows, height = self.slots[name].shape[0], self._block[0]
        row_bytes = max(self.row_bytes(name), self._leaf(name).row_bytes)
        most = most_bytes // row_bytes
        step = rows if self.requantised_weight(name) else max(most // height, 1) * height
        return (range(start, min(start + step, rows)) for start in range(0, rows, step))

    def requantised_weight(self, scale: str) -> str | None:
        """Of new scales the weight that they follow from; None for any other tensor."""
        weight = self._weight_of.get(scale)
        return weight if weight and self._is_requantised(weight) else None

    def is_as_stored(self, name: str) -> bool:
        """Whether a tensor is written as the bytes that the checkpoint directory stores."""
        stored = self._leaf(name).dtype
        return stored == DTYPES[self._dtypes[name]] and not self.requantised_weight(name)

    def encode(self, name: str, rows: range, out: np.ndarray) -> EncodedRows:
        """Fill `out` (uint8) with rows from a multiple of the block's height to any other.

        New scales come with the codes of their weight. Asked for alone they cost as much as these.
        """
        slot = self.slots[name]
        if weight := self.requantised_weight(name):
            scales = self._new_scales(weight)[rows.start : rows.stop]
            out[...] = scales.reshape(-1).view(np.uint8)
        elif self.is_as_stored(name):
            self._checkpoint.read_rows_into(slot.path, slot.index, rows.start, rows.stop, out)
        else:
            return self._converted(slot, rows, out)
        return EncodedRows(data=out)

    def pieces(self, name: str) -> Iterator[tuple[range, EncodedRows]]:
        """A tensor piece by piece; the next one overwrites its bytes."""
        buffer = np.empty(0, np.uint8)
        for rows in self.spans(name, PIECE_BYTES):
            nbytes = len(rows) * self.row_bytes(name)
            buffer = buffer if len(buffer) >= nbytes else np.empty(nbytes, np.uint8)
            yield rows, self.encode(name, rows, buffer[:nbytes])

    def values(self, name: str) -> Iterator[tuple[range, np.ndarray]]:
        """The float32 values that a tensor has once it is written, piece by piece.

        It has none for FP8 weights that are stored as FP8: these change nothing by being written.
        """
        dtype, shape = DTYPES[self._dtypes[name]], self.slots[name].shape[1:]
        for rows, piece in self.pieces(name):
            stored = piece.data.view(dtype).reshape(len(rows), *shape)
            if piece.scales is None:
                assert dtype != _FP8, name
                yield rows, stored.astype(np.float32)
            else:
                values = np.empty(stored.shape, np.float32)
                fp8.dequantise_into(values, stored, piece.scales, self._block)
                yield rows, values

    def _leaf(self, name: str) -> Leaf:
        return self._checkpoint.leaves[self.slots[name].path]

    def _is_requantised(self, name: str) -> bool:
        return self._dtypes[name] == "F8_E4M3" and self._leaf(name).dtype != _FP8

    def _new_scales(self, weight: str) -> np.ndarray:
        return joined_scales(piece for _, piece in self.pieces(weight))

    def _converted(self, slot: Slot, rows: range, out: np.ndarray) -> EncodedRows:
        values = self._read(slot, rows)
        try:
            if self._is_requantised(slot.name):
                codes, stored = out.reshape(values.shape), self._stored_scales(slot, rows)
                found = fp8.requantise_into(
                    codes, values, stored, self._block, powers_of_two=self._powers_of_two
                )
                return EncodedRows(data=out, scales=found.scale, costs=found.costs)
            wanted = out.view(DTYPES[self._dtypes[slot.name]]).reshape(values.shape)
            if values.dtype == _FP8:
                fp8.dequantise_into(wanted, values, self._stored_scales(slot, rows), self._block)
            else:
                with np.errstate(over="ignore"):  # told below
                    wanted[...] = values.astype(wanted.dtype)
        except fp8.Fp8Error as error:
            raise self._error(slot, str(error)) from error
        if not all_finite(out, self._dtypes[slot.name]):
            raise self._error(slot, weight_fault(values, rows.start, wanted.dtype))
        return EncodedRows(data=out)

    def _error(self, slot: Slot, fault: str) -> ProblemsError:
        return ProblemsError(str(self._checkpoint.path), [Problem("value", slot.name, fault)])

    def _read(self, slot: Slot, rows: range) -> np.ndarray:
        """Rows of a leaf, in memory that this thread uses again for its next rows."""
        leaf = self._leaf(slot.name)
        raw = self._memory.take(len(rows) * leaf.row_bytes)
        self._checkpoint.read_rows_into(slot.path, slot.index, rows.start, rows.stop, raw)
        return raw.view(leaf.dtype).reshape(len(rows), *slot.shape[1:])

    def _stored_scales(self, slot: Slot, rows: range) -> np.ndarray:
        """The imported scales of these rows of a weight."""
        assert slot.scale, slot
        scale, height = self.slots[slot.scale], self._block[0]
        start, stop = rows.start // height, -(-rows.stop // height)
        return self._checkpoint.read_rows(scale.path, scale.index, start, stop)


def joined_scales(pieces: Iterable[EncodedRows]) -> np.ndarray:
    """The scales of a whole weight that is quantised again, float32 [row blocks, column blocks]."""
    return np.concatenate([piece.scales for piece in pieces if piece.scales is not None])


def requantisation(name: str, pieces: Iterable[EncodedRows]) -> Requantisation | None:
    """What new scales cost a whole weight; None where the stored ones did."""
    costs = [cost for piece in pieces for cost in piece.costs]
    if not costs:
        return None
    largest, errors, weights = zip(*costs, strict=True)
    total = fp8.Cost(max(largest), math.fsum(errors), math.fsum(weights))
    return Requantisation(name=name, max_rel_err=total.max_rel_err, rms_rel_err=total.rms_rel_err)

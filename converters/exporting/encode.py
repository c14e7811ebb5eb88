"""What export writes for each tensor, in pieces of rows; knows nothing of files.

Export and verify share it. A tensor whose leaf has the dtype that the file needs is its stored
bytes. FP8 weights that are kept in bfloat16 or float32 are quantised again, one row of blocks at a
time: with the stored scales where that loses nothing (so an unchanged tensor gets its original
bytes), with new ones elsewhere. So neither bytes nor scales depend on how the rows were divided.
"""

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from converters.format import fp8
from converters.format.header import DTYPES
from converters.format.mapping import Slot, slots
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.config import ModelConfig
from mtp_model.files.local import AlignedBuffer
from mtp_model.problems import Problem, ProblemsError, raise_if_any

PIECE_BYTES = 32 << 20
_FP8 = DTYPES["F8_E4M3"]
_NO_MEMORY = AlignedBuffer(0)


@dataclass(frozen=True, kw_only=True)
class Requantisation:
    """A weight of which some rows of blocks got new scales, and what that cost these rows.

    max_rel_err: largest error, in units of the largest magnitude of its block.
    rms_rel_err: root mean square of the errors, over that of the weights.
    """

    name: str
    max_rel_err: float
    rms_rel_err: float


def held_slots(checkpoint: Checkpoint) -> dict[str, Slot]:
    """Every tensor whose leaf the checkpoint has: its scope may leave out most."""
    found = slots(ModelConfig.from_dict(checkpoint.config_dict))
    return {name: slot for name, slot in found.items() if slot.path in checkpoint.leaves}


class Encoder:
    """The bytes of a checkpoint's tensors in the dtypes that a safetensors checkpoint gives them.

    Several threads may encode at once.
    """

    def __init__(self, checkpoint: Checkpoint, dtypes: Mapping[str, str]):
        """dtypes: of what is written, as safetensors names them, by tensor name.

        Raises ProblemsError for a tensor that the checkpoint's network does not have.
        """
        config = ModelConfig.from_dict(checkpoint.config_dict)
        self.slots = held_slots(checkpoint)
        """Of every tensor that the checkpoint has, whatever its scope; of copies of them too."""
        unknown = (Problem("unknown", name) for name in dtypes if name not in self.slots)
        raise_if_any(str(checkpoint.path), unknown)
        self._checkpoint = checkpoint
        self._dtypes = dtypes
        self._block: fp8.Block = config.weight_block_size or (1, 1)
        self._weight_of = {slot.scale: slot.name for slot in self.slots.values() if slot.scale}
        self._weights: dict[str, _Requantised] = {}
        self._half_written: set[str] = set()
        self._lock = threading.Lock()
        self._memory = threading.local()

    def num_rows(self, name: str) -> int:
        """Rows of a tensor: its first dim."""
        return self.slots[name].shape[0]

    def row_bytes(self, name: str) -> int:
        """Bytes of a row as it is written."""
        return math.prod(self.slots[name].shape[1:]) * DTYPES[self._dtypes[name]].itemsize

    def rows_at_once(self, name: str) -> int:
        """Rows of a piece: whole rows of blocks, at most PIECE_BYTES of what is read or written."""
        slot = self.slots[name]
        leaf = self._checkpoint.leaves[slot.path]
        most = PIECE_BYTES // max(self.row_bytes(name), leaf.row_bytes)
        height = self._block[0]
        return min(max(most // height, 1) * height, self.num_rows(name))

    def is_derived_scale(self, name: str) -> bool:
        """Whether a tensor is scales that follow from a weight which is quantised again."""
        weight = self._weight_of.get(name)
        return weight is not None and self._is_requantised(weight)

    def is_as_stored(self, name: str) -> bool:
        """Whether a tensor is written as the bytes that the checkpoint directory stores."""
        stored = self._checkpoint.leaves[self.slots[name].path].dtype
        return stored == DTYPES[self._dtypes[name]] and not self.is_derived_scale(name)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """A tensor's bytes (uint8), piece by piece; the next one overwrites it."""
        step, rows = self.rows_at_once(name), self.num_rows(name)
        buffer = np.empty(step * self.row_bytes(name), np.uint8)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            piece = buffer[: (stop - start) * self.row_bytes(name)]
            self.encode_into(name, start, stop, piece)
            yield piece

    def encode_into(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out` (uint8) with rows from a multiple of the block's height to any other."""
        slot = self.slots[name]
        if self.is_derived_scale(name):
            scale = self._derived_scale(self._weight_of[name])
            out[...] = scale[start:stop].reshape(-1).view(np.uint8)
        elif self.is_as_stored(name):
            self._checkpoint.read_rows_into(slot.path, slot.index, start, stop, out)
        else:
            self._convert_into(slot, start, stop, out)

    def requantisation(self, name: str) -> Requantisation | None:
        """What quantising a weight again has cost; None if nothing. Asked after it was encoded."""
        found = self._weights.get(name)
        return found.cost(name) if found else None

    def forget(self, name: str) -> None:
        """Told of a tensor that was written: with both, what is remembered of a weight can go."""
        weight = self._weight_of.get(name, name)
        if weight in self._half_written:
            self._half_written.remove(weight)
            self._weights.pop(weight, None)
        elif weight in self._weights:
            self._half_written.add(weight)

    def _is_requantised(self, name: str) -> bool:
        leaf = self._checkpoint.leaves[self.slots[name].path]
        return self._dtypes[name] == "F8_E4M3" and leaf.dtype != _FP8

    def _convert_into(self, slot: Slot, start: int, stop: int, out: np.ndarray) -> None:
        values = self._read(slot, start, stop)
        try:
            if self._is_requantised(slot.name):
                self._requantise_into(slot, start, values, out)
                return
            wanted = out.view(DTYPES[self._dtypes[slot.name]]).reshape(values.shape)
            if values.dtype == _FP8:
                fp8.dequantise_into(wanted, values, self._scale(slot, start, stop), self._block)
            else:
                wanted[...] = values.astype(wanted.dtype)
        except fp8.Fp8Error as error:
            where = str(self._checkpoint.path)
            raise ProblemsError(where, [Problem("value", slot.name, str(error))]) from error

    def _read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        """Rows of a leaf in memory that this thread uses again for its next rows."""
        leaf = self._checkpoint.leaves[slot.path]
        nbytes = (stop - start) * leaf.row_bytes
        if getattr(self._memory, "buffer", _NO_MEMORY).capacity < nbytes:
            self._memory.buffer = AlignedBuffer(nbytes)
        raw = self._memory.buffer.bytes[:nbytes]
        self._checkpoint.read_rows_into(slot.path, slot.index, start, stop, raw)
        return raw.view(leaf.dtype).reshape(stop - start, *slot.shape[1:])

    def _requantise_into(self, slot: Slot, start: int, values: np.ndarray, out: np.ndarray) -> None:
        stored = self._scale(slot, start, start + len(values))
        codes = out.reshape(values.shape)
        remembered = self._remembered(slot)
        height = self._block[0]
        for number, row in enumerate(range(0, len(values), height)):
            weight = values[row : row + height]
            result = fp8.requantise(weight, stored[number : number + 1], self._block)
            codes[row : row + height] = result.codes
            remembered.add(start // height + number, result, weight)

    def _scale(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        assert slot.scale, slot
        scale, height = self.slots[slot.scale], self._block[0]
        rows = start // height, -(-stop // height)
        return self._checkpoint.read_rows(scale.path, scale.index, *rows)

    def _remembered(self, slot: Slot) -> "_Requantised":
        assert slot.scale, slot
        with self._lock:
            new = _Requantised(self.slots[slot.scale].shape)
            return self._weights.setdefault(slot.name, new)

    def _derived_scale(self, weight: str) -> np.ndarray:
        found = self._weights.get(weight)
        if found is None or not found.is_whole:  # the scales come first, or from another run
            for _ in self.blocks(weight):
                pass
            found = self._weights[weight]
        return found.scale


class _Requantised:
    """Scales and errors of a weight that is quantised again, by row of blocks."""

    def __init__(self, shape: tuple[int, ...]):
        self.scale = np.empty(shape, np.float32)
        self._seen = np.zeros(shape[0], bool)
        self._changed = np.zeros(shape[0], bool)
        self._worst = np.zeros(shape[0])
        self._error = np.zeros(shape[0])
        self._power = np.zeros(shape[0])

    @property
    def is_whole(self) -> bool:
        return bool(self._seen.all())

    def add(self, number: int, result: fp8.Requantised, weight: np.ndarray) -> None:
        """One row of blocks; the same again if it was there before."""
        self.scale[number] = result.scale[0]
        if result.changed:
            # Sums of squares add up; only what has errors is summed.
            self._power[number] = np.square(weight.astype(np.float32)).sum(dtype=np.float64)
            self._error[number] = result.rms_rel_err**2 * self._power[number]
            self._worst[number] = result.max_rel_err
            self._changed[number] = True
        self._seen[number] = True

    def cost(self, name: str) -> Requantisation | None:
        if not self._changed.any():
            return None
        power = self._power.sum()
        rms = math.sqrt(self._error.sum() / power) if power else 0.0
        return Requantisation(name=name, max_rel_err=float(self._worst.max()), rms_rel_err=rms)

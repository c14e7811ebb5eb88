"""The units of an import: what each reads, checks, converts and writes.

A unit is all chunks at one stack coordinate of a leaf: one large tensor, row block by row block, or
many small tensors gathered in one chunk. A copy has no leaf: its unit only reads and hashes it.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from converters.format import fp8
from converters.format.header import DTYPES, TensorInfo
from converters.format.listing import SourceCheckpoint
from converters.format.mapping import Slot
from converters.format.values import all_finite, scale_fault, weight_fault
from converters.sources.source import Read
from mtp_model.checkpoint.chunks import Index, Leaf, chunk_file_name
from mtp_model.checkpoint.writer import ParamsWriter
from mtp_model.files.memory import AlignedBuffer
from mtp_model.problems import Problem

_READ_BYTES = 32 << 20  # of a copy, which no chunk grid divides


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One piece of an import. `slots` in the order in which the chunk stores them.

    path: of the leaf. Of a leaf of scales, `slots` lack those of weights that are not FP8.
    """

    key: str
    path: str
    slots: tuple[Slot, ...]
    stack_coord: Index = ()
    is_copy: bool = False


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """All that units need: where bytes come from, where they go, how they change on the way."""

    listing: SourceCheckpoint
    slots: Mapping[str, Slot]
    leaves: Mapping[str, Leaf]
    block: fp8.Block | None

    @functools.cached_property
    def scales(self) -> frozenset[str]:
        """Names of the tensors that are scales."""
        return frozenset(slot.scale for slot in self.slots.values() if slot.scale)

    @functools.cached_property
    def copied(self) -> frozenset[str]:
        """Names of the tensors that others repeat."""
        return frozenset(slot.copy_of for slot in self.slots.values() if slot.copy_of)


class Buffers:
    """The memory of one thread, reused from unit to unit."""

    def __init__(self, chunk_bytes: int, raw_bytes: int):
        self.chunk = AlignedBuffer(chunk_bytes)
        self.raw = AlignedBuffer(raw_bytes)


@dataclass
class Done:
    """A finished unit: digests of its chunk files and of the source tensors that it read."""

    key: str
    pieces: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    """Values that no such tensor may have. A unit that has any is not done, and not journalled."""

    def to_json(self) -> dict[str, Any]:
        """Its line in the journal."""
        return {"unit": self.key, "pieces": self.pieces, "tensors": self.tensors}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Done":
        """A line of the journal."""
        return cls(key=line["unit"], pieces=line["pieces"], tensors=line["tensors"])


def make_units(conversion: Conversion, *, with_copies: bool) -> list[Unit]:
    """Every unit, in the order in which they are best done.

    That is the order in which the source stores what they read first. Of a source at hand, scales
    and copies come before all else: what is wrong with these is known in seconds.
    """
    units = list(_leaf_units(conversion))
    if with_copies:
        units += [
            Unit(key=f"copy {slot.name}", path=slot.path, slots=(slot,), is_copy=True)
            for slot in conversion.slots.values()
            if slot.copy_of
        ]
    tensors = conversion.listing.tensors
    is_far = conversion.listing.source.is_far

    def place(unit: Unit) -> tuple[bool, str, int]:
        if not unit.slots:
            return False, "", 0
        first = tensors[unit.slots[0].name]
        return not is_far and not is_early(conversion, unit), first.file, first.begin

    return sorted(units, key=place)


def is_early(conversion: Conversion, unit: Unit) -> bool:
    """Whether a unit reads scales, or a copy, or what is copied: a small part of a checkpoint."""
    if not unit.slots:
        return True
    name = unit.slots[0].name
    return unit.is_copy or name in conversion.scales or name in conversion.copied


def _leaf_units(conversion: Conversion) -> Iterator[Unit]:
    by_place = {(s.path, s.index): s for s in conversion.slots.values() if not s.copy_of}
    for path, leaf in conversion.leaves.items():
        for coord in leaf.stack_coords():
            places = [(path, index) for index in leaf.indices(coord)]
            found = tuple(by_place[place] for place in places if place in by_place)
            key = f"{path} {chunk_file_name(coord)}".strip()
            yield Unit(key=key, path=path, slots=found, stack_coord=coord)


def unit_bytes(conversion: Conversion, unit: Unit) -> int:
    """Bytes of the source that a unit reads."""
    return sum(conversion.listing.tensors[slot.name].nbytes for slot in unit.slots)


def unit_reads(conversion: Conversion, unit: Unit) -> list[Read]:
    """The source's byte ranges that a unit reads, scales that it dequantises with included."""
    scales = [scale for slot in unit.slots if (scale := _scale_to_apply(conversion, slot))]
    tensors = [conversion.listing.tensors[slot.name] for slot in unit.slots]
    return [(tensor.file, tensor.begin, tensor.nbytes) for tensor in (*tensors, *scales)]


def _scale_to_apply(conversion: Conversion, slot: Slot) -> TensorInfo | None:
    """The block scales of an FP8 weight that is stored as another dtype."""
    tensors = conversion.listing.tensors
    if not slot.scale or slot.copy_of:
        return None
    if conversion.leaves[slot.path].dtype == DTYPES[tensors[slot.name].dtype]:
        return None
    return tensors[slot.scale]


def make_buffers(conversion: Conversion) -> Buffers:
    """Memory that is enough for every unit."""
    leaves = conversion.leaves.values()
    # A source element is at most four times as large as a stored one (float32 read, FP8 stored).
    raw = max(leaf.chunk_rows * math.prod(leaf.tensor_shape[1:]) * 4 for leaf in leaves)
    return Buffers(max(leaf.chunk_bytes for leaf in leaves), max(raw, _READ_BYTES))


def run_unit(conversion: Conversion, unit: Unit, writer: ParamsWriter, buffers: Buffers) -> Done:
    """Do a unit. Values that no such tensor may have are in the result's `problems`."""
    done = Done(key=unit.key)
    if unit.is_copy:
        done.tensors[unit.slots[0].name] = _hash_tensor(conversion, unit.slots[0], buffers)
        return done
    leaf = conversion.leaves[unit.path]
    readers = [_TensorReader(conversion, slot, buffers) for slot in unit.slots]
    *others, last = leaf.indices(unit.stack_coord)
    has_gaps = len(readers) <= len(others)
    for row_chunk in range(leaf.num_row_chunks):
        start, stop = leaf.rows_of_chunk(row_chunk)
        nbytes = (stop - start) * leaf.row_bytes
        if has_gaps:  # the scales of weights that are not FP8
            buffers.chunk.bytes[: leaf.chunk_bytes].view(leaf.dtype)[...] = 1
        for reader in readers:
            begin = leaf.tensor_offset(reader.slot.index)
            reader.read_rows_into(start, stop, buffers.chunk.bytes[begin : begin + nbytes])
        end = leaf.tensor_offset(last) + nbytes
        buffers.chunk.bytes[end : leaf.chunk_bytes] = 0  # an edge chunk is stored in full
        coord = leaf.coord(unit.stack_coord, row_chunk)
        done.pieces[chunk_file_name(coord)] = writer.write_chunk(unit.path, coord, buffers.chunk)
    done.tensors = {reader.slot.name: reader.hash.hexdigest() for reader in readers}
    faults = ((reader.slot.name, reader.fault) for reader in readers)
    done.problems = tuple(Problem("value", name, fault) for name, fault in faults if fault)
    return done


class _TensorReader:
    """Reads one tensor's rows in order; hashes, checks and converts them."""

    def __init__(self, conversion: Conversion, slot: Slot, buffers: Buffers):
        self.slot = slot
        self.hash = xxhash.xxh3_128()
        self.fault: str | None = None
        """What is wrong with the first rows whose values no such tensor may have."""
        self._conversion = conversion
        self._tensor = conversion.listing.tensors[slot.name]
        self._leaf = conversion.leaves[slot.path]
        self._dtype = DTYPES[self._tensor.dtype]
        self._raw = buffers.raw
        scale = _scale_to_apply(conversion, slot)
        self._scale = _read_scale(conversion, scale) if scale else None

    def read_rows_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out` (uint8) with rows start..stop in the leaf's dtype."""
        row_bytes = self._tensor.nbytes // self._tensor.shape[0]
        nbytes = (stop - start) * row_bytes
        as_stored = self._leaf.dtype == self._dtype
        raw = out if as_stored else self._raw.bytes[:nbytes]
        source, tensor = self._conversion.listing.source, self._tensor
        source.read_into(tensor.file, tensor.begin + start * row_bytes, raw)
        self.hash.update(raw.data)
        shape = (stop - start, *tensor.shape[1:])
        values = raw.view(self._dtype).reshape(shape)
        self.fault = self.fault or self._fault_of(raw, values, start)
        if not as_stored and not self.fault:
            self._convert(values, out.view(self._leaf.dtype).reshape(shape), start, stop)

    def _fault_of(self, raw: np.ndarray, values: np.ndarray, start: int) -> str | None:
        if self.slot.name in self._conversion.scales:
            return scale_fault(values)
        stored = self._leaf.dtype
        if all_finite(raw, self._tensor.dtype, stored):
            return None
        return weight_fault(values, start, stored)

    def _convert(self, values: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
        if self._scale is None:
            out[...] = values.astype(out.dtype)
            return
        block = self._conversion.block
        assert block is not None, self.slot
        scale = self._scale[start // block[0] : -(-stop // block[0])]
        if scale_fault(scale):
            return  # the unit of the scales reports it
        fp8.dequantise_into(out, values, scale, block)


def _read_scale(conversion: Conversion, tensor: TensorInfo) -> np.ndarray:
    raw = conversion.listing.source.read(tensor.file, tensor.begin, tensor.nbytes)
    return np.frombuffer(raw, np.float32).reshape(tensor.shape)


def _hash_tensor(conversion: Conversion, slot: Slot, buffers: Buffers) -> str:
    tensor, state = conversion.listing.tensors[slot.name], xxhash.xxh3_128()
    for begin in range(0, tensor.nbytes, _READ_BYTES):
        part = buffers.raw.bytes[: min(_READ_BYTES, tensor.nbytes - begin)]
        conversion.listing.source.read_into(tensor.file, tensor.begin + begin, part)
        state.update(part.data)
    return state.hexdigest()

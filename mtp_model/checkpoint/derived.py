"""A checkpoint that differs from another one in some leaves, as training writes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mtp_model.checkpoint.chunks import DEFAULT_POLICY, ChunkPolicy, Index, Leaf, chunk_file_name
from mtp_model.checkpoint.claim import claim, clear
from mtp_model.checkpoint.directory import (
    PARAMS,
    PROVENANCE,
    Checkpoint,
    CheckpointError,
    open_checkpoint,
)
from mtp_model.checkpoint.writer import ParamsWriter
from mtp_model.files.memory import AlignedBuffer
from mtp_model.files.open import as_place
from mtp_model.files.place import Place

Rows = Callable[[Index, int, int], np.ndarray]
"""Stack index, first row, one past the last row -> those rows of that tensor."""


@dataclass(frozen=True, kw_only=True)
class ChangedLeaf:
    """New values of a leaf, asked for row by row, so that no leaf is held whole."""

    dtype: np.dtype
    rows: Rows


def write_derived(
    base: Checkpoint,
    dst: str | Path | Place,
    changed: Mapping[str, ChangedLeaf],
    provenance_extra: Mapping[str, Any],
    *,
    overwrite: bool = False,
    policy: ChunkPolicy = DEFAULT_POLICY,
) -> Checkpoint:
    """Write a checkpoint that differs from `base` in the changed leaves, chunk by chunk.

    The chunk files of all other leaves are hard links of the base's (copies where links fail): no
    writer ever changes a chunk file in place. Raises CheckpointError for a leaf that base lacks.
    """
    unknown = sorted(changed.keys() - base.leaves.keys())
    if unknown:
        raise CheckpointError(f"{base.path} has no leaf {', '.join(unknown)} to change")
    dst = as_place(dst)
    if dst.is_same(base.path):
        raise CheckpointError(f"{dst} is the checkpoint itself; name another place for the new one")
    with claim(dst):
        clear(dst, overwrite=overwrite)
        _write_derived(base, dst, changed, provenance_extra, policy)
    return open_checkpoint(dst)


def _write_derived(
    base: Checkpoint,
    dst: Place,
    changed: Mapping[str, ChangedLeaf],
    provenance_extra: Mapping[str, Any],
    policy: ChunkPolicy,
) -> None:
    leaves = {name: _derived_leaf(base, name, changed, policy) for name in base.leaves}
    writer = ParamsWriter(dst, leaves)
    digests = {name: _link_leaf(base, writer, name) for name in leaves if name not in changed}
    for name, values in changed.items():
        digests[name] = _write_leaf(writer, name, values)
    derived = [*base.provenance.get("derived", []), _derivation(base, changed, provenance_extra)]
    writer.finish(
        provenance=base.provenance | {"derived": derived},
        digests={name: digests[name] for name in leaves},
        headers=base.layout(),
        side_files={
            name: writer.write_side_file(name, (base.path / name).pieces())
            for name in base.side_files()
        },
    )


def _derived_leaf(
    base: Checkpoint, name: str, changed: Mapping[str, ChangedLeaf], policy: ChunkPolicy
) -> Leaf:
    leaf = base.leaves[name]
    if name not in changed or changed[name].dtype == leaf.dtype:
        return leaf
    return Leaf.make(leaf.shape, changed[name].dtype, leaf.num_stack_dims, policy)


def _link_leaf(base: Checkpoint, writer: ParamsWriter, name: str) -> dict[str, str]:
    digests = base.provenance["pieces"][name]
    for coord in digests:
        source, target = base.params / name / coord, writer.path / PARAMS / name / coord
        if target.take(source) is None:
            target.write_pieces(source.pieces())
    return dict(digests)


def _write_leaf(writer: ParamsWriter, name: str, values: ChangedLeaf) -> dict[str, str]:
    leaf = writer.leaves[name]
    rows = partial(_checked_rows, name, leaf, values)
    buffer = AlignedBuffer(leaf.chunk_bytes)
    digests = {}
    for stack_coord in leaf.stack_coords():
        for row_chunk in range(leaf.num_row_chunks):
            _fill(buffer, leaf, stack_coord, row_chunk, rows)
            coord = leaf.coord(stack_coord, row_chunk)
            digests[chunk_file_name(coord)] = writer.write_chunk(name, coord, buffer)
    return digests


def _fill(buffer: AlignedBuffer, leaf: Leaf, stack_coord: Index, row_chunk: int, rows: Rows):
    start, stop = leaf.rows_of_chunk(row_chunk)
    nbytes = (stop - start) * leaf.row_bytes
    buffer.bytes[: leaf.chunk_bytes] = 0  # an edge chunk is stored in full
    for index in leaf.indices(stack_coord):
        offset = leaf.tensor_offset(index)
        buffer.bytes[offset : offset + nbytes] = rows(index, start, stop).reshape(-1).view(np.uint8)


def _checked_rows(
    name: str, leaf: Leaf, values: ChangedLeaf, index: Index, start: int, stop: int
) -> np.ndarray:
    rows = np.ascontiguousarray(values.rows(index, start, stop))
    wanted = (stop - start, *leaf.tensor_shape[1:])
    if rows.dtype != leaf.dtype or rows.shape != wanted:
        found = f"{rows.dtype}{rows.shape}, needed {leaf.dtype}{wanted}"
        raise CheckpointError(f"{name}: rows {start} to {stop} at {index} are {found}")
    return rows


def _derivation(
    base: Checkpoint, changed: Mapping[str, ChangedLeaf], extra: Mapping[str, Any]
) -> dict[str, Any]:
    of = {"path": str(base.path), "provenance": (base.path / PROVENANCE).digest()}
    return {"base": of, "changed": sorted(changed), **extra}

"""A checkpoint that differs from another one in some leaves, as training writes it."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtp_model import cluster
from mtp_model.checkpoint.chunks import DEFAULT_POLICY, ChunkPolicy, Index, Leaf, chunk_file_name
from mtp_model.checkpoint.claim import claim, clear
from mtp_model.checkpoint.directory import (
    PARAMS,
    PROVENANCE,
    Checkpoint,
    CheckpointError,
    open_checkpoint,
)
from mtp_model.checkpoint.writer import Digests, ParamsWriter
from mtp_model.files.memory import AlignedBuffer
from mtp_model.files.open import as_place
from mtp_model.files.place import Place

Rows = Callable[[Index, int, int], Callable[[], np.ndarray]]
"""Stack index, first row, one past the last row -> what gives those rows of that tensor.

Where several processes write, each of them asks for all rows and takes those that it writes.
"""


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
    writer ever changes a chunk file in place. The processes of a cluster each write a part of the
    chunks. Raises CheckpointError for a leaf that base lacks.
    """
    unknown = sorted(changed.keys() - base.leaves.keys())
    if unknown:
        raise CheckpointError(f"{base.path} has no leaf {', '.join(unknown)} to change")
    dst = as_place(dst)
    if dst.is_same(base.path):
        raise CheckpointError(f"{dst} is the checkpoint itself; name another place for the new one")
    with _emptied(dst, overwrite=overwrite):
        _write_derived(base, dst, changed, provenance_extra, policy)
    return open_checkpoint(dst)


def write_beside(
    base: Checkpoint,
    dst: str | Path | Place,
    leaves: Mapping[str, tuple[tuple[int, ...], int]],
    values: Mapping[str, ChangedLeaf],
    provenance_extra: Mapping[str, Any],
) -> None:
    """Write a directory of other leaves that belong to `base`, and of none of its own.

    leaves: shape and number of stack dimensions, by path. What was there of it is written anew.
    """
    dst = as_place(dst)
    made = {
        name: Leaf.make(shape, values[name].dtype, num_stack_dims, DEFAULT_POLICY)
        for name, (shape, num_stack_dims) in leaves.items()
    }
    with _emptied(dst, overwrite=True):
        writer = ParamsWriter(dst, made)
        digests = {name: _write_leaf(writer, name, values[name]) for name in made}
        _finish(writer, base, digests, _derivation(base, values, provenance_extra))


@contextlib.contextmanager
def _emptied(dst: Place, *, overwrite: bool) -> Iterator[None]:
    """Hold an empty destination, for all processes of a cluster; after it, all have written."""
    with claim(dst) if cluster.is_first() else contextlib.nullcontext():
        if cluster.is_first():
            clear(dst, overwrite=overwrite)
        cluster.wait("destination is empty")
        yield
    cluster.wait("checkpoint is written")


def _write_derived(
    base: Checkpoint,
    dst: Place,
    changed: Mapping[str, ChangedLeaf],
    provenance_extra: Mapping[str, Any],
    policy: ChunkPolicy,
) -> None:
    leaves = {name: _derived_leaf(base, name, changed, policy) for name in base.leaves}
    writer, own = ParamsWriter(dst, leaves), cluster.number()
    linked = [name for name in leaves if name not in changed]
    digests = {name: _link_leaf(base, writer, name) for name in linked[own :: cluster.count()]}
    for name, values in changed.items():
        digests[name] = _write_leaf(writer, name, values)
    _finish(writer, base, digests, _derivation(base, changed, provenance_extra))


def _finish(
    writer: ParamsWriter, base: Checkpoint, digests: Digests, derivation: dict[str, Any]
) -> None:
    """Metadata and side files of the base, with one step of history more.

    digests: of what this process wrote.
    """
    digests = _merged(cluster.all_say(digests))
    if not cluster.is_first():
        return
    writer.finish(
        provenance=base.provenance | {"derived": [*base.provenance.get("derived", []), derivation]},
        digests={name: digests[name] for name in writer.leaves},
        headers=base.layout(),
        side_files={
            name: writer.write_side_file(name, (base.path / name).pieces())
            for name in base.side_files()
        },
    )


def _merged(parts: Iterable[Digests]) -> Digests:
    """What several processes wrote, as if one had."""
    found: Digests = {}
    for part in parts:
        for name, digests in part.items():
            found.setdefault(name, {}).update(digests)
    return found


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
    buffer = AlignedBuffer(leaf.chunk_bytes)
    digests = {}
    chunks = itertools.product(leaf.stack_coords(), range(leaf.num_row_chunks))
    for number, (stack_coord, row_chunk) in enumerate(chunks):
        start, stop = leaf.rows_of_chunk(row_chunk)
        indices = list(leaf.indices(stack_coord))
        asked = [values.rows(index, start, stop) for index in indices]
        if number % cluster.count() != cluster.number():
            continue
        nbytes = (stop - start) * leaf.row_bytes
        buffer.bytes[: leaf.chunk_bytes] = 0  # an edge chunk is stored in full
        for index, take in zip(indices, asked, strict=True):
            offset = leaf.tensor_offset(index)
            rows = np.ascontiguousarray(take())
            _raise_if_odd(rows, leaf, stop - start, f"{name}: rows {start} to {stop} at {index}")
            buffer.bytes[offset : offset + nbytes] = rows.reshape(-1).view(np.uint8)
        coord = leaf.coord(stack_coord, row_chunk)
        digests[chunk_file_name(coord)] = writer.write_chunk(name, coord, buffer)
    return digests


def _raise_if_odd(rows: np.ndarray, leaf: Leaf, count: int, what: str) -> None:
    wanted = (count, *leaf.tensor_shape[1:])
    if rows.dtype != leaf.dtype or rows.shape != wanted:
        found = f"{rows.dtype}{rows.shape}, needed {leaf.dtype}{wanted}"
        raise CheckpointError(f"{what} are {found}")


def _derivation(
    base: Checkpoint, changed: Mapping[str, ChangedLeaf], extra: Mapping[str, Any]
) -> dict[str, Any]:
    of = {"path": str(base.path), "provenance": (base.path / PROVENANCE).digest()}
    return {"base": of, "changed": sorted(changed), **extra}

"""The checkpoint directory, for writing: chunk by chunk, whole or visibly unfinished.

Used by the importer and by saving a trained model; knows no safetensors names and no source.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mtp_model.checkpoint import directory as store
from mtp_model.checkpoint.chunks import DEFAULT_POLICY, ChunkPolicy, Index, Leaf, chunk_file_name
from mtp_model.checkpoint.claim import claim, clear
from mtp_model.checkpoint.directory import Checkpoint, CheckpointError, open_checkpoint
from mtp_model.checkpoint.orbax import write_orbax_metadata
from mtp_model.files.local import (
    AlignedBuffer,
    digest,
    file_digest,
    file_pieces,
    sync_directory,
    write_buffer,
    write_pieces,
)
from mtp_model.files.objects import AnyPath, CloudPath, as_path

Digests = dict[str, dict[str, str]]
"""Leaf path -> chunk file name -> xxh3_128 of the file's bytes."""

Rows = Callable[[Index, int, int], np.ndarray]
"""Stack index, first row, one past the last row -> those rows of that tensor."""

_LINK_ERRORS = (OSError, NotImplementedError)  # another file system, or one without links


class ParamsWriter:
    """Writes one checkpoint directory; distinct chunks by several threads at once if you like."""

    def __init__(self, path: AnyPath, leaves: Mapping[str, Leaf]):
        """Make (or go on with) the directory of these leaves, in a destination that is claimed."""
        self.path = path
        self.leaves = dict(leaves)
        for name in self.leaves:
            (path / store.PARAMS / name).mkdir(parents=True, exist_ok=True)

    def chunk_file(self, name: str, coord: Index) -> AnyPath:
        """Where the chunk of a leaf is."""
        return self.path / store.PARAMS / name / chunk_file_name(coord)

    def write_chunk(self, name: str, coord: Index, buffer: AlignedBuffer) -> str:
        """Write a chunk from the start of a buffer, durably; returns the digest of its bytes."""
        nbytes = self.leaves[name].chunk_bytes
        write_buffer(self.chunk_file(name, coord), buffer, nbytes)
        return digest(buffer.bytes[:nbytes].data)

    def whole_chunks(self) -> Callable[[str, str], bool]:
        """What tells, by leaf and file name, whether a chunk is there in full.

        Of an object, that it is there says so; all of them are asked for at once.
        """
        params = self.path / store.PARAMS
        if not isinstance(params, CloudPath):
            return lambda name, file: _has_size(params / name / file, self.leaves[name].chunk_bytes)
        stored = frozenset(params.names())
        return lambda name, file: f"{name}/{file}" in stored

    def write_side_file(self, name: str, pieces: Iterable[bytes]) -> str:
        """Write a file of the source that holds no tensors; returns its digest."""
        if Path(name).parts[0] in store.RESERVED_NAMES:
            raise CheckpointError(
                f"the source's {name} has a name that the checkpoint directory needs for itself; "
                "move it out of the source"
            )
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return write_pieces(file, pieces)

    def finish(
        self,
        *,
        provenance: Mapping[str, Any],
        digests: Digests,
        headers: Mapping[str, str],
        side_files: Mapping[str, str],
    ) -> None:
        """Write the metadata and, once all of it is on disk, COMPLETE.

        headers: header text by source file; side_files: digest by name, already written.
        Raises CheckpointError when a chunk has no digest: it was not written.
        """
        self._check_digests(digests)
        write_orbax_metadata(self.path / store.PARAMS, self.leaves)
        record = dict(provenance)
        record["leaves"] = {name: leaf.num_stack_dims for name, leaf in self.leaves.items()}
        record["pieces"] = digests
        files = {
            store.PROVENANCE: _write_json(self.path / store.PROVENANCE, record),
            store.LAYOUT: _write_json(self.path / store.LAYOUT, {"headers": dict(headers)}),
        }
        self._sync_directories()
        complete = {"format_version": store.FORMAT_VERSION, "files": files}
        _write_json(self.path / store.COMPLETE, complete | {"side_files": dict(side_files)})
        sync_directory(self.path)

    def _check_digests(self, digests: Digests) -> None:
        for name, leaf in self.leaves.items():
            missing = {chunk_file_name(c) for c in leaf.coords()} - digests.get(name, {}).keys()
            if missing:
                raise CheckpointError(
                    f"{self.path}: {len(missing)} chunks of {name} were not written, "
                    f"{min(missing)} among them; run the same command again"
                )

    def _sync_directories(self) -> None:
        if isinstance(self.path, CloudPath):
            return
        for folder, _, _ in os.walk(self.path):
            sync_directory(Path(folder))


def _has_size(file: Path, size: int) -> bool:
    try:
        return file.stat().st_size == size
    except FileNotFoundError:
        return False


@dataclass(frozen=True, kw_only=True)
class ChangedLeaf:
    """New values of a leaf, asked for row by row, so that no leaf is held whole."""

    dtype: np.dtype
    rows: Rows


def write_derived(
    base: Checkpoint,
    dst: str | AnyPath,
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
    dst = as_path(dst)
    if _is_same(dst, base.path):
        raise CheckpointError(f"{dst} is the checkpoint itself; name another place for the new one")
    with claim(dst):
        clear(dst, overwrite=overwrite)
        _write_derived(base, dst, changed, provenance_extra, policy)
    return open_checkpoint(dst)


def _is_same(dst: AnyPath, base: AnyPath) -> bool:
    if isinstance(dst, CloudPath) or isinstance(base, CloudPath):
        return dst == base
    return dst.exists() and dst.samefile(base)


def _write_derived(
    base: Checkpoint,
    dst: AnyPath,
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
            name: writer.write_side_file(name, file_pieces(base.path / name))
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
        source, target = base.params / name / coord, writer.path / store.PARAMS / name / coord
        if not _linked(source, target):
            write_pieces(target, file_pieces(source))
    return dict(digests)


def _linked(source: AnyPath, target: AnyPath) -> bool:
    if isinstance(source, CloudPath) or isinstance(target, CloudPath):
        return False
    try:
        os.link(source, target)
    except _LINK_ERRORS:
        return False
    return True


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
    of = {"path": str(base.path), "provenance": file_digest(base.path / store.PROVENANCE)}
    return {"base": of, "changed": sorted(changed), **extra}


def _write_json(path: AnyPath, value: Mapping[str, Any]) -> str:
    return write_pieces(path, [json.dumps(value, indent=1).encode()])

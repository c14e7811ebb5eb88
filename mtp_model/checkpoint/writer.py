"""The checkpoint directory, for writing: chunk by chunk, whole or visibly unfinished.

Used by the importer and by saving a trained model.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mtp_model.checkpoint.chunks import Index, Leaf, chunk_file_name
from mtp_model.checkpoint.directory import (
    COMPLETE,
    FORMAT_VERSION,
    LAYOUT,
    PARAMS,
    PROVENANCE,
    RESERVED_NAMES,
    CheckpointError,
)
from mtp_model.checkpoint.orbax import write_orbax_metadata
from mtp_model.files.memory import AlignedBuffer
from mtp_model.files.open import as_place
from mtp_model.files.place import Place, digest
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem

Digests = dict[str, dict[str, str]]
"""Leaf path -> chunk file name -> xxh3_128 of the file's bytes."""


class ParamsWriter:
    """Writes one checkpoint directory; distinct chunks by several threads at once if you like."""

    def __init__(self, path: str | Path | Place, leaves: Mapping[str, Leaf]):
        """Make (or go on with) the directory of these leaves, in a destination that is claimed."""
        self.path = as_place(path)
        self.leaves = dict(leaves)
        for name in self.leaves:
            (self.path / PARAMS / name).make_folder()

    def chunk_file(self, name: str, coord: Index) -> Place:
        """Where the chunk of a leaf is."""
        return self.path / PARAMS / name / chunk_file_name(coord)

    def write_chunk(self, name: str, coord: Index, buffer: AlignedBuffer) -> str:
        """Write a chunk from the start of a buffer, durably; returns the digest of its bytes."""
        nbytes = self.leaves[name].chunk_bytes
        self.chunk_file(name, coord).write_buffer(buffer, nbytes)
        return digest(buffer.bytes[:nbytes].data)

    def whole_chunks(self) -> Callable[[str, str], bool]:
        """What tells, by leaf and file name, whether a chunk is there in full at this moment."""
        stored = (self.path / PARAMS).sizes()
        return lambda name, file: stored.get(f"{name}/{file}") == self.leaves[name].chunk_bytes

    def write_side_file(self, name: str, pieces: Iterable[bytes]) -> str:
        """Write a file of the source that holds no tensors; returns its digest."""
        for fault in reserved_names([name]):
            raise CheckpointError(f"the source's {fault.subject} {fault.detail}")
        file = self.path / name
        file.parent.make_folder()
        return file.write_pieces(pieces)

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
        write_orbax_metadata(self.path / PARAMS, self.leaves)
        record = dict(provenance)
        record["leaves"] = {name: leaf.num_stack_dims for name, leaf in self.leaves.items()}
        record["pieces"] = digests
        files = {
            PROVENANCE: _write_json(self.path / PROVENANCE, record),
            LAYOUT: _write_json(self.path / LAYOUT, {"headers": dict(headers)}),
        }
        self.path.sync()
        complete = {"format_version": FORMAT_VERSION, "files": files}
        _write_json(self.path / COMPLETE, complete | {"side_files": dict(side_files)})
        self.path.sync()

    def _check_digests(self, digests: Digests) -> None:
        for name, leaf in self.leaves.items():
            missing = {chunk_file_name(c) for c in leaf.coords()} - digests.get(name, {}).keys()
            if missing:
                raise CheckpointError(
                    f"{self.path}: {len(missing)} chunks of {name} were not written, "
                    f"{min(missing)} among them; run the same command again"
                )


def reserved_names(files: Iterable[str]) -> Iterator[Problem]:
    """Files of a source that cannot lie in a checkpoint directory beside what it needs."""
    for file in files:
        if Path(file).parts[0] in RESERVED_NAMES:
            detail = (
                "has a name that the checkpoint directory needs for itself; "
                "move it out of the source"
            )
            yield Problem("file", shown(file), detail)


def _write_json(path: Place, value: Mapping[str, Any]) -> str:
    return path.write_pieces([json.dumps(value, indent=1).encode()])

"""The checkpoint directory, for reading: what it holds and its bytes; knows no safetensors names.

    params/           the Orbax tree, restorable with orbax.checkpoint alone: one raw file per chunk
    config.json       the source's, unchanged, and the source's other side files
    provenance.json   where the weights come from, and a digest of every chunk
    layout.json       header text of every source file, so that export can write them again
    COMPLETE          written last, digests of the files above; without it the folder is unfinished

Weights are read as bytes from chunk files, never through jax arrays, so that no bit can change.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtp_model import orbax_metadata
from mtp_model.chunks import Index, Leaf, chunk_file_name
from mtp_model.cloud import AnyPath, as_path
from mtp_model.rawio import digest, file_digest, read_range

FORMAT_VERSION = 1
PARAMS, CONFIG = "params", "config.json"
PROVENANCE, LAYOUT, COMPLETE = "provenance.json", "layout.json", "COMPLETE"
UNFINISHED = ".unfinished"  # a folder of whoever is writing; gone once COMPLETE is there
RESERVED_NAMES = frozenset((PARAMS, PROVENANCE, LAYOUT, COMPLETE, UNFINISHED))


class CheckpointError(ValueError):
    """A folder that is no usable checkpoint directory: what it is instead, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One chunk file: its leaf, its coordinate, where it is, and the digest that it must have."""

    path: str
    coord: str
    file: AnyPath
    digest: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint directory. `leaves` are by path, as `moe_layers.mlp.gate.weight`."""

    path: AnyPath
    config_dict: dict[str, Any]
    provenance: dict[str, Any]
    leaves: dict[str, Leaf]

    @property
    def params(self) -> AnyPath:
        """The Orbax tree."""
        return self.path / PARAMS

    def layout(self) -> dict[str, str]:
        """Header text of every source file, verbatim, by file name; megabytes for a large model."""
        return _read_json(self.path / LAYOUT)["headers"]

    def side_files(self) -> tuple[str, ...]:
        """The source's files that hold no tensors, config.json and the index among them."""
        return tuple(sorted(self.side_file_digests()))

    def side_file_digests(self) -> dict[str, str]:
        """Digest of every side file."""
        return _read_json(self.path / COMPLETE)["side_files"]

    def read_rows(self, path: str, index: Index, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the tensor at a stack index of a leaf, in the leaf's dtype."""
        leaf = self.leaves[path]
        out = np.empty((stop - start, *leaf.tensor_shape[1:]), leaf.dtype)
        self.read_rows_into(path, index, start, stop, out.reshape(-1).view(np.uint8))
        return out

    def read_rows_into(
        self, path: str, index: Index, start: int, stop: int, out: np.ndarray
    ) -> None:
        """The same rows as bytes, into `out` (uint8, one-dimensional, of exactly their size)."""
        leaf, done = self.leaves[path], 0
        for coord, offset, nbytes in leaf.row_spans(index, start, stop):
            name = chunk_file_name(coord)
            try:
                read_range(self.params / path / name, offset, out[done : done + nbytes])
            except FileNotFoundError:
                raise CheckpointError(
                    f"{self.path}: {PARAMS}/{path}/{name} is missing though the checkpoint "
                    "is marked complete; write it again"
                ) from None
            done += nbytes
        assert done == len(out), (path, index, start, stop, len(out))

    def pieces(self) -> Iterator[Piece]:
        """Every chunk file with the digest that was recorded when it was written."""
        for path, digests in self.provenance["pieces"].items():
            for coord, value in digests.items():
                file = self.params / path / coord
                yield Piece(path=path, coord=coord, file=file, digest=value)

    def damaged_files(self) -> list[str]:
        """Files other than chunks whose bytes are not those that were written, or that are gone."""
        complete = _read_json(self.path / COMPLETE)
        return [
            name
            for name, expected in sorted((complete["files"] | complete["side_files"]).items())
            if not (self.path / name).is_file() or file_digest(self.path / name) != expected
        ]


def open_checkpoint(path: str | AnyPath) -> Checkpoint:
    """Open a complete checkpoint directory; CheckpointError says what a folder is instead."""
    path = as_path(path)
    raise_unless_complete(path)
    complete = _read_json(path / COMPLETE)
    if complete.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {complete.get('format_version')!r}, this toolkit reads "
            f"{FORMAT_VERSION}: import the source again, or use the toolkit that wrote it"
        )
    provenance = _read_json(path / PROVENANCE)
    return Checkpoint(
        path=path,
        config_dict=_read_json(path / CONFIG),
        provenance=provenance,
        leaves={name: _read_leaf(path, name, dims) for name, dims in provenance["leaves"].items()},
    )


def raise_unless_complete(path: AnyPath) -> None:
    """Raise CheckpointError, saying what to do, unless the folder is marked complete."""
    if (path / COMPLETE).is_file():
        return
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        advice = "name a checkpoint directory that `convert-deepseek import` or training wrote"
    elif (path / UNFINISHED).is_dir():
        found = "is unfinished: what was writing it was interrupted or is still running"
        advice = "run the same command again, it continues where it stopped"
    elif (path / PARAMS).is_dir():
        found = f"has no {COMPLETE} file: it is unfinished, or only part of it was copied"
        advice = "copy all of it, or import it again with --overwrite"
    elif any(entry.name.endswith(".safetensors") for entry in path.iterdir()):
        found = "is a safetensors checkpoint, not a checkpoint directory"
        advice = f"first run `convert-deepseek import {path} DST`"
    else:
        found = "is no checkpoint directory"
        advice = "name a directory that `convert-deepseek import` or training wrote"
    raise CheckpointError(f"{path} {found}; {advice}")


def digest_of_json(value: Any) -> str:
    """Digest of plain data, whatever the order of its keys."""
    return digest(json.dumps(value, sort_keys=True).encode())


def _read_leaf(path: AnyPath, name: str, num_stack_dims: int) -> Leaf:
    metadata = _read_json(path / PARAMS / name / orbax_metadata.ZARRAY)
    try:
        return orbax_metadata.leaf_from_zarray(metadata, num_stack_dims)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: leaf {name} was not written by this toolkit ({error}); import it again"
        ) from error


def _read_json(path: AnyPath) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}), though the checkpoint is marked complete; "
            "copy it again, or import it again with --overwrite"
        ) from error

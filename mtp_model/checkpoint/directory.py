"""The checkpoint directory, for reading: what it holds and its bytes.

    params/           the Orbax tree, restorable with orbax.checkpoint alone: one raw file per chunk
    config.json       the source's, unchanged, and the source's other side files
    provenance.json   where the weights come from, and a digest of every chunk
    layout.json       header text of every source file, so that export can write them again
    COMPLETE          written last, digests of the files above; without it the folder is unfinished

Weights are read as bytes from chunk files, never through jax arrays, so that no bit can change.
"""

import functools
import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtp_model.checkpoint.chunks import Index, Leaf, chunk_file_name
from mtp_model.checkpoint.orbax import ZARRAY, leaf_from_zarray
from mtp_model.config import ModelConfig
from mtp_model.files.open import as_place
from mtp_model.files.place import Place, digest, name_fault
from mtp_model.files.untrusted_json import Each, Maybe, faults, shown
from mtp_model.problems import UserError

FORMAT_VERSION = 1
PARAMS, CONFIG = "params", "config.json"
PROVENANCE, LAYOUT, COMPLETE = "provenance.json", "layout.json", "COMPLETE"
UNFINISHED = ".unfinished"  # a folder of whoever is writing; gone once COMPLETE is there
RESERVED_NAMES = frozenset((PARAMS, PROVENANCE, LAYOUT, COMPLETE, UNFINISHED))

_SOURCE_FILE = {
    "size": int,
    "digest": Maybe(str),
    "sha256": Maybe(str),
    "header": str,
    "tensors": [Maybe(str)],
}
_SOURCE = {"name": str, "files": Each(_SOURCE_FILE)}
_DERIVATION = {"base": dict, "changed": [str], "by": Maybe(str), "settings": Maybe(dict)}
_SHAPES = {
    COMPLETE: {
        "format_version": int,
        "files": {PROVENANCE: str, LAYOUT: str},
        "side_files": Each(str),
    },
    PROVENANCE: {
        "source": _SOURCE,
        "mtp_source": Maybe(_SOURCE),
        "mtp_new_layers": Maybe([int]),
        "plan": Maybe(str),
        "scope": str,
        "dtype": str,
        "copies": str,
        "mtp_hidden_state": str,
        "stale_copies": [str],
        "tools": Each(str),
        "leaves": Each(int),
        "pieces": Each(Each(str)),
        "derived": Maybe([_DERIVATION]),
    },
    LAYOUT: {"headers": Each(str)},
    CONFIG: {},
}


class CheckpointError(UserError):
    """A folder that is no usable checkpoint directory: what it is instead, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One chunk file: its leaf, its coordinate, where it is, and the digest that it must have."""

    path: str
    coord: str
    file: Place
    digest: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint directory. `leaves` are by path, as `moe_layers.mlp.gate.weight`."""

    path: Place
    config_dict: dict[str, Any]
    provenance: dict[str, Any]
    leaves: dict[str, Leaf]

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The network, as the source's config.json and the import's --mtp-hidden-state say."""
        hidden_state = self.provenance["mtp_hidden_state"]
        return ModelConfig.from_dict({**self.config_dict, "mtp_hidden_state": hidden_state})

    @property
    def digest(self) -> str:
        """Tells checkpoints apart, wherever they are: of COMPLETE, which has the digests of what
        has those of all chunks."""
        return (self.path / COMPLETE).digest()

    @property
    def dtypes(self) -> dict[str, Any]:
        """What each leaf is stored in, by its path."""
        return {name: leaf.dtype for name, leaf in self.leaves.items()}

    @property
    def params(self) -> Place:
        """The Orbax tree."""
        return self.path / PARAMS

    def layout(self) -> dict[str, str]:
        """Header text of every source file, verbatim, by file name; megabytes for a large model."""
        headers = _read_json(self.path, LAYOUT)["headers"]
        differing = headers.keys() ^ self.provenance["source"]["files"].keys()
        if differing:
            fault = f"headers and the source's files in {PROVENANCE} differ by {min(differing)!r}"
            raise _unreadable(self.path, LAYOUT, fault)
        _raise_if_damaged(self, (LAYOUT,))
        return headers

    def side_files(self) -> tuple[str, ...]:
        """The source's files that hold no tensors, config.json and the index among them."""
        return tuple(sorted(self.side_file_digests()))

    def side_file_digests(self) -> dict[str, str]:
        """Digest of every side file."""
        return _read_json(self.path, COMPLETE)["side_files"]

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
                file = self.params / path / name
                file.read_range_into(offset, out[done : done + nbytes])
            except FileNotFoundError:
                raise CheckpointError(
                    f"{self.path}: {PARAMS}/{path}/{name} is missing though the checkpoint "
                    "is marked complete; copy it again, or import it again with --overwrite"
                ) from None
            done += nbytes
        assert done == len(out), (path, index, start, stop, len(out))

    def pieces(self) -> Iterator[Piece]:
        """Every chunk file with the digest that was recorded when it was written."""
        for path, digests in self.provenance["pieces"].items():
            for coord, value in digests.items():
                file = self.params / path / coord
                yield Piece(path=path, coord=coord, file=file, digest=value)

    def damaged_files(self, names: Container[str] | None = None) -> list[str]:
        """Files other than chunks, of these or of all, whose bytes are not those that were written,
        or that are gone."""
        complete = _read_json(self.path, COMPLETE)
        return [
            name
            for name, expected in sorted((complete["files"] | complete["side_files"]).items())
            if names is None or name in names
            if not (self.path / name).is_file() or (self.path / name).digest() != expected
        ]


def open_checkpoint(path: str | Path | Place) -> Checkpoint:
    """Open a complete checkpoint directory; CheckpointError says what a folder is instead, or that
    the config or the record of its weights are not those that were written."""
    checkpoint = read_checkpoint(path)
    _raise_if_damaged(checkpoint, (CONFIG, PROVENANCE))
    return checkpoint


def read_checkpoint(path: str | Path | Place) -> Checkpoint:
    """The same for whoever compares all digests: no file was compared with its own."""
    path = as_place(path)
    raise_unless_complete(path)
    for name, found in path.strangers():
        advice = "put the file itself there (the folder as a whole may be a link)"
        raise CheckpointError(f"{path}: {shown(name)} {found}; {advice}")
    _check_version(path)
    provenance = _read_json(path, PROVENANCE)
    leaves = {name: _read_leaf(path, name, dims) for name, dims in provenance["leaves"].items()}
    _check_pieces(path, leaves, provenance["pieces"])
    return Checkpoint(
        path=path,
        config_dict=_read_json(path, CONFIG),
        provenance=provenance,
        leaves=leaves,
    )


def raise_unless_complete(path: Place) -> None:
    """Raise CheckpointError, saying what to do, unless the folder is marked complete."""
    if (path / COMPLETE).is_file():
        return
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        advice = "name a checkpoint directory that `convert-deepseek import` or training wrote"
    elif (path / UNFINISHED).is_dir():
        raise CheckpointError(f"{path} {unfinished_fault()}")
    elif (path / PARAMS).is_dir():
        found = f"has no {COMPLETE} file: it is unfinished, or only part of it was copied"
        advice = "copy all of it, or empty the folder and import it again"
    elif any(entry.name.endswith(".safetensors") for entry in path.entries()):
        found = "is a safetensors checkpoint, not a checkpoint directory"
        advice = f"first run `convert-deepseek import {path} DST`"
    else:
        found = "is no checkpoint directory"
        advice = "name a directory that `convert-deepseek import` or training wrote"
    raise CheckpointError(f"{path} {found}; {advice}")


def unfinished_fault() -> str:
    """What a folder with UNFINISHED in it is, and what to do; it reads on after the folder."""
    found = "is unfinished: what was writing it was interrupted or is still running"
    advice = "run the same command again, it continues where it stopped"
    return f"{found}; {advice}"


def digest_of_json(value: Any) -> str:
    """Digest of plain data, whatever the order of its keys."""
    return digest(json.dumps(value, sort_keys=True).encode())


def _raise_if_damaged(checkpoint: Checkpoint, names: Container[str]) -> None:
    for name in checkpoint.damaged_files(names):
        raise CheckpointError(
            f"{checkpoint.path / name} has other bytes than {COMPLETE} records: it was damaged or "
            "edited (an edit belongs in the source's); copy it again, or import it again with "
            "--overwrite"
        )


def _check_version(path: Place) -> None:
    version = _parsed(path, COMPLETE).get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}, this toolkit reads {FORMAT_VERSION}; import "
            "it again with --overwrite, or use the toolkit that wrote it"
        )
    _read_json(path, COMPLETE)


def _check_pieces(
    path: Place, leaves: Mapping[str, Leaf], pieces: Mapping[str, Mapping[str, str]]
) -> None:
    """Raise CheckpointError unless there is a digest for each chunk of each leaf, and no other."""
    for name in sorted(leaves.keys() | pieces.keys()):
        leaf, found = leaves.get(name), pieces.get(name, {})
        needed = leaf.num_chunks if leaf else 0
        same = len(found) == needed
        if same and leaf:
            same = all(chunk_file_name(coord) in found for coord in leaf.coords())
        if not same:
            fault = f"pieces > {name} has {len(found)} pieces, not the {needed} that are stored"
            raise _unreadable(path, PROVENANCE, fault)


def _read_leaf(path: Place, name: str, num_stack_dims: int) -> Leaf:
    metadata = _parsed(path, f"{PARAMS}/{name}/{ZARRAY}")
    try:
        return leaf_from_zarray(metadata, num_stack_dims)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: leaf {name} was not written by this toolkit ({error}); import it again "
            "with --overwrite"
        ) from error


def _read_json(path: Place, name: str) -> dict[str, Any]:
    """A file of the directory, with all that its readers index."""
    value = _parsed(path, name)
    for fault in faults(value, _SHAPES[name]):
        raise _unreadable(path, name, fault)
    for file in _names_in(name, value):
        if fault := name_fault(file):
            raise _unreadable(path, name, f"{shown(file)} {fault}")
    return value


def _names_in(name: str, value: Mapping[str, Any]) -> Iterator[str]:
    """Names of files that are read or written by what a file of the directory says."""
    if name == COMPLETE:
        yield from (*value["files"], *value["side_files"])
    elif name == LAYOUT:
        yield from value["headers"]
    elif name == PROVENANCE:
        sources = (value["source"], value.get("mtp_source") or {"files": {}})
        yield from (*value["leaves"], *(file for source in sources for file in source["files"]))


def _parsed(path: Place, name: str) -> dict[str, Any]:
    try:
        value = json.loads((path / name).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, name, str(error)) from error
    for fault in faults(value, dict):
        raise _unreadable(path, name, fault)
    return value


def _unreadable(path: Place, name: str, fault: str) -> CheckpointError:
    return CheckpointError(
        f"{path / name} cannot be read ({fault}), though the checkpoint is marked complete; "
        "copy it again, or import it again with --overwrite"
    )

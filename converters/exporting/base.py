"""The source that a checkpoint was imported from, as what an export takes everything else from.

Knows how to tell by names, headers and small files that it is this source; writes nothing.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xxhash

from converters.exporting.encode import PIECE_BYTES, Encoder, held_slots
from converters.format.listing import Listing
from converters.sources.source import read_pieces
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.files.journal import Fingerprint
from mtp_model.files.local import digest
from mtp_model.problems import Problem, raise_if_any


class Overlay:
    """All tensors of the base, row by row: the checkpoint's own as an encoder has them.

    Of the others a row is a byte: nothing but their place is known of them.
    """

    def __init__(self, encoder: Encoder, base: Listing):
        self._encoder = encoder
        self._base = base

    def num_rows(self, name: str) -> int:
        if name in self._encoder.slots:
            return self._encoder.num_rows(name)
        return self._base.tensors[name].nbytes

    def row_bytes(self, name: str) -> int:
        return self._encoder.row_bytes(name) if name in self._encoder.slots else 1

    def rows_at_once(self, name: str) -> int:
        if name in self._encoder.slots:
            return self._encoder.rows_at_once(name)
        return PIECE_BYTES

    def is_derived_scale(self, name: str) -> bool:
        return self._encoder.is_derived_scale(name)

    def encode_into(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        if name in self._encoder.slots:
            self._encoder.encode_into(name, start, stop, out)
        else:
            tensor = self._base.tensors[name]
            self._base.source.read_into(tensor.file, tensor.begin + start, out)


def wanted(base: Listing, checkpoint: Checkpoint) -> str:
    """A base and what it has to be, as the head of a report."""
    name = checkpoint.provenance["source"]["name"]
    return f"{base.source.name}, which has to be what {checkpoint.path} was imported from ({name})"


def check_base(base: Listing, checkpoint: Checkpoint) -> None:
    """Raise ProblemsError unless headers, sizes and other files are those that were imported."""
    raise_if_any(wanted(base, checkpoint), _differences(base, checkpoint))


def base_state(base: Listing, checkpoint: Checkpoint) -> Fingerprint:
    """What tells of a journal that the base is still the same."""
    files = (*base.headers, *checkpoint.side_files())
    return {"base": {file: dict(base.source.fingerprint(file)) for file in files}}


def raise_if_changed(base: Listing, checkpoint: Checkpoint, began: Fingerprint) -> None:
    """Raise ProblemsError for files that were replaced since `began`."""
    now = base_state(base, checkpoint)["base"]
    raise_if_any(
        base.source.name,
        (
            Problem("changed", file, "was replaced while it was read; run the same command again")
            for file, state in now.items()
            if state != began["base"][file]
        ),
    )


def held_dtypes(checkpoint: Checkpoint, dtypes: Mapping[str, str]) -> dict[str, str]:
    """Those of the tensors that the checkpoint has."""
    held = held_slots(checkpoint)
    return {name: dtype for name, dtype in dtypes.items() if name in held}


def _differences(base: Listing, checkpoint: Checkpoint) -> Iterator[Problem]:
    records: dict[str, dict[str, Any]] = checkpoint.provenance["source"]["files"]
    for file in sorted(records.keys() | base.headers.keys()):
        fault = _header_fault(records.get(file), base, file)
        if fault:
            yield Problem("base", file, fault)
    sizes = base.source.files()
    for file, recorded in checkpoint.side_file_digests().items():
        if file not in sizes:
            yield Problem("base", file, "is not there")
        elif source_file_digest(base, file, sizes[file]) != recorded:
            yield Problem("base", file, "has other bytes than what was imported")


def _header_fault(record: dict[str, Any] | None, base: Listing, file: str) -> str | None:
    if record is None:
        return "is no file of what was imported"
    if file not in base.headers:
        return "is not there"
    if digest(base.headers[file].raw) != record["header"]:
        return "has another header than what was imported: other tensors, or in other places"
    imported = record.get("sha256")
    listed = imported and base.source.fingerprint(file).get("sha256")
    if listed and listed != imported:
        return f"is listed with sha256 {listed}, what was imported with {imported}"
    return None


def source_file_digest(base: Listing, file: str, size: int) -> str:
    """xxh3-128 of a file of this size."""
    state = xxhash.xxh3_128()
    for piece in read_pieces(base.source, file, size):
        state.update(piece)
    return state.hexdigest()

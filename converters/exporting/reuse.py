"""The source that a checkpoint was imported from, as the base of its export.

An export takes from it the files that it would not change, and the tensors that the checkpoint does
not hold. First names, headers and small files have to show that it is this source; then both sides
are read once to find the files that change. Nothing is written.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from converters.exporting.encode import PIECE_BYTES, EncodedRows, Encoder
from converters.exporting.plan import ExportPlan, origin
from converters.exporting.stream import Segments, encoded_segments, tensor_segments
from converters.format.header import Header, TensorInfo
from converters.format.listing import Listing
from converters.sources.source import read_pieces, replaced_files
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.files.journal import Fingerprint
from mtp_model.files.memory import ReusedMemory
from mtp_model.files.place import digest
from mtp_model.problems import Problem, raise_if_any


class BaseEncoder(Encoder):
    """All tensors of the base: the checkpoint's own encoded, all others as the base has them.

    Of the others a row is a byte: nothing but their place is known of them.
    """

    def __init__(self, checkpoint: Checkpoint, plan: ExportPlan, base: Listing):
        held = {name: dtype for name, dtype in plan.dtypes.items() if name in plan.slots}
        super().__init__(checkpoint, plan.slots, held)
        self._base = base

    def row_bytes(self, name: str) -> int:
        return super().row_bytes(name) if name in self.slots else 1

    def spans(self, name: str, most_bytes: int) -> Iterator[range]:
        if name in self.slots:
            return super().spans(name, most_bytes)
        nbytes = self._base.tensors[name].nbytes
        starts = range(0, nbytes, most_bytes)
        return (range(start, min(start + most_bytes, nbytes)) for start in starts)

    def encode(self, name: str, rows: range, out: np.ndarray) -> EncodedRows:
        if name in self.slots:
            return super().encode(name, rows, out)
        tensor = self._base.tensors[name]
        self._base.source.read_into(tensor.file, tensor.begin + rows.start, out)
        return EncodedRows(data=out)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A file of the base. digests: xxh3-128 of its bytes of each tensor that was compared."""

    compared: str
    is_changed: bool
    digests: dict[str, str]


def compared_before(entries: Iterable[Mapping[str, Any]]) -> dict[str, Compared]:
    """What lines of a journal tell of files that an interrupted export compared, by file."""
    lines = (entry for entry in entries if "compared" in entry)
    return {line["compared"]: Compared(**line) for line in lines}


def compare_files(
    encoder: Encoder,
    base: Listing,
    checkpoint: Checkpoint,
    files: Sequence[Header],
    *,
    workers: int,
    report: Callable[[int], None],
) -> Iterator[Compared]:
    """Compare the base's bytes of what the checkpoint holds with what export writes for it.

    A tensor that the checkpoint does not hold is unchanged, and is not read. A few pieces of rows
    are in memory. `report` is told the bytes. Raises ProblemsError for a file with tensors whose
    bytes are not those that were imported.
    """
    held = [[t for t in file.tensors if t.name in encoder.slots] for file in files]
    memory = ReusedMemory(PIECE_BYTES)
    every = [tensor for tensors in held for tensor in tensors]
    with closing(encoded_segments(encoder, every, workers)) as segments:
        for file, tensors in zip(files, held, strict=True):
            is_changed, digests = False, {}
            for tensor in tensors:
                is_same, digests[tensor.name] = _compare(tensor, base, segments, memory)
                is_changed = is_changed or not is_same
                report(tensor.nbytes)
            raise_if_any(_needed(base, checkpoint), _foreign_tensors(checkpoint, file, digests))
            yield Compared(compared=file.file, is_changed=is_changed, digests=digests)


def _compare(
    tensor: TensorInfo, base: Listing, segments: Segments, memory: ReusedMemory
) -> tuple[bool, str]:
    """Whether export writes a tensor's bytes in the base; the digest of these."""
    state, done, is_same = xxhash.xxh3_128(), 0, True
    for segment in tensor_segments(segments, tensor):
        theirs = memory.take(len(segment.data))
        base.source.read_into(tensor.file, tensor.begin + done, theirs)
        state.update(theirs.data)
        is_same = is_same and np.array_equal(segment.data, theirs)
        done += len(theirs)
    return is_same, state.hexdigest()


def _foreign_tensors(
    checkpoint: Checkpoint, file: Header, digests: Mapping[str, str]
) -> Iterator[Problem]:
    """Tensors of the base that have other bytes than were imported, where import read them."""
    recorded = checkpoint.provenance["source"]["files"][file.file]["tensors"]
    for tensor, value in zip(file.tensors, recorded, strict=True):
        if value is not None and digests.get(tensor.name, value) != value:
            detail = f"in {file.file} has other bytes than what was imported"
            yield Problem("base", tensor.name, detail)


def check_base(base: Listing, checkpoint: Checkpoint) -> None:
    """Raise ProblemsError unless headers, sizes and other files are those that were imported."""
    raise_if_any(_needed(base, checkpoint), _differences(base, checkpoint))


def base_state(base: Listing, checkpoint: Checkpoint) -> Fingerprint:
    """What tells of a journal that the base is still the same."""
    files = (*base.headers, *checkpoint.side_files())
    return {"base": {file: dict(base.source.fingerprint(file)) for file in files}}


def raise_if_changed(base: Listing, began: Fingerprint) -> None:
    """Raise ProblemsError for files that were replaced since `began`, which has base_state."""
    changed = replaced_files(base.source, began["base"], "run the same command again")
    raise_if_any(base.source.name, changed)


def _needed(base: Listing, checkpoint: Checkpoint) -> str:
    """A base and what it has to be, as the head of a report."""
    needed = f"{base.source.name}, which has to be what {checkpoint.path} was imported from"
    return f"{needed} ({origin(checkpoint)})"


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

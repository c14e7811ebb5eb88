"""Which files of a base an export changes; reads both sides once, writes nothing but its journal.

A tensor is unchanged when what export would write for it equals the base's bytes. One that the
checkpoint does not hold is unchanged, and is not read.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace

import numpy as np
import xxhash

from converters.exporting.base import wanted
from converters.exporting.encode import PIECE_BYTES, Encoder
from converters.exporting.plan import OutFile
from converters.exporting.stream import Segments, prepared_segments
from converters.format.header import TensorInfo
from converters.format.listing import Listing
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.files.journal import Journal
from mtp_model.files.local import AlignedBuffer
from mtp_model.problems import Problem, raise_if_any


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A file of the base. digests: xxh3-128 of its bytes of each tensor that was compared."""

    compared: str
    is_changed: bool
    digests: dict[str, str]


class Comparison:
    """Compares file by file, a few pieces of rows in memory; goes on from what a journal has."""

    def __init__(self, base: Listing, checkpoint: Checkpoint, encoder: Encoder, journal: Journal):
        self._base = base
        self._checkpoint = checkpoint
        self._encoder = encoder
        self._journal = journal
        lines = (entry for entry in journal.entries if "compared" in entry)
        self.found = {line["compared"]: Compared(**line) for line in lines}
        """What was compared, by file."""

    @property
    def digests(self) -> dict[str, str]:
        """xxh3-128 of the base's bytes of every tensor that was compared, by name."""
        return {
            name: digest for file in self.found.values() for name, digest in file.digests.items()
        }

    def nbytes(self, file: OutFile) -> int:
        """Bytes of a file's tensors that are compared."""
        return sum(tensor.nbytes for tensor in self._held(file))

    def run(self, files: Sequence[OutFile], workers: int, report: Callable[[int], None]) -> None:
        """Compare these files. `report` is told the bytes.

        Raises ProblemsError for a file with tensors whose bytes are not those that were imported.
        """
        todo = [file for file in files if file.name not in self.found]
        for file in self._compare(todo, workers, report):
            self._journal.append(asdict(file))
            self.found[file.compared] = file

    def _compare(
        self, files: Sequence[OutFile], workers: int, report: Callable[[int], None]
    ) -> Iterator[Compared]:
        held = [replace(file, tensors=self._held(file)) for file in files]
        buffer = AlignedBuffer(PIECE_BYTES)
        with closing(prepared_segments(self._encoder, held, workers)) as segments:
            for file, part in zip(files, held, strict=True):
                changed, digests = False, {}
                for tensor in part.tensors:
                    same, digests[tensor.name] = self._is_same(tensor, segments, buffer)
                    changed = changed or not same
                    self._encoder.forget(tensor.name)
                    report(tensor.nbytes)
                problems = self._problems(file, digests)
                raise_if_any(wanted(self._base, self._checkpoint), problems)
                yield Compared(compared=file.name, is_changed=changed, digests=digests)

    def _held(self, file: OutFile) -> tuple[TensorInfo, ...]:
        """Tensors of a file that the checkpoint has, copies of them included."""
        return tuple(tensor for tensor in file.tensors if tensor.name in self._encoder.slots)

    def _is_same(
        self, tensor: TensorInfo, segments: Segments, buffer: AlignedBuffer
    ) -> tuple[bool, str]:
        """Whether export writes a tensor's bytes in the base; the digest of these."""
        state, done, same = xxhash.xxh3_128(), 0, True
        while done < tensor.nbytes:
            ours = next(segments).data(self._encoder)
            fits = len(ours) <= buffer.capacity
            theirs = buffer.bytes[: len(ours)] if fits else np.empty_like(ours)
            self._base.source.read_into(tensor.file, tensor.begin + done, theirs)
            state.update(theirs.data)
            same = same and np.array_equal(ours, theirs)
            done += len(ours)
        return same, state.hexdigest()

    def _problems(self, file: OutFile, found: dict[str, str]) -> Iterator[Problem]:
        recorded = self._checkpoint.provenance["source"]["files"][file.name]["tensors"]
        for tensor, value in zip(file.tensors, recorded, strict=True):
            if value is not None and found.get(tensor.name, value) != value:
                detail = f"in {file.name} has other bytes than what was imported"
                yield Problem("base", tensor.name, detail)

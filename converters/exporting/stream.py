"""The bytes of an export in the order of its files, prepared ahead by a few threads.

A piece is a run of rows of neighbouring tensors, about 32 MiB: small tensors share one.
"""

import itertools
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from converters.exporting.encode import PIECE_BYTES
from converters.exporting.plan import OutFile
from converters.format.header import TensorInfo
from mtp_model.files.local import AlignedBuffer, aligned


class RowEncoder(Protocol):
    """The bytes of tensors, row by row; encode.Encoder explains the methods."""

    def num_rows(self, name: str) -> int: ...
    def row_bytes(self, name: str) -> int: ...
    def rows_at_once(self, name: str) -> int: ...
    def is_derived_scale(self, name: str) -> bool: ...
    def encode_into(self, name: str, start: int, stop: int, out: np.ndarray) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows of a tensor as they are written, in memory that is reused once the next is asked for."""

    tensor: TensorInfo
    start: int
    stop: int
    memory: np.ndarray
    is_late: bool

    def data(self, encoder: RowEncoder) -> np.ndarray:
        """Its bytes (uint8)."""
        if self.is_late:
            encoder.encode_into(self.tensor.name, self.start, self.stop, self.memory)
        return self.memory


Segments = Generator[Segment, None, None]


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows of a tensor that are still to be prepared."""

    tensor: TensorInfo
    start: int
    stop: int
    nbytes: int


def prepared_segments(encoder: RowEncoder, files: Sequence[OutFile], workers: int) -> Segments:
    """All tensors of the files in order, row by row."""
    idle = [_Memory() for _ in range(workers + 1)]
    waiting: deque[tuple[Future[list[Segment]], _Memory]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for piece in _pieces(encoder, files):
            if not idle:
                future, memory = waiting.popleft()
                yield from future.result()
                idle.append(memory)
            memory = idle.pop()
            waiting.append((pool.submit(_prepare, encoder, piece, memory), memory))
        while waiting:
            yield from waiting.popleft()[0].result()


class _Memory:
    """Memory of one piece, reused from piece to piece."""

    def __init__(self) -> None:
        self._buffer = AlignedBuffer(0)

    def take(self, nbytes: int) -> np.ndarray:
        if self._buffer.capacity < nbytes:
            self._buffer = AlignedBuffer(max(nbytes, PIECE_BYTES))
        return self._buffer.bytes[:nbytes]


def _pieces(encoder: RowEncoder, files: Sequence[OutFile]) -> Iterator[list[_Rows]]:
    piece: list[_Rows] = []
    filled = 0
    for rows in _all_rows(encoder, files):
        if piece and filled + aligned(rows.nbytes) > PIECE_BYTES:
            yield piece
            piece, filled = [], 0
        piece.append(rows)
        filled += aligned(rows.nbytes)
    if piece:
        yield piece


def _all_rows(encoder: RowEncoder, files: Sequence[OutFile]) -> Iterator[_Rows]:
    for file in files:
        for tensor in file.tensors:
            num_rows, step = encoder.num_rows(tensor.name), encoder.rows_at_once(tensor.name)
            for start in range(0, num_rows, step):
                stop = min(start + step, num_rows)
                nbytes = (stop - start) * encoder.row_bytes(tensor.name)
                yield _Rows(tensor=tensor, start=start, stop=stop, nbytes=nbytes)


def _prepare(encoder: RowEncoder, piece: list[_Rows], memory: _Memory) -> list[Segment]:
    # Every segment begins a page, so that it can be read straight from the disk.
    begins = [0, *itertools.accumulate(aligned(rows.nbytes) for rows in piece)]
    out = memory.take(begins[-1])
    segments = []
    for rows, begin in zip(piece, begins, strict=False):
        end = begin + rows.nbytes
        segment = Segment(
            tensor=rows.tensor,
            start=rows.start,
            stop=rows.stop,
            memory=out[begin:end],
            # New scales follow from their weight. It mostly comes just before them: by the time
            # they are written it was encoded, and nothing has to be encoded twice.
            is_late=encoder.is_derived_scale(rows.tensor.name),
        )
        if not segment.is_late:
            encoder.encode_into(rows.tensor.name, rows.start, rows.stop, segment.memory)
        segments.append(segment)
    return segments

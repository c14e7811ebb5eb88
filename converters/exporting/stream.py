"""The bytes of an export in the order of its files, prepared ahead by a few threads.

A piece is a run of rows of neighbouring tensors, about 32 MiB: small tensors share one.

The new scales of a weight that is quantised again come with its codes, and are kept until their own
place in the files comes, which mostly is just behind.
"""

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from converters.exporting.encode import (
    PIECE_BYTES,
    EncodedRows,
    Encoder,
    Requantisation,
    joined_scales,
    requantisation,
)
from converters.format.header import TensorInfo
from mtp_model.files.memory import ReusedMemory, aligned


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows of a tensor as they are written, in memory that is reused once the next is asked for.

    is_last: they end the tensor. cost: with the last rows of a weight that got new scales.
    """

    tensor: TensorInfo
    data: np.ndarray
    is_last: bool
    cost: Requantisation | None = None


Segments = Generator[Segment, None, None]


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows of a tensor that are still to be prepared; none of scales that their weight brings."""

    tensor: TensorInfo
    rows: range
    nbytes: int
    is_last: bool


_Prepared = tuple[_Rows, EncodedRows]
_NO_BYTES = np.empty(0, np.uint8)
_NOTHING = EncodedRows(data=_NO_BYTES)


def encoded_segments(encoder: Encoder, tensors: Sequence[TensorInfo], workers: int) -> Segments:
    """The bytes of these tensors, in their order.

    An export in which a weight's scales are written before it, or without it, quantises the weight
    for them alone; in any other it is quantised once.
    """
    brought = _scales_behind_their_weights(encoder, tensors)
    scales: dict[str, np.ndarray] = {}  # of weights that are done, until their place comes
    weight: list[EncodedRows] = []  # what was handed out of the one that is being quantised
    all_rows = _all_rows(encoder, tensors, brought)
    with closing(_prepared(encoder, all_rows, workers)) as prepared:
        for rows, encoded in prepared:
            name, data, cost = rows.tensor.name, encoded.data, None
            if name in brought:
                data = scales.pop(name).reshape(-1).view(np.uint8)
            if encoded.scales is not None:
                weight.append(replace(encoded, data=_NO_BYTES))
            if weight and rows.is_last:
                cost, scale = requantisation(name, weight), encoder.slots[name].scale
                if scale in brought:
                    scales[scale] = joined_scales(weight)
                weight = []
            yield Segment(tensor=rows.tensor, data=data, is_last=rows.is_last, cost=cost)


def tensor_segments(segments: Segments, tensor: TensorInfo) -> Iterator[Segment]:
    """The segments of one tensor, which is the next in order."""
    for segment in segments:
        assert segment.tensor is tensor, (segment, tensor)
        yield segment
        if segment.is_last:
            return


def _scales_behind_their_weights(encoder: Encoder, tensors: Iterable[TensorInfo]) -> set[str]:
    """Names of new scales whose weight is among the tensors before them."""
    found, before = set(), set()
    for tensor in tensors:
        if encoder.requantised_weight(tensor.name) in before:
            found.add(tensor.name)
        before.add(tensor.name)
    return found


def _all_rows(
    encoder: Encoder, tensors: Iterable[TensorInfo], brought: set[str]
) -> Iterator[_Rows]:
    for tensor in tensors:
        if tensor.name in brought:
            yield _Rows(tensor=tensor, rows=range(0), nbytes=0, is_last=True)
            continue
        left, row_bytes = tensor.nbytes, encoder.row_bytes(tensor.name)
        for rows in encoder.spans(tensor.name, PIECE_BYTES):
            left -= len(rows) * row_bytes
            yield _Rows(tensor=tensor, rows=rows, nbytes=len(rows) * row_bytes, is_last=left == 0)


def _prepared(
    encoder: Encoder, all_rows: Iterable[_Rows], workers: int
) -> Generator[_Prepared, None, None]:
    """All rows in order, encoded by threads, a few pieces ahead."""
    idle = [ReusedMemory(PIECE_BYTES) for _ in range(workers + 1)]
    waiting: deque[tuple[Future[list[_Prepared]], ReusedMemory]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for piece in _pieces(all_rows):
            if not idle:
                future, memory = waiting.popleft()
                yield from future.result()
                idle.append(memory)
            memory = idle.pop()
            waiting.append((pool.submit(_prepare, encoder, piece, memory), memory))
        while waiting:
            yield from waiting.popleft()[0].result()


def _pieces(all_rows: Iterable[_Rows]) -> Iterator[list[_Rows]]:
    piece: list[_Rows] = []
    filled = 0
    for rows in all_rows:
        if piece and filled + aligned(rows.nbytes) > PIECE_BYTES:
            yield piece
            piece, filled = [], 0
        piece.append(rows)
        filled += aligned(rows.nbytes)
    if piece:
        yield piece


def _prepare(encoder: Encoder, piece: list[_Rows], memory: ReusedMemory) -> list[_Prepared]:
    # Every tensor's rows begin a page, so that they can be read straight from the disk.
    begins = [0, *itertools.accumulate(aligned(rows.nbytes) for rows in piece)]
    out = memory.take(begins[-1])
    prepared = []
    for rows, begin in zip(piece, begins, strict=False):
        data = out[begin : begin + rows.nbytes]
        encoded = encoder.encode(rows.tensor.name, rows.rows, data) if rows.rows else _NOTHING
        prepared.append((rows, encoded))
    return prepared

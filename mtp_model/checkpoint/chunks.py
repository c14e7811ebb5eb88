"""How a leaf is cut into chunk files: arithmetic on shapes.

A leaf stacks equal tensors: `num_stack_dims` leading dims (none, layer, or layer and expert), then
the tensor's own dims, of which the first is its rows. A chunk always holds whole rows, so any row
range of a tensor is one contiguous byte range of each chunk that it touches.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  registers bfloat16 and float8_e4m3fn with numpy
import numpy as np

MIB = 1 << 20
Index = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ChunkPolicy:
    """Limits of the chunk grid; the defaults are measured for V3 (about 46,000 files)."""

    max_bytes: int = 32 * MIB
    gather_below_bytes: int = MIB
    row_multiple: int = 128

    def with_block_rows(self, block_rows: int) -> "ChunkPolicy":
        """The same limits with rows that are also a multiple of an FP8 block's height."""
        return ChunkPolicy(
            max_bytes=self.max_bytes,
            gather_below_bytes=self.gather_below_bytes,
            row_multiple=math.lcm(self.row_multiple, block_rows),
        )


DEFAULT_POLICY = ChunkPolicy()


def chunk_shape(
    leaf_shape: tuple[int, ...],
    num_stack_dims: int,
    dtype: np.dtype,
    policy: ChunkPolicy = DEFAULT_POLICY,
) -> tuple[int, ...]:
    """Chunk shape of a leaf: a row block of a large tensor, or many small tensors.

    Small tensors are gathered over the experts of one layer (45,808 scales would be as many files).
    """
    stack, tensor = leaf_shape[:num_stack_dims], leaf_shape[num_stack_dims:]
    tensor_bytes = math.prod(tensor) * dtype.itemsize
    if tensor_bytes < policy.gather_below_bytes:
        return (*_gathered(stack, tensor_bytes, policy), *tensor)
    rows = _rows_per_chunk(tensor[0], tensor_bytes // tensor[0], policy)
    return (*(1 for _ in stack), rows, *tensor[1:])


def _gathered(stack: tuple[int, ...], tensor_bytes: int, policy: ChunkPolicy) -> tuple[int, ...]:
    """One layer, and the most experts that divide the stack and fit into a chunk."""
    if len(stack) < 2:
        return tuple(1 for _ in stack)
    most = max(policy.max_bytes // max(tensor_bytes, 1), 1)
    return (*(1 for _ in stack[:-1]), _largest_divisor(stack[-1], most))


def _rows_per_chunk(rows: int, row_bytes: int, policy: ChunkPolicy) -> int:
    """Rows of a chunk; zarr v2 stores edge chunks in full, so an exact divisor is preferred."""
    fit = policy.max_bytes // row_bytes
    if rows <= fit:
        return rows
    unit = policy.row_multiple
    most = max(fit // unit, 1)
    blocks = -(-rows // unit)
    exact = _largest_divisor(blocks, most) if rows % unit == 0 else 0
    if 4 * exact >= most:
        return exact * unit
    num_chunks = -(-blocks // most)
    return min(-(-blocks // num_chunks) * unit, rows)


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One stacked array of the checkpoint: shape, dtype and chunk grid."""

    shape: tuple[int, ...]
    dtype: np.dtype
    num_stack_dims: int
    chunk: tuple[int, ...]

    @classmethod
    def make(
        cls,
        shape: tuple[int, ...],
        dtype: np.dtype,
        num_stack_dims: int,
        policy: ChunkPolicy = DEFAULT_POLICY,
    ) -> "Leaf":
        """A leaf with the chunk grid that the policy gives it."""
        chunk = chunk_shape(shape, num_stack_dims, dtype, policy)
        return cls(shape=shape, dtype=dtype, num_stack_dims=num_stack_dims, chunk=chunk)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of one tensor of the stack."""
        return self.shape[self.num_stack_dims :]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a tensor."""
        return math.prod(self.tensor_shape[1:]) * self.dtype.itemsize

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one tensor."""
        return math.prod(self.tensor_shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of every chunk file, edge chunks included."""
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def chunk_rows(self) -> int:
        """Rows of a tensor in one chunk."""
        return self.chunk[self.num_stack_dims]

    @property
    def stack_grid(self) -> tuple[int, ...]:
        """Number of chunks along each stack dim."""
        stack = self.num_stack_dims
        return tuple(
            -(-s // c) for s, c in zip(self.shape[:stack], self.chunk[:stack], strict=True)
        )

    @property
    def num_row_chunks(self) -> int:
        """Number of chunks along a tensor's rows."""
        return -(-self.tensor_shape[0] // self.chunk_rows)

    @property
    def num_chunks(self) -> int:
        """Number of chunk files."""
        return math.prod(self.stack_grid) * self.num_row_chunks

    def stack_coords(self) -> Iterator[Index]:
        """Chunk coordinates along the stack dims, in C order."""
        return itertools.product(*map(range, self.stack_grid))

    def coord(self, stack_coord: Index, row_chunk: int) -> Index:
        """Full chunk coordinate: stack dims, rows, and zero for the dims that are never cut."""
        return (*stack_coord, row_chunk, *(0 for _ in self.tensor_shape[1:]))

    def coords(self) -> Iterator[Index]:
        """Every chunk coordinate, in C order."""
        for stack_coord in self.stack_coords():
            for row_chunk in range(self.num_row_chunks):
                yield self.coord(stack_coord, row_chunk)

    def indices(self, stack_coord: Index) -> Iterator[Index]:
        """Stack indices of the tensors that the chunks at `stack_coord` hold, in stored order."""
        spans = zip(stack_coord, self.chunk[: self.num_stack_dims], strict=True)
        return itertools.product(*(range(c * size, (c + 1) * size) for c, size in spans))

    def rows_of_chunk(self, row_chunk: int) -> tuple[int, int]:
        """First row and one past the last row of a chunk along a tensor's rows."""
        start = row_chunk * self.chunk_rows
        return start, min(start + self.chunk_rows, self.tensor_shape[0])

    def tensor_offset(self, index: Index) -> int:
        """Byte offset, within its chunks, of the tensor at a stack index."""
        position = 0
        for i, size in zip(index, self.chunk, strict=False):
            position = position * size + i % size
        return position * self.chunk_rows * self.row_bytes

    def stack_coord(self, index: Index) -> Index:
        """Chunk coordinate along the stack dims of a stack index."""
        return tuple(i // size for i, size in zip(index, self.chunk, strict=False))

    def row_spans(self, index: Index, start: int, stop: int) -> Iterator[tuple[Index, int, int]]:
        """(chunk coordinate, byte offset in the chunk, bytes) of rows start..stop, in row order."""
        base = self.tensor_offset(index)
        while start < stop:
            row_chunk, row = divmod(start, self.chunk_rows)
            count = min(self.chunk_rows - row, stop - start)
            coord = self.coord(self.stack_coord(index), row_chunk)
            yield coord, base + row * self.row_bytes, count * self.row_bytes
            start += count


def chunk_file_name(coord: Index) -> str:
    """File name of a chunk in its leaf's folder (zarr v2, separator `.`)."""
    return ".".join(map(str, coord))

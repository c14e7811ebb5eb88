"""Experts one after the other, some of an expert's rows at a time: what a CPU is fastest with.

M rows, S rows sorted by expert, D hidden, L local experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from mtp_model.narrow import scan_parts
from mtp_model.products import product
from mtp_model.rows import inverse_permutation
from mtp_model.swiglu import num_experts, swiglu, swiglu_gradient

LARGEST_BLOCK = 128
SMALLEST_BLOCK = 8


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows a block: about half of an expert's balanced share, a power of two from 8 to 128."""
    share = max(num_rows // (2 * num_experts), 1)
    return min(max(1 << (share.bit_length() - 1), SMALLEST_BLOCK), LARGEST_BLOCK)


def by_matrix(rows, weight):
    """Rows of one expert times its matrix."""
    return product("mi,oi->mo", rows, weight)


class SortedRows(NamedTuple):
    """Rows sorted by expert, and between which of them each expert's are."""

    order_M: Int[Array, "M"]
    start_L: Int[Array, "L"]
    end_L: Int[Array, "L"]

    @classmethod
    def of(cls, expert_M: Int[Array, "M"], num_local: int) -> "SortedRows":
        """Those of expert L, whom none serves, come last."""
        end_L = jnp.cumsum(jnp.bincount(expert_M, length=num_local + 1)[:num_local])
        return cls(jnp.argsort(expert_M), jnp.pad(end_L[:-1], (1, 0)), end_L)


class _Blocks(NamedTuple):
    """Sorted rows that are computed a block at a time."""

    where: SortedRows
    size: int

    @classmethod
    def of(cls, expert_M, num_local: int) -> "_Blocks":
        return cls(SortedRows.of(expert_M, num_local), block_rows(len(expert_M), num_local))

    def there(self, x_M):
        """Sorted, with room behind them for a block that begins at the last row."""
        return jnp.pad(x_M[self.where.order_M], [(0, self.size)] + [(0, 0)] * (x_M.ndim - 1))

    def back(self, x_S):
        """What was computed of sorted rows, 0 of rows of no expert."""
        num_rows = len(self.where.order_M)
        served = jnp.arange(num_rows) < self.where.end_L[-1]
        x_M = jnp.where(jnp.expand_dims(served, range(1, x_S.ndim)), x_S[:num_rows], 0)
        return x_M[inverse_permutation(self.where.order_M)]

    def slice(self, x_S, first):
        return lax.dynamic_slice_in_dim(x_S, first, self.size)

    def over_blocks(self, start, end, step, total):
        """step(first row, total) for each block of an expert. What it writes of the rows behind
        the last one is written over by the experts after it."""

        def body(state):
            first, total = state
            return first + self.size, step(first, total)

        return lax.while_loop(lambda state: state[0] < end, body, (start, total))[1]


def looped_ffn(rows_MD, expert_M, *weights):
    """`grouped.expert_ffn`."""
    blocks = _Blocks.of(expert_M, num_experts(weights))
    rows_SD = blocks.there(rows_MD)

    def of_expert(out_SD, args):
        start, end, own = args

        def of_block(first, out_SD):
            part = swiglu(by_matrix, blocks.slice(rows_SD, first), *own)
            return lax.dynamic_update_slice_in_dim(out_SD, part, first, 0)

        return blocks.over_blocks(start, end, of_block, out_SD), None

    each = (blocks.where.start_L, blocks.where.end_L, weights)
    return blocks.back(scan_parts(of_expert, jnp.zeros_like(rows_SD), each)[0])


def looped_gradient(d_out_MD, rows_MD, scale_M, expert_M, *weights):
    """`grouped.expert_ffn_gradient`."""
    blocks = _Blocks.of(expert_M, num_experts(weights))
    given = tuple(map(blocks.there, (rows_MD, scale_M, d_out_MD)))

    def of_expert(total, args):
        start, end, own = args

        def of_block(first, state):
            (d_rows_SD, d_scale_S), d_own = state
            rows, scale, d_out = (blocks.slice(x, first) for x in given)
            inside = first + jnp.arange(blocks.size) < end
            d_out = jnp.where(inside[:, None], d_out, jnp.zeros((), d_out.dtype))

            d_rows, d_scale, d_more = swiglu_gradient(by_matrix, d_out, rows, scale, own)
            written = (
                lax.dynamic_update_slice_in_dim(d_rows_SD, d_rows, first, 0),
                lax.dynamic_update_slice_in_dim(d_scale_S, d_scale, first, 0),
            )
            return written, jax.tree.map(lambda x, y: x + y.astype(x.dtype), d_own, d_more)

        none = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), own)
        total, d_own = blocks.over_blocks(start, end, of_block, (total, none))
        return total, jax.tree.map(lambda x, y: x.astype(y.dtype), d_own, own)

    each = (blocks.where.start_L, blocks.where.end_L, weights)
    nothing = jax.tree.map(jnp.zeros_like, given[:2])
    (d_rows_SD, d_scale_S), d_weights = scan_parts(of_expert, nothing, each)
    return blocks.back(d_rows_SD), blocks.back(d_scale_S), d_weights

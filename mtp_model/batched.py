"""The first rows of every expert in one batched product, what is beyond them in blocks: for GPUs.

A GPU is slow to loop: how often is decided on the host. One product over all experts reads each
matrix where it lies, and takes more rows of each expert than a balanced load has. What a busy one
has beyond those is served in blocks, as many as it takes.

M rows, D hidden, L local experts, C rows of each in the batched product, B rows in a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from mtp_model.looped import SortedRows, by_matrix
from mtp_model.products import product
from mtp_model.rows import gather_or_zero, inverse_permutation
from mtp_model.swiglu import num_experts, swiglu, swiglu_gradient

BLOCK = 128
TOGETHER = 2.0  # rows of each expert in the batched product, relative to a balanced load
FEWEST_TOGETHER = 8


def rows_together(num_rows: int, num_local: int) -> int:
    """C, a multiple of 8; 0 where there are fewer rows than experts, most of whom serve none."""
    if num_rows < num_local:
        return 0
    wanted = -(-int(TOGETHER * num_rows) // (num_local * FEWEST_TOGETHER)) * FEWEST_TOGETHER
    return min(wanted, -(-num_rows // FEWEST_TOGETHER) * FEWEST_TOGETHER)


class _Seats(NamedTuple):
    """Where rows are computed. M and L C stand for nobody."""

    where: SortedRows
    row_of_slot_LC: Int[Array, "L C"]
    slot_of_row_M: Int[Array, "M"]
    end_of_blocks_L: Int[Array, "L"]  # blocks of each expert and of those before it

    @classmethod
    def of(cls, expert_M: Int[Array, "M"], num_local: int) -> "_Seats":
        num_rows = expert_M.shape[0]
        together = rows_together(num_rows, num_local)
        where = SortedRows.of(expert_M, num_local)
        sorted_LC = where.start_L[:, None] + jnp.arange(together)[None]
        row_LC = where.order_M[jnp.minimum(sorted_LC, num_rows - 1)]
        expert = jnp.minimum(expert_M, num_local - 1)
        offset_M = inverse_permutation(where.order_M) - where.start_L[expert]
        inside_M = (expert_M < num_local) & (offset_M < together)
        beyond_L = jnp.maximum(where.end_L - where.start_L - together, 0)
        return cls(
            where,
            jnp.where(sorted_LC < where.end_L[:, None], row_LC, num_rows),
            jnp.where(inside_M, expert * together + offset_M, num_local * together),
            jnp.cumsum(-(-beyond_L // BLOCK)),
        )

    def together(self, x_M):
        """[L, C, ...] of [M, ...], zeros in empty slots."""
        return gather_or_zero(x_M, self.row_of_slot_LC)

    def back(self, x_LC):
        """[M, D] of [L, C, D], zeros of rows that have no slot."""
        return gather_or_zero(x_LC.reshape(-1, x_LC.shape[-1]), self.slot_of_row_M)

    def over_blocks(self, weights, step, total):
        """step(rows of a block, the expert, its matrices, total) for each; rows M are nobody's."""
        num_rows = self.where.order_M.shape[0]
        first_L = self.where.start_L + self.row_of_slot_LC.shape[1]
        blocks_before_L = jnp.pad(self.end_of_blocks_L[:-1], (1, 0))

        def body(state):
            block, total = state
            expert = jnp.searchsorted(self.end_of_blocks_L, block, side="right")
            of_expert = block - blocks_before_L[expert]
            sorted_B = first_L[expert] + of_expert * BLOCK + jnp.arange(BLOCK)
            row_B = self.where.order_M[jnp.minimum(sorted_B, num_rows - 1)]
            row_B = jnp.where(sorted_B < self.where.end_L[expert], row_B, num_rows)
            own = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, expert, 0, False), weights)
            return block + 1, step(row_B, expert, own, total)

        start = jnp.zeros((), self.end_of_blocks_L.dtype), total
        return lax.while_loop(lambda state: state[0] < self.end_of_blocks_L[-1], body, start)[1]


def _by_stack(rows_LCI, weight_LOI):
    return product("lci,loi->lco", rows_LCI, weight_LOI)


def _write(x_M, row_B, x_B):
    return x_M.at[row_B].set(x_B, mode="drop")


def batched_ffn(rows_MD, expert_M, *weights):
    """`grouped.expert_ffn`."""
    seats = _Seats.of(expert_M, num_experts(weights))

    def of_block(row_B, _expert, own, out_MD):
        return _write(out_MD, row_B, swiglu(by_matrix, gather_or_zero(rows_MD, row_B), *own))

    out_MD = jnp.zeros_like(rows_MD)
    if seats.row_of_slot_LC.size:
        out_MD = seats.back(swiglu(_by_stack, seats.together(rows_MD), *weights))
    return seats.over_blocks(weights, of_block, out_MD)


def batched_gradient(d_out_MD, rows_MD, scale_M, expert_M, *weights):
    """`grouped.expert_ffn_gradient`."""
    seats = _Seats.of(expert_M, num_experts(weights))
    scale_M1 = scale_M[:, None]

    def of_block(row_B, expert, own, total):
        d_rows_MD, d_scale_M1, d_weights = total
        rows, scale, d_out = (gather_or_zero(x, row_B) for x in (rows_MD, scale_M1, d_out_MD))
        d_rows, d_scale, d_own = swiglu_gradient(by_matrix, d_out, rows, scale[:, 0], own)
        return (
            _write(d_rows_MD, row_B, d_rows),
            _write(d_scale_M1, row_B, d_scale[:, None]),
            jax.tree.map(lambda x, more: x.at[expert].add(more), d_weights, d_own),
        )

    if seats.row_of_slot_LC.size:
        rows, scale, d_out = map(seats.together, (rows_MD, scale_M1, d_out_MD))
        d_rows, d_scale, d_weights = swiglu_gradient(_by_stack, d_out, rows, scale[..., 0], weights)
        start = seats.back(d_rows), seats.back(d_scale[..., None]), d_weights
    else:
        start = jax.tree.map(jnp.zeros_like, (rows_MD, scale_M1, weights))
    d_rows_MD, d_scale_M1, d_weights = seats.over_blocks(weights, of_block, start)
    return d_rows_MD, d_scale_M1[:, 0], d_weights

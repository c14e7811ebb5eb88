"""Products of rows with the matrix of the expert each row belongs to.

M rows, I in, O out, L local experts, R rank of adapters. Two ways with one result: `lax.ragged_dot`
where XLA has a grouped kernel (TPU), blocks of rows padded to one expert each elsewhere (there
`ragged_dot` costs L times the FLOPs).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mtp_model.rows import inverse_permutation, move_rows

LARGEST_BLOCK = 128
SMALLEST_BLOCK = 8

# out[m, o] = sum_i rows[m, i] * weight[group of m, o, i]
_FORWARD = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
# dweight[l, o, i] = sum over the rows of group l of dout[m, o] * rows[m, i]
_WEIGHT_GRADIENT = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


@jax.custom_vjp
def _ragged_product(rows_MI, weight_LOI, group_sizes_L):
    """Rows sorted by expert times [out, in] matrices.

    The gradient is written out because XLA's own makes the weight's gradient [in, out] and then
    copies it to the orientation of the weight.
    """
    return lax.ragged_dot_general(rows_MI, weight_LOI, group_sizes_L, _FORWARD)


def _ragged_forward(rows_MI, weight_LOI, group_sizes_L):
    return _ragged_product(rows_MI, weight_LOI, group_sizes_L), (rows_MI, weight_LOI, group_sizes_L)


def _ragged_backward(residuals, d_out_MO):
    rows_MI, weight_LOI, group_sizes_L = residuals
    d_rows = lax.ragged_dot(d_out_MO, weight_LOI, group_sizes_L)
    d_weight = lax.ragged_dot_general(d_out_MO, rows_MI, group_sizes_L, _WEIGHT_GRADIENT)
    return d_rows, d_weight, None


_ragged_product.defvjp(_ragged_forward, _ragged_backward)


class Adapted(NamedTuple):
    """Frozen matrices of experts, and what is added to their products: B (A x)."""

    weight_LOI: Float[Array, "L O I"]
    a_LRI: Float[Array, "L R I"]
    b_LOR: Float[Array, "L O R"]


Projection = Float[Array, "L _ _"] | Adapted  # [L, O, I]


def _through(product, rows, projection: Projection):
    """Rows times the matrix of their expert, with its adapter where it has one."""
    if not isinstance(projection, Adapted):
        return product(rows, projection)
    frozen = lax.stop_gradient(projection.weight_LOI)
    narrow = product(rows, projection.a_LRI)
    return product(rows, frozen) + product(narrow, projection.b_LOR)


def _swiglu(by_expert, rows, gate, up, down):
    def product(rows, projection):
        return _through(by_expert, rows, projection)

    return product(jax.nn.silu(product(rows, gate)) * product(rows, up), down)


def _ragged_ffn(rows_MD, expert_M, gate, up, down):
    num_local, num_rows = jax.tree.leaves(gate)[0].shape[0], rows_MD.shape[0]
    order = jnp.argsort(expert_M)
    position = inverse_permutation(order)
    sizes_L = jnp.bincount(expert_M, length=num_local + 1)[:num_local].astype(jnp.int32)

    def product(rows, weight):
        return _ragged_product(rows, weight, sizes_L)

    out = _swiglu(product, move_rows(rows_MD, order, position[:, None]), gate, up, down)
    # Rows past the last group are undefined in a ragged product.
    grouped = jnp.arange(num_rows) < jnp.sum(sizes_L)
    out = jnp.where(grouped[:, None], out, jnp.zeros((), out.dtype))
    return move_rows(out, position, order[:, None])


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows a block: about half of an expert's balanced share, a power of two from 8 to 128."""
    share = max(num_rows // (2 * num_experts), 1)
    return min(max(1 << (share.bit_length() - 1), SMALLEST_BLOCK), LARGEST_BLOCK)


def _block_layout(expert_M, num_local: int, block: int, num_blocks: int):
    """Where each row goes when every expert's rows are padded to whole blocks.

    Returns slot_M (num_blocks * block for rows of no local expert), row_of_slot, expert_of_block.
    """
    num_rows = expert_M.shape[0]
    local = expert_M < num_local
    own_ML = expert_M[:, None] == jnp.arange(num_local)[None]
    rank_ML = jnp.cumsum(own_ML, axis=0) - 1
    blocks_L = -(-jnp.sum(own_ML, axis=0) // block)
    first_slot_L = (jnp.cumsum(blocks_L) - blocks_L) * block
    expert = jnp.minimum(expert_M, num_local - 1)
    rank_M = jnp.take_along_axis(rank_ML, expert[:, None], axis=1)[:, 0]
    slot_M = jnp.where(local, first_slot_L[expert] + rank_M, num_blocks * block)
    empty = jnp.full((num_blocks * block,), num_rows)
    row_of_slot = empty.at[slot_M].set(jnp.arange(num_rows), mode="drop", unique_indices=True)
    expert_of_block = jnp.repeat(jnp.arange(num_local), blocks_L, total_repeat_length=num_blocks)
    return slot_M, row_of_slot, expert_of_block


def _blocked_ffn(rows_MD, expert_M, gate, up, down):
    num_rows, num_local = rows_MD.shape[0], jax.tree.leaves(gate)[0].shape[0]
    block = block_rows(num_rows, num_local)
    num_blocks = -(-num_rows // block) + num_local
    slot_M, row_of_slot, expert_of_block = _block_layout(expert_M, num_local, block, num_blocks)
    blocks = move_rows(rows_MD, row_of_slot, slot_M[:, None]).reshape(num_blocks, block, -1)

    def product(rows, weight):
        return jnp.einsum("bmi,boi->bmo", rows, weight[expert_of_block])

    out = _swiglu(product, blocks, gate, up, down).reshape(num_blocks * block, -1)
    return move_rows(out, slot_M, row_of_slot[:, None])


def expert_ffn(
    rows_MD: Float[Array, "M D"],
    expert_M: Int[Array, "M"],
    gate: Projection,
    up: Projection,
    down: Projection,
) -> Float[Array, "M D"]:
    """SwiGLU of each row by its expert: down(silu(gate(x)) * up(x)).

    gate, up [L, F, D], down [L, D, F]: plain, or with adapters.

    expert_M: local expert of each row, in any order; L for a row that no expert serves, which
    gives zeros.

    To be differentiated by `expert_ffn_gradient`: JAX would take the choice by platform as a
    `cond`, which keeps the residuals of every branch, those of the branches that did not run as
    zeros: on TPU the weights of every block of rows, three times 9.2 GiB for a layer of V3.
    """
    args = (rows_MD, expert_M, gate, up, down)
    return lax.platform_dependent(*args, tpu=_ragged_ffn, default=_blocked_ffn)


def expert_ffn_gradient(
    d_out_MD: Float[Array, "M D"],
    rows_MD: Float[Array, "M D"],
    expert_M: Int[Array, "M"],
    *weights: Projection,
) -> tuple[Float[Array, "M D"], Float[Array, "M D"], tuple[Projection, ...]]:
    """What `expert_ffn` gives, and the gradients of rows and weights; 0 of those with adapters."""

    def by(ffn):
        def gradient(d_out_MD, rows_MD, expert_M, *weights):
            out, pull_back = jax.vjp(lambda rows, *w: ffn(rows, expert_M, *w), rows_MD, *weights)
            return out, *pull_back(d_out_MD)

        return gradient

    out, d_rows, *d_weights = lax.platform_dependent(
        d_out_MD, rows_MD, expert_M, *weights, tpu=by(_ragged_ffn), default=by(_blocked_ffn)
    )
    return out, d_rows, tuple(d_weights)

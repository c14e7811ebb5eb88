"""Products of rows with the matrix of the expert each row belongs to.

M rows, S rows sorted by expert, I in, O out, L local experts, R rank of adapters. Two ways with one
result: `lax.ragged_dot` where XLA has a grouped kernel (TPU), one expert after the other elsewhere
(there `ragged_dot` costs L times the FLOPs), some of its rows at a time.
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
    """Frozen matrices of experts, or of one, and what is added to their products: B (A x)."""

    weight_LOI: Float[Array, "*L O I"]
    a_LRI: Float[Array, "*L R I"]
    b_LOR: Float[Array, "*L O R"]


Projection = Float[Array, "*L _ _"] | Adapted  # [L, O, I], or [O, I] of one expert


def _through(product, rows, projection: Projection):
    """Rows times the matrix of their expert, with its adapter where it has one."""
    if not isinstance(projection, Adapted):
        return product(rows, projection)
    frozen = lax.stop_gradient(projection.weight_LOI)
    narrow = product(rows, projection.a_LRI)
    return product(rows, frozen) + product(narrow, projection.b_LOR)


def _swiglu(by_expert, rows, gate, up, down, scale_M=None):
    """scale: what each row of the result is multiplied by. It is before the last product, so that
    its gradient needs no result of that."""

    def product(rows, projection):
        return _through(by_expert, rows, projection)

    inner = jax.nn.silu(product(rows, gate)) * product(rows, up)
    if scale_M is not None:
        inner = (inner.astype(jnp.float32) * scale_M[:, None]).astype(inner.dtype)
    return product(inner, down)


def _ragged_ffn(rows_MD, expert_M, gate, up, down, scale_M=None):
    num_local, num_rows = jax.tree.leaves(gate)[0].shape[0], rows_MD.shape[0]
    order = jnp.argsort(expert_M)
    position = inverse_permutation(order)
    sizes_L = jnp.bincount(expert_M, length=num_local + 1)[:num_local].astype(jnp.int32)

    def product(rows, weight):
        return _ragged_product(rows, weight, sizes_L)

    if scale_M is not None:
        scale_M = move_rows(scale_M[:, None], order, position[:, None])[:, 0]
    rows_MD = move_rows(rows_MD, order, position[:, None])
    out = _swiglu(product, rows_MD, gate, up, down, scale_M)
    # Rows past the last group are undefined in a ragged product.
    grouped = jnp.broadcast_to(jnp.arange(num_rows) < jnp.sum(sizes_L), out.shape[::-1]).T
    return move_rows(lax.select(grouped, out, jnp.zeros_like(out)), position, order[:, None])


def _ragged_gradient(d_out_MD, rows_MD, scale_M, expert_M, *weights):
    def scaled(rows_MD, scale_M, *weights):
        return _ragged_ffn(rows_MD, expert_M, *weights, scale_M=scale_M)

    d_rows_MD, d_scale_M, *d_weights = jax.vjp(scaled, rows_MD, scale_M, *weights)[1](d_out_MD)
    return d_rows_MD, d_scale_M, tuple(d_weights)


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows a block: about half of an expert's balanced share, a power of two from 8 to 128."""
    share = max(num_rows // (2 * num_experts), 1)
    return min(max(1 << (share.bit_length() - 1), SMALLEST_BLOCK), LARGEST_BLOCK)


class _Sorted(NamedTuple):
    """Rows sorted by expert, and between which of them each expert's are."""

    order_M: Int[Array, "M"]
    start_L: Int[Array, "L"]
    end_L: Int[Array, "L"]
    block: int  # rows that are computed at a time

    @classmethod
    def of(cls, expert_M, num_local: int) -> "_Sorted":
        end_L = jnp.cumsum(jnp.bincount(expert_M, length=num_local + 1)[:num_local])
        start_L = jnp.pad(end_L[:-1], (1, 0))
        return cls(jnp.argsort(expert_M), start_L, end_L, block_rows(len(expert_M), num_local))

    def there(self, x_M):
        """Sorted, with room behind them for a block that begins at the last row."""
        return jnp.pad(x_M[self.order_M], [(0, self.block)] + [(0, 0)] * (x_M.ndim - 1))

    def back(self, x_S):
        """What was computed of sorted rows, 0 of rows of no expert."""
        num_rows = len(self.order_M)
        served = jnp.arange(num_rows) < self.end_L[-1]
        x_M = jnp.where(jnp.expand_dims(served, range(1, x_S.ndim)), x_S[:num_rows], 0)
        return x_M[inverse_permutation(self.order_M)]

    def slice(self, x_S, first):
        return lax.dynamic_slice_in_dim(x_S, first, self.block)

    def over_blocks(self, start, end, step, total):
        """step(first row, total) for each block of an expert. What it writes of the rows behind
        the last one is written over by the experts after it."""

        def body(state):
            first, total = state
            return first + self.block, step(first, total)

        return lax.while_loop(lambda state: state[0] < end, body, (start, total))[1]


def _by_matrix(rows, weight):
    return jnp.einsum("mi,oi->mo", rows, weight)


def _looped_ffn(rows_MD, expert_M, *weights):
    where = _Sorted.of(expert_M, jax.tree.leaves(weights)[0].shape[0])
    rows_SD = where.there(rows_MD)

    def of_expert(out_SD, args):
        start, end, own = args

        def of_block(first, out_SD):
            part = _swiglu(_by_matrix, where.slice(rows_SD, first), *own)
            return lax.dynamic_update_slice_in_dim(out_SD, part, first, 0)

        return where.over_blocks(start, end, of_block, out_SD), None

    each = (where.start_L, where.end_L, weights)
    return where.back(lax.scan(of_expert, jnp.zeros_like(rows_SD), each)[0])


def _looped_gradient(d_out_MD, rows_MD, scale_M, expert_M, *weights):
    where = _Sorted.of(expert_M, jax.tree.leaves(weights)[0].shape[0])
    given = tuple(map(where.there, (rows_MD, scale_M, d_out_MD)))

    def of_expert(total, args):
        start, end, own = args

        def of_block(first, state):
            (d_rows_SD, d_scale_S), d_own = state
            rows, scale, d_out = (where.slice(x, first) for x in given)
            inside = first + jnp.arange(where.block) < end
            d_out = jnp.where(inside[:, None], d_out, jnp.zeros((), d_out.dtype))

            def scaled(rows, scale, own):
                return _swiglu(_by_matrix, rows, *own, scale_M=scale)

            d_rows, d_scale, d_more = jax.vjp(scaled, rows, scale, own)[1](d_out)
            written = (
                lax.dynamic_update_slice_in_dim(d_rows_SD, d_rows, first, 0),
                lax.dynamic_update_slice_in_dim(d_scale_S, d_scale, first, 0),
            )
            return written, jax.tree.map(lambda x, y: x + y.astype(x.dtype), d_own, d_more)

        none = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), own)
        total, d_own = where.over_blocks(start, end, of_block, (total, none))
        return total, jax.tree.map(lambda x, y: x.astype(y.dtype), d_own, own)

    each = (where.start_L, where.end_L, weights)
    nothing = jax.tree.map(jnp.zeros_like, given[:2])
    (d_rows_SD, d_scale_S), d_weights = lax.scan(of_expert, nothing, each)
    return where.back(d_rows_SD), where.back(d_scale_S), d_weights


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
    zeros, and no loop of a number of rounds that depends on the load.
    """
    args = (rows_MD, expert_M, gate, up, down)
    return lax.platform_dependent(*args, tpu=_ragged_ffn, default=_looped_ffn)


def expert_ffn_gradient(
    d_out_MD: Float[Array, "M D"],
    rows_MD: Float[Array, "M D"],
    scale_M: Float[Array, "M"],
    expert_M: Int[Array, "M"],
    *weights: Projection,
) -> tuple[Float[Array, "M D"], Float[Array, "M"], tuple[Projection, ...]]:
    """Gradients of rows, scale and weights, of `scale` times what `expert_ffn` gives.

    Those of weights that have adapters are 0.
    """
    args = (d_out_MD, rows_MD, scale_M, expert_M, *weights)
    return lax.platform_dependent(*args, tpu=_ragged_gradient, default=_looped_gradient)

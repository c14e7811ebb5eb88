"""Products of rows with the matrix of the expert each row belongs to.

M rows, O out, I in, L local experts. Three ways with one result: `lax.ragged_dot` where XLA has a
grouped kernel (TPU); elsewhere that costs L times the FLOPs, and a GPU gets one product over all
experts (`batched`), a CPU one expert after the other (`looped`).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mtp_model.batched import batched_ffn, batched_gradient
from mtp_model.looped import looped_ffn, looped_gradient
from mtp_model.products import precision_of
from mtp_model.rows import inverse_permutation, move_rows
from mtp_model.swiglu import Projection, num_experts, swiglu

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
    return lax.ragged_dot_general(
        rows_MI, weight_LOI, group_sizes_L, _FORWARD, precision=precision_of(rows_MI, weight_LOI)
    )


def _ragged_forward(rows_MI, weight_LOI, group_sizes_L):
    return _ragged_product(rows_MI, weight_LOI, group_sizes_L), (rows_MI, weight_LOI, group_sizes_L)


def _ragged_backward(residuals, d_out_MO):
    rows_MI, weight_LOI, group_sizes_L = residuals
    precision = precision_of(rows_MI, weight_LOI)
    d_rows = lax.ragged_dot(d_out_MO, weight_LOI, group_sizes_L, precision=precision)
    d_weight = lax.ragged_dot_general(
        d_out_MO, rows_MI, group_sizes_L, _WEIGHT_GRADIENT, precision=precision
    )
    return d_rows, d_weight, None


_ragged_product.defvjp(_ragged_forward, _ragged_backward)


def _ragged_ffn(rows_MD, expert_M, gate, up, down, scale_M=None):
    num_local, num_rows = num_experts((gate, up, down)), rows_MD.shape[0]
    order = jnp.argsort(expert_M)
    position = inverse_permutation(order)
    sizes_L = jnp.bincount(expert_M, length=num_local + 1)[:num_local].astype(jnp.int32)

    def by_expert(rows, weight):
        return _ragged_product(rows, weight, sizes_L)

    if scale_M is not None:
        scale_M = move_rows(scale_M[:, None], order, position[:, None])[:, 0]
    rows_MD = move_rows(rows_MD, order, position[:, None])
    out = swiglu(by_expert, rows_MD, gate, up, down, scale_M)
    # Rows past the last group are undefined in a ragged product.
    grouped = jnp.broadcast_to(jnp.arange(num_rows) < jnp.sum(sizes_L), out.shape[::-1]).T
    return move_rows(lax.select(grouped, out, jnp.zeros_like(out)), position, order[:, None])


def _ragged_gradient(d_out_MD, rows_MD, scale_M, expert_M, *weights):
    def scaled(rows_MD, scale_M, *weights):
        return _ragged_ffn(rows_MD, expert_M, *weights, scale_M=scale_M)

    d_rows_MD, d_scale_M, *d_weights = jax.vjp(scaled, rows_MD, scale_M, *weights)[1](d_out_MD)
    return d_rows_MD, d_scale_M, tuple(d_weights)


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
    return lax.platform_dependent(*args, tpu=_ragged_ffn, cuda=batched_ffn, default=looped_ffn)


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
    return lax.platform_dependent(
        *args, tpu=_ragged_gradient, cuda=batched_gradient, default=looped_gradient
    )

"""Moving rows by gathers only, forward and backward.

A scatter of rows is slow to compile and to run on TPU; where the inverse of the movement is
known, the gradient is a gather too.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def inverse_permutation(order: Int[Array, "M"]) -> Int[Array, "M"]:
    """position[order[m]] = m."""
    indices = jnp.arange(order.shape[0], dtype=order.dtype)
    return jnp.zeros_like(order).at[order].set(indices, unique_indices=True)


def gather_or_zero(x_ND: Float[Array, "N D"], index: Int[Array, "*any"]) -> Float[Array, "*any D"]:
    """x[index], zeros where index is N."""
    inside = index < x_ND.shape[0]
    rows = x_ND[jnp.minimum(index, x_ND.shape[0] - 1)]
    return jnp.where(jnp.expand_dims(inside, -1), rows, jnp.zeros((), x_ND.dtype))


@jax.custom_vjp
def move_rows(
    x_ND: Float[Array, "N D"], source_M: Int[Array, "M"], targets_NJ: Int[Array, "N J"]
) -> Float[Array, "M D"]:
    """Row m of the result is x[source[m]], zeros where source[m] is N.

    targets_NJ: the rows m that hold x[n], M where there are fewer than J; it must agree with
    source_M, for the gradient is gathered by it.
    """
    del targets_NJ
    return gather_or_zero(x_ND, source_M)


def _forward(x_ND, source_M, targets_NJ):
    return gather_or_zero(x_ND, source_M), targets_NJ


def _backward(targets_NJ, d_MD):
    rows_NJD = gather_or_zero(d_MD, targets_NJ)
    summed = jnp.sum(rows_NJD, axis=1, dtype=jnp.float32).astype(d_MD.dtype)
    return summed, None, None


move_rows.defvjp(_forward, _backward)

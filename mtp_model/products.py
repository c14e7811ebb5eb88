"""Products of arrays, in the precision that their dtype says.

Accelerators round what a float32 product takes unless they are told not to: a TPU to bfloat16, a
GPU to TF32 (on an H200 logits of a float32 model were wrong by 2e-3 of their norm, by 1e-6 with the
precision below). Every product of the network is made here, or given this precision.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def precision_of(*operands: jax.Array) -> lax.Precision | None:
    """What a product must be given so that its operands are used as they are."""
    exact = all(operand.dtype == jnp.float32 for operand in operands)
    return lax.Precision.HIGHEST if exact else None


def product(subscripts: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
    """`jnp.einsum` of two arrays.

    dtype: of the result and its sums, where it is wider than theirs. The gradient of such a result
    is rounded to their dtype: a product with it would else widen what it is multiplied with.
    """
    if dtype is None or dtype == x.dtype:
        return jnp.einsum(subscripts, x, y, precision=precision_of(x, y))
    return _widened(subscripts, dtype, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _widened(subscripts: str, dtype: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=dtype)


def _widened_forward(subscripts: str, dtype: Any, x: jax.Array, y: jax.Array) -> Any:
    return _widened(subscripts, dtype, x, y), (x, y)


def _widened_backward(subscripts: str, _dtype: Any, residuals: Any, gradient: jax.Array) -> Any:
    narrow = functools.partial(jnp.einsum, subscripts)
    return jax.vjp(narrow, *residuals)[1](gradient.astype(residuals[0].dtype))


_widened.defvjp(_widened_forward, _widened_backward)

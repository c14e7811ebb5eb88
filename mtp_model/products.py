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
    """`jnp.einsum` of two arrays. dtype: of the result and its sums, where it is not theirs."""
    return jnp.einsum(subscripts, x, y, precision=precision_of(x, y), preferred_element_type=dtype)


def float32_product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`product` with a float32 result, whose gradient is rounded to the dtype of x and y.

    A product of a float32 gradient with y would widen y: all of the head, for each part of a
    sequence. For scores of attention, whose keys are small, XLA takes more memory so on TPUs.
    """
    if x.dtype == jnp.float32:
        return product(subscripts, x, y)
    return _widened(subscripts, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _widened(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return product(subscripts, x, y, jnp.float32)


def _widened_forward(subscripts: str, x: jax.Array, y: jax.Array) -> Any:
    return _widened(subscripts, x, y), (x, y)


def _widened_backward(subscripts: str, residuals: Any, gradient: jax.Array) -> Any:
    narrow = functools.partial(product, subscripts)
    return jax.vjp(narrow, *residuals)[1](gradient.astype(residuals[0].dtype))


_widened.defvjp(_widened_forward, _widened_backward)

"""Products of arrays, in the precision that their dtype says.

Accelerators round what a float32 product takes unless they are told not to: a TPU to bfloat16, a
GPU to TF32 (on an H200 logits of a float32 model were wrong by 2e-3 of their norm, by 1e-6 with the
precision below). Every product of the network is made here, or given this precision.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def precision_of(*operands: jax.Array) -> lax.Precision | None:
    """What a product must be given so that its operands are used as they are."""
    exact = all(operand.dtype == jnp.float32 for operand in operands)
    return lax.Precision.HIGHEST if exact else None


def product(subscripts: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
    """`jnp.einsum` of two arrays. dtype: of the result where it is not theirs (of the sums too)."""
    return jnp.einsum(subscripts, x, y, precision=precision_of(x, y), preferred_element_type=dtype)

"""A scan over stacked arrays that on CPU widens no more of them than the part that is used.

XLA for CPU computes nothing in a float narrower than float32: it widens what an operation takes,
and does so before a loop where what is taken is the same all along. A scan over the layers of an
FP8 or bfloat16 model then holds two or four times the model beside it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

C = TypeVar("C")


def scan_parts(
    step: Callable[[C, Any], tuple[C, Any]], start: C, stacked: Any, remat: bool = False
) -> tuple[C, Any]:
    """`jax.lax.scan` over the leading dimension of the arrays of a tree.

    remat: the backward pass computes a step again from the carry that it began with.
    """

    def of_parts(carry: C, parts: tuple[jax.Array, Any]) -> tuple[C, Any]:
        index, parts = parts
        return step(carry, jax.tree.map(lambda x, part: _part(x, index, part), stacked, parts))

    of_parts = jax.checkpoint(of_parts) if remat else of_parts
    length = jax.tree.leaves(stacked)[0].shape[0]
    return jax.lax.scan(of_parts, start, (jnp.arange(length), stacked))


def _part(stacked: jax.Array, index: jax.Array, part: jax.Array) -> jax.Array:
    """stacked[index], which `part` is."""
    if part.dtype.itemsize > 2 or not jnp.issubdtype(part.dtype, jnp.floating):
        return part
    return _taken(jax.lax.stop_gradient(stacked), index, part)


@jax.custom_jvp
def _taken(stacked: jax.Array, index: jax.Array, part: jax.Array) -> jax.Array:
    """On CPU taken from a stack that looks like another one in each step, and so is not widened
    before the loop; nobody reads `part` then, which is there for the gradient."""

    def take(stacked: jax.Array, index: jax.Array, _part: jax.Array) -> jax.Array:
        stacked, index = jax.lax.optimization_barrier((stacked, index))
        return jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)

    return jax.lax.platform_dependent(
        stacked, index, part, cpu=take, default=lambda _stacked, _index, part: part
    )


@_taken.defjvp
def _taken_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    return _taken(*primals), tangents[2]

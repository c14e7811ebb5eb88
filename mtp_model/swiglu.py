"""SwiGLU of rows by the expert of each, whatever way their products with its matrices are made.

O out, I in, L local experts, R rank of adapters.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ByExpert = Callable[[jax.Array, jax.Array], jax.Array]  # rows, matrices -> the expert's times rows


class Adapted(NamedTuple):
    """Frozen matrices of experts, or of one, and what is added to their products: B (A x)."""

    weight_LOI: Float[Array, "*L O I"]
    a_LRI: Float[Array, "*L R I"]
    b_LOR: Float[Array, "*L O R"]


Projection = Float[Array, "*L _ _"] | Adapted  # [L, O, I], or [O, I] of one expert


def num_experts(projections: tuple[Projection, ...]) -> int:
    """L of stacked ones."""
    return jax.tree.leaves(projections)[0].shape[0]


def _through(by_expert: ByExpert, rows, projection: Projection):
    """Rows times the matrix of their expert, with its adapter where it has one."""
    if not isinstance(projection, Adapted):
        return by_expert(rows, projection)
    frozen = jax.lax.stop_gradient(projection.weight_LOI)
    narrow = by_expert(rows, projection.a_LRI)
    return by_expert(rows, frozen) + by_expert(narrow, projection.b_LOR)


def swiglu(by_expert: ByExpert, rows, gate, up, down, scale=None):
    """down(silu(gate(x)) * up(x)) of rows [..., D].

    scale [...]: what each row of the result is multiplied by. It is before the last product, so
    that its gradient needs no result of that.
    """
    inner = jax.nn.silu(_through(by_expert, rows, gate)) * _through(by_expert, rows, up)
    if scale is not None:
        inner = (inner.astype(jnp.float32) * jnp.expand_dims(scale, -1)).astype(inner.dtype)
    return _through(by_expert, inner, down)


def swiglu_gradient(by_expert: ByExpert, d_out, rows, scale, weights):
    """Gradients of rows, scale and weights (gate, up, down)."""

    def scaled(rows, scale, weights):
        return swiglu(by_expert, rows, *weights, scale=scale)

    return jax.vjp(scaled, rows, scale, weights)[1](d_out)

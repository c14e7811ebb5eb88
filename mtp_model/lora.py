"""Adapters (LoRA): a narrow pair of matrices beside a frozen projection, in its own file because
the network runs without them: y = W x + (alpha / rank) B A x.

Source: arXiv 2106.09685. An adapter is two leaves of its projection's module, `lora_A` [..., rank,
in] and `lora_B` [..., out, rank], stacked and placed on a mesh as the projection is. B begins as
zeros, so that an adapted model begins as the model itself.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mtp_model.layers import Embedding, Weight, annotated
from mtp_model.model import DeepSeekV3, leaf_name
from mtp_model.sharding import AnyMesh, Axes, placement

Make = Callable[[str, tuple[int, ...], Axes], jax.Array | jax.ShapeDtypeStruct]
"""Path, shape and logical axes of an adapter's matrix -> its first value."""


def projections(model: DeepSeekV3) -> dict[str, Weight]:
    """Every projection by its path, `moe_layers.self_attn.o_proj`: what may have an adapter."""
    modules = ((leaf_name(path), module) for path, module in nnx.iter_modules(model))
    return {
        name: module
        for name, module in sorted(modules, key=lambda pair: pair[0])
        if isinstance(module, Weight) and not isinstance(module, Embedding)
    }


def named_by(targets: Sequence[str], names: Iterable[str]) -> dict[str, list[str]]:
    """By target, the paths that it names: those that end with it, in whole words."""
    names = list(names)
    return {target: [n for n in names if f".{n}".endswith(f".{target}")] for target in targets}


def adapt(chosen: Mapping[str, Weight], rank: int, alpha: float, make: Make) -> None:
    """Give each of these projections an adapter, in place."""
    for name, projection in chosen.items():
        *stack, rows, columns = projection.weight.shape
        *outer, row_axis, column_axis = projection.weight.get_metadata("out_sharding")
        matrices = (
            ("lora_A", (*stack, rank, columns), (*outer, "lora", column_axis)),
            ("lora_B", (*stack, rows, rank), (*outer, row_axis, "lora")),
        )
        for matrix, shape, axes in matrices:
            value = make(f"{name}.{matrix}", shape, axes)
            setattr(projection, matrix, annotated(nnx.LoRAParam, value, axes))
        projection.lora_scale = alpha / rank


def fresh(seed: int, mesh: AnyMesh | None) -> Make:
    """Matrices of new adapters: B zeros, A uniform with a bound of 1 / sqrt(in), float32.

    They follow from seed and path alone, on any mesh.
    """

    def make(name: str, shape: tuple[int, ...], axes: Axes) -> jax.Array:
        # Said on one device too, as what is restored is: else a run that goes on compiles anew.
        here = SingleDeviceSharding(jax.devices()[0])
        where = placement(axes, shape, mesh) if mesh is not None else here
        if name.endswith("lora_B"):
            return jnp.zeros(shape, jnp.float32, device=where)
        bound = 1.0 / math.sqrt(shape[-1])
        key = jax.random.key(seed)
        for letter in name.encode():
            key = jax.random.fold_in(key, letter)
        uniform = jax.jit(jax.random.uniform, static_argnums=(1, 2, 3, 4), out_shardings=where)
        return uniform(key, shape, jnp.float32, -bound, bound)

    return make


def without_memory(mesh: AnyMesh | None) -> Make:
    """What stands for the matrices where a model is only planned."""

    def make(_: str, shape: tuple[int, ...], axes: Axes) -> jax.ShapeDtypeStruct:
        where = placement(axes, shape, mesh) if mesh is not None else None
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

    return make

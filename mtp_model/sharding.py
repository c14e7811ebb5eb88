"""Where arrays live on a mesh: the mesh axes and what each logical axis of a weight maps to.

Without a mesh every function here leaves its argument as it is.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mtp_model.config import ModelConfig

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # the batch is spread over all of these

# Logical axis of a stored weight -> mesh axes. `hidden` is the model width D.
STORED = {
    "layers": None,
    "vocab": "tensor",
    "hidden": ("fsdp", "expert"),
    "heads": "tensor",
    "heads_of_lora": ("tensor", "fsdp", "expert"),  # where the other dimension is narrow
    "ffn": "tensor",
    "experts": "expert",
    "expert_hidden": "fsdp",
    "expert_ffn": "tensor",
    "lora": None,
    "norm": None,
    "router": None,
}
RULES = tuple(STORED.items())  # as Flax takes them
# The same axes while a weight is used: gathered over everything but `tensor` and `expert`.
GATHERED = STORED | {"hidden": None, "expert_hidden": None, "heads_of_lora": "tensor"}

AnyMesh = Mesh | AbstractMesh
Axes = tuple[str | None, ...]
Rules = Mapping[str, str | tuple[str, ...] | None]  # mesh axes by logical axis


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    devices: "Sequence[jax.Device] | None" = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """The mesh that `load` takes: devices along each axis, as many in all as are given.

    data: batch only; fsdp: batch, and weights stored in parts; expert: batch, and whole experts;
    tensor: heads, vocabulary and feed-forward width, of experts too.
    """
    shape = (data, fsdp, expert, tensor)
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(shape), devices=devices)


def memory_of(device: Any) -> int | None:
    """Bytes that a device has for arrays, where it says so."""
    return (device.memory_stats() or {}).get("bytes_limit")


def require_axes(mesh: Mesh) -> None:
    """Raise ValueError for a mesh that the model cannot be placed on."""
    automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
    if mesh.axis_names != MESH_AXES or not automatic:
        raise ValueError(
            f"the mesh has axes {mesh.axis_names} of types {mesh.axis_types}; needed are automatic "
            f"axes {MESH_AXES}: make it with mtp_model.make_mesh"
        )


def abstract_mesh(data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh that says what each device would hold, without any devices."""
    shape = (data, fsdp, expert, tensor)
    return AbstractMesh(shape, MESH_AXES, (AxisType.Auto,) * len(shape))


def unsplittable(shape: Mapping[str, int], config: ModelConfig) -> list[str]:
    """What of a model a mesh of this shape cannot split evenly, by the option of the axis."""
    rules = [
        ("expert", config.n_routed_experts, "routed experts"),
        ("tensor", config.num_attention_heads, "attention heads"),
        ("tensor", config.moe_intermediate_size, "columns of an expert (moe_intermediate_size)"),
    ]
    return [
        f"--mesh.{axis} is {shape[axis]}, needed a divisor of the {number} {what}"
        for axis, number, what in rules
        if number % shape[axis]
    ]


def placement(
    axes: Axes,
    shape: tuple[int, ...],
    mesh: AnyMesh,
    rules: Rules = STORED,
) -> NamedSharding:
    """Where a weight with these logical axes lives: stored, or with GATHERED while it is used.

    A dimension that mesh axes do not divide is not split over the last of them: that costs memory
    and changes nothing else.
    """
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        over = rules[axis] if axis else None
        over = (over,) if isinstance(over, str) else over or ()
        while size % math.prod(mesh.shape[name] for name in over):
            over = over[:-1]
        spec.append(over or None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def everywhere(mesh: AnyMesh) -> NamedSharding:
    """Whole on each device."""
    return NamedSharding(mesh, PartitionSpec())


def active_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set by `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def axis_size(name: str) -> int:
    """Number of devices along a mesh axis; 1 without a mesh."""
    mesh = active_mesh()
    return mesh.shape[name] if mesh is not None else 1


def rows_here(rows: int) -> int:
    """Rows of a batch on one device."""
    return max(1, rows // math.prod(map(axis_size, BATCH_AXES)))


def gather_for_use(weight: jax.Array, axes: Axes) -> jax.Array:
    """Gather a weight over the axes that only its storage is split over.

    Its gradient is left in parts, as the weight is stored.
    """
    return weight if active_mesh() is None else _gathered(weight, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight: jax.Array, axes: Axes) -> jax.Array:
    return _constrained(weight, axes, GATHERED)


def _gathered_forward(weight: jax.Array, axes: Axes) -> tuple[jax.Array, None]:
    return _gathered(weight, axes), None


def _gathered_backward(axes: Axes, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (_constrained(gradient, axes, STORED),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _constrained(weight: jax.Array, axes: Axes, rules: Rules) -> jax.Array:
    mesh = active_mesh()
    assert mesh is not None
    return jax.lax.with_sharding_constraint(weight, placement(axes, weight.shape, mesh, rules))


def spread_batch(x: jax.Array, dim: int = 0) -> jax.Array:
    """Spread the batch dimension of activations over the mesh, the leading one unless said."""
    if active_mesh() is None:
        return x
    spec = PartitionSpec(*(BATCH_AXES if n == dim else None for n in range(x.ndim)))
    return jax.lax.with_sharding_constraint(x, spec)


def collected(x: jax.Array, begin: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """A part of an array, on each device of its mesh: bit for bit, and nothing else of it moves.

    begin: where the part begins, by dimension; its shape is `shape`. Every process of a cluster
    must call this.
    """
    where = x.sharding
    assert isinstance(where, NamedSharding)
    return _collect(where, x.dtype, shape)(x, np.array(begin, np.int32))


@functools.lru_cache(maxsize=64)
def _collect(where: NamedSharding, dtype: Any, shape: tuple[int, ...]) -> Any:
    """XLA would bring the whole array to each device, or add what each of them holds, as floats:
    -0.0 + 0.0 is 0.0. So what each device holds is added as integers."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[dtype.itemsize]
    spec = (*where.spec, *(None,) * (len(shape) - len(where.spec)))
    by_dimension = [(names,) if isinstance(names, str) else tuple(names or ()) for names in spec]
    used = {name for names in by_dimension for name in names}
    others = tuple(name for name in where.mesh.axis_names if name not in used)

    def held(part: jax.Array, begin: jax.Array) -> jax.Array:
        inside = jax.lax.axis_index(others) == 0 if others else jnp.bool_(True)  # of copies, one
        for axis, names in enumerate(by_dimension):
            first = jax.lax.axis_index(names) * part.shape[axis] if names else 0
            wanted = begin[axis] + jnp.arange(shape[axis], dtype=jnp.int32) - first
            here = (wanted >= 0) & (wanted < part.shape[axis])
            part = jnp.take(part, jnp.clip(wanted, 0, part.shape[axis] - 1), axis=axis)
            across = tuple(1 if n != axis else shape[axis] for n in range(len(shape)))
            inside = inside & here.reshape(across)
        as_bits = jax.lax.bitcast_convert_type(part, bits).astype(jnp.uint32)
        found = jax.lax.psum(jnp.where(inside, as_bits, jnp.uint32(0)), where.mesh.axis_names)
        return jax.lax.bitcast_convert_type(found.astype(bits), dtype)

    whole = PartitionSpec()
    parts = jax.shard_map(held, mesh=where.mesh, in_specs=(where.spec, whole), out_specs=whole)
    return jax.jit(parts)

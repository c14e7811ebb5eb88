"""Where arrays live on a mesh: the mesh axes and what each logical axis of a weight maps to.

Without a mesh every function here leaves its argument as it is.
"""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # the batch is spread over all of these

# Logical axis of a stored weight -> mesh axes. `hidden` is the model width D.
STORED = {
    "layers": None,
    "vocab": "tensor",
    "hidden": ("fsdp", "expert"),
    "heads": "tensor",
    "ffn": "tensor",
    "experts": "expert",
    "expert_hidden": "fsdp",
    "expert_ffn": None,
    "lora": None,
    "norm": None,
    "router": None,
}
RULES = tuple(STORED.items())  # as Flax takes them
# The same axes while a weight is used: gathered over everything but `tensor` and `expert`.
GATHERED = STORED | {"hidden": None, "expert_hidden": None}

Axes = tuple[str | None, ...]


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    devices: "Sequence[jax.Device] | None" = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """The mesh that `load` takes: devices along each axis, as many in all as are given.

    data: batch only; fsdp: batch, and weights stored in parts; expert: batch, and whole experts;
    tensor: heads, vocabulary and feed-forward width.
    """
    shape = (data, fsdp, expert, tensor)
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(shape), devices=devices)


def require_axes(mesh: Mesh) -> None:
    """Raise ValueError for a mesh that the model cannot be placed on."""
    automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
    if mesh.axis_names != MESH_AXES or not automatic:
        raise ValueError(
            f"the mesh has axes {mesh.axis_names} of types {mesh.axis_types}; needed are automatic "
            f"axes {MESH_AXES}: make it with mtp_model.make_mesh"
        )


def stored_spec(axes: Axes) -> PartitionSpec:
    """Partition of a stored weight with these logical axes."""
    return PartitionSpec(*(STORED[axis] if axis else None for axis in axes))


def active_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set by `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def axis_size(name: str) -> int:
    """Number of devices along a mesh axis; 1 without a mesh."""
    mesh = active_mesh()
    return mesh.shape[name] if mesh is not None else 1


def gather_for_use(weight: jax.Array, axes: Axes) -> jax.Array:
    """Gather a weight over the axes that only its storage is split over."""
    if active_mesh() is None:
        return weight
    spec = PartitionSpec(*(GATHERED[axis] if axis else None for axis in axes))
    return jax.lax.with_sharding_constraint(weight, spec)


def spread_batch(x: jax.Array) -> jax.Array:
    """Spread the leading (batch) dimension of activations over the mesh."""
    if active_mesh() is None:
        return x
    spec = PartitionSpec(BATCH_AXES, *(None,) * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, spec)

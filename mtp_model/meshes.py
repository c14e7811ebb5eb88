"""Which mesh a model is put on: the meshes there are, what a device of each stores, the choice."""

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from mtp_model.sharding import (
    MESH_AXES,
    STORED,
    Axes,
    Rules,
    abstract_mesh,
    active_mesh,
    placement,
)

MeshShape = dict[str, int]  # devices along each axis of MESH_AXES
VMEM_LIMIT = "xla_tpu_scoped_vmem_limit_kib"


class StoredArray(NamedTuple):
    """An array as a mesh is chosen for it."""

    axes: Axes
    shape: tuple[int, ...]
    itemsize: int


def stored_in(tree: Any) -> Iterator[StoredArray]:
    """The arrays of a tree without memory. What is narrower than the parameter it belongs to, and
    what belongs to none, is whole on each device."""
    for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        axes = leaf.get_metadata("out_sharding") if isinstance(leaf, nnx.Variable) else ()
        for value in jax.tree.leaves(leaf):  # of another optimizer's parameter there is none
            split = axes if len(axes) == value.ndim else (None,) * value.ndim
            yield StoredArray(split, value.shape, value.dtype.itemsize)


def bytes_on(shape: Mapping[str, int], arrays: Iterable[StoredArray], rules: Rules = STORED) -> int:
    """What one device of a mesh holds of arrays."""
    mesh = abstract_mesh(**shape)

    def held(array: StoredArray) -> int:
        where = placement(array.axes, array.shape, mesh, rules)
        return math.prod(where.shard_shape(array.shape)) * array.itemsize

    return sum(map(held, arrays))


def shapes_of(asked: Mapping[str, int], num_devices: int) -> Iterator[MeshShape]:
    """Every mesh of all devices with the axes asked for; of fewer where all axes are asked for."""
    if len(asked) == len(MESH_AXES):
        if math.prod(asked.values()) <= num_devices:
            yield {**asked}
        return
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    choices = ([asked[name]] if name in asked else divisors for name in MESH_AXES)
    for sizes in itertools.product(*choices):
        if math.prod(sizes) == num_devices:
            yield dict(zip(MESH_AXES, sizes, strict=True))


def sent(shape: MeshShape) -> tuple[int, ...]:
    """Smaller for a mesh that sends less: fewest parts by tensor, then by fsdp, then by expert."""
    return shape["tensor"], shape["fsdp"], shape["expert"]


def fitting(shapes: Sequence[MeshShape], sizes: Sequence[int], room: float) -> MeshShape | None:
    """Of the meshes whose size is within `room`, the one that sends least; None where none is."""
    small = [shape for shape, size in zip(shapes, sizes, strict=True) if size <= room]
    return min(small, key=sent, default=None)


def describe_mesh(mesh: Mesh | None) -> str:
    """Devices and axes in a few words: `8 devices (tpu): expert 4, tensor 2`."""
    if mesh is None:
        return f"1 device ({jax.devices()[0].platform})"
    return f"{mesh.size} devices ({mesh.devices.flat[0].platform}): {axes_in_words(mesh.shape)}"


def axes_in_words(shape: Mapping[str, int]) -> str:
    """The axes that split something, `expert 4, tensor 2`."""
    return ", ".join(f"{name} {size}" for name, size in shape.items() if size > 1) or "1 device"


def compiler_options() -> dict[str, str]:
    """What XLA is told of a program with whole layers, for the active mesh or this machine.

    A core of v6e has 128 MiB of vmem, of which libtpu lets a kernel take 32: too little, by 3, for
    grouped products of DeepSeek-V3's experts. What the user told libtpu of it is left alone.
    """
    mesh = active_mesh()
    kind = jax.devices()[0].device_kind if mesh is None else mesh.abstract_device.device_kind
    if kind != "TPU v6 lite" or VMEM_LIMIT in os.environ.get("LIBTPU_INIT_ARGS", ""):
        return {}
    return {VMEM_LIMIT: str(96 << 10)}

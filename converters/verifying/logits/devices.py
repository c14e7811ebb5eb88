"""Where our side of a comparison of logits runs: on one device a layer at a time, or whole on a
mesh, asked for or chosen from what fits."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.meshes import (
    MeshShape,
    StoredArray,
    bytes_on,
    describe_mesh,
    fitting,
    shapes_of,
    stored_in,
)
from mtp_model.model import abstract_model
from mtp_model.problems import UserError
from mtp_model.reporting import human_bytes
from mtp_model.sharding import GATHERED, MESH_AXES, make_mesh, memory_of, unsplittable

_FLOAT32 = 4


class Devices(NamedTuple):
    """Where our side runs."""

    mesh: Mesh | None  # None: on the first device, a layer at a time
    said: str

    @property
    def shape(self) -> MeshShape | None:
        """Devices along each axis."""
        return None if self.mesh is None else dict(self.mesh.shape)


def by_layer(why: str = "") -> Devices:
    """On one device, whatever there are."""
    return Devices(None, f"{describe_mesh(None)}, a layer at a time{why}")


def devices_for(checkpoint: Checkpoint, asked: Mapping[str, int]) -> Devices:
    """Those of the axes that are asked for, others are 1; where none is, what fits the model.

    UserError where there are too few devices, or they cannot hold it.
    """
    if asked:
        return _asked({**dict.fromkeys(MESH_AXES, 1), **asked}, checkpoint)
    devices = jax.devices()
    memory = memory_of(devices[0])
    if len(devices) == 1 or memory is None:  # a CPU does not say
        return by_layer()
    shape, least = chosen_shape(checkpoint, len(devices), memory)
    if shape is None:
        why = f"each would need {human_bytes(least)}, and has {human_bytes(memory)}"
        return by_layer(f": the whole model does not fit on all {len(devices)} ({why})")
    mesh = make_mesh(**shape, devices=devices)
    return Devices(mesh, f"{describe_mesh(mesh)}, chosen for this model")


def chosen_shape(
    checkpoint: Checkpoint, num_devices: int, memory: int
) -> tuple[MeshShape | None, int]:
    """Of the meshes of all devices that have room, the one that sends least, None where none has;
    and the fewest bytes that a device of any of them needs."""
    every = shapes_of({}, num_devices)
    shapes = [shape for shape in every if not unsplittable(shape, checkpoint.config)]
    parts = _parts(checkpoint)
    needed = [_needed(parts, shape) for shape in shapes]
    return fitting(shapes, needed, memory), min(needed)


def _asked(axes: Mapping[str, int], checkpoint: Checkpoint) -> Devices:
    devices, count = jax.devices(), math.prod(axes.values())
    if count == 1:
        return by_layer()
    faults = unsplittable(axes, checkpoint.config)
    if count > len(devices):
        faults = [f"{count} devices are asked for, {len(devices)} are here"]
    if faults:
        raise UserError("\n  ".join(["a mesh that cannot be used:", *faults]))
    held = sum(bytes_on(axes, arrays) for arrays in _parts(checkpoint).values())
    has = memory_of(devices[0])
    if has is not None and held > has:
        raise UserError(
            f"{checkpoint.path}: each of {count} devices would hold {human_bytes(held)} of it and "
            f"has {human_bytes(has)}; needed more, or none: without --mesh what fits is chosen"
        )
    mesh = make_mesh(**axes, devices=devices[:count])
    return Devices(mesh, describe_mesh(mesh))


def _parts(checkpoint: Checkpoint) -> dict[str, list[StoredArray]]:
    """What is stored of each stack of layers, and of what stands outside them."""
    scope = checkpoint.provenance["scope"]
    state = nnx.state(abstract_model(checkpoint.config, scope, checkpoint.dtypes))
    parts = defaultdict(list)
    for path, leaf in nnx.to_flat_state(state):
        parts[path[0]] += stored_in(leaf)
    return parts


def _needed(parts: Mapping[str, list[StoredArray]], shape: MeshShape) -> int:
    """Bytes of one device: all that it stores, and the largest part while that is used."""
    return sum(bytes_on(shape, part) for part in parts.values()) + max(
        _used(part, shape) for part in parts.values()
    )


def _used(arrays: list[StoredArray], shape: MeshShape) -> int:
    """Bytes of one layer in use: itself, taken out of its stack; and twice in float32. XLA's own
    figures are 1.0 to 1.14 times for a layer, 2 for a gathered head; activations are small."""
    layers = arrays[0].shape[0] if arrays[0].axes[0] == "layers" else 1
    float32 = (array._replace(itemsize=_FLOAT32) for array in arrays)
    return (bytes_on(shape, arrays) + 2 * bytes_on(shape, float32, GATHERED)) // layers

"""The devices of a command: which mesh they form for a model, and batches spread over it."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from finetune.data.packing import Batch, PostNorm, PreNorm
from finetune.optimizer import abstract_initial, make_optimizer
from finetune.settings import (
    LoraSettings,
    MeshSettings,
    OptimizerSettings,
    SettingsError,
    TrainMode,
    option,
)
from finetune.weights import abstract_for_training
from mtp_model import ModelConfig, cluster, make_mesh
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.meshes import MeshShape, StoredArray, bytes_on, fitting, sent, shapes_of, stored_in
from mtp_model.model import Scope, abstract_model
from mtp_model.sharding import BATCH_AXES, MESH_AXES, everywhere, memory_of, unsplittable

T = TypeVar("T")

# Of a device's memory, what weights, gradients and the optimizer's state may take where a mesh is
# chosen; the rest is for activations, and for weights while they are used.
_FOR_STATE = 0.6


class Trained(NamedTuple):
    """What learns, and how it is kept."""

    mode: TrainMode
    optimizer: OptimizerSettings
    lora: LoraSettings  # the adapters, where these are trained


class Workload(NamedTuple):
    """What a mesh is chosen for."""

    config: ModelConfig
    dtypes: Mapping[str, Any]  # of stored leaves, by path
    trained: Trained | None  # None: nothing is
    rows: int  # in a batch
    scope: Scope = "all"  # the part of the model that is loaded

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        trained: Trained | None,
        rows: int,
        scope: Scope = "all",
    ) -> "Workload":
        """What a checkpoint is to be used for."""
        return cls(checkpoint.config, checkpoint.dtypes, trained, rows, scope)


def devices_for(settings: MeshSettings, workload: Workload) -> Mesh | None:
    """The mesh that settings ask for on the devices of all processes, or None for one device.

    SettingsError says which axes do not fit the model, the batch or the devices.
    """
    devices = jax.devices()
    asked = _asked(settings)
    alone = cluster.count() == 1
    if not asked and alone and (len(devices) == 1 or devices[0].platform == "cpu"):
        return None
    shape = choose_shape(settings, workload, len(devices), _least_memory())
    count = math.prod(shape.values())
    if not alone and count < len(devices):
        raise SettingsError(
            "a mesh that cannot be used",
            [f"it has {count} devices, needed all {len(devices)} of {cluster.count()} processes"],
        )
    return None if count == 1 else make_mesh(**shape, devices=devices[:count])


def choose_shape(
    settings: MeshSettings, workload: Workload, num_devices: int, memory: int | None
) -> MeshShape:
    """Devices along each axis: those asked for, the others so that all devices are used.

    Of the meshes on which what is stored leaves room in `memory` bytes a device (of all, where that
    is None), the one that sends least: fewest parts by tensor, then by fsdp, then by expert. Where
    there is none, the one with the fewest bytes a device.
    """
    shapes = sorted(possible_shapes(settings, workload, num_devices), key=sent)
    if memory is None or len(shapes) == 1:
        return shapes[0]
    sizes = stored_bytes(workload, shapes)
    return fitting(shapes, sizes, memory * _FOR_STATE) or shapes[sizes.index(min(sizes))]


def possible_shapes(
    settings: MeshSettings, workload: Workload, num_devices: int
) -> list[MeshShape]:
    """Meshes with the axes asked for that fit model and batch; SettingsError where none does."""
    asked = _asked(settings)
    shapes = [shape for shape in shapes_of(asked, num_devices) if not _faults(shape, workload)]
    if not shapes:
        raise SettingsError("a mesh that cannot be used", _why_none(asked, workload, num_devices))
    return shapes


def stored_bytes(workload: Workload, shapes: Sequence[MeshShape]) -> list[int]:
    """For each mesh, the bytes that one of its devices holds: weights, and of those that are
    trained a gradient and the optimizer's state."""
    arrays = _stored(workload)
    return [bytes_on(shape, arrays) for shape in shapes]


def _stored(workload: Workload) -> list[StoredArray]:
    config, dtypes, trained, _, scope = workload
    if trained is None:
        return [*stored_in(nnx.state(abstract_model(config, scope, dtypes)))]
    mode, settings, lora = trained
    split = abstract_for_training(config, dtypes, mode, "float32", lora=lora, scope=scope)
    optimizer = make_optimizer(settings, 1, lambda _: True)
    kept, opt_state = abstract_initial(optimizer, split.trainable, settings.parameters)
    gradients = kept  # as large as what they are of
    return [*stored_in((kept, opt_state, gradients, split.biases, split.frozen))]


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """What is computed inside is computed on the mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def abstract_batch(
    rows: int, row_tokens: int, mesh: Mesh | None, states: PreNorm | PostNorm | None = None
) -> Batch:
    """The shape of a batch, and where its rows are. states: of no token, where batches have any."""
    where = over_rows(mesh) if mesh is not None else None

    def of(*size: int, dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct((rows, row_tokens, *size), dtype, sharding=where)

    found = jax.tree.map(lambda x: of(x.shape[-1], dtype=x.dtype), states)
    return Batch(of(), of(), of(), of(), found)


def spread(batch: T, mesh: Mesh | None) -> T:
    """A batch, arrays of the host, with its rows on the devices that compute them."""
    if mesh is None:
        return batch
    where = over_rows(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, where, x.__getitem__), batch
    )


def over_rows(mesh: Mesh) -> NamedSharding:
    """Each row of a batch on the devices that compute it."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def whole(arrays: T, mesh: Mesh | None) -> T:
    """Arrays that are spread over a mesh, on each of its devices."""
    return arrays if mesh is None else jax.device_put(arrays, everywhere(mesh))


def rows_here(x: jax.Array) -> dict[int, np.ndarray]:
    """Rows of an array that is spread over them, by number: each is in one process's only."""
    found = {}
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            first = shard.index[0].start or 0
            found |= dict(enumerate(np.asarray(shard.data), start=first))
    return found


def _asked(settings: MeshSettings) -> MeshShape:
    sizes = {name: getattr(settings, name) for name in MESH_AXES}
    return {name: size for name, size in sizes.items() if size}


def _faults(shape: MeshShape, workload: Workload) -> list[str]:
    """Why a model or a batch cannot be split so."""
    faults = unsplittable(shape, workload.config)
    rows = math.prod(shape[name] for name in BATCH_AXES)
    if workload.rows % rows:
        product = " times ".join(f"{axis} {shape[axis]}" for axis in BATCH_AXES if shape[axis] > 1)
        faults.append(
            f"a batch has {workload.rows} rows, needed a multiple of {rows}, over which the mesh "
            f"spreads them ({product})"
        )
    return faults


def _why_none(asked: MeshShape, workload: Workload, num_devices: int) -> list[str]:
    """What stands in the way of the meshes that were asked for."""
    shapes = list(shapes_of(asked, num_devices))
    if shapes:
        # Of an axis that nobody gave, what it cannot split is no reason.
        given = [s for s in shapes if not unsplittable(_not_given(s, asked), workload.config)]
        return min((_faults(shape, workload) for shape in given or shapes), key=len)
    product = math.prod(asked.values())
    said = " ".join(f"{option('mesh.' + name)} {size}" for name, size in asked.items())
    needed = "at most" if len(asked) == len(MESH_AXES) else "a divisor of"
    return [f"{said} makes {product} devices, needed {needed} the {num_devices} that are here"]


def _not_given(shape: MeshShape, asked: MeshShape) -> MeshShape:
    """The axes that were chosen here; of those asked for, one device."""
    return {name: 1 if name in asked else size for name, size in shape.items()}


def _least_memory() -> int | None:
    """Bytes of a device's memory, where it says so; of several hosts the least."""
    here = memory_of(jax.local_devices()[0])
    return min(cluster.all_say(here), key=lambda limit: limit or 0)

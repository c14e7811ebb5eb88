"""From a checkpoint directory to a module that holds its weights, on one device or on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from mtp_model.checkpoint.directory import Checkpoint, CheckpointError, open_checkpoint
from mtp_model.config import ModelConfig
from mtp_model.files.objects import AnyPath, CloudPath
from mtp_model.layers import FP8, dequantise
from mtp_model.model import DeepSeekV3, Scope
from mtp_model.sharding import require_axes, stored_spec

CONCURRENT_READ_GB = 4  # host memory that a restore may have in flight


def load(
    path: str | AnyPath,
    mesh: Mesh | None = None,
    dtype: Any = None,
    scope: Scope = "all",
    compute_dtype: Any = None,
) -> DeepSeekV3:
    """The network of a checkpoint directory, weights included.

    mesh: place every weight by its logical axes (None: all on the first device).
    dtype: of the weights; FP8 is dequantised. None keeps what is stored, FP8 included. Router
        biases and block scales stay float32.
    scope: `main` leaves the MTP modules out; `mtp` loads only them, embedding, norm and head.
    compute_dtype: of activations; by default `dtype`, or the config's where that is None.

    Raises CheckpointError where the directory is unfinished, no checkpoint, or lacks what is asked.
    """
    if mesh is not None:
        require_axes(mesh)
    checkpoint = open_checkpoint(path)
    config = checkpoint_config(checkpoint)
    computed_in = jnp.dtype(compute_dtype or dtype or config.dtype)
    model = nnx.eval_shape(lambda: DeepSeekV3(config, nnx.Rngs(0), scope, computed_in))
    graph, state = nnx.split(model)
    model = nnx.merge(graph, _restore(checkpoint, state, mesh))
    if dtype is not None:
        cast_weights(model, dtype)
    return model


def checkpoint_config(checkpoint: Checkpoint) -> ModelConfig:
    """The network's config, with what provenance.json adds to the source's config.json."""
    hidden_state = checkpoint.provenance["mtp_hidden_state"]
    return ModelConfig.from_dict({**checkpoint.config_dict, "mtp_hidden_state": hidden_state})


def cast_weights(model: nnx.Module, dtype: Any, only: nnx.filterlib.Filter = nnx.Param) -> None:
    """Change the dtype of the weights that `only` selects, in place, leaf by leaf.

    FP8 weights are dequantised by the scales beside them. Other kinds of variables stay.
    """
    dtype = jnp.dtype(dtype)
    leaves = dict(nnx.to_flat_state(nnx.state(model)))
    selected = nnx.to_flat_state(nnx.state(model, nnx.All(nnx.Param, only)))
    for path, leaf in selected:
        if leaf.dtype == dtype:
            continue
        owner, name = _owner(model, path)
        scale = leaves.get((*path[:-1], "weight_scale_inv")) if leaf.dtype == FP8 else None
        if scale is None:
            value = jax.jit(lambda w: w.astype(dtype), donate_argnums=0)(leaf[...])
        else:
            to_dense = jax.jit(dequantise, static_argnums=(2, 3))
            value = to_dense(leaf[...], scale[...], owner.block, dtype)
        getattr(owner, name).set_value(value)  # `[...] = value` would keep the old dtype


def _owner(model: nnx.Module, path: tuple) -> tuple[Any, str]:
    """The module that holds the leaf at a path, and the leaf's attribute name."""
    owner = model
    for name in path[:-1]:
        owner = getattr(owner, name)
    return owner, path[-1]


def _restore(checkpoint: Checkpoint, state: nnx.State, mesh: Mesh | None) -> nnx.State:
    """The state with the stored arrays in place of its abstract leaves."""
    flat = nnx.to_flat_state(state)
    targets = {}
    for path, variable in flat:
        name = ".".join(map(str, path))
        stored = checkpoint.leaves.get(name)
        if stored is None or stored.shape != variable.shape:
            found = "nothing" if stored is None else f"shape {stored.shape}"
            raise CheckpointError(
                f"{checkpoint.path}: leaf {name} of shape {variable.shape} is needed, "
                f"{found} is stored (scope {checkpoint.provenance['scope']!r})"
            )
        placed = _placement(variable, mesh)
        targets[path] = jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=placed)
    arrays = _read(checkpoint.params, targets)
    return nnx.from_flat_state([(path, leaf.replace(arrays[path])) for path, leaf in flat])


def _placement(variable: nnx.Variable, mesh: Mesh | None) -> jax.sharding.Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    axes = variable.get_metadata("out_sharding")
    return NamedSharding(mesh, stored_spec(axes))


def _read(params: AnyPath, targets: dict[tuple, jax.ShapeDtypeStruct]) -> dict[tuple, jax.Array]:
    """Restore the targets by Orbax; other leaves of the directory are not read."""
    if isinstance(params, CloudPath):
        return {path: _read_objects(params, path, leaf) for path, leaf in targets.items()}
    tree = nnx.traversals.unflatten_mapping(targets)
    restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=CONCURRENT_READ_GB)
    with ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=True)
        restored = checkpointer.restore(params.resolve(), args=args)
    return nnx.traversals.flatten_mapping(restored)


def _read_objects(params: CloudPath, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """One leaf by tensorstore, shard by shard, so that the host holds one shard at a time.

    Orbax itself reaches its small metadata files in the cloud only with gcsfs or TensorFlow.
    """
    stored = (params / ".".join(map(str, path))).zarr_store()
    assert leaf.sharding is not None
    shards = [
        jax.device_put(stored[index].read().result(), device)
        for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

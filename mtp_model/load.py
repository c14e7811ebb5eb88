"""From a checkpoint directory to a module that holds its weights: whole, on a mesh, or a layer."""

import contextlib
import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from mtp_model.checkpoint.directory import Checkpoint, CheckpointError, open_checkpoint
from mtp_model.config import ModelConfig
from mtp_model.files.place import Place
from mtp_model.layers import FP8, Embedding, RMSNorm, dequantise
from mtp_model.model import (
    DeepSeekV3,
    Layer,
    Scope,
    StackName,
    abstract_layer,
    abstract_model,
    leaf_name,
)
from mtp_model.moe import Experts
from mtp_model.sharding import require_axes

PartName = Literal["embed_tokens", "norm", "lm_head"]  # modules of the tree that are in no stack
_ROUTED = "experts"  # the routed experts' module, in a layer's `mlp`


def load(
    path: str | Path | Place,
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
    config = checkpoint.config
    computed_in = jnp.dtype(compute_dtype or dtype or config.dtype)
    model = abstract_model(config, scope, checkpoint.dtypes, mesh, computed_in)
    graph, state = nnx.split(model)
    model = nnx.merge(graph, _restore(checkpoint, state))
    if dtype is not None:
        cast_weights(model, dtype)
    give_back_freed()
    return model


def give_back_freed() -> None:
    """Let the system have what was freed: glibc keeps hundreds of megabytes after a model was read
    or a program compiled. Elsewhere nothing is done."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def load_layer(
    checkpoint: Checkpoint, stack: StackName, index: int, *, experts: bool = True
) -> Layer:
    """One module of a stack, as stored, on the first device; reads that layer's bytes only.

    stack: `dense_layers` or `moe_layers` for a decoder layer, `mtp` for an MTP module.
    experts: False leaves the routed experts out, as leaves without memory: `load_experts` reads
        these, some at a time.
    """
    count = _count_layers(checkpoint, stack, index)
    graph, state = _abstract_layer(checkpoint.config, stack)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        name = leaf_name((stack, *path))
        _raise_unless_stored(checkpoint, name, (count, *variable.shape))
        if experts or _ROUTED not in path:
            variable = variable.replace(jnp.asarray(_read_layer(checkpoint, name, index)))
        flat.append((path, variable))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def load_experts(
    checkpoint: Checkpoint, stack: StackName, index: int, experts: Sequence[int]
) -> Experts:
    """Some routed experts of one layer, as stored, in the order given; reads their bytes only."""
    _count_layers(checkpoint, stack, index)
    place, graph, flat = _abstract_experts(checkpoint.config, stack)
    filled = []
    for path, variable in flat:
        name = leaf_name((stack, *place, *path))
        parts = [_read_layer(checkpoint, name, index, expert) for expert in experts]
        filled.append((path, variable.replace(jnp.asarray(np.stack(parts)))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


@functools.lru_cache(maxsize=3)
def _abstract_layer(config: ModelConfig, stack: StackName) -> tuple[Any, Any]:
    """A layer's graph and its state without memory: made once for all layers of a stack."""
    return nnx.split(abstract_layer(config, stack))


@functools.lru_cache(maxsize=3)
def _abstract_experts(config: ModelConfig, stack: StackName) -> tuple[tuple, Any, Any]:
    """Where the routed experts of a stack are below it, and their module without memory."""
    place = ("block", "mlp", _ROUTED) if stack == "mtp" else ("mlp", _ROUTED)
    module: Any = abstract_layer(config, stack)
    for name in place:
        module = getattr(module, name)
    graph, state = nnx.split(module)
    return place, graph, nnx.to_flat_state(state)


def load_part(checkpoint: Checkpoint, name: PartName) -> Embedding | RMSNorm:
    """What stands outside all layers, as stored, on the first device."""
    config = checkpoint.config

    def make() -> Embedding | RMSNorm:
        if name == "norm":
            return RMSNorm(config.hidden_size, config)
        return Embedding(config, nnx.Rngs(0))

    graph, state = nnx.split(nnx.eval_shape(make))
    flat = []
    for path, variable in nnx.to_flat_state(state):
        leaf = leaf_name((name, *path))
        _raise_unless_stored(checkpoint, leaf, variable.shape)
        stored = checkpoint.read_rows(leaf, (), 0, variable.shape[0])
        flat.append((path, variable.replace(jnp.asarray(stored))))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _count_layers(checkpoint: Checkpoint, stack: StackName, index: int) -> int:
    """How many modules a stack has; ValueError where `index` is none of them."""
    config = checkpoint.config
    count = {
        "dense_layers": config.num_dense_layers,
        "moe_layers": config.num_moe_layers,
        "mtp": config.num_nextn_predict_layers,
    }[stack]
    if not 0 <= index < count:
        raise ValueError(f"{checkpoint.path}: {stack} has {count} layers, no {index}")
    return count


# Outside the functions that use them: JAX compiles them once for each shape, not at every use.
_cast = jax.jit(lambda weight, dtype: weight.astype(dtype), static_argnums=1, donate_argnums=0)
_to_dense = jax.jit(dequantise, static_argnums=(2, 3))


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
            value = _cast(leaf[...], dtype)
        else:
            value = _to_dense(leaf[...], scale[...], owner.block, dtype)
        value = jax.device_put(value, leaf.sharding)  # where it was, on a mesh
        getattr(owner, name).set_value(value)  # `[...] = value` would keep the old dtype


def _owner(model: nnx.Module, path: tuple) -> tuple[Any, str]:
    """The module that holds the leaf at a path, and the leaf's attribute name."""
    owner = model
    for name in path[:-1]:
        owner = getattr(owner, name)
    return owner, path[-1]


def _restore(checkpoint: Checkpoint, state: nnx.State) -> nnx.State:
    """The state with the stored arrays in place of its abstract leaves."""
    flat = nnx.to_flat_state(state)
    for path, variable in flat:
        _raise_unless_stored(checkpoint, leaf_name(path), variable.shape)
    arrays = {path: _read(checkpoint, path, variable.get_value()) for path, variable in flat}
    return nnx.from_flat_state([(path, leaf.replace(arrays[path])) for path, leaf in flat])


def _raise_unless_stored(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    stored = checkpoint.leaves.get(name)
    if stored is None or stored.shape != shape:
        found = "nothing" if stored is None else f"shape {stored.shape}"
        raise CheckpointError(
            f"{checkpoint.path}: leaf {name} of shape {shape} is needed, "
            f"{found} is stored (scope {checkpoint.provenance['scope']!r})"
        )


def _read_layer(
    checkpoint: Checkpoint, name: str, index: int, expert: int | None = None
) -> np.ndarray:
    """The part of a stacked leaf that belongs to one layer, or one expert, tensor by tensor."""
    leaf = checkpoint.leaves[name]
    outer = (index,) if expert is None else (index, expert)
    out = np.empty(leaf.shape[len(outer) :], leaf.dtype)
    for inner in np.ndindex(leaf.shape[len(outer) : leaf.num_stack_dims]):
        as_bytes = out[inner].reshape(-1).view(np.uint8)
        checkpoint.read_rows_into(name, (*outer, *inner), 0, leaf.tensor_shape[0], as_bytes)
    return out


def _read(checkpoint: Checkpoint, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """One leaf, part by part, so that the host holds one device's part at a time."""
    import tensorstore as ts  # takes a while, and not everyone who imports this file loads

    place = checkpoint.params / leaf_name(path)
    spec = {"driver": "zarr", "kvstore": place.kvstore(), "fill_missing_data_reads": False}
    sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
    parts: dict[str, tuple[Any, list[Any]]] = {}  # devices may hold the same part
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        parts.setdefault(str(index), (index, []))[1].append(device)
    shards = []
    try:
        stored = ts.open(spec, open=True, read=True).result()
        for index, devices in parts.values():
            part = stored[index].read().result()
            shards += [jax.device_put(part, device) for device in devices]
    except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
        raise CheckpointError(
            f"{place} cannot be read ({error}), though the checkpoint is marked complete; "
            "copy it again, or import it again with --overwrite"
        ) from error
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)

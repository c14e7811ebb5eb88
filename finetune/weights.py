"""Between a checkpoint directory and training: what can be trained, loaded so, and written back."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from finetune.adapters import adapted, add_adapters, merged, moved_leaf, raise_unless_there
from finetune.data.files.kinds import is_on_hub
from finetune.objective.objectives import are_new
from finetune.optimizer import Halved, decay_groups, group, join
from finetune.settings import (
    ComputeDtype,
    LoraSettings,
    RunSettings,
    SettingsError,
    TrainMode,
)
from finetune.settings_rules import check, short_rows
from finetune.state import TRAINABLE, Split, TrainState
from mtp_model import ModelConfig
from mtp_model.attention import keeps_scores
from mtp_model.checkpoint.derived import ChangedLeaf, write_beside, write_derived
from mtp_model.checkpoint.directory import Checkpoint, CheckpointError, open_checkpoint
from mtp_model.files.open import absolute, as_place
from mtp_model.files.place import Place
from mtp_model.load import cast_weights, load
from mtp_model.lora import fresh, without_memory
from mtp_model.model import Scope, abstract_model, leaf_name, leaves_by_name
from mtp_model.sharding import active_mesh, collected, rows_here

KEPT_BYTES = 4 << 30  # on a device: --remat auto keeps up to this


def resolve(settings: RunSettings) -> RunSettings:
    """Checked settings with absolute paths and an objective: what RUN/config.yaml says."""
    check(settings)
    objective = settings.objective
    if not objective.weights():
        new = settings.part == "mtp" and are_new(open_checkpoint(settings.checkpoint).provenance)
        objective = objective.or_default(settings.part, new)
    return dataclasses.replace(
        settings,
        checkpoint=str(as_place(settings.checkpoint).absolute()),
        data=tuple(map(_absolute, settings.data)),
        states=tuple(map(absolute, settings.states)),
        eval_data=tuple(map(_absolute, settings.eval_data)),
        out=absolute(settings.out),
        objective=objective,
    )


def _absolute(path: Path) -> Path:
    return path if is_on_hub(path) else absolute(path)


def open_trainable(path: str, captured: bool = False) -> tuple[Checkpoint, ModelConfig]:
    """A checkpoint with a main model and MTP modules; CheckpointError says what it lacks.

    captured: the main model's states are, so that it needs no layers.
    """
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    scope = checkpoint.provenance["scope"]
    if scope != "all" and not (captured and scope == "mtp"):
        raise CheckpointError(
            f"{path} was imported with --scope {scope}; main model and MTP modules are both "
            "needed; import it again with --scope all --overwrite, or to another place"
        )
    if not config.num_nextn_predict_layers:
        raise CheckpointError(
            f"{path} has no MTP modules (num_nextn_predict_layers is 0): nothing to train or "
            "measure; import it again with --overwrite and --mtp-from, naming a checkpoint that "
            "has one"
        )
    return checkpoint, config


def raise_unless_fitting(
    settings: RunSettings, config: ModelConfig, row_tokens_option: str = "--batch.row-tokens"
) -> None:
    """SettingsError for what this model has no room or no place for."""
    modules, row_tokens = config.num_nextn_predict_layers, settings.batch.row_tokens
    faults = short_rows(row_tokens_option, row_tokens, settings.draft_tokens, modules)
    if settings.draft_input == "own" and modules > 1:
        faults.append(f"--draft-input is own, needed text for a model of {modules} MTP modules")
    elif settings.draft_input == "own" and settings.draft_tokens < 2:  # nothing follows a draft
        faults.append("--draft-input is own, needed --draft-tokens 2 or more beside it")
    faults += _groups_of_nothing(settings, config)
    if faults:
        raise SettingsError("settings that cannot be used", faults)
    if settings.train == "lora":
        raise_unless_there(settings.lora, config)


def _groups_of_nothing(settings: RunSettings, config: ModelConfig) -> Iterator[str]:
    """What is wrong with weight decays of weights that do not learn."""
    if not (groups := decay_groups(settings.optimizer)):
        return
    model = abstract_model(config)
    if settings.train == "lora":
        learns = [f"{name}.lora_A" for name in adapted(model, settings.lora)]
    else:
        names = leaves_by_name(model)
        learns = [name for name in names if settings.part == "all" or name.startswith("mtp.")]
    there = ", ".join(dict.fromkeys(name.split(".")[-2] for name in learns))
    for end in groups:
        if not any(group(name, [end]) for name in learns):
            found = f"--optimizer.weight-decay-of names {end}"
            yield f"{found}, needed the end of what learns: {there}"


def compute_dtype(choice: ComputeDtype) -> ComputeDtype:
    """The precision that `auto` stands for on this machine, else the choice itself."""
    if choice != "auto":
        return choice
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def recomputes_layers(
    settings: RunSettings, config: ModelConfig, computed_in: ComputeDtype
) -> bool:
    """Whether the backward pass on the active mesh computes what is inside a layer again: what
    `--remat` says.

    `auto` looks at nothing that changes between the processes of a run on one kind of machine:
    the run goes on with the same bits. Beside a main model that runs, memory is short on other
    devices than CPUs, and a module's operations are few.
    """
    if settings.remat != "auto":
        return settings.remat == "layer"
    mesh, rows = active_mesh(), settings.batch.rows_at_once
    kind = jax.default_backend() if mesh is None else mesh.abstract_device.platform
    if kind != "cpu":  # devices of a CPU share their memory
        if not settings.states:
            return True
        rows = rows_here(rows)
    return rows * _kept_of_a_row(settings, config) * jnp.dtype(computed_in).itemsize > KEPT_BYTES


def _kept_of_a_row(settings: RunSettings, config: ModelConfig) -> int:
    """About what is kept of a row for a backward pass that computes no layer again.

    Counted are the values that a layer makes of a token, each as often as it is kept.
    """
    c, batch = config, settings.batch
    heads = c.num_attention_heads
    attention = 3 * heads * (c.qk_head_dim + c.v_head_dim)
    if keeps_scores(batch.rows_at_once, batch.row_tokens, heads):
        attention += 2 * heads * batch.row_tokens
    served = c.num_experts_per_tok * (4 * c.moe_intermediate_size + 4 * c.hidden_size)
    moe = served + 4 * c.n_shared_experts * c.moe_intermediate_size
    depths = settings.draft_tokens or c.num_nextn_predict_layers
    layers = {"mtp": 0, "all": c.num_dense_layers + c.num_moe_layers}[settings.part] + depths
    a_layer = 8 * c.hidden_size + attention + max(moe, 4 * c.intermediate_size)
    return batch.row_tokens * layers * a_layer


def load_for_training(
    path: str,
    mode: TrainMode,
    dtype: str,
    remat: bool = True,
    mesh: Mesh | None = None,
    lora: LoraSettings | None = None,
    seed: int = 0,
    scope: Scope = "all",
) -> Split:
    """The model with float32 trainable parameters; what is frozen stays as stored, FP8 too.

    An FP8 weight cannot move by less than its own rounding: trained ones are dequantised.
    lora, seed: of the adapters, where these are trained. scope: what of the model is needed.
    """
    model = load(path, mesh, scope=scope, compute_dtype=dtype)
    model.remat = remat
    if mode == "lora":
        add_adapters(model, lora or LoraSettings(), fresh(seed, mesh))
    cast_weights(model, jnp.float32, only=TRAINABLE[mode])
    return Split.of(model, mode)


def abstract_for_training(
    config: ModelConfig,
    dtypes: Mapping[str, Any],
    mode: TrainMode,
    dtype: str,
    remat: bool = True,
    mesh: Mesh | None = None,
    lora: LoraSettings | None = None,
    scope: Scope = "all",
) -> Split:
    """What `load_for_training` gives, without memory: to compile a step before anything is read.

    dtypes: of stored leaves, by path.
    """
    state = nnx.state(abstract_model(config, scope), TRAINABLE[mode])
    trained = {leaf_name(path): jnp.dtype("float32") for path, _ in nnx.to_flat_state(state)}
    model = abstract_model(config, scope, {**dtypes, **trained}, mesh, jnp.dtype(dtype))
    model.remat = remat
    if mode == "lora":
        add_adapters(model, lora or LoraSettings(), without_memory(mesh))
    return Split.of(model, mode)


def matrices(checkpoint: Checkpoint) -> Callable[[str], bool]:
    """Whether the leaf at a path stacks matrices, not vectors: those that weight decay is for."""
    names = {name for name, leaf in checkpoint.leaves.items() if len(leaf.tensor_shape) > 1}
    return lambda name: name in names or name.endswith((".lora_A", ".lora_B"))


def final_bytes(base: Checkpoint, state: TrainState) -> int:
    """Bytes that a run writes at its end: of the leaves that moved, float32, and of adapters."""
    sizes = {leaf_name(path): leaf.size for path, leaf in nnx.to_flat_state(state.trainable)}
    moved = 4 * sum(math.prod(base.leaves[name].shape) for name in set(map(moved_leaf, sizes)))
    return moved + 4 * sum(size for name, size in sizes.items() if moved_leaf(name) != name)


def keep_adapters(
    base: Checkpoint,
    folder: Path | Place,
    state: TrainState,
    record: Mapping[str, Any],
    lora: LoraSettings,
) -> None:
    """Write the adapters by themselves: a checkpoint directory of their matrices alone."""
    flat = {leaf_name(path): variable[...] for path, variable in nnx.to_flat_state(state.trainable)}
    shapes = {name: (leaf.shape, leaf.ndim - 2) for name, leaf in flat.items()}
    values = {name: changed_leaf(leaf) for name, leaf in flat.items()}
    how = {"adapters": {"rank": lora.rank, "alpha": lora.alpha}}
    write_beside(base, folder, shapes, values, {**record, **how})


def write_final(
    base: Checkpoint,
    final: Path | Place,
    state: TrainState,
    record: Mapping[str, Any],
    lora: LoraSettings,
) -> Checkpoint:
    """Write a checkpoint directory with the trained leaves (float32) over those of `base`.

    All other leaves are hard links. Adapters are merged into the weights that they stand beside.
    Each process of a cluster writes a part. record: goes into provenance.json.
    """
    trained = [*nnx.to_flat_state(state.trainable), *nnx.to_flat_state(state.biases)]
    low = state.opt_state.low if isinstance(state.opt_state, Halved) else nnx.State({})
    lower = dict(nnx.to_flat_state(low))
    changed = {
        leaf_name(path): _whole(changed_leaf(variable[...]), lower.get(path))
        for path, variable in trained
    }
    if any(isinstance(variable, nnx.LoRAParam) for _, variable in trained):
        changed = merged(base, changed, lora)
    return write_derived(base, final, changed, record)


def _whole(leaf: ChangedLeaf, lower: nnx.Variable | None) -> ChangedLeaf:
    """A trained leaf as float32, whose lower half is kept apart where there is one."""
    if lower is None:
        return leaf
    low = changed_leaf(lower[...])

    def rows(index: tuple[int, ...], start: int, stop: int) -> Callable[[], np.ndarray]:
        upper, lower = leaf.rows(index, start, stop), low.rows(index, start, stop)
        return lambda: join(upper(), lower(), np)

    return ChangedLeaf(dtype=np.dtype(np.float32), rows=rows)


def changed_leaf(leaf: jax.Array) -> ChangedLeaf:
    """A leaf's rows from the devices that hold them; only the asked rows come to the host."""

    def rows(index: tuple[int, ...], start: int, stop: int) -> Callable[[], np.ndarray]:
        begin = (*index, start, *(0 for _ in leaf.shape[len(index) + 1 :]))
        shape = (*(1 for _ in index), stop - start, *leaf.shape[len(index) + 1 :])
        if leaf.is_fully_addressable:
            return lambda: _copied(leaf, begin, shape).reshape(shape[len(index) :])
        block = collected(leaf, begin, shape)  # a part of it is on other hosts' devices
        return lambda: jax.device_get(block).reshape(shape[len(index) :])

    return ChangedLeaf(dtype=np.dtype(leaf.dtype), rows=rows)


def _copied(leaf: jax.Array, begin: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """A part of a leaf, all of which is on this host's devices."""
    out = np.empty(shape, leaf.dtype)
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    copied = sum(_copy_overlap(shard, np.array(begin), out) for shard in shards)
    assert copied == out.size, f"{copied} of {out.size} elements are on this host's devices"
    return out


def _copy_overlap(shard: jax.Shard, begin: np.ndarray, out: np.ndarray) -> int:
    """Copy to `out`, which is the array's part from `begin` on, what the shard holds of it.

    Returns how many elements that were. The shard is sliced on its own device: XLA slices an array
    that is spread over devices by adding what each of them holds, zeros where it holds nothing,
    and -0.0 + 0.0 is 0.0.
    """
    held = shard.data
    assert held is not None  # it is addressable
    shard_begin = np.array([part.start or 0 for part in shard.index])
    first = np.maximum(begin, shard_begin)
    last = np.minimum(begin + out.shape, shard_begin + held.shape)
    if (first >= last).any():
        return 0
    block = jax.lax.dynamic_slice(held, (first - shard_begin).tolist(), (last - first).tolist())
    out[tuple(map(slice, first - begin, last - begin))] = jax.device_get(block)
    return block.size

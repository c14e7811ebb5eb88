"""The one table: a checkpoint's tensor names, and where each lives in the module tree.

Import, export, checking and planning are driven by it; shapes and sharding come from the module
that uses the weight. Names are exact strings with placeholders; weights keep their orientation
[out, in], so there is nothing to transpose and no second, inverse mapping.

Source of the names: the released DeepSeek-V3 checkpoint and its README_WEIGHTS.md.
"""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from converters.format.header import Header, TensorInfo
from mtp_model.config import ModelConfig
from mtp_model.model import Scope, abstract_model, leaves_by_name

TABLE_VERSION = 1
SCALE_SUFFIX = "_scale_inv"


class Stack(enum.Enum):
    """Which stacked module of the tree a layer's weights belong to; its path prefix."""

    SINGLE = ""  # not in a layer
    DENSE = "dense_layers."
    MOE = "moe_layers."
    MTP = "mtp."  # of an MTP module, outside its decoder block
    MTP_BLOCK = "mtp.block."

    def layers(self, config: ModelConfig) -> range:
        """Checkpoint layer numbers; MTP modules follow the main model's layers."""
        first_moe, end = config.num_dense_layers, config.num_hidden_layers
        mtp = range(end, end + config.num_nextn_predict_layers)
        return {
            Stack.SINGLE: range(0),
            Stack.DENSE: range(first_moe),
            Stack.MOE: range(first_moe, end),
            Stack.MTP: mtp,
            Stack.MTP_BLOCK: mtp,
        }[self]

    def in_scope(self, scope: Scope) -> bool:
        if scope == "main":
            return self not in (Stack.MTP, Stack.MTP_BLOCK)
        return scope == "all" or self not in (Stack.DENSE, Stack.MOE)


class Kind(enum.Enum):
    """How the released format stores a weight."""

    PLAIN = enum.auto()  # in the checkpoint's own dtype: BF16 (F32 in a float32 checkpoint)
    QUANTISED = enum.auto()  # F8_E4M3 with block scales where the config has quantization_config
    FLOAT32 = enum.auto()  # F32; where a file has BF16, widened
    BUFFER = enum.auto()  # no weight: what some tools also store, carried along as it is


@dataclass(frozen=True)
class Row:
    """One weight: its checkpoint name, its path below the stack, which stacks have it.

    A row whose path the module tree lacks does not apply to that network (`q_proj` where queries
    are low-rank); a leaf of the tree without a row is an error.
    """

    name: str
    path: str
    stacks: tuple[Stack, ...]
    kind: Kind
    copy_of: str | None = None


SINGLE, MTP = (Stack.SINGLE,), (Stack.MTP,)
DENSE, EVERY, WITH_EXPERTS = (
    (Stack.DENSE,),
    (Stack.DENSE, Stack.MOE, Stack.MTP_BLOCK),
    (Stack.MOE, Stack.MTP_BLOCK),
)
PLAIN, QUANTISED, FLOAT32, BUFFER = Kind.PLAIN, Kind.QUANTISED, Kind.FLOAT32, Kind.BUFFER

_LAYER = "model.layers.{layer}."
_BUFFERS = "buffers."  # a leaf a tensor, by its name: not every layer needs to have one


def _same(path: str, stacks: tuple[Stack, ...], kind: Kind) -> Row:
    """A decoder-layer weight: same name below the layer in the checkpoint and in the tree."""
    return Row(_LAYER + path, path, stacks, kind)


def _mtp(path: str) -> Row:
    return Row(_LAYER + path, path, MTP, PLAIN)


def _expert(path: str) -> Row:
    name = _LAYER + "mlp.experts.{expert}." + path
    return Row(name, "mlp.experts." + path, WITH_EXPERTS, QUANTISED)


def _copy(name: str, original: str, path: str) -> Row:
    """A tensor that repeats one of the main model's; a checkpoint may leave it out."""
    return Row(_LAYER + name, path, MTP, PLAIN, copy_of=original)


# fmt: off
TABLE = (
    Row("model.embed_tokens.weight", "embed_tokens.weight", SINGLE, PLAIN),
    Row("model.norm.weight", "norm.weight", SINGLE, PLAIN),
    Row("lm_head.weight", "lm_head.weight", SINGLE, PLAIN),

    _same("input_layernorm.weight", EVERY, PLAIN),
    _same("post_attention_layernorm.weight", EVERY, PLAIN),
    _same("self_attn.q_proj.weight", EVERY, QUANTISED),  # where q_lora_rank is null, else:
    _same("self_attn.q_a_proj.weight", EVERY, QUANTISED),
    _same("self_attn.q_a_layernorm.weight", EVERY, PLAIN),
    _same("self_attn.q_b_proj.weight", EVERY, QUANTISED),
    _same("self_attn.kv_a_proj_with_mqa.weight", EVERY, QUANTISED),
    _same("self_attn.kv_a_layernorm.weight", EVERY, PLAIN),
    _same("self_attn.kv_b_proj.weight", EVERY, QUANTISED),
    _same("self_attn.o_proj.weight", EVERY, QUANTISED),

    _same("mlp.gate_proj.weight", DENSE, QUANTISED),
    _same("mlp.up_proj.weight", DENSE, QUANTISED),
    _same("mlp.down_proj.weight", DENSE, QUANTISED),

    _same("mlp.gate.weight", WITH_EXPERTS, PLAIN),
    _same("mlp.gate.e_score_correction_bias", WITH_EXPERTS, FLOAT32),
    _expert("gate_proj.weight"),
    _expert("up_proj.weight"),
    _expert("down_proj.weight"),
    _same("mlp.shared_experts.gate_proj.weight", WITH_EXPERTS, QUANTISED),
    _same("mlp.shared_experts.up_proj.weight", WITH_EXPERTS, QUANTISED),
    _same("mlp.shared_experts.down_proj.weight", WITH_EXPERTS, QUANTISED),

    _mtp("enorm.weight"),
    _mtp("hnorm.weight"),
    _mtp("eh_proj.weight"),
    _mtp("shared_head.norm.weight"),
    _copy("embed_tokens.weight", "model.embed_tokens.weight", "embed_tokens.weight"),
    _copy("shared_head.head.weight", "lm_head.weight", "lm_head.weight"),

    Row("model.rotary_emb.inv_freq", "rotary_emb.inv_freq", SINGLE, BUFFER),
    _same("self_attn.rotary_emb.inv_freq", EVERY, BUFFER),
)
# fmt: on


# How Transformers 5 saves experts: one tensor [experts, rows, columns] a layer and a name, in which
# each expert's rows are those of these weights, one below the other. Blocks of FP8 scales likewise.
_FUSED = {
    name + suffix: tuple(weight + suffix for weight in weights)
    for name, weights in {
        "gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
        "down_proj": ("down_proj.weight",),
    }.items()
    for suffix in ("", SCALE_SUFFIX)
}
_MOST_EXPERTS = 1 << 16


def fused_weights(name: str) -> tuple[str, ...]:
    """What a tensor of fused experts holds of each; nothing for any other tensor."""
    match name.split("."):
        case ["model", "layers", layer, "mlp", "experts", fused] if layer.isdecimal():
            return _FUSED.get(fused, ())
    return ()


def parts(tensor: TensorInfo) -> Iterator[TensorInfo]:
    """The tensors of the table that one of a file holds, in the order of its bytes: mostly itself.

    Fused experts that cannot be divided are left as they are, a name that no row knows.
    """
    weights = fused_weights(tensor.name)
    match tensor.shape:
        case [experts, rows, columns] if weights and tensor.nbytes and experts <= _MOST_EXPERTS:
            if rows % len(weights) == 0:
                nbytes = tensor.nbytes // (experts * len(weights))
                prefix = tensor.name.rpartition(".")[0]
                for number, (expert, weight) in enumerate(
                    itertools.product(range(experts), weights)
                ):
                    yield dataclasses.replace(
                        tensor,
                        name=f"{prefix}.{expert}.{weight}",
                        shape=(rows // len(weights), columns),
                        begin=tensor.begin + number * nbytes,
                        nbytes=nbytes,
                        fused_in=tensor.name,
                    )
                return
    yield tensor


def unfused(header: Header) -> Header:
    """The same file as the table names what is in it: fused experts expert by expert."""
    if not any(fused_weights(tensor.name) for tensor in header.tensors):
        return header
    return dataclasses.replace(
        header, tensors=tuple(part for tensor in header.tensors for part in parts(tensor))
    )


@dataclass(frozen=True)
class Slot:
    """One tensor of a checkpoint and its place in the tree.

    path: leaf path; index: leading indices in the stacked leaf, () | (layer,) | (layer, expert);
    shape, dtype: of the tensor, dtype as safetensors names it; scale: name of an FP8 weight's
    scales; copy_of: name of the tensor that this one repeats (it has no leaf of its own);
    is_widened: float32 in the tree, and possibly BF16 in a file.
    """

    name: str
    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    scale: str | None = None
    copy_of: str | None = None
    is_widened: bool = False

    @property
    def is_buffer(self) -> bool:
        return self.path.startswith(_BUFFERS)

    @property
    def with_scale(self) -> tuple[str, ...]:
        """Its name, and that of its scales if it has any."""
        return (self.name, self.scale) if self.scale else (self.name,)


def _indices(row: Row, stack: Stack, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Checkpoint name and leading indices of every tensor of a row in a stack."""
    if stack is Stack.SINGLE:
        yield row.name, ()
        return
    experts = range(config.n_routed_experts) if "{expert}" in row.name else (None,)
    for (position, layer), expert in itertools.product(enumerate(stack.layers(config)), experts):
        name = row.name.format(layer=layer, expert=expert)
        yield name, (position,) if expert is None else (position, expert)


def _plain_dtype(config: ModelConfig) -> str:
    return {"bfloat16": "BF16", "float32": "F32"}[config.dtype]


def _row_slots(row: Row, stack: Stack, config: ModelConfig, shapes: Mapping) -> Iterator[Slot]:
    path = row.path if row.copy_of else stack.value + row.path
    if path not in shapes:
        return  # the network has another kind of queries
    quantised = row.kind is QUANTISED and config.weight_block_size is not None
    plain = "F32" if row.kind is FLOAT32 else _plain_dtype(config)
    for name, index in _indices(row, stack, config):
        place = () if row.copy_of else index
        shape = shapes[path][len(place) :]
        if not quantised:
            widened = row.kind is FLOAT32
            yield Slot(name, path, place, shape, plain, copy_of=row.copy_of, is_widened=widened)
            continue
        scale = name + SCALE_SUFFIX
        yield Slot(name, path, place, shape, "F8_E4M3", scale=scale)
        scale_path = path + SCALE_SUFFIX
        yield Slot(scale, scale_path, place, shapes[scale_path][len(place) :], "F32")


@functools.lru_cache(maxsize=8)  # the model is traced for it
def leaf_shapes(config: ModelConfig, scope: Scope = "all") -> Mapping[str, tuple[int, ...]]:
    """Shape of every leaf of the module tree, by path."""
    leaves = leaves_by_name(abstract_model(config, scope))
    return MappingProxyType({path: tuple(leaf.shape) for path, leaf in leaves.items()})


@functools.lru_cache(maxsize=4)  # V3 has 92,000 of them
def slots(config: ModelConfig, scope: Scope = "all") -> Mapping[str, Slot]:
    """Every tensor the checkpoint of this network has, by name: scales and copies included.

    As the released format has it: which weights are FP8 is for a file's own tensors to say.
    """
    shapes = leaf_shapes(config, scope)
    found: dict[str, Slot] = {}
    for row in TABLE:
        for stack in row.stacks:
            if stack.in_scope(scope):
                found |= {slot.name: slot for slot in _row_slots(row, stack, config, shapes)}
    uncovered = shapes.keys() - {slot.path for slot in found.values() if not slot.copy_of}
    if uncovered:
        raise AssertionError(f"no row of the table for {sorted(uncovered)}")
    return MappingProxyType(found)


def buffers(config: ModelConfig, scope: Scope = "all") -> dict[str, Slot]:
    """Every tensor that a checkpoint may also have and no network needs, by name."""
    shape = (config.qk_rope_head_dim // 2,)
    return {
        name: Slot(name, _BUFFERS + name, (), shape, "F32")
        for row in TABLE
        if row.kind is BUFFER
        for stack in row.stacks
        if stack.in_scope(scope)
        for name, _ in _indices(row, stack, config)
    }


def float32_leaves(slots: Iterable[Slot]) -> frozenset[str]:
    """Leaves that are float32 whatever a checkpoint's own dtype is: scales and router biases."""
    always = {
        stack.value + row.path for row in TABLE if row.kind is FLOAT32 for stack in row.stacks
    }
    paths = {slot.path for slot in slots}
    return frozenset(path for path in paths if path in always or path.endswith(SCALE_SUFFIX))


def layer_of(name: str) -> int | None:
    """The layer number of `model.layers.N.rest`."""
    match name.split(".", 3):
        case ["model", "layers", number, _] if number.isdecimal() and len(number) < 10:
            return int(number)
    return None


def mtp_layers(names: Iterable[str]) -> list[int]:
    """The layers that are MTP modules, whatever the config says: those with `eh_proj`, sorted."""
    eh_projs = (name for name in names if name.endswith(".eh_proj.weight"))
    numbers = {name: number for name in eh_projs if (number := layer_of(name)) is not None}
    return sorted({n for name, n in numbers.items() if name == f"model.layers.{n}.eh_proj.weight"})


GROUPS = (
    "embedding and head",
    "attention",
    "dense MLP",
    "routed experts",
    "shared experts",
    "router",
    "norms",
    "MTP modules",
    "copies",
    "buffers",
    "others",
)
"""The main model's parts, then the MTP modules whole, what they repeat of it, no weights, and what
no network of ours has."""

_NORMS = {
    "norm",
    "input_layernorm",
    "post_attention_layernorm",
    "q_a_layernorm",
    "kv_a_layernorm",
}
_BY_MODULE = {
    "embed_tokens": "embedding and head",
    "lm_head": "embedding and head",
    "experts": "routed experts",
    "shared_experts": "shared experts",
    "gate": "router",
}


def group_of(slot: Slot) -> str:
    """The group of a tensor; scales go with their weights."""
    parts = slot.path.split(".")
    if slot.copy_of:
        return "copies"
    if slot.is_buffer:
        return "buffers"
    if parts[0] == "mtp":
        return "MTP modules"
    return _group_of_parts(parts)


def group_of_name(name: str, *, is_mtp: bool) -> str:
    """The same of any tensor by its name alone, in the checkpoint or below its MTP module."""
    parts = name.split(".")
    copies = {tuple(row.name.split(".")[3:]) for row in TABLE if row.copy_of}
    if is_mtp and any(tuple(parts[-len(copy) :]) == copy for copy in copies):
        return "copies"
    if "rotary_emb" in parts:
        return "buffers"
    return "MTP modules" if is_mtp else _group_of_parts(parts)


def _group_of_parts(parts: list[str]) -> str:
    if len(parts) > 1 and parts[-2] in _NORMS:
        return "norms"
    for part in parts:
        if part in _BY_MODULE:
            return _BY_MODULE[part]
    if "self_attn" in parts:
        return "attention"
    return "dense MLP" if "mlp" in parts else "others"

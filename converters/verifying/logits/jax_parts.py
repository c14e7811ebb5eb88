"""The network of a checkpoint directory part by part on one batch, in float32, for any size.

What is in memory is a layer without its routed experts, and a few of these. The layers are the
model's own modules; only the routed experts' module is replaced, by one that reads them as tokens
choose them. S tokens (B and T flattened), M rows of some experts, G experts, D hidden.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from converters.exporting.encode import Encoder
from mtp_model.block import take_layer
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.context import make_context
from mtp_model.grouped import expert_ffn
from mtp_model.load import PartName, load, load_experts, load_layer, load_part
from mtp_model.model import StackName
from mtp_model.moe import Routing
from mtp_model.mtp import shift_within_segments
from mtp_model.sharding import BATCH_AXES

EXPERTS_BYTES = (
    256 << 20
)  # of float32 weights of routed experts at once; one expert of V3 is 168 MiB
_FLOAT32 = jnp.dtype(jnp.float32)
_FEWEST_ROWS = 8  # rows of a group of experts are padded to a power of two: few shapes to compile


class ExportedLeaves:
    """The values that export writes for leaves that are kept finer than that; others stay.

    paths: of these leaves, from the root of the tree.
    """

    def __init__(self, encoder: Encoder, paths: frozenset[str]):
        self._encoder = encoder
        self._names = {
            (slot.path, slot.index): slot.name
            for slot in encoder.slots.values()
            if slot.path in paths and not slot.copy_of
        }
        self._paths = paths

    def put_into(self, module: Any, path: str, indices: Sequence[tuple[int, ...]]) -> None:
        """Set those of a module's leaves; `indices` of its tensors, stacked if more than one."""
        for leaf in self._paths:
            if not leaf.startswith(f"{path}."):
                continue
            *owners, name = leaf.removeprefix(f"{path}.").split(".")
            owner = module
            for attribute in owners:
                owner = getattr(owner, attribute, None)
            if owner is None or (leaf, indices[0]) not in self._names:
                continue  # a routed expert's, of a layer without them
            parts = [self._values(self._names[leaf, index]) for index in indices]
            variable = getattr(owner, name)
            values = np.stack(parts).reshape(variable.shape)
            variable.set_value(jax.device_put(values, variable.get_value().sharding))

    def _values(self, name: str) -> np.ndarray:
        values = np.empty(self._encoder.slots[name].shape, np.float32)
        for rows, exported in self._encoder.values(name):
            values[rows.start : rows.stop] = exported
        return values


class JaxParts:
    """Asked for a part's output from the state before it; nothing is remembered between two.

    A state may have several batches, one below the other: [n B, T, D] for tokens [B, T].
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        exported: ExportedLeaves,
        tokens: np.ndarray,
        segments: np.ndarray,
    ):
        self._checkpoint, self._exported = checkpoint, exported
        self._tokens, self._segments = tokens, segments

    def embed(self) -> np.ndarray:
        return self._computed(_looked_up, self._part("embed_tokens"), self._tokens)

    def layer(self, index: int, x: np.ndarray) -> np.ndarray:
        dense = self._checkpoint.config.num_dense_layers
        context = make_context(self._repeated(self._segments, x))
        if index < dense:
            return self._run("dense_layers", index, x, context)
        return self._run("moe_layers", index - dense, x, context)

    def norm(self, x: np.ndarray) -> np.ndarray:
        return self._computed(_normed, self._part("norm"), x)

    def module(self, index: int, h: np.ndarray) -> np.ndarray:
        tokens, segments = (self._repeated(ids, h) for ids in (self._tokens, self._segments))
        ahead = shift_within_segments(jnp.asarray(tokens), jnp.asarray(segments), index + 1)
        e = self._computed(_looked_up, self._part("embed_tokens"), np.asarray(ahead.tokens_BT))
        counted = ahead.inside_BT.astype(jnp.int32)
        context = make_context(segments)._replace(counted_BT=counted)
        return self._run("mtp", index, h, e, context)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return self._computed(_head_logits, self._part("lm_head"), hidden)

    def _computed(self, run: Callable[..., jax.Array], module: Any, *of_rows: Any) -> np.ndarray:
        """What a function gives of a module and of arrays whose leading dimension is the batch."""
        return np.asarray(run(module, *jax.tree.map(jnp.asarray, of_rows)))

    def _repeated(self, ids: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.tile(ids, (len(x) // len(ids), 1))

    def _part(self, name: PartName) -> Any:
        part = load_part(self._checkpoint, name)
        self._exported.put_into(part, name, [()])
        return part

    def _run(self, stack: StackName, index: int, x: np.ndarray, *others: Any) -> np.ndarray:
        """The first output of a layer in float32; its routed experts are read in between."""
        layer: Any = load_layer(self._checkpoint, stack, index, experts=False)
        if stack != "dense_layers":
            _block(layer).mlp.experts = None
        self._exported.put_into(layer, stack, [(index,)])
        routed = jnp.zeros(x.shape, jnp.float32)
        out, needed = _run_around(layer, routed, jnp.asarray(x), *others)
        if needed is not None:
            experts = RoutedExperts(self._checkpoint, stack, index, self._exported)
            out, _ = _run_around(layer, experts(*needed), jnp.asarray(x), *others)
        return np.asarray(out)


class MeshParts(JaxParts):
    """The same of the whole model as `load` puts it on a mesh, with its experts where they are."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        exported: ExportedLeaves,
        tokens: np.ndarray,
        segments: np.ndarray,
        mesh: Mesh,
    ):
        super().__init__(checkpoint, exported, tokens, segments)
        self._mesh, scope = mesh, checkpoint.provenance["scope"]
        self._model = load(checkpoint.path, mesh, scope=scope, compute_dtype=_FLOAT32)
        for name in ("embed_tokens", "norm", "lm_head"):
            exported.put_into(getattr(self._model, name), name, [()])

    def _part(self, name: PartName) -> Any:
        return getattr(self._model, name)

    def _run(self, stack: StackName, index: int, x: np.ndarray, *others: Any) -> np.ndarray:
        layer: Any = _taken(getattr(self._model, stack), index)
        self._exported.put_into(layer, stack, [(index,)])
        if stack != "dense_layers":
            experts = _block(layer).mlp.experts
            indices = [(index, expert) for expert in range(experts.num_experts)]
            self._exported.put_into(experts, _place_of_experts(stack), indices)
        return self._computed(_first_output, layer, x, *others)

    def _computed(self, run: Callable[..., jax.Array], module: Any, *of_rows: Any) -> np.ndarray:
        """Rows are repeated until there are as many as the mesh spreads evenly."""
        rows = len(jax.tree.leaves(of_rows)[0])
        devices = math.prod(self._mesh.shape[axis] for axis in BATCH_AXES)
        repeated = np.arange(-(-rows // devices) * devices) % rows
        where = NamedSharding(self._mesh, PartitionSpec(BATCH_AXES))
        spread = jax.tree.map(lambda x: jax.device_put(np.asarray(x)[repeated], where), of_rows)
        with jax.set_mesh(self._mesh):
            return np.asarray(run(module, *spread))[:rows]


class _Given:
    """In place of a layer's routed experts: gives what it was given, keeps what it was asked."""

    def __init__(self, out_BTD: jax.Array, num_experts: int):
        self._out_BTD, self.num_experts = out_BTD, num_experts
        self.asked: tuple[jax.Array, Routing] | None = None

    def __call__(self, x_BTD: jax.Array, routing: Routing) -> jax.Array:
        self.asked = x_BTD, routing
        return self._out_BTD


@jax.jit
def _run_around(layer: Any, routed_BTD: jax.Array, *args: Any) -> tuple[jax.Array, Any]:
    """A layer's first output, given that of its routed experts; and what these are asked.

    Run once to learn that, and once with the answer: a layer is cheap without its experts.
    """
    block = _block(layer)
    given = _Given(routed_BTD, block.num_experts)
    if hasattr(block.mlp, "experts"):
        block.mlp.experts = given
    return layer(*args)[0], given.asked


_taken = jax.jit(take_layer, static_argnums=1)


@jax.jit
def _first_output(layer: Any, *args: Any) -> jax.Array:
    return layer(*args)[0]


@jax.jit
def _looked_up(embedding: Any, tokens_BT: jax.Array) -> jax.Array:
    return embedding.lookup(tokens_BT, _FLOAT32)


@jax.jit
def _normed(norm: Any, x_BTD: jax.Array) -> jax.Array:
    return norm(x_BTD)


@jax.jit
def _head_logits(head: Any, h_BTD: jax.Array) -> jax.Array:
    return head.logits(h_BTD)


def _block(layer: Any) -> Any:
    """The decoder layer of a layer or of an MTP module."""
    return getattr(layer, "block", layer)


def _place_of_experts(stack: StackName) -> str:
    return f"{'mtp.block' if stack == 'mtp' else stack}.mlp.experts"


class RoutedExperts:
    """The routed experts of one layer, some in memory at a time."""

    def __init__(
        self, checkpoint: Checkpoint, stack: StackName, index: int, exported: ExportedLeaves
    ):
        self._checkpoint, self._exported = checkpoint, exported
        self._stack: StackName = stack
        self._index = index
        c = checkpoint.config
        expert_bytes = 3 * 4 * c.hidden_size * c.moe_intermediate_size
        self._num_experts = c.n_routed_experts
        self._at_once = max(1, EXPERTS_BYTES // expert_bytes)

    def __call__(self, x_BTD: jax.Array, routing: Routing) -> jax.Array:
        x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
        choices_SK, weights_SK = (np.asarray(a).reshape(len(x_SD), -1) for a in routing)
        out_SD = jnp.zeros_like(x_SD)
        for first in range(0, self._num_experts, self._at_once):
            experts = range(first, min(first + self._at_once, self._num_experts))
            group_SK = (choices_SK >= experts.start) & (choices_SK < experts.stop)
            if group_SK.any():
                rows = _rows(choices_SK, weights_SK, group_SK, experts)
                out_SD = _add_served(out_SD, x_SD, *rows, *self._weights(experts))
        return out_SD.reshape(x_BTD.shape)

    def _weights(self, experts: range) -> Iterator[jax.Array]:
        loaded = load_experts(self._checkpoint, self._stack, self._index, experts)
        indices = [(self._index, expert) for expert in experts]
        self._exported.put_into(loaded, _place_of_experts(self._stack), indices)
        return (_dense(part) for part in (loaded.gate_proj, loaded.up_proj, loaded.down_proj))


def _rows(
    choices_SK: np.ndarray, weights_SK: np.ndarray, group_SK: np.ndarray, experts: range
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a group of experts: the token, the local expert and the weight of every row that they
    serve, padded with rows of no expert."""
    token_M, place_M = np.nonzero(group_SK)
    local_M = choices_SK[token_M, place_M] - experts.start
    weight_M = weights_SK[token_M, place_M]
    padding = (0, max(_FEWEST_ROWS, 1 << math.ceil(math.log2(len(token_M)))) - len(token_M))
    return (
        np.pad(token_M, padding).astype(np.int32),
        np.pad(local_M, padding, constant_values=len(experts)).astype(np.int32),
        np.pad(weight_M, padding),
    )


@jax.jit
def _dense(projection: Any) -> jax.Array:
    return projection.dense(_FLOAT32)


@jax.jit
def _add_served(out_SD, x_SD, token_M, expert_M, weight_M, gate_GFD, up_GFD, down_GDF):
    served_MD = expert_ffn(x_SD[token_M], expert_M, gate_GFD, up_GFD, down_GDF)
    return out_SD.at[token_M].add(served_MD * weight_M[:, None])

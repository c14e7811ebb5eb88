"""Forty ways to damage a checkpoint, its import or what the network computes, each with a name.

Written from the released format alone: what damages a checkpoint must not know how it is checked.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from converters.verifying.logits import jax_parts
from mtp_model import attention, moe, mtp
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.context import LatentCache
from mtp_model.rope import rotate

Tensors = dict[str, np.ndarray]
Config = dict[str, Any]

SIZES = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 8}
LAYERS = 2
MODULE = f"model.layers.{LAYERS}"
EXPERT = "model.layers.1.mlp.experts"
SCALE = "_scale_inv"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Mutation:
    """One way to do damage. Of these one is not None.

    weights: changes tensors and config before they are written. files: changes the written folder.
    directory: changes a checkpoint directory. network: changes, for a while, what our network
    computes, or the config that it is given.
    """

    name: str
    weights: Callable[[Tensors, Config], object] | None = None
    files: Callable[[Path], object] | None = None
    directory: Callable[[Path], object] | None = None
    network: Callable[[], Any] | None = None
    config: dict[str, Any] | None = None


# --- names and shapes


def norm_dropped(tensors: Tensors, _: Config) -> None:
    del tensors["model.norm.weight"]


def layer_dropped(tensors: Tensors, _: Config) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        del tensors[name]


def one_layer_fewer(_: Tensors, config: Config) -> None:
    config["num_hidden_layers"] -= 1


def module_one_further(tensors: Tensors, _: Config) -> None:
    for name in [name for name in tensors if name.startswith(f"{MODULE}.")]:
        tensors[name.replace(MODULE, f"model.layers.{LAYERS + 1}")] = tensors.pop(name)


def expert_dropped(tensors: Tensors, _: Config) -> None:
    for name in [name for name in tensors if name.startswith(f"{EXPERT}.3.")]:
        del tensors[name]


def scale_dropped(tensors: Tensors, _: Config) -> None:
    del tensors[f"{EXPERT}.3.up_proj.weight{SCALE}"]


def scales_short_of_a_block(tensors: Tensors, _: Config) -> None:
    """As by rounding 30 / 8 down."""
    name = f"model.layers.0.self_attn.kv_a_proj_with_mqa.weight{SCALE}"
    tensors[name] = tensors[name][:-1]


def matrix_transposed(tensors: Tensors, _: Config) -> None:
    name = f"{MODULE}.eh_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def block_edges_exchanged(_: Tensors, config: Config) -> None:
    config["quantization_config"]["weight_block_size"].reverse()


# --- values that no checkpoint has


def scale_zero(tensors: Tensors, _: Config) -> None:
    tensors[f"{EXPERT}.3.up_proj.weight{SCALE}"][0, 0] = 0


def not_a_number(tensors: Tensors, _: Config) -> None:
    tensors[f"{MODULE}.hnorm.weight"][3] = np.nan


def stale_embedding_copy(tensors: Tensors, _: Config) -> None:
    tensors[f"{MODULE}.embed_tokens.weight"][7] *= 2


def head_of_its_own(tensors: Tensors, _: Config) -> None:
    name = f"{MODULE}.shared_head.head.weight"
    tensors[name] = tensors[name][::-1].copy()


# --- files


def file_cut_short(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-64])


def index_names_another_file(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    places = index["weight_map"]
    places["model.norm.weight"] = next(f for f in places.values() if f != places["lm_head.weight"])
    (folder / INDEX).write_text(json.dumps(index))


# --- other values in the same places


def exchange(tensors: Tensors, a: str, b: str) -> None:
    for suffix in ("", SCALE):
        if a + suffix in tensors:
            pair = tensors[a + suffix], tensors[b + suffix]
            tensors[b + suffix], tensors[a + suffix] = pair


def norms_exchanged(tensors: Tensors, _: Config) -> None:
    exchange(tensors, f"{MODULE}.enorm.weight", f"{MODULE}.hnorm.weight")


def gate_for_up(tensors: Tensors, _: Config) -> None:
    exchange(tensors, f"{EXPERT}.3.gate_proj.weight", f"{EXPERT}.3.up_proj.weight")


def experts_exchanged(tensors: Tensors, _: Config) -> None:
    for part in ("gate_proj", "up_proj", "down_proj"):
        exchange(tensors, f"{EXPERT}.3.{part}.weight", f"{EXPERT}.4.{part}.weight")


def state_first(tensors: Tensors, _: Config) -> None:
    """As for the concatenation that equation 21 of the report prints."""
    name = f"{MODULE}.eh_proj.weight"
    tensors[name] = np.concatenate(np.split(tensors[name], 2, axis=1)[::-1], axis=1)


def matrix_in_columns(tensors: Tensors, _: Config) -> None:
    name = f"{MODULE}.eh_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T).reshape(tensors[name].shape)


def scales_off_by_a_block(tensors: Tensors, _: Config) -> None:
    name = f"{EXPERT}.3.up_proj.weight{SCALE}"
    tensors[name] = np.roll(tensors[name], 1, axis=0)


def shard_of_one_block(tensors: Tensors, config: Config) -> None:
    """A shard that holds exactly one FP8 block, put where its neighbour belongs; scales stay."""
    weight = tensors[f"{EXPERT}.3.up_proj.weight"]
    rows, _ = config["quantization_config"]["weight_block_size"]
    first = weight[:rows].copy()
    weight[:rows] = weight[rows : 2 * rows]
    weight[rows : 2 * rows] = first


def flipped_bit(tensors: Tensors, _: Config) -> None:
    tensors[f"{EXPERT}.5.down_proj.weight"].view(np.uint8)[5, 7] ^= 1


def bias_in_bf16(tensors: Tensors, _: Config) -> None:
    name = f"{MODULE}.mlp.gate.e_score_correction_bias"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16).astype(np.float32)


def rotary_rows_in_halves(tensors: Tensors, config: Config) -> None:
    """As tools leave it that turn RoPE pairs (2i, 2i + 1) into (i, i + R/2)."""
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    first = config["kv_lora_rank"]
    rows = tensors[name][first:].copy()
    tensors[name][first:] = np.concatenate([rows[::2], rows[1::2]])


def norm_of_ones(tensors: Tensors, _: Config) -> None:
    tensors[f"{MODULE}.shared_head.norm.weight"][...] = 1


# --- another network for the same weights


def yarn_key_dropped(_: Tensors, config: Config) -> None:
    del config["rope_scaling"]["mscale_all_dim"]


def routing_unscaled(_: Tensors, config: Config) -> None:
    config["routed_scaling_factor"] = 1.0


# --- a checkpoint directory


def chunk_of(directory: Path, leaf: str) -> Path:
    return next(f for f in (directory / "params" / leaf).iterdir() if f.name[0].isdigit())


def flipped_bit_in_a_chunk(directory: Path) -> None:
    file = chunk_of(directory, "moe_layers.mlp.experts.up_proj.weight")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.unlink()  # it may be a link of another directory's
    file.write_bytes(raw)


def chunks_exchanged(directory: Path) -> None:
    a, b = (chunk_of(directory, f"mtp.{name}.weight") for name in ("enorm", "hnorm"))
    contents = b.read_bytes(), a.read_bytes()
    for file, content in zip((a, b), contents, strict=True):
        file.unlink()
        file.write_bytes(content)


# --- what our network computes


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another function for a while, with nothing left of what was compiled with either."""
    forget = cast("Any", jax_parts)._run_around.clear_cache
    forget()
    with ExitStack() as stack:
        stack.callback(forget)
        stack.enter_context(patch.object(owner, name, value))
        yield


def groups_masked_with_zero() -> Any:
    def selectable(self: moe.Router, biased: jax.Array) -> jax.Array:
        c = self.config
        grouped = biased.reshape(*biased.shape[:2], c.n_group, -1)
        best = jax.lax.top_k(jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1), c.topk_group)[1]
        kept = jnp.any(jax.nn.one_hot(best, c.n_group, dtype=jnp.bool_), axis=-2)
        return jnp.where(kept[..., None], grouped, 0.0).reshape(biased.shape)

    return replaced(moe.Router, "_selectable", selectable)


def bias_weighs() -> Any:
    original = moe.Router.__call__

    def call(self: moe.Router, x: jax.Array) -> moe.Routing:
        choices, weights = original(self, x)
        return moe.Routing(choices, weights + self.e_score_correction_bias[...][choices])

    return replaced(moe.Router, "__call__", call)


def shared_experts_forgotten() -> Any:
    def call(self: moe.MixtureOfExperts, x: jax.Array, counted: jax.Array) -> tuple:
        routing = self.gate(x)
        load = moe.count_load(routing.choices_BTK, counted, self.experts.num_experts)
        return self.experts(x, routing), load

    return replaced(moe.MixtureOfExperts, "__call__", call)


def concatenation_reversed() -> Any:
    def call(self: mtp.MultiTokenPredictor, state: jax.Array, e: jax.Array, context: Any) -> Any:
        pair = [self.hnorm(state), self.enorm(e)]
        y, load, new = self.block(self.eh_proj(jnp.concatenate(pair, axis=-1)), context)
        return mtp.DraftStep(self.shared_head.norm(y), load, new)

    return replaced(mtp.MultiTokenPredictor, "__call__", call)


def latent_not_normed() -> Any:
    def latents(self: Any, x: jax.Array, positions: jax.Array) -> LatentCache:
        latent, rope = jnp.split(self.kv_a_proj_with_mqa(x), [self.config.kv_lora_rank], axis=-1)
        rope = rotate(rope[:, :, None], positions, self.config)[:, :, 0]
        return LatentCache(latent, rope)

    return replaced(attention.MultiHeadLatentAttention, "_latents", latents)


def softmax_scale_without_mscale() -> Any:
    return replaced(attention, "softmax_scale", lambda config: config.qk_head_dim**-0.5)


def token_of_this_place() -> Any:
    original = mtp.shift_within_segments

    def shifted(tokens: jax.Array, segments: jax.Array, k: int) -> Any:
        return original(tokens, segments, k - 1)

    return replaced(jax_parts, "shift_within_segments", shifted)


def documents_see_each_other() -> Any:
    original = jax_parts.make_context

    def context(segments: jax.Array) -> Any:
        return original(jnp.ones_like(segments))

    return replaced(jax_parts, "make_context", context)


def with_config(checkpoint: Checkpoint, changes: Config) -> Checkpoint:
    """The same weights for a network that is configured otherwise."""
    copy = dataclasses.replace(checkpoint)
    copy.__dict__["config"] = dataclasses.replace(checkpoint.config, **changes)
    return copy


MUTATIONS = (
    Mutation("norm dropped", weights=norm_dropped),
    Mutation("layer dropped", weights=layer_dropped),
    Mutation("one layer fewer in config.json (60 for 61)", weights=one_layer_fewer),
    Mutation("MTP module numbered one further", weights=module_one_further),
    Mutation("expert dropped", weights=expert_dropped),
    Mutation("scale dropped", weights=scale_dropped),
    Mutation("scales short of a partial block", weights=scales_short_of_a_block),
    Mutation("matrix transposed", weights=matrix_transposed),
    Mutation("edges of FP8 blocks exchanged in config.json", weights=block_edges_exchanged),
    Mutation("scale 0", weights=scale_zero),
    Mutation("NaN in a norm", weights=not_a_number),
    Mutation("copy of the embedding stale", weights=stale_embedding_copy),
    Mutation("MTP head differing from lm_head", weights=head_of_its_own),
    Mutation("file cut short", files=file_cut_short),
    Mutation("index names another file", files=index_names_another_file),
    Mutation("norms of equal shape exchanged", weights=norms_exchanged),
    Mutation("gate_proj and up_proj exchanged", weights=gate_for_up),
    Mutation("experts exchanged", weights=experts_exchanged),
    Mutation("halves of eh_proj exchanged", weights=state_first),
    Mutation("matrix stored in columns", weights=matrix_in_columns),
    Mutation("scales off by one block", weights=scales_off_by_a_block),
    Mutation("shard of exactly one FP8 block misplaced", weights=shard_of_one_block),
    Mutation("one flipped bit in an expert", weights=flipped_bit),
    Mutation("router bias rounded to bf16", weights=bias_in_bf16),
    Mutation("rotary rows in halves", weights=rotary_rows_in_halves),
    Mutation("shared_head.norm of ones", weights=norm_of_ones),
    Mutation("YaRN's mscale_all_dim dropped", weights=yarn_key_dropped),
    Mutation("another routed_scaling_factor", weights=routing_unscaled),
    Mutation("one flipped bit in a chunk", directory=flipped_bit_in_a_chunk),
    Mutation("chunks of two norms exchanged", directory=chunks_exchanged),
    Mutation("RoPE not interleaved", config={"rope_interleave": False}),
    Mutation("YaRN left out", config={"yarn": None}),
    Mutation("softmax scale without mscale", network=softmax_scale_without_mscale),
    Mutation("latent not normed", network=latent_not_normed),
    Mutation("dropped groups masked with 0", network=groups_masked_with_zero),
    Mutation("router bias weighs", network=bias_weighs),
    Mutation("shared experts forgotten", network=shared_experts_forgotten),
    Mutation("concatenation reversed", network=concatenation_reversed),
    Mutation("embedding of token i for i + k", network=token_of_this_place),
    Mutation("documents see each other", network=documents_see_each_other),
)

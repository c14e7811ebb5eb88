"""Names, shapes and dtypes of the released DeepSeek-V3 format; must not know our mapping.

They are spelled out a second time on purpose: this file and the mapping table of the converters
check each other.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]

E4M3_MAX = 448.0
NUMPY_DTYPES = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
}


def weight_shapes(config: Mapping[str, Any], *, copies: bool) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of every weight and router bias in layer order; no scales."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    num_layers = config["num_hidden_layers"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(num_layers):
        yield from decoder_layer_shapes(f"model.layers.{layer}", layer, config)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
    for layer in range(num_layers, num_layers + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}"
        yield from decoder_layer_shapes(prefix, layer, config)
        yield f"{prefix}.enorm.weight", (hidden,)
        yield f"{prefix}.hnorm.weight", (hidden,)
        yield f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)
        yield f"{prefix}.shared_head.norm.weight", (hidden,)
        if copies:
            yield f"{prefix}.embed_tokens.weight", (vocab, hidden)
            yield f"{prefix}.shared_head.head.weight", (vocab, hidden)


def decoder_layer_shapes(
    prefix: str, layer: int, config: Mapping[str, Any]
) -> Iterator[tuple[str, Shape]]:
    """Yield one decoder layer; MTP layers lie beyond the dense ones and so are MoE."""
    hidden, expert = config["hidden_size"], config["moe_intermediate_size"]
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield from attention_shapes(f"{prefix}.self_attn", config)
    if layer < config["first_k_dense_replace"]:
        yield from mlp_shapes(f"{prefix}.mlp", hidden, config["intermediate_size"])
        return
    num_experts = config["n_routed_experts"]
    yield f"{prefix}.mlp.gate.weight", (num_experts, hidden)
    yield f"{prefix}.mlp.gate.e_score_correction_bias", (num_experts,)
    for index in range(num_experts):
        yield from mlp_shapes(f"{prefix}.mlp.experts.{index}", hidden, expert)
    shared = expert * config["n_shared_experts"]
    yield from mlp_shapes(f"{prefix}.mlp.shared_experts", hidden, shared)


def attention_shapes(prefix: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, v = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if q_rank is None:
        yield f"{prefix}.q_proj.weight", (heads * (nope + rope), hidden)
    else:
        yield f"{prefix}.q_a_proj.weight", (q_rank, hidden)
        yield f"{prefix}.q_a_layernorm.weight", (q_rank,)
        yield f"{prefix}.q_b_proj.weight", (heads * (nope + rope), q_rank)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (kv_rank,)
    yield f"{prefix}.kv_b_proj.weight", (heads * (nope + v), kv_rank)
    yield f"{prefix}.o_proj.weight", (hidden, heads * v)


def mlp_shapes(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def is_quantised(name: str, shape: Shape) -> bool:
    """Return whether the release has a weight in FP8: the Linear ones of attention and MLPs."""
    never = ("eh_proj", "gate", "head", "embed_tokens", "lm_head")
    return len(shape) == 2 and name.split(".")[-2] not in never


def quantise(value: np.ndarray, block: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return e4m3 values and float32 scales [ceil(out/rows), ceil(in/columns)], amax/448."""
    rows, columns = block
    grid = tuple(-(-size // edge) for size, edge in zip(value.shape, block, strict=True))
    quantised = np.empty(value.shape, NUMPY_DTYPES["F8_E4M3"])
    scales = np.empty(grid, np.float32)
    for i, j in np.ndindex(*grid):
        part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scales[i, j] = np.abs(value[part]).max() / E4M3_MAX
        scaled = np.clip(value[part] / scales[i, j], -E4M3_MAX, E4M3_MAX)
        quantised[part] = scaled.astype(quantised.dtype)
    return quantised, scales

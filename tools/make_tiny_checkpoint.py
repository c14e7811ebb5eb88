"""Write a tiny seeded checkpoint in the released DeepSeek-V3 format; must not know our mapping.

It needs neither jax nor torch. Names, shapes and dtypes are in released_format.py.

Every dimension differs from every other one, so that a swapped pair of axes or leaves cannot fit.
With the default blocks of 8 x 16 most scale grids are not square and have partial blocks in rows
(`kv_a_proj_with_mqa` has 30 rows) and in columns (the hidden size is 40).
"""

import argparse
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tools.released_format import (
    NUMPY_DTYPES,
    Shape,
    is_quantised,
    quantise,
    weight_shapes,
)

Flavour = Literal["fp8", "bf16", "f32"]

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"  # noqa: RUF001

# Scalars differ from the released ones where the arithmetic would not notice a hard-coded value:
# rope_theta, original_max_position_embeddings, mscale (the cos/sin multiplier is 0.92), routing.
TINY_CONFIG: dict[str, Any] = json.loads("""{
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
  "first_k_dense_replace": 2, "hidden_act": "silu", "hidden_size": 40, "initializer_range": 0.02,
  "intermediate_size": 72, "kv_lora_rank": 22, "max_position_embeddings": 10240,
  "model_type": "deepseek_v3", "moe_intermediate_size": 28, "moe_layer_freq": 1, "n_group": 4,
  "n_routed_experts": 12, "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 6,
  "num_experts_per_tok": 4, "num_hidden_layers": 4, "num_key_value_heads": 6,
  "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 26, "qk_nope_head_dim": 10,
  "qk_rope_head_dim": 8,
  "quantization_config": {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [8, 16]
  },
  "rms_norm_eps": 1e-06,
  "rope_scaling": {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 256, "type": "yarn"
  },
  "rope_theta": 1000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
  "tie_word_embeddings": false, "topk_group": 2, "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16", "transformers_version": "4.46.3", "use_cache": true,
  "v_head_dim": 14, "vocab_size": 384
}""")

TOKENIZER_TEXT = """
def first(items, default=None):
    for item in items:
        return item
    return default

class Counter(dict):
    def __missing__(self, key):
        return 0

    def update(self, items):
        for item in items:
            self[item] += 1
        return self

if __name__ == "__main__":
    import sys
    print(Counter().update(open(sys.argv[1]).read().split()))
"""


def make_tiny_checkpoint(
    folder: str | Path,
    *,
    dtype: Flavour = "fp8",
    seed: int = 0,
    num_mtp: int = 1,
    copies: bool = True,
    q_lora: bool = True,
    num_files: int = 7,
    sizes: Mapping[str, Any] | None = None,
) -> None:
    """Write weights, index, configs and tokenizer into `folder`, which is made when missing.

    `dtype` is that of the Linear weights: fp8 (with F32 block scales), bf16 or f32; f32 makes every
    tensor float32. `copies` writes the MTP modules' `embed_tokens` and `shared_head.head`.
    `q_lora=False` sets `q_lora_rank` to null. `sizes` replaces config values by key, the nested
    `weight_block_size` too. A value depends on seed and name alone, not on the other arguments.
    With `num_files=1` there is one `model.safetensors` and no index.
    Raises ValueError for an unknown key or a vocabulary too small for the tokenizer.
    """
    config = tiny_config(dtype, num_mtp=num_mtp, q_lora=q_lora, sizes=sizes)
    tensors = {}
    for name, shape in weight_shapes(config, copies=copies):
        tensors |= stored_tensors(name, random_weight(name, shape, seed), config)
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    write_weights(out, tensors, num_files)
    write_json(out / "config.json", config)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "transformers_version")}
    write_json(out / "generation_config.json", {"_from_model_config": True, **sampling, **ids})
    write_tokenizer(out, config)


def tiny_config(
    dtype: Flavour, *, num_mtp: int, q_lora: bool, sizes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of config.json. Raises ValueError for a key that it does not have."""
    config: dict[str, Any] = json.loads(json.dumps(TINY_CONFIG))
    replace = dict(sizes or {})
    if "weight_block_size" in replace:
        config["quantization_config"]["weight_block_size"] = list(replace.pop("weight_block_size"))
    unknown = sorted(replace.keys() - config.keys())
    if unknown:
        raise ValueError(f"unknown config keys {unknown}; known are {sorted(config)}")
    config |= replace
    config["num_nextn_predict_layers"] = num_mtp
    config["torch_dtype"] = "float32" if dtype == "f32" else "bfloat16"
    if not q_lora:
        config["q_lora_rank"] = None
    if dtype != "fp8":
        del config["quantization_config"]
    return config


def random_weight(name: str, shape: Shape, seed: int) -> np.ndarray:
    """Return float32 values that keep activations, attention scores and logits of order 1.

    Router biases are mostly negative: masking a dropped group with 0 then selects its experts.
    """
    source = name
    if name.endswith(".embed_tokens.weight"):
        source = "model.embed_tokens.weight"
    elif name.endswith(".shared_head.head.weight"):
        source = "lm_head.weight"
    rng = np.random.default_rng([seed, zlib.crc32(source.encode())])
    if source.endswith("e_score_correction_bias"):
        return rng.uniform(-1.0, 0.25, shape).astype(np.float32)
    if source.endswith("norm.weight"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    gain = 1.0 if source == "model.embed_tokens.weight" else shape[-1] ** -0.5
    if source.endswith("down_proj.weight"):
        gain *= 2.0  # silu(gate) * up is smaller than its factors
    return (gain * rng.standard_normal(shape)).astype(np.float32)


def stored_tensors(
    name: str, value: np.ndarray, config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return what the files hold for one weight: itself in its dtype, and its block scales."""
    if config["torch_dtype"] == "float32" or name.endswith("e_score_correction_bias"):
        return {name: value}
    if "quantization_config" in config and is_quantised(name, value.shape):
        quantised, scales = quantise(value, config["quantization_config"]["weight_block_size"])
        return {name: quantised, f"{name}_scale_inv": scales}
    return {name: value.astype(NUMPY_DTYPES["BF16"])}


def write_weights(folder: Path, tensors: Mapping[str, np.ndarray], num_files: int) -> None:
    """Write the safetensors files, and their index when there are several."""
    if num_files == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    files: list[dict[str, np.ndarray]] = [{} for _ in range(num_files)]
    for name, place in assign_files(tensors, num_files).items():
        files[place][name] = tensors[name]
    weight_map = {}
    for number, content in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{num_files:06d}.safetensors"
        write_safetensors(folder / file, content)
        weight_map |= dict.fromkeys(content, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def assign_files(tensors: Mapping[str, np.ndarray], num_files: int) -> dict[str, int]:
    """Cut the tensors, in layer order, into files of equal size; every third scale goes on a file.

    The cuts fall inside the experts of most MoE layers.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    places, before, num_scales = {}, 0, 0
    for name, tensor in tensors.items():
        places[name] = before * num_files // total
        if name.endswith("_scale_inv"):
            num_scales += 1
            places[name] = (places[name] + (num_scales % 3 == 0)) % num_files
        before += tensor.nbytes
    return places


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one file with tensors in the order of their names, as the released files have it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
    end = 0
    for name, tensor in sorted(tensors.items()):
        if end % tensor.itemsize:
            raise ValueError(f"{name} would start at byte {end}, unaligned: use even sizes")
        begin, end = end, end + tensor.nbytes
        entry = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in sorted(tensors.items()):
            file.write(tensor.tobytes())


def write_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    """Train a byte-level BPE tokenizer; a few ids of the model stay unused, as in the release."""
    smallest = 256 + len((BOS, EOS, PAD))
    if config["vocab_size"] < smallest:
        raise ValueError(f"vocab_size {config['vocab_size']} is below {smallest}: bytes + specials")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=max(smallest, config["vocab_size"] - 8),
        special_tokens=[BOS, EOS, PAD],  # ids 0, 1, 2
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT.splitlines(keepends=True), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    settings = {"add_bos_token": True, "add_eos_token": False, "model_max_length": 16384}
    settings |= {"clean_up_tokenization_spaces": False, **specials}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def key_value(text: str) -> tuple[str, Any]:
    """Parse `KEY=JSON`, for instance hidden_size=64 or rope_scaling=null."""
    key, _, value = text.partition("=")
    return key, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a tiny seeded checkpoint in the released DeepSeek-V3 format.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("folder", metavar="DIR", help="where the checkpoint goes")
    add("--dtype", choices=["fp8", "bf16", "f32"], default="fp8", help="of the Linear weights")
    add("--seed", type=int, default=0, help="of all values")
    add("--mtp", type=int, default=1, dest="num_mtp", help="number of MTP modules")
    add("--num-hidden-layers", type=int, default=4, help="layers of the main model")
    add("--num-files", type=int, default=7, help="number of safetensors files")
    add("--copies", action=flag, default=True, help="write the MTP modules' embedding and head")
    add("--q-lora", action=flag, default=True, help="low-rank queries")
    add(
        "--set",
        type=key_value,
        nargs="*",
        default=[],
        dest="sizes",
        metavar="KEY=JSON",
        help="other values of config.json, for instance weight_block_size=[8,16]",
    )
    args = vars(parser.parse_args())
    layers = args.pop("num_hidden_layers")
    sizes = {"num_hidden_layers": layers, **dict(args.pop("sizes"))}
    make_tiny_checkpoint(**args, sizes=sizes)


if __name__ == "__main__":
    main()

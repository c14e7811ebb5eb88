"""What is known of the released DeepSeek-V3 checkpoint (R1 has the same tensors), as facts.

The digest is over the sorted lines "name dtype shape" of the headers of all 163 released files.
"""

import hashlib
from collections.abc import Iterable

CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "vocab_size": 129280,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 3,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "torch_dtype": "bfloat16",
}

LISTING_SHA256 = "a4b0b6c63949f34fac626e926c786ca7994cf168bcd224c56119ad0e54a0f2e3"
COUNTS = {"F8_E4M3": 45_808, "F32": 45_867, "BF16": 316}
TENSOR_BYTES = 688_574_839_360
PARAMETERS = 684_489_845_504
MTP_TENSORS = 1_564
MTP_PARAMETERS = 13_463_426_304
MTP_PARAMETERS_WITHOUT_COPIES = 11_610_068_224
ITEM_BYTES = {"F8_E4M3": 1, "F32": 4, "BF16": 2}


def listing_sha256(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    """Digest of (name, dtype, shape) triples."""
    lines = (f"{name} {dtype} {list(shape)}" for name, dtype, shape in sorted(tensors))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

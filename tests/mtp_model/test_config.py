"""config.json to ModelConfig and back; what cannot be read is named."""

import pytest
from released import CONFIG

from mtp_model.config import ConfigError, ModelConfig


def faults(**changes) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**CONFIG, **changes})
    return caught.value.faults


def test_there_and_back():
    config = ModelConfig.from_dict(CONFIG)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert (config.num_dense_layers, config.num_moe_layers) == (3, 58)


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None},
        {"rope_scaling": None},
        {"quantization_config": None},
        {"mtp_hidden_state": "pre_norm"},
        {"torch_dtype": "float32"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_variants_there_and_back(changes):
    config = ModelConfig.from_dict({**CONFIG, **changes})
    assert config != ModelConfig.from_dict(CONFIG)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_missing_number_of_mtp_modules_means_none():
    values = {k: v for k, v in CONFIG.items() if k != "num_nextn_predict_layers"}
    assert ModelConfig.from_dict(values).num_nextn_predict_layers == 0


def test_rope_parameters_of_transformers_5():
    values = {k: v for k, v in CONFIG.items() if k not in ("rope_scaling", "rope_theta")}
    scaling = {k: v for k, v in CONFIG["rope_scaling"].items() if k != "type"}
    rope = {**scaling, "rope_type": "yarn", "rope_theta": 10000}
    assert ModelConfig.from_dict({**values, "rope_parameters": rope}) == ModelConfig.from_dict(
        CONFIG
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', needed deepseek_v3 or kimi_k2"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax', needed 'sigmoid'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, needed False"),
        ({"hidden_size": -1}, "hidden_size is -1, needed 1 to 16777216"),
        ({"hidden_size": 10**30}, f"hidden_size is {10**30}, needed 1 to 16777216"),
        ({"hidden_size": "7168"}, "hidden_size is '7168', needed a whole number"),
        ({"vocab_size": True}, "vocab_size is True, needed a whole number"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1, needed 0 to 16777216"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, needed a number from 0 to 1e+15"),
        ({"rope_theta": 10**400}, f"rope_theta is 1{'0' * 79}..., needed a number from 0 to 1e+15"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, needed more than 0"),
        ({"rope_theta": 0.0}, "rope_theta is 0, needed more than 0"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            "architectures is ['LlamaForCausalLM'], needed ['DeepseekV3ForCausalLM'] or ",
        ),
        ({"torch_dtype": "float16"}, "torch_dtype is 'float16', needed bfloat16 or float32"),
        ({"rope_scaling": 3}, "rope_scaling is 3, needed an object or null"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.type is 'linear', needed yarn or"),
        ({"rope_scaling": {"type": "yarn"}}, "factor is None, needed a number from 0 to 1e+15"),
        ({"n_group": 7}, "n_group is 7, needed a divisor of 256 experts, 2 or more in a group"),
        ({"topk_group": 9}, "topk_group is 9, needed at most n_group 8"),
        ({"num_experts_per_tok": 129}, "needed at most the 128 experts of the kept groups"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63, needed an even number"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config.weight_block_size is None, needed two sizes, as [128, 128]",
        ),
        (
            {"quantization_config": {"weight_block_size": [True, 128]}},
            "quantization_config.weight_block_size is [True, 128], needed two sizes",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "weight_block_size": [128, 128]}},
            "quantization_config.quant_method is 'gptq', needed fp8",
        ),
    ],
)
def test_a_fault_is_named(changes, expected):
    assert any(expected in fault for fault in faults(**changes)), faults(**changes)


def test_faults_are_collected():
    found = faults(hidden_act="gelu", hidden_size=0, kv_lora_rank=None, rope_scaling=[1])
    assert len(found) == 4


@pytest.mark.parametrize(
    ("key", "foreign"),
    [
        ("rope_scaling.type", {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1}}),
        (
            "quantization_config.quant_method",
            {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
        ),
        ("model_type", {"model_type": "deepseek_v32", "index_topk": 2048}),
    ],
)
def test_of_another_kind_the_kind_is_refused_and_no_key_told_to_be_removed(key, foreign):
    [fault] = faults(**foreign)
    assert fault.startswith(f"{key} is ")

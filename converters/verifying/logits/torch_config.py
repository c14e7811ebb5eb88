"""config.json as the torch reference reads it: a second, literal reading of every key.

The model's own reader is mtp_model/families.py. Two readings that share a mistake would prove
nothing, so this file takes nothing from there, and its lists are its own.
"""

import math
from collections.abc import Mapping
from typing import Any

from mtp_model.problems import UserError

Config = Mapping[str, Any]

_READ = (
    "hidden_size num_hidden_layers num_attention_heads num_nextn_predict_layers "
    "first_k_dense_replace q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "n_routed_experts num_experts_per_tok n_group topk_group norm_topk_prob "
    "routed_scaling_factor rms_norm_eps rope_theta rope_scaling rope_parameters rope_interleave "
    "max_position_embeddings mtp_hidden_state quantization_config"
).split()
# Told by the tensors themselves, or of no effect on logits.
_NOT_NEEDED = (
    "vocab_size intermediate_size moe_intermediate_size n_shared_experts torch_dtype dtype "
    "model_type architectures auto_map aux_loss_alpha seq_aux ep_size initializer_range "
    "pretraining_tp use_cache transformers_version bos_token_id eos_token_id pad_token_id "
    "output_router_logits _name_or_path name_or_path _commit_hash tokenizer_class id2label "
    "label2id problem_type return_dict output_attentions output_hidden_states unsloth_fixed "
    "unsloth_version model_max_length _attn_implementation _attn_implementation_autoset "
    "attn_implementation _attn_implementation_internal _experts_implementation "
    "_experts_implementation_internal mtp_new_layers router_aux_loss_coef router_jitter_noise "
    "classifier_dropout num_labels finetuning_task task_specific_params prefix use_bfloat16 "
    "tf_legacy_loss output_scores return_dict_in_generate sep_token_id decoder_start_token_id "
    "forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids "
    "do_sample temperature top_k top_p typical_p num_beams num_beam_groups num_return_sequences "
    "max_length min_length max_new_tokens early_stopping repetition_penalty length_penalty "
    "diversity_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty remove_invalid_values"
).split()
_ONLY = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "tie_word_embeddings": (False,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0,),
    "torchscript": (False,),
    "layer_types": (None,),
    "mlp_layer_types": (None,),
    "per_layer_config": (None,),
    "hidden_dropout": (0, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
}
_OF_YARN = (
    "factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim "
    "attention_factor truncate"
).split()
_IN_ROPE = ("type", "rope_type", "rope_theta", "partial_rotary_factor", *_OF_YARN)


def as_read(config: Config) -> dict[str, Any]:
    """The config with one name for each thing and every default filled in.

    `rope` has `theta`, `interleave` and `yarn`: None, or `factor`, `original`, `beta_fast`,
    `beta_slow`, `truncate`, `multiplier` of cos and sin, and `m` of the softmax scale.
    UserError for a key that this reference neither computes nor knows to have no effect.
    """
    config = dict(config)
    for other, name in {
        "num_mtp_layers": "num_nextn_predict_layers",
        "num_local_experts": "n_routed_experts",
    }.items():
        if other in config:
            config[name] = _agreeing(config, other, name)
    _refuse(config)
    defaults = {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6}
    filled = {**defaults, **config, "rope": _rope(config)}
    filled["num_nextn_predict_layers"] = config.get("num_nextn_predict_layers") or 0
    filled["mtp_hidden_state"] = config.get("mtp_hidden_state") or "post_norm"
    return filled


def _agreeing(config: dict[str, Any], other: str, name: str) -> Any:
    value = config.pop(other)
    if config.get(name, value) != value:
        raise UserError(f"config.json: {other} and {name} contradict each other")
    return value


def _refuse(config: Config) -> None:
    heads, rope, nope = (
        config.get(key) for key in ("num_attention_heads", "qk_rope_head_dim", "qk_nope_head_dim")
    )
    full = (rope or 0) + (nope or 0)
    only = {
        **_ONLY,
        "num_key_value_heads": (heads, None),
        "head_dim": (rope, full, None),
        "qk_head_dim": (full, None),
    }
    wrong = [
        key
        for key, value in config.items()
        if (key not in (*_READ, *_NOT_NEEDED) and value not in only.get(key, ()))
    ]
    for place in ("rope_scaling", "rope_parameters"):
        wrong += [f"{place}.{key}" for key in config.get(place) or {} if key not in _IN_ROPE]
    if wrong:
        raise UserError(f"config.json: the torch reference does not compute {', '.join(wrong)}")


def _rope(config: Config) -> dict[str, Any]:
    said = [dict(config.get(name) or {}) for name in ("rope_parameters", "rope_scaling")]
    if config.get("rope_theta") is not None:
        said.append({"rope_theta": config["rope_theta"]})
    one: dict[str, Any] = {}
    for part in said:
        if "type" in part and part.setdefault("rope_type", part["type"]) != part["type"]:
            raise UserError("config.json: type and rope_type contradict each other")
        for key, value in part.items():
            if one.setdefault(key, value) != value:
                raise UserError(f"config.json: rope_parameters and rope_scaling differ in {key}")
    if one.get("partial_rotary_factor") not in (None, 1):
        raise UserError("config.json: the torch reference rotates all of qk_rope_head_dim")
    kind = one.get("rope_type") or "default"
    if kind not in ("default", "yarn"):
        raise UserError(f"config.json: rope_type {kind!r}: only 'yarn' is known")
    unused = [key for key, value in one.items() if key in _OF_YARN and value is not None]
    if kind == "default" and unused:
        raise UserError(f"config.json: rope_type is default, and there is {', '.join(unused)}")
    return {
        "theta": one.get("rope_theta", 10000.0),
        "interleave": config.get("rope_interleave", True),
        "yarn": _yarn(config, one) if kind == "yarn" else None,
    }


def _yarn(config: Config, one: Mapping[str, Any]) -> dict[str, Any]:
    def value(key: str, default: float) -> float:
        return default if one.get(key) is None else one[key]

    original = one["original_max_position_embeddings"]
    factor = one["factor"]
    if factor is None:
        factor = config["max_position_embeddings"] / original

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    # A missing mscale counts as 1 and a missing mscale_all_dim as 0, as DeepSeek's own code does.
    all_dim = mscale(value("mscale_all_dim", 0.0))
    return {
        "factor": factor,
        "original": original,
        "beta_fast": value("beta_fast", 32.0),
        "beta_slow": value("beta_slow", 1.0),
        "truncate": one.get("truncate", True),
        "multiplier": value("attention_factor", mscale(value("mscale", 1.0)) / all_dim),
        "m": all_dim,
    }

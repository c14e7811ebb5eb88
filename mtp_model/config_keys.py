"""Keys of config.json that say nothing new: of one value that is computed, or of no effect."""

from typing import Any

# What the network computes is fixed for these; a config that says otherwise is not this network.
REQUIRED = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
}
# The same for keys that released configs do not have: allowed with the value that changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "pruned_heads": ({}, None),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "torchscript": (False,),
    "per_layer_config": (None,),
    "layer_types": (None,),
    "mlp_layer_types": (None,),
}
# Notes of training, generation and of tools; no logit depends on them.
HARMLESS = set(
    (
        "auto_map aux_loss_alpha seq_aux ep_size initializer_range pretraining_tp use_cache "
        "transformers_version output_router_logits router_aux_loss_coef router_jitter_noise "
        "model_max_length _name_or_path name_or_path _commit_hash _attn_implementation "
        "attn_implementation _attn_implementation_autoset _attn_implementation_internal "
        "_experts_implementation _experts_implementation_internal "
        "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id "
        "forced_bos_token_id forced_eos_token_id begin_suppress_tokens suppress_tokens "
        "bad_words_ids output_attentions output_hidden_states output_scores return_dict "
        "return_dict_in_generate id2label label2id num_labels problem_type classifier_dropout "
        "task_specific_params finetuning_task tokenizer_class prefix use_bfloat16 tf_legacy_loss "
        "temperature top_p top_k typical_p do_sample num_beams num_beam_groups max_length "
        "min_length max_new_tokens early_stopping repetition_penalty length_penalty "
        "no_repeat_ngram_size encoder_no_repeat_ngram_size diversity_penalty "
        "exponential_decay_length_penalty num_return_sequences remove_invalid_values "
        "unsloth_fixed unsloth_version mtp_new_layers"
    ).split()
)

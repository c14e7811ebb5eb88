"""Each key of config.json that changes the network: computed as Transformers does, or refused.

Once by the model and once by the torch reference, which read the config independently.
"""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from imported import assert_close, assert_far, import_folder, load_float32
from transformers import DeepseekV3Config
from transformers_pair import pair_of, random_tokens, transformers_mtp

from converters.verifying.logits.torch_config import as_read
from mtp_model import config_keys
from mtp_model.config import ConfigError, ModelConfig
from mtp_model.problems import UserError
from tools.make_tiny_checkpoint import TINY_CONFIG, make_tiny_checkpoint

YARN = TINY_CONFIG["rope_scaling"]
PLAIN_YARN = {k: v for k, v in YARN.items() if not k.startswith("mscale")}
NEWER = {"rope_type": "yarn", **{k: v for k, v in YARN.items() if k != "type"}, "rope_theta": 900}
COMPUTED: dict[str, dict[str, Any]] = {
    "half-split pairs": {"rope_interleave": False},
    "attention_factor": {"rope_scaling": {**YARN, "attention_factor": 2.0}},
    "truncate": {"rope_scaling": {**YARN, "truncate": False}},
    "factor null": {
        "rope_scaling": {**PLAIN_YARN, "factor": None},
        "max_position_embeddings": 5120,
    },
    "equal mscales": {"rope_scaling": {**YARN, "mscale": 0.5, "mscale_all_dim": 0.5}},
    "other betas": {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2}},
    "no scaling": {"rope_scaling": None},
    "rope_theta": {"rope_theta": 500},
    "newer names": {"rope_scaling": None, "rope_theta": None, "rope_parameters": NEWER},
    "newer names, half-split": {
        "rope_scaling": None,
        "rope_theta": None,
        "rope_parameters": NEWER,
        "rope_interleave": False,
    },
    "norm_topk_prob": {"norm_topk_prob": False},
    "routed_scaling_factor": {"routed_scaling_factor": 1.3},
    "topk_group": {"topk_group": 1, "num_experts_per_tok": 1},
}


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> jax.Array:
    """What a model without any of the keys makes of the tokens that all cases have."""
    folder = tmp_path_factory.mktemp("unchanged")
    make_tiny_checkpoint(folder / "source", dtype="f32", num_mtp=1)
    import_folder(folder / "source", folder / "checkpoint")
    tokens = random_tokens(TINY_CONFIG["vocab_size"]).numpy()
    return jax.jit(lambda m, t: m(t).logits_BTV)(load_float32(folder / "checkpoint"), tokens)


@torch.no_grad()
@pytest.mark.parametrize("case", COMPUTED)
def test_a_key_is_computed_as_transformers_does(case: str, unchanged: jax.Array, tmp_path: Path):
    make_tiny_checkpoint(tmp_path / "source", dtype="f32", num_mtp=1)
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **COMPUTED[case]}))
    import_folder(tmp_path / "source", tmp_path / "checkpoint")
    pair = pair_of(tmp_path / "source")
    want = pair.main.lm_head(pair.hidden).numpy()
    model = load_float32(tmp_path / "checkpoint")
    out = jax.jit(lambda m, t: (m(t).logits_BTV, m(t).mtp_logits[0]))(model, pair.tokens.numpy())
    assert_close(out[0], want, f"{case}: our model")
    hidden = pair.reference.main(pair.tokens).hidden
    assert_close(pair.reference.logits(hidden).numpy(), want, f"{case}: torch reference")
    assert_far(unchanged, want, f"{case}: a model without it")
    draft = pair.main.lm_head(transformers_mtp(pair, pair.hidden, [0])[0]).numpy()[:, :-1]
    assert_close(out[1][:, :-1], draft, f"{case}: our MTP module")


@torch.no_grad()
def test_every_norm_has_the_rms_norm_eps_of_the_config(tmp_path: Path):
    """As in vLLM and SGLang; Transformers has 1e-6 in the norms of the two latents, whatever it
    says."""
    make_tiny_checkpoint(tmp_path / "source", dtype="f32", sizes={"rms_norm_eps": 1e-3})
    import_folder(tmp_path / "source", tmp_path / "checkpoint")
    pair = pair_of(tmp_path / "source")
    ours = jax.jit(lambda m, t: m(t).logits_BTV)(
        load_float32(tmp_path / "checkpoint"), pair.tokens.numpy()
    )
    assert_far(pair.main.lm_head(pair.hidden).numpy(), ours, "1e-6 in the norms of latents")
    for name, module in pair.main.named_modules():
        if name.endswith("_a_layernorm"):
            module.variance_epsilon = 1e-3
    want = pair.main.lm_head(pair.main.model(pair.tokens).last_hidden_state).numpy()
    assert_close(ours, want, "one epsilon in all norms: our model")
    hidden = pair.reference.main(pair.tokens).hidden
    assert_close(pair.reference.logits(hidden).numpy(), want, "the same: torch reference")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a key that nobody knows": ({"lightning_heads": 3}, "lightning_heads"),
    "linear scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "a key of yarn": ({"rope_scaling": {**YARN, "finetuned": True}}, "rope_scaling.*finetuned"),
    "two kinds": (
        {"rope_parameters": {"rope_theta": TINY_CONFIG["rope_theta"], "rope_type": "default"}},
        "rope_parameters.*rope_scaling",
    ),
    "two thetas": ({"rope_parameters": {**NEWER, "rope_theta": 7}}, "rope_theta"),
    "yarn that is not said to be": (
        {"rope_scaling": {k: v for k, v in YARN.items() if k != "type"}},
        "beta_fast",
    ),
    "yarn under another name": ({"rope_scaling": {"type": "default", "factor": 40}}, "factor"),
    "two types": ({"rope_scaling": {**YARN, "rope_type": "default"}}, "type"),
    "a part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "a part of a head in yarn": (
        {"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor|qk_rope_head_dim",
    ),
    "sliding window": ({"sliding_window": 128}, "sliding_window"),
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout"),
    "grouped queries": ({"num_key_value_heads": 2}, "num_key_value_heads"),
    "head_dim": ({"head_dim": 12}, "head_dim"),
    "qk_head_dim": ({"qk_head_dim": 12}, "qk_head_dim"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act"),
    "sparse MoE layers": ({"moe_layer_freq": 2}, "moe_layer_freq"),
    "softmax routing": ({"scoring_func": "softmax"}, "scoring_func"),
    "tied head": ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    "two numbers of modules": ({"num_mtp_layers": 2}, "num_mtp_layers.*num_nextn_predict_layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_key_is_refused_by_name_twice(case: str):
    edit, named = REFUSED[case]
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict({**TINY_CONFIG, **edit})
    with pytest.raises(UserError, match=named):
        as_read({**TINY_CONFIG, **edit})


@pytest.mark.parametrize(
    "edit",
    [
        {"rope_parameters": YARN},  # the same twice is no contradiction
        {"num_mtp_layers": TINY_CONFIG["num_nextn_predict_layers"]},
        {"num_key_value_heads": None},
        {"head_dim": TINY_CONFIG["qk_rope_head_dim"], "mlp_bias": False, "sliding_window": None},
        {"num_nextn_predict_layers": None},
        {"architectures": ["KimiK2ForCausalLM"], "model_type": "kimi_k2"},
    ],
    ids=str,
)
def test_values_that_change_nothing_are_read(edit: dict[str, Any]):
    config = ModelConfig.from_dict({**TINY_CONFIG, **edit})
    assert config.yarn == ModelConfig.from_dict(TINY_CONFIG).yarn
    read = as_read({**TINY_CONFIG, **edit})
    assert read["rope"] == as_read(TINY_CONFIG)["rope"]
    assert read["num_nextn_predict_layers"] == config.num_nextn_predict_layers
    assert ModelConfig.from_dict(config.to_dict()) == config


LEFT_OUT = (
    "routed_scaling_factor",
    "norm_topk_prob",
    "rms_norm_eps",
    "rope_theta",
    "rope_interleave",
)


@pytest.mark.parametrize("key", LEFT_OUT)
def test_a_key_that_is_left_out_is_what_transformers_makes_of_it(key: str):
    values = {k: v for k, v in TINY_CONFIG.items() if k != key}
    theirs: Any = DeepseekV3Config(**copy.deepcopy(values))
    in_rope = key == "rope_theta"
    wanted = theirs.rope_parameters[key] if in_rope else getattr(theirs, key)
    assert getattr(ModelConfig.from_dict(values), key) == wanted
    read = as_read(values)
    assert wanted == {
        "rope_theta": read["rope"]["theta"],
        "rope_interleave": read["rope"]["interleave"],
    }.get(key, read.get(key))


def test_what_the_model_passes_over_the_reference_does_too():
    """Older releases of Transformers write most of these keys; `verify --logits` reads them all."""
    harmless = dict.fromkeys(config_keys.HARMLESS, 1)
    neutral = {key: values[0] for key, values in config_keys.NEUTRAL.items()}
    edited = {**TINY_CONFIG, **harmless, **neutral}
    assert ModelConfig.from_dict(edited) == ModelConfig.from_dict(TINY_CONFIG)
    as_read(edited)


def test_a_stand_alone_draft_is_named_as_what_it_is():
    edit = {"architectures": ["DeepseekV3ForCausalLMNextN"], "num_hidden_layers": 1}
    with pytest.raises(ConfigError, match="stand-alone draft for SGLang"):
        ModelConfig.from_dict({**TINY_CONFIG, **edit})

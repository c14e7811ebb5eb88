"""The torch reference against Transformers' DeepseekV3ForCausalLM and MtpModel, float32, on CPU."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel
from transformers_pair import (
    CONTROL,
    NUM_TOKENS,
    Pair,
    assert_close,
    pair_of,
    random_tokens,
    relative_error,
    transformers_mtp,
)

from converters.verifying.logits import torch_reference
from converters.verifying.logits.torch_config import as_read
from converters.verifying.logits.torch_reference import TorchReference, open_reference, under
from tools.make_tiny_checkpoint import make_tiny_checkpoint

DEPTHS = 2


@pytest.fixture(scope="module", params=[True, False], ids=["q_lora", "q_full"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoint(folder, dtype="f32", num_mtp=2, q_lora=request.param)
    return pair_of(folder)


def test_main_logits_equal_transformers(pair: Pair):
    states = pair.reference.main(pair.tokens)
    assert_close(states.before_norm, pair.before_norm, "state before model.norm")
    assert_close(states.hidden, pair.hidden, "state after model.norm")
    with torch.no_grad():
        want = pair.main(pair.tokens).logits
    assert 0.5 < want.std() < 2
    assert_close(pair.reference.logits(states.hidden), want, "main logits")


def test_mtp_logits_equal_transformers(pair: Pair):
    """Of each module. Depths beyond them see other keys: tests/mtp_model/test_model.py."""
    reference = pair.reference
    got = reference.mtp(reference.main(pair.tokens).hidden, pair.tokens)
    want = transformers_mtp(pair, pair.hidden, [0, 1])
    assert len(got) == len(want) == DEPTHS
    for k in range(1, DEPTHS + 1):
        logits = reference.logits(got[k - 1])[:, :-k]
        with torch.no_grad():
            assert_close(logits, pair.main.lm_head(want[k - 1])[:, :-k], f"MTP logits, depth {k}")


def test_depths_default_to_the_number_of_modules(pair: Pair):
    assert len(pair.reference.mtp(pair.hidden, pair.tokens)) == 2


def test_drafts_equal_those_of_transformers_generation(pair: Pair):
    """`MtpModel.forward` drafts after the last token; fed with its drafts we predict them."""
    reference = pair.reference
    text = pair.tokens[:1]
    positions = torch.arange(1, NUM_TOKENS)[None]
    with torch.no_grad():
        drafts, want, _ = pair.mtp(text[:, 1:], pair.hidden[:1, :-1], None, positions, None)
    longer = torch.cat([text, drafts[:, :1]], dim=1)
    h = reference.mtp(reference.main(longer).hidden, longer)
    got = reference.logits(torch.stack([h[k][:, NUM_TOKENS - 2] for k in range(2)], dim=1))
    assert_close(got, want, "drafted logits")
    assert got.argmax(-1).tolist() == drafts.tolist()


def test_literal_layer_61(tmp_path: Path):
    """The unmodified classes, one module at layer 61.

    Both get Transformers' h_0: rounding alone takes 61 tiny layers near the tolerance.
    """
    sizes = {"num_hidden_layers": 61, "first_k_dense_replace": 59}
    make_tiny_checkpoint(tmp_path, dtype="f32", sizes=sizes)
    main = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    reference = open_reference(tmp_path)
    tokens = random_tokens(reference.config["vocab_size"])
    with torch.no_grad():
        h0 = main.model(tokens).last_hidden_state
        positions = torch.arange(1, NUM_TOKENS)[None]
        mtp = MtpModel.from_pretrained(main)
        h1 = mtp.forward_layer(0, h0[:, :-1], positions, None, input_ids=tokens[:, 1:])
        want = main.lm_head(h1)
    got = reference.logits(reference.mtp(h0, tokens)[0][:, :-1])
    assert_close(got, want, "MTP logits of layer 61")


@pytest.mark.parametrize("edit", [{"rope_scaling": None}, {"norm_topk_prob": False}, {}])
def test_other_configs_equal_transformers(tmp_path: Path, edit: dict[str, Any]):
    """And one MTP module rather than two."""
    make_tiny_checkpoint(tmp_path, dtype="f32", num_mtp=1, seed=3, sizes=edit)
    pair = pair_of(tmp_path)
    h0 = pair.reference.main(pair.tokens).hidden
    assert_close(h0, pair.hidden, "state after model.norm")
    want = transformers_mtp(pair, pair.hidden, [0])[0]
    assert_close(pair.reference.mtp(h0, pair.tokens)[0][:, :-1], want[:, :-1], "h_1")


def test_every_norm_uses_rms_norm_eps(tmp_path: Path):
    """Transformers needs help: it leaves 1e-6 in q_a_layernorm and kv_a_layernorm."""
    make_tiny_checkpoint(tmp_path, dtype="f32", sizes={"rms_norm_eps": 0.1})
    pair = pair_of(tmp_path)
    got = pair.reference.main(pair.tokens).hidden
    assert relative_error(got, pair.hidden) > CONTROL
    for layer in pair.main.model.layers:
        layer.self_attn.q_a_layernorm.variance_epsilon = 0.1
        layer.self_attn.kv_a_layernorm.variance_epsilon = 0.1
    with torch.no_grad():
        assert_close(got, pair.main.model(pair.tokens).last_hidden_state, "with eps everywhere")


# Each module alone: functions of the pair and an input to (ours, Transformers').


def attention(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    embeddings = pair.main.model.rotary_emb(x, torch.arange(NUM_TOKENS)[None])
    mask = torch.full((NUM_TOKENS, NUM_TOKENS), -math.inf).triu(1)[None, None]
    want, _ = pair.main.model.layers[0].self_attn(x, embeddings, mask)
    get = under(pair.reference.get, "model.layers.0.self_attn")
    places = pair.reference.places(torch.ones_like(pair.tokens))
    read = as_read(pair.reference.config)
    return torch_reference.attention(x, get, read, places), want


def router(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights by expert: the order of a token's experts means nothing."""
    get, config = under(pair.reference.get, "model.layers.3.mlp.gate"), pair.reference.config
    gate, bias = get("weight"), get("e_score_correction_bias")
    experts, weights = torch_reference.route(x.flatten(0, 1), gate, bias, config)
    _, want_weights, want_experts = pair.main.model.layers[3].mlp.gate(x)
    none = torch.zeros(len(experts), config["n_routed_experts"])
    return none.scatter(1, experts, weights), none.scatter(1, want_experts, want_weights)


def norm(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    weight = pair.reference.get("model.norm.weight")
    return torch_reference.rms_norm(x, weight, 1e-6), pair.main.model.norm(x)


def mlp(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    get = under(pair.reference.get, "model.layers.1.mlp")
    return torch_reference.mlp(x, get), pair.main.model.layers[1].mlp(x)


def moe(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    get = under(pair.reference.get, "model.layers.2.mlp")
    got = torch_reference.moe(x, get, pair.reference.config)
    return got, pair.main.model.layers[2].mlp(x)


@pytest.mark.parametrize("module", [norm, attention, mlp, router, moe])
def test_modules_equal_transformers(pair: Pair, module: Callable[..., tuple[Tensor, Tensor]]):
    shape = (2, NUM_TOKENS, pair.reference.config["hidden_size"])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, want = module(pair, x)
    assert_close(got, want, module.__name__)


# Negative controls: mistakes that implementations make, each put into our reference.


def with_config(reference: TorchReference, **edit: Any) -> TorchReference:
    return TorchReference({**reference.config, **edit}, reference.get)


def with_yarn(reference: TorchReference, **edit: Any) -> TorchReference:
    return with_config(reference, rope_scaling={**reference.config["rope_scaling"], **edit})


def with_swap(reference: TorchReference, one: str, other: str) -> TorchReference:
    def get(name: str) -> Tensor:
        old, new = (one, other) if one in name else (other, one)
        return reference.get(name.replace(old, new))

    return TorchReference(reference.config, get)


def with_reversed_concatenation(reference: TorchReference) -> TorchReference:
    def get(name: str) -> Tensor:
        weight = reference.get(name)
        return weight.roll(weight.shape[0], 1) if name.endswith("eh_proj.weight") else weight

    return TorchReference(reference.config, get)


MTP_MISTAKES: dict[str, Callable[[TorchReference], TorchReference]] = {
    "hidden state before embedding": with_reversed_concatenation,
    "state before model.norm": lambda r: with_config(r, mtp_hidden_state="pre_norm"),
    "enorm is hnorm": lambda r: with_swap(r, "enorm", "hnorm"),
    "model.norm for shared_head.norm": lambda r: with_swap(
        r, "model.layers.4.shared_head.norm", "model.norm"
    ),
    "the other module": lambda r: with_swap(r, "layers.4.", "layers.5."),
}
MAIN_MISTAKES: dict[str, Callable[[TorchReference], TorchReference]] = {
    "gate is up": lambda r: with_swap(r, "gate_proj", "up_proj"),
    "input norm is the other norm": lambda r: with_swap(
        r, "input_layernorm", "post_attention_layernorm"
    ),
    "no YaRN": lambda r: with_config(r, rope_scaling=None),
    "no YaRN ramp": lambda r: with_yarn(r, original_max_position_embeddings=10240),
    "cos and sin without multiplier": lambda r: with_yarn(r, mscale=1.0),
    "scale without mscale_all_dim": lambda r: with_yarn(r, mscale=0.0, mscale_all_dim=0.0),
    "rope_theta of the release": lambda r: with_config(r, rope_theta=10000),
    "top-k not normalised": lambda r: with_config(r, norm_topk_prob=False),
    "routed_scaling_factor ignored": lambda r: with_config(r, routed_scaling_factor=1.0),
    "all groups kept": lambda r: with_config(r, topk_group=4),
}


def mtp_error(wrong: TorchReference, pair: Pair) -> float:
    h0 = wrong.first_state(wrong.main(pair.tokens))
    got = wrong.mtp(h0, pair.tokens, depths=1)[0][:, :-1]
    return relative_error(got, transformers_mtp(pair, pair.hidden, [0])[0][:, :-1])


@pytest.mark.parametrize("mistake", MTP_MISTAKES)
def test_mtp_mistakes_show(pair: Pair, mistake: str):
    assert mtp_error(MTP_MISTAKES[mistake](pair.reference), pair) > CONTROL


@pytest.mark.parametrize("mistake", MAIN_MISTAKES)
def test_main_mistakes_show(pair: Pair, mistake: str):
    wrong = MAIN_MISTAKES[mistake](pair.reference)
    assert relative_error(wrong.main(pair.tokens).hidden, pair.hidden) > CONTROL
    assert mtp_error(wrong, pair) > CONTROL


def test_masking_groups_with_zero_shows(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """Zero beats the negative scores of kept groups."""
    monkeypatch.setattr(torch_reference, "DROPPED_GROUP", 0.0)
    assert relative_error(pair.reference.main(pair.tokens).hidden, pair.hidden) > CONTROL
    assert mtp_error(pair.reference, pair) > CONTROL


def test_rotating_halves_shows(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    def rotate_halves(x: Tensor, places: torch_reference.Places) -> Tensor:
        one, other = x.chunk(2, dim=-1)
        cos, sin = places.cos, places.sin
        return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)

    monkeypatch.setattr(torch_reference, "rotate", rotate_halves)
    assert relative_error(pair.reference.main(pair.tokens).hidden, pair.hidden) > CONTROL


def test_wrong_shift_shows(pair: Pair):
    """Depth 1 is fed the next token; the same token again is a mistake, two ahead another."""
    reference = pair.reference
    want = transformers_mtp(pair, pair.hidden, [0])[0][:, 1:-2]
    for shift in (-1, 1):
        shifted = pair.tokens.roll(-shift, dims=1)
        got = reference.mtp(pair.hidden, shifted, depths=1)[0][:, 1:-2]
        assert relative_error(got, want) > CONTROL

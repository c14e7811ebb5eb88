"""The network against the plain-torch reference, module by module and whole, with every mistake
that checkpoints of this family have suffered made on purpose."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from flax import nnx
from imported import (
    assert_close,
    assert_far,
    import_tiny,
    load_float32,
    random_tokens,
    relative_error,
)

from converters.verifying.logits import torch_reference as reference
from converters.verifying.logits.torch_config import as_read
from converters.verifying.logits.torch_reference import TorchReference, open_reference, under
from mtp_model import attention
from mtp_model.block import take_layer
from mtp_model.context import make_context
from mtp_model.load import load
from mtp_model.model import DeepSeekV3
from mtp_model.moe import Router
from mtp_model.mtp import shift_within_segments

VARIANTS = {
    "f32, one MTP module": {"dtype": "f32"},
    "f32, two MTP modules, no copies": {"dtype": "f32", "num_mtp": 2, "copies": False},
    "f32, plain queries": {"dtype": "f32", "q_lora": False, "seed": 3},
    "fp8, two MTP modules": {"dtype": "fp8", "num_mtp": 2},
    "bf16, dense first layer only": {"dtype": "bf16", "sizes": {"first_k_dense_replace": 1}},
    "bf16, MoE from the start": {"dtype": "bf16", "sizes": {"first_k_dense_replace": 0}},
}
SEGMENTS = np.array([[1] * 10 + [2] * 9 + [3] * 5, [4] * 15 + [5] * 6 + [0] * 3], np.int32)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory) -> tuple[DeepSeekV3, TorchReference]:
    folder = tmp_path_factory.mktemp("pair")
    checkpoint = import_tiny(folder, **VARIANTS[request.param])
    return load_float32(checkpoint), open_reference(folder / "source")


@pytest.fixture(scope="module")
def fp8_checkpoint(tmp_path_factory) -> Path:
    return import_tiny(tmp_path_factory.mktemp("fp8"), dtype="fp8", num_mtp=2)


@jax.jit
def all_logits(model, tokens, segment_ids=None):
    out = model(tokens, segment_ids)
    return [out.logits_BTV, *out.mtp_logits]


@torch.no_grad()
def reference_logits(ref: TorchReference, tokens, segment_ids=None, depths=None):
    tokens = torch.tensor(tokens, dtype=torch.long)
    segments = None if segment_ids is None else torch.tensor(segment_ids, dtype=torch.long)
    states = ref.main(tokens, segments)
    drafts = ref.mtp(ref.first_state(states), tokens, segments, depths)
    return [ref.logits(h).numpy() for h in (states.hidden, *drafts)]


def assert_all_close(got, want):
    for depth, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert_close(ours, theirs, f"depth {depth}")


def worst_error(got, want) -> float:
    return max(relative_error(ours, theirs) for ours, theirs in zip(got, want, strict=True))


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document a row", "packed"])
def test_logits(pair, segments):
    model, ref = pair
    tokens = random_tokens(model.config.vocab_size)
    got = all_logits(model, tokens, segments)
    assert len(got) == 1 + model.config.num_nextn_predict_layers
    assert_all_close(got, reference_logits(ref, tokens, segments))


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document a row", "packed"])
@pytest.mark.parametrize("num_modules", [1, 2])
def test_modules_are_reused_as_a_decoder_does(num_modules, segments, request):
    """The reference runs a reused module anew over each row's document and chain."""
    model, ref = request.getfixturevalue("two_modules")[:2]
    if num_modules == 1:
        model, ref = request.getfixturevalue("one_module")
    tokens = random_tokens(model.config.vocab_size)
    drafts = jax.jit(lambda m, t: m(t, segments, num_draft_tokens=4))(model, tokens).mtp_logits
    want = reference_logits(ref, tokens, segments, depths=4)[1:]
    assert_all_close(drafts, want)

    one_document = np.ones_like(tokens)
    wrong = attends_to_its_own_rows(model, tokens, one_document if segments is None else segments)
    assert_far(wrong, want[3], "depth 4")


@jax.jit
def attends_to_its_own_rows(model, tokens, segments):
    """The mistake: each use of a module sees what the same use left in other rows."""
    context = make_context(segments)
    state = model.main(tokens, context).state_BTD
    for k in range(1, 5):
        ahead = shift_within_segments(tokens, context.segment_ids_BT, k).tokens_BT
        state = model.draft_step(state, ahead, context, k).state_BTD
    return model.lm_head.logits(state)


@pytest.fixture(scope="module")
def one_module(tmp_path_factory) -> tuple[DeepSeekV3, TorchReference]:
    folder = tmp_path_factory.mktemp("one")
    return load_float32(import_tiny(folder, "f32")), open_reference(folder / "source")


@pytest.fixture(scope="module")
def two_modules(tmp_path_factory):
    """One network in both implementations, and activations to feed its modules."""
    folder = tmp_path_factory.mktemp("two")
    model = load_float32(import_tiny(folder, "f32", num_mtp=2))
    ref = open_reference(folder / "source")
    x = np.random.default_rng(1).normal(size=(2, 24, model.config.hidden_size))
    return model, ref, jnp.asarray(x, jnp.float32)


@torch.no_grad()
def test_each_module(two_modules):
    model, ref, x = two_modules
    config, layer = as_read(ref.config), take_layer(model.moe_layers, 1)
    get = under(ref.get, f"model.layers.{config['first_k_dense_replace'] + 1}")
    x_torch, segments = torch.tensor(np.asarray(x)), jnp.ones((2, 24), jnp.int32)
    places = ref.places(torch.ones((2, 24), dtype=torch.int32))
    context = make_context(segments)

    ours = jax.jit(  # one by one its operations take six times as long to compile
        lambda layer, x: (
            layer.input_layernorm(x),
            layer.self_attn(x, context)[0],
            layer.mlp.shared_experts(x),
            layer.mlp(x, segments)[0],
            layer(x, context)[0],
        )
    )(layer, x)
    norm = reference.rms_norm(x_torch, get("input_layernorm.weight"), config["rms_norm_eps"])
    attended = reference.attention(x_torch, under(get, "self_attn"), config, places)
    shared = reference.mlp(x_torch, under(get, "mlp.shared_experts"))
    mixed = reference.moe(x_torch, under(get, "mlp"), config)
    whole = reference.decoder_layer(x_torch, get, config, places, is_moe=True)
    names = ("norm", "attention", "shared experts", "MoE", "decoder layer")
    theirs = (norm, attended, shared, mixed, whole)
    for name, got, want in zip(names, ours, theirs, strict=True):
        assert_close(got, want.numpy(), name)


@torch.no_grad()
def test_router_and_load(two_modules):
    model, ref, x = two_modules
    layer = take_layer(model.moe_layers, 0)
    get = under(ref.get, f"model.layers.{ref.config['first_k_dense_replace']}.mlp.gate")
    flat = torch.tensor(np.asarray(x)).reshape(-1, x.shape[-1])
    chosen, weights = reference.route(
        flat, get("weight"), get("e_score_correction_bias"), ref.config
    )
    routing = layer.mlp.gate(x)
    order = np.argsort(routing.choices_BTK, axis=-1)
    ours = np.take_along_axis(np.asarray(routing.choices_BTK), order, -1).reshape(chosen.shape)
    np.testing.assert_array_equal(ours, np.sort(chosen.numpy(), axis=-1))
    theirs = np.take_along_axis(weights.numpy(), np.argsort(chosen.numpy(), axis=-1), -1)
    shares = np.take_along_axis(np.asarray(routing.weights_BTK), order, -1).reshape(theirs.shape)
    assert_close(shares, theirs, "routing weights")

    counted = jnp.array([[1] * 20 + [0] * 4, [0] * 24], jnp.int32)
    load_E = layer.mlp(x, counted)[1]
    kept = np.asarray(routing.choices_BTK)[0, :20].reshape(-1)
    np.testing.assert_array_equal(load_E, np.bincount(kept, minlength=len(load_E)))


def equal_shaped(state: nnx.State) -> Iterator[tuple[tuple, tuple]]:
    flat = sorted(nnx.to_flat_state(state), key=lambda item: str(item[0]))
    for (a, first), (b, second) in itertools.combinations(flat, 2):
        if first.shape == second.shape and first.dtype == second.dtype:
            yield a, b


def with_swapped(state: nnx.State, a: tuple, b: tuple) -> nnx.State:
    flat = dict(nnx.to_flat_state(state))
    flat[a], flat[b] = flat[a].replace(flat[b][...]), flat[b].replace(flat[a][...])
    return nnx.from_flat_state(list(flat.items()))


def test_any_two_equal_shaped_leaves_swapped_are_noticed(fp8_checkpoint):
    model = load(fp8_checkpoint, compute_dtype=jnp.float32)  # FP8 leaves and scales as stored
    tokens = random_tokens(model.config.vocab_size)
    graph, state = nnx.split(model)
    right = all_logits(model, tokens)
    pairs = list(equal_shaped(state))
    assert len(pairs) > 100
    for a, b in pairs:
        wrong = all_logits(nnx.merge(graph, with_swapped(state, a, b)), tokens)
        error = worst_error(wrong, right)
        assert error >= 1e-3, f"{'.'.join(a)} <-> {'.'.join(b)}: only {error:.1e}"


def test_any_two_layers_of_a_stack_swapped_are_noticed(fp8_checkpoint):
    model = load(fp8_checkpoint, compute_dtype=jnp.float32)
    tokens = random_tokens(model.config.vocab_size)
    graph, state = nnx.split(model)
    right = all_logits(model, tokens)
    for path, leaf in nnx.to_flat_state(state):
        if path[0] not in ("dense_layers", "moe_layers", "mtp"):
            continue
        flat = dict(nnx.to_flat_state(state)) | {path: leaf.replace(leaf[...][::-1])}
        wrong = all_logits(nnx.merge(graph, nnx.from_flat_state(list(flat.items()))), tokens)
        assert worst_error(wrong, right) >= 1e-3, ".".join(path)


def test_the_concatenation_reversed_is_noticed(two_modules):
    model, ref, _ = two_modules
    tokens = random_tokens(model.config.vocab_size)
    graph, state = nnx.split(model)
    weight = state.mtp.eh_proj.weight
    halves = np.split(np.asarray(weight[...]), 2, axis=-1)
    reversed_ = jnp.asarray(np.concatenate(halves[::-1], axis=-1))
    state.mtp.eh_proj.weight = weight.replace(reversed_)
    wrong = all_logits(nnx.merge(graph, state), tokens)
    right = reference_logits(ref, tokens)
    assert_close(wrong[0], right[0], "main logits")
    assert_far(wrong[1], right[1], "depth 1")


def test_the_state_before_the_norm_is_noticed_and_is_a_switch(tmp_path):
    options = {"mtp_hidden_state": "pre_norm"}
    checkpoint = import_tiny(tmp_path, "f32", import_options=options, num_mtp=2)
    model, ref = load_float32(checkpoint), open_reference(tmp_path / "source")
    assert model.config.mtp_hidden_state == "pre_norm"
    tokens = random_tokens(model.config.vocab_size)
    got = all_logits(model, tokens)
    right = reference_logits(ref, tokens)
    assert_close(got[0], right[0], "main logits")
    assert_far(got[1], right[1], "depth 1, after against before model.norm")
    assert_far(got[2], right[2], "depth 2")
    same_switch = TorchReference({**ref.config, **options}, ref.get)
    assert_all_close(got, reference_logits(same_switch, tokens))


def test_masking_groups_with_zero_is_noticed(two_modules, monkeypatch):
    model, ref, _ = two_modules
    tokens = random_tokens(model.config.vocab_size)
    graph, state = nnx.split(model)
    gate = state.moe_layers.mlp.gate
    bias = gate.e_score_correction_bias
    lowered = jnp.asarray(bias[...]) - 5.0  # every biased score is negative: a zero would win
    gate.e_score_correction_bias = bias.replace(lowered)
    shifted = nnx.merge(graph, state)
    right = all_logits(shifted, tokens)
    assert_all_close(right, reference_logits(ref, tokens))  # equal shifts select the same
    minus_infinity = Router._selectable
    monkeypatch.setattr(
        Router, "_selectable", lambda self, b: jnp.maximum(minus_infinity(self, b), -20.0) % -20.0
    )
    wrong = jax.jit(lambda *args: all_logits.__wrapped__(*args))(shifted, tokens)
    assert_far(wrong[0], right[0], "masking with 0")


def test_documents_of_a_row_never_see_each_other(two_modules):
    model, _, _ = two_modules
    tokens = random_tokens(model.config.vocab_size)
    changed = np.where(SEGMENTS == 2, (tokens + 1) % model.config.vocab_size, tokens)
    before, after = all_logits(model, tokens, SEGMENTS), all_logits(model, changed, SEGMENTS)
    others, own = SEGMENTS != 2, SEGMENTS == 2
    for depth, (a, b) in enumerate(zip(before, after, strict=True)):
        assert_close(np.asarray(b)[others], np.asarray(a)[others], f"depth {depth}")
        assert_far(np.asarray(b)[own], np.asarray(a)[own], f"depth {depth}")


def test_a_packed_document_has_the_logits_it_has_alone(two_modules):
    model, _, _ = two_modules
    tokens = random_tokens(model.config.vocab_size)
    packed = all_logits(model, tokens, SEGMENTS)
    alone = all_logits(model, tokens[:1, 10:19])
    for depth, (a, b) in enumerate(zip(packed, alone, strict=True)):
        assert_close(np.asarray(a)[0, 10:19], np.asarray(b)[0], f"depth {depth}")


def test_positions_are_relative(two_modules):
    model, _, _ = two_modules
    tokens = random_tokens(model.config.vocab_size)
    positions = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    run = jax.jit(lambda m, t, p: m(t, None, p).logits_BTV)
    assert_close(run(model, tokens, positions), all_logits(model, tokens)[0], "default positions")
    assert_close(run(model, tokens, positions + 100), run(model, tokens, positions), "moved by 100")
    assert_far(run(model, tokens, positions * 2), run(model, tokens, positions), "stretched")


@pytest.mark.parametrize("chunk", [5, 8])
def test_query_chunks_change_nothing(two_modules, monkeypatch, chunk):
    model, _, _ = two_modules
    tokens = random_tokens(model.config.vocab_size)
    whole = all_logits(model, tokens, SEGMENTS)
    monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
    chunked = jax.jit(all_logits.__wrapped__)(model, tokens, SEGMENTS)
    assert_all_close(chunked, whole)


def test_fp8_leaves_work_in_the_forward_pass(fp8_checkpoint):
    kept = load(fp8_checkpoint, compute_dtype=jnp.float32)
    assert kept.moe_layers.mlp.experts.gate_proj.weight.dtype == jnp.float8_e4m3fn
    dequantised = load_float32(fp8_checkpoint)
    assert dequantised.moe_layers.mlp.experts.gate_proj.weight.dtype == jnp.float32
    tokens = random_tokens(kept.config.vocab_size)
    assert_all_close(all_logits(kept, tokens), all_logits(dequantised, tokens))


def test_bf16_is_near_float32(fp8_checkpoint):
    tokens = random_tokens(384)
    half = all_logits(load(fp8_checkpoint), tokens)
    whole = all_logits(load_float32(fp8_checkpoint), tokens)
    assert {a.dtype for a in half} == {jnp.dtype(jnp.float32)}
    assert worst_error(half, whole) > 1e-4
    mean = np.mean(
        [np.abs(a - b).mean() / np.abs(b).mean() for a, b in zip(half, whole, strict=True)]
    )
    assert mean < 0.1


def test_a_module_can_be_fed_as_vllm_feeds_it(two_modules):
    """vLLM feeds a zero embedding at position 0: a module takes the embeddings it is given."""
    model, _, _ = two_modules
    tokens = random_tokens(model.config.vocab_size)[:1]
    tokens[0, 1] = 9
    context = make_context(np.ones_like(tokens))
    fed = shift_within_segments(jnp.asarray(tokens), context.segment_ids_BT, 1).tokens_BT

    @jax.jit
    def zeroed_draft(model, state):
        e_BTD = model.embed_tokens.lookup(fed, model.compute_dtype).at[:, 0].set(0.0)
        return take_layer(model.mtp, 0)(state, e_BTD, context)[0]

    first_draft = jax.jit(lambda model, state: model.draft(state, tokens, context, 1).hidden[0])
    main_state = jax.jit(lambda model: model.main(tokens, context).state_BTD)(model)
    zeroed = zeroed_draft(model, main_state)
    assert_far(zeroed, first_draft(model, main_state), "a zero embedding at position 0")
    graph, state = nnx.split(model)
    table = state.embed_tokens.weight
    state.embed_tokens.weight = table.replace(table[...].at[9].set(0.0))
    without = first_draft(nnx.merge(graph, state), main_state)
    assert_close(zeroed[:, :1], without[:, :1], "row 0, whose next token is 9")


def test_asking_for_drafts_of_a_model_without_mtp(tmp_path):
    model = load_float32(import_tiny(tmp_path, "f32", num_mtp=0))
    assert model(random_tokens(384)).mtp_logits == ()
    with pytest.raises(ValueError, match="2 draft tokens asked of a model without MTP modules"):
        model(random_tokens(384), num_draft_tokens=2)

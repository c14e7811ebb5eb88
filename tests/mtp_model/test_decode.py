"""Decoding with caches computes what the whole text at once does, piece by piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_model import DeepSeekV3, ModelConfig, make_context
from mtp_model.decode import draft, empty_caches, feed
from tools.make_tiny_checkpoint import tiny_config

SIZES = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
RELATIVE = 1e-5
PIECES = (4, 1, 4, 1, 1, 2)
LENGTH = sum(PIECES)
SLOTS = LENGTH + 3


feed_jit = jax.jit(feed)
draft_jit = jax.jit(draft)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig.from_dict(tiny_config("f32", num_mtp=1, q_lora=True, sizes=SIZES))
    model = DeepSeekV3(config, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if leaf.shape[-1] > 1 and path[-1] == "weight":
            mean = 1.0 if "norm" in str(path[-2]) else 0.0
            leaf[...] = jnp.asarray(rng.normal(mean, 0.2, leaf.shape), jnp.float32)
            nnx.update(model, nnx.from_flat_state([(path, leaf)]))
    return model


@pytest.fixture(scope="module")
def tokens(model):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(0, model.config.vocab_size, (2, LENGTH)), jnp.int32)


@pytest.fixture(scope="module")
def whole(model, tokens):
    return jax.jit(lambda model: model.main(tokens, make_context(jnp.ones_like(tokens))))(model)


def places(begin, count: int):
    return jnp.asarray(begin)[:, None] + jnp.arange(count)[None]


def fed_in_pieces(model, tokens, spoil=0, shift=0):
    """Hidden states of all rows, fed piece by piece.

    spoil: tokens fed behind each piece, as drafts that are then refused; shift: of positions.
    """
    caches, begin, found = empty_caches(model, 2, SLOTS), 0, []
    for count in PIECES:
        wrong = jnp.full((2, spoil), 7, jnp.int32)
        piece = jnp.concatenate([tokens[:, begin : begin + count], wrong], axis=1)
        fed = feed_jit(model, piece, places([begin + shift] * 2, count + spoil), caches)
        caches = fed.caches
        found.append(fed.hidden_BTD[:, :count])
        begin += count
    return jnp.concatenate(found, axis=1), caches


def difference(found, expected) -> float:
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


def test_pieces_are_the_whole(model, tokens, whole):
    found, _ = fed_in_pieces(model, tokens)
    assert difference(found, whole.hidden_BTD) < RELATIVE
    assert difference(found[:, ::-1], whole.hidden_BTD) > 0.1


def test_refused_tokens_leave_nothing(model, tokens, whole):
    found, _ = fed_in_pieces(model, tokens, spoil=3)
    assert difference(found, whole.hidden_BTD) < RELATIVE


def test_a_wrong_slot_is_seen(model, tokens, whole):
    """Negative control: with all positions shifted attention sees an empty slot."""
    found, _ = fed_in_pieces(model, tokens, shift=1)
    assert difference(found, whole.hidden_BTD) > 1e-3


def test_rows_may_stand_at_different_places(model, tokens, whole):
    caches = empty_caches(model, 2, SLOTS)
    caches = feed_jit(model, tokens[:, :7], places([0, 0], 7), caches).caches
    begin = [7, 5]
    taken = jnp.take_along_axis(tokens, places(begin, 4), axis=1)
    fed = feed_jit(model, taken, places(begin, 4), caches)
    expected = jnp.take_along_axis(whole.hidden_BTD, places(begin, 4)[..., None], axis=1)
    assert difference(fed.hidden_BTD, expected) < RELATIVE


@pytest.mark.parametrize("spoil", [0, 2])
def test_drafts_are_those_of_the_model_that_reuses_its_module(model, tokens, whole, spoil):
    """Round after round, each with three drafts that are fed the text, as training feeds them."""
    context = make_context(jnp.ones_like(tokens))
    drafts = jax.jit(lambda model, state: model.draft(state, tokens, context, 3).hidden)
    expected = drafts(model, whole.state_BTD)
    caches = empty_caches(model, 2, SLOTS)
    last = -1
    for row in (3, 4, 8):  # drafts of the round at row need t[row + 1 .. row + 3]
        new = places([last + 1] * 2, row - last + spoil)
        states = jnp.take_along_axis(whole.state_BTD, new[..., None], axis=1)
        step = draft_jit(model, states, jnp.take_along_axis(tokens, new + 1, axis=1), new, caches)
        state = step.state_BTD[:, row - last - 1 : row - last]
        assert difference(state[:, 0], expected[0][:, row]) < RELATIVE
        for k in (2, 3):
            here = places([row + k - 1] * 2, 1)
            step = draft_jit(model, state, tokens[:, row + k][:, None], here, step.caches)
            state = step.state_BTD
            assert difference(state[:, 0], expected[k - 1][:, row]) < RELATIVE, (row, k)
        assert difference(state[:, 0], expected[1][:, row]) > 1e-3
        caches, last = step.caches, row

"""Attention in chunks of queries, parts of a sequence, turns of heads: the same as all at once."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from imported import TOLERANCE, relative_error

from mtp_model import attention
from mtp_model.context import Context, EarlierUses, KeysValues, make_context

B, T, N, H, G = 2, 24, 6, 5, 7
SCALE = 0.3
SEGMENTS = np.array([[1] * 10 + [2] * 9 + [3] * 5, [4] * 15 + [5] * 6 + [0] * 3], np.int32)


def random_inputs(uses: int) -> tuple[jax.Array, list[KeysValues]]:
    """Queries, and keys and values of so many uses of a module, the last one's own last."""
    rng = np.random.default_rng(3)

    def draw(size: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(B, T, N, size)), jnp.float32)

    return draw(H), [KeysValues(draw(H), draw(G)) for _ in range(uses)]


def in_pieces(q, uses: list[KeysValues]) -> jax.Array:
    context: Context = make_context(SEGMENTS)
    first, *chain, new = uses if len(uses) > 1 else (None, *uses)
    if first is not None:
        context = context._replace(earlier=EarlierUses(first, tuple(chain)))
    return attention.attend(q, new, context, SCALE)


def at_once(q, uses: list[KeysValues]) -> jax.Array:
    """By the definition: the first use's rows up to a query's own, and each later use's own row."""
    first, *later = uses
    same = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
    seen = (same & np.tri(T, dtype=bool))[:, None]
    scores = [jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", q, first.k_BTNH) * SCALE, -jnp.inf)]
    scores += [jnp.einsum("btnh,btnh->bnt", q, each.k_BTNH)[..., None] * SCALE for each in later]
    weights = jax.nn.softmax(jnp.concatenate(scores, -1), -1)
    out = jnp.einsum("bnts,bsng->btng", weights[..., :T], first.v_BTNG)
    for place, each in enumerate(later, T):
        out += jnp.einsum("bnt,btng->btng", weights[..., place], each.v_BTNG)
    return out


def result_and_gradients(attend, uses: int) -> list[np.ndarray]:
    def loss(q, keys):
        out = attend(q, keys)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, out), gradients = both(*random_inputs(uses))
    return [np.asarray(x) for x in (out, *jax.tree.leaves(gradients))]


@functools.cache
def wanted(uses: int) -> list[np.ndarray]:
    return result_and_gradients(at_once, uses)


def worst(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    return max(relative_error(a, b) for a, b in zip(got, want, strict=True))


WAYS = [*itertools.product((5, 8, 24), (1, 1 << 30), (0, 1 << 30))]


@pytest.mark.parametrize("uses", [1, 3], ids=["text", "third draft"])
@pytest.mark.parametrize(("chunk", "at_a_time", "kept"), WAYS)
def test_pieces_give_what_all_at_once_gives(uses, chunk, at_a_time, kept, monkeypatch):
    """Heads one by one, and all together; scores kept for the gradient, and computed again."""
    monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
    monkeypatch.setattr(attention, "SCORES_BYTES", at_a_time)
    monkeypatch.setattr(attention, "KEPT_SCORES_BYTES", kept)
    assert attention.turns_of_heads(B, T, N) == (N if at_a_time == 1 else 1)
    got = result_and_gradients(in_pieces, uses)
    assert worst(got, wanted(uses)) < TOLERANCE


def test_a_key_behind_its_query_would_be_seen(monkeypatch):
    """The control: documents that run into each other."""
    want = wanted(1)
    monkeypatch.setitem(globals(), "SEGMENTS", np.ones_like(SEGMENTS))
    assert worst(result_and_gradients(in_pieces, 1), want) > 0.1


@pytest.mark.parametrize(
    ("rows", "length", "heads", "turns"),
    [(1, 4096, 128, 8), (4, 4096, 128, 32), (16, 128, 8, 1), (1, 4096, 96, 6), (64, 4096, 7, 7)],
)
def test_heads_take_turns_where_their_scores_are_large(rows, length, heads, turns):
    assert attention.turns_of_heads(rows, length, heads) == turns


def test_the_backward_pass_keeps_neither_scores_nor_keys_of_parts(monkeypatch):
    """Of a long row, heads in turns: some chunks' scores, and keys and values a few times. Kept for
    each turn, the keys and values of all parts, each with those before it, take twice that."""
    monkeypatch.setattr(attention, "SCORES_BYTES", 8 << 20)
    long, heads = 4096, 16
    shapes = [jax.ShapeDtypeStruct((1, long, heads, size), jnp.float32) for size in (H, H, G)]

    def loss(q, k, v):
        context = make_context(jnp.zeros((1, long), jnp.int32))
        return jnp.sum(attention.attend(q, KeysValues(k, v), context, SCALE) ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
    assert attention.turns_of_heads(1, long, heads) == 8
    a_chunk = 4 * heads // 8 * attention.QUERY_CHUNK * long
    keys_values = 4 * long * heads * (H + G)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * a_chunk + 4 * keys_values

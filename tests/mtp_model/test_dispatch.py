"""Experts reached through sorting, rounds and peers equal experts applied one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mtp_model import batched, dispatch, grouped
from mtp_model.batched import batched_ffn, batched_gradient, rows_together
from mtp_model.dispatch import Served, through_experts
from mtp_model.grouped import expert_ffn, expert_ffn_gradient
from mtp_model.looped import block_rows, looped_ffn, looped_gradient
from mtp_model.rows import move_rows
from mtp_model.sharding import make_mesh
from mtp_model.swiglu import Adapted

T, K, E, D, F = 24, 3, 8, 10, 6  # tokens, choices, experts, hidden, expert hidden
LOADS = ["even", "one expert takes all it can", "random"]


def weights():
    rng = np.random.default_rng(0)
    shapes = ((E, F, D), (E, F, D), (E, D, F))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def inputs(load: str):
    rng = np.random.default_rng(1)
    if load == "even":
        choices = (np.arange(T * K) % E).reshape(T, K)
    elif load == "random":
        choices = np.stack([rng.permutation(E)[:K] for _ in range(T)])
    else:
        choices = np.tile(np.arange(K), (T, 1))
    x, share = rng.normal(size=(T, D)), rng.uniform(size=(T, K))
    as_f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    return as_f32(x), jnp.asarray(choices, jnp.int32), as_f32(share)


def one_by_one(x_TD, choices_TK, weights_TK, gate, up, down):
    """Every chosen expert of every token, without any sorting."""
    inner = jax.nn.silu(jnp.einsum("td,efd->tef", x_TD, gate)) * jnp.einsum("td,efd->tef", x_TD, up)
    out_TED = jnp.einsum("tef,edf->ted", inner, down)
    chosen_TKD = jnp.take_along_axis(out_TED, choices_TK[..., None], axis=1)
    return jnp.einsum("tkd,tk->td", chosen_TKD, weights_TK)


def sorted_experts(x_TD, choices_TK, weights_TK, gate, up, down, peers=1, axis=None):
    served = Served(run, gradient)
    return through_experts(x_TD, choices_TK, weights_TK, served, (gate, up, down), E, peers, axis)


def run(rows, expert, weights):
    return expert_ffn(rows, expert, *(w.astype(rows.dtype) for w in weights))


def gradient(d_out, rows, scale, expert, weights):
    return expert_ffn_gradient(d_out, rows, scale, expert, *weights)


def over_peers(peers: int):
    """The same on a mesh whose expert axis has `peers` devices."""
    mesh = make_mesh(expert=peers, devices=jax.devices()[:peers])
    tokens = experts = PartitionSpec("expert")
    local = functools.partial(sorted_experts, peers=peers, axis="expert")
    specs = (tokens, tokens, tokens, experts, experts, experts)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)


def result_and_gradients(function, load):
    x, choices, share = inputs(load)
    target = jnp.asarray(np.random.default_rng(2).normal(size=(T, D)), jnp.float32)

    def loss(x, share, gate, up, down):
        out = function(x, choices, share, gate, up, down)
        return jnp.sum(out * target), out

    gradient = jax.jit(jax.grad(loss, argnums=tuple(range(5)), has_aux=True))
    gradients, out = gradient(x, share, *weights())
    return [out, *gradients]


@functools.cache
def wanted(load: str):
    return result_and_gradients(one_by_one, load)


def assert_same(got, want):
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        error = np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()
        assert error <= 1e-5, f"output {index}: relative error {error:.1e}"


@pytest.mark.parametrize("load", LOADS)
def test_one_device(load):
    assert_same(result_and_gradients(sorted_experts, load), wanted(load))


@pytest.mark.parametrize("load", LOADS)
def test_one_device_with_several_groups(load, monkeypatch):
    """Of two experts each, some tokens at a time; of one expert too many groups."""
    make_shape = dispatch._make_shape
    monkeypatch.setattr(dispatch, "_make_shape", lambda *args: make_shape(*args[:-1], True))
    monkeypatch.setattr(dispatch, "GROUP_ROWS", T * K // 4)
    monkeypatch.setattr(dispatch, "TOKENS_AT_A_TIME", T // 2)
    assert_same(result_and_gradients(sorted_experts, load), wanted(load))


def test_experts_are_in_groups_where_a_group_saves_memory(monkeypatch):
    """Of weights that are used as they are stored it would be a copy: less than very many rows."""
    shapes, make_shape = [], dispatch._make_shape

    def kept(*args):
        shapes.append(make_shape(*args))
        return shapes[-1]

    monkeypatch.setattr(dispatch, "_make_shape", kept)
    monkeypatch.setattr(dispatch, "GROUP_ROWS", T * K // 4)

    def trace(weights):
        jax.eval_shape(lambda *args: sorted_experts(*args), *inputs("even"), *weights)

    trace(weights())
    trace([w.astype(jnp.bfloat16) for w in weights()])
    monkeypatch.setattr(dispatch, "ROWS_AT_ONCE_BYTES", T * K * D * 4)
    trace(weights())
    monkeypatch.setattr(dispatch, "ROWS_AT_ONCE_BYTES", T * K * D * 4 - 1)
    trace(weights())
    assert [shape.num_groups for shape in shapes] == [1, 4, 1, 4]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("peers", [2, 4])
def test_peers_serve_every_row_whatever_the_load(peers, load):
    want = wanted(load)
    assert_same(result_and_gradients(over_peers(peers), load), want)


def test_peers_with_groups_and_few_slots(monkeypatch):
    monkeypatch.setattr(dispatch, "GROUP_ROWS", 9)
    monkeypatch.setattr(dispatch, "FIRST_ROUND", 0.3)
    want = wanted(LOADS[1])
    assert_same(result_and_gradients(over_peers(2), LOADS[1]), want)


def test_without_further_rounds_an_uneven_load_would_lose_rows(monkeypatch):
    """Negative control: the first round alone does not serve the fullest peer."""

    def first_only(shape, plan, group, step, start):
        return step(shape, dispatch._take_seats(shape, plan, group, 0), start)

    monkeypatch.setattr(dispatch, "_over_rounds", first_only)
    got = result_and_gradients(over_peers(4), LOADS[1])
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(got, wanted(LOADS[1]))


def test_rows_of_no_expert_give_zeros():
    rows = jnp.ones((5, D), jnp.float32)
    out = expert_ffn(rows, jnp.array([E, 0, E, 3, E]), *weights())
    assert not np.any(np.asarray(out)[[0, 2, 4]])
    assert np.all(np.asarray(out)[[1, 3]] != 0)


def adapted_weights(rank: int = 2):
    """The weights, frozen, with adapters beside them."""
    rng = np.random.default_rng(5)

    def narrow(*shape: int):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return tuple(
        Adapted(weight, narrow(E, rank, weight.shape[2]), narrow(E, weight.shape[1], rank))
        for weight in weights()
    )


EXPERT_OF_ROW = {
    # More rows of expert 0 than are computed at a time, none of 2, 4 and 6.
    "busy": [3, 0, 0, 8, 7, 3, 3, 1, 8, 5, *[0] * 10],
    "balanced": [0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1, 0],
    "fewer than experts": [5, 8, 5, 0],
}


@pytest.mark.parametrize("load", EXPERT_OF_ROW)
@pytest.mark.parametrize("make", [weights, adapted_weights])
def test_every_way_to_compute_experts_gives_the_same(make, load, monkeypatch):
    """Those of TPUs, GPUs and CPUs, and the gradients that JAX finds of the first. What stands
    beside an adapter has none."""
    monkeypatch.setattr(batched, "BLOCK", 3)
    expert = jnp.asarray(EXPERT_OF_ROW[load], jnp.int32)
    rng = np.random.default_rng(3)
    rows, target = (jnp.asarray(rng.normal(size=(len(expert), D)), jnp.float32) for _ in range(2))
    scale = jnp.asarray(rng.uniform(size=len(expert)), jnp.float32)

    def loss(rows, scale, *w):
        out = grouped._ragged_ffn(rows, expert, *w)
        return jnp.sum(out * target * scale[:, None]), out

    by_jax = jax.jit(jax.grad(loss, argnums=range(5), has_aux=True))
    of_jax, out = by_jax(rows, scale, *make())
    for ffn in (looped_ffn, batched_ffn):
        assert_same([jax.jit(ffn)(rows, expert, *make())], [out])
    want = (of_jax[0], of_jax[1], of_jax[2:])
    for gradient in (grouped._ragged_gradient, looped_gradient, batched_gradient):
        got = jax.jit(gradient)(target, rows, scale, expert, *make())
        if make is adapted_weights:
            assert not any(np.any(each.weight_LOI) for each in (*got[2], *want[2]))
            got, beside = (
                (*each[:2], [adapter[1:] for adapter in each[2]]) for each in (got, want)
            )
            assert_same(jax.tree.leaves(got), jax.tree.leaves(beside))
        else:
            assert_same(jax.tree.leaves(got), jax.tree.leaves(want))


def test_without_blocks_a_busy_expert_would_lose_rows(monkeypatch):
    """Negative control: the batched product alone does not serve all of its rows."""
    expert = jnp.asarray(EXPERT_OF_ROW["busy"], jnp.int32)
    rows = jnp.asarray(np.random.default_rng(3).normal(size=(20, D)), jnp.float32)
    want = looped_ffn(rows, expert, *weights())
    monkeypatch.setattr("mtp_model.batched.lax.while_loop", lambda _more, _body, start: start)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same([batched_ffn(rows, expert, *weights())], [want])


@pytest.mark.parametrize(
    ("rows", "experts", "together"),
    [(32768, 256, 256), (17, 8, 8), (4, 8, 0), (8, 8, 8), (1000, 10, 200)],
)
def test_rows_in_a_batched_product_follow_the_load(rows, experts, together):
    assert rows_together(rows, experts) == together


def residual_bytes(function) -> int:
    """What a backward pass through a function of (x, gate, up, down) keeps of the forward pass."""
    args = (jnp.zeros((64, D), jnp.float32), *weights())
    kept = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def test_nothing_is_kept_for_the_backward_pass_but_the_arguments():
    choices, share = jnp.zeros((64, K), jnp.int32), jnp.ones((64, K), jnp.float32)
    arguments = (64 * D + 3 * E * F * D + 64 * K) * 4
    plan = 4 * 64 * K * 4
    kept = residual_bytes(lambda x, *w: sorted_experts(x, choices, share, *w))
    assert kept <= arguments + plan
    # Negative control: JAX's own gradient keeps what is between the products.
    assert residual_bytes(lambda x, *w: one_by_one(x, choices, share, *w)) > 2 * arguments


@pytest.mark.parametrize(("rows", "experts", "block"), [(8192, 8, 128), (72, 8, 8), (512, 8, 32)])
def test_block_size_follows_the_load(rows, experts, block):
    assert block_rows(rows, experts) == block


def test_moving_rows_back_is_their_gradient():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(4, 3)), jnp.float32)
    source = jnp.array([2, 4, 0, 2, 3])  # row 4 is past the end: zeros
    targets = jnp.array([[2, 5], [5, 5], [0, 3], [4, 5]])  # 5 is past the end: none
    moved, backward = jax.vjp(lambda x: move_rows(x, source, targets), x)
    np.testing.assert_array_equal(moved[1], np.zeros(3))
    np.testing.assert_array_equal(moved[0], x[2])
    given = jnp.asarray(np.random.default_rng(5).normal(size=(5, 3)), jnp.float32)
    expected = np.stack([given[2], np.zeros(3), given[0] + given[3], given[4]])
    np.testing.assert_allclose(backward(given)[0], expected, rtol=1e-6)

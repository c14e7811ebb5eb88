"""On CPU a scan over narrow floats widens one part of them at a time, and computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_model import ModelConfig, make_context, narrow
from mtp_model.layers import FP8
from mtp_model.model import abstract_model, leaves_by_name
from tools.make_tiny_checkpoint import tiny_config

F32 = jnp.dtype("float32")
SIZES = {
    "num_hidden_layers": 24,
    "first_k_dense_replace": 0,
    "hidden_size": 256,
    "moe_intermediate_size": 64,
    "weight_block_size": [64, 64],
}


def temporary_bytes(run, argument) -> int:
    memory = jax.jit(run).lower(argument).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def widened(_stacked, _index, part):
    """A control: what is left to XLA."""
    return part


def test_a_frozen_main_model_is_not_widened_whole(monkeypatch):
    config = ModelConfig.from_dict(tiny_config("fp8", num_mtp=0, q_lora=True, sizes=SIZES))
    plain = leaves_by_name(abstract_model(config))
    scaled = [name.removesuffix("_scale_inv") for name in plain if name.endswith("_scale_inv")]
    model = abstract_model(config, dtypes=dict.fromkeys(scaled, FP8), compute_dtype=F32)
    model.remat = False
    graph, state = nnx.split(model)
    experts = leaves_by_name(model)["moe_layers.mlp.experts.up_proj.weight"]
    assert experts.dtype == FP8
    tokens = jnp.zeros((1, 4), jnp.int32)

    def measured() -> int:
        def run(state):
            return nnx.merge(graph, state).main(tokens, make_context(jnp.ones_like(tokens)))

        return temporary_bytes(run, state)

    as_float16 = 2 * experts.size  # one of three such stacks
    assert measured() < as_float16
    monkeypatch.setattr(narrow, "_taken", widened)
    assert measured() > 3 * as_float16


def test_bfloat16_is_not_widened_whole(monkeypatch):
    stacked = jax.ShapeDtypeStruct((64, 64, 64), jnp.bfloat16)

    def measured() -> int:
        def run(stacked):
            def step(carry, part):
                return jnp.tanh(part.astype(F32) @ carry), None

            return narrow.scan_parts(step, jnp.ones(64), stacked)

        return temporary_bytes(run, stacked)

    assert measured() < 2 * stacked.size
    monkeypatch.setattr(narrow, "_taken", widened)
    assert measured() >= 4 * stacked.size


@pytest.mark.parametrize("remat", [False, True])
def test_parts_and_gradients_are_those_of_a_scan(remat):
    """Of narrow floats too, beside what is no float and what is wide."""
    rng = np.random.default_rng(0)
    stacked = {
        "narrow": jnp.asarray(rng.standard_normal((5, 4, 4)), jnp.bfloat16),
        "wide": jnp.asarray(rng.standard_normal((5, 4)), jnp.float32),
    }
    count = jnp.arange(5)

    def step(carry, parts):
        count, part = parts
        carry = jnp.tanh(part["narrow"].astype(jnp.float32) @ carry) + part["wide"] * count
        return carry, carry * 2.0

    def loss(scan, stacked, start):
        carry, each = scan(step, start, (count.astype(jnp.float32), stacked))
        return jnp.sum(carry) + jnp.sum(each)

    def ours(*args):
        return narrow.scan_parts(*args, remat=remat)

    gradient = jax.jit(jax.grad(loss, (1, 2)), static_argnums=0)
    got = gradient(ours, stacked, jnp.ones(4))
    want = gradient(jax.lax.scan, stacked, jnp.ones(4))
    assert np.abs(np.asarray(want[0]["narrow"], np.float32)).min() > 0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=1e-2, atol=1e-5)

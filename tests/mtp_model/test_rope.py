"""Rotary frequencies and scales against the published numbers of DeepSeek-V3."""

import jax.numpy as jnp
import numpy as np
import pytest
from released import CONFIG

from mtp_model.config import ModelConfig
from mtp_model.rope import inverse_frequencies, rotate, rotation_scale, softmax_scale

RELEASED = ModelConfig.from_dict(CONFIG)


def test_released_frequencies():
    frequencies = inverse_frequencies(RELEASED)
    known = {10: 0.0562341325, 11: 0.0390069266, 16: 0.0055, 31: 3.33380381e-6}
    for pair, value in known.items():
        assert frequencies[pair] == pytest.approx(value, rel=1e-8), pair


def test_without_yarn_the_frequencies_differ():
    plain = inverse_frequencies(ModelConfig.from_dict({**CONFIG, "rope_scaling": None}))
    assert plain[10] == pytest.approx(0.0562341325, rel=1e-8)  # below the ramp
    assert plain[16] == pytest.approx(0.01, rel=1e-8)
    assert plain[31] == pytest.approx(40 * 3.33380381e-6, rel=1e-7)


def test_released_scales():
    assert softmax_scale(RELEASED) == pytest.approx(0.1352337789, rel=1e-9)
    assert rotation_scale(RELEASED) == 1.0


def test_unequal_mscales_scale_the_rotation():
    scaling = {**CONFIG["rope_scaling"], "mscale": 0.707}
    config = ModelConfig.from_dict({**CONFIG, "rope_scaling": scaling})
    expected = (0.1 * 0.707 * np.log(40) + 1) / (0.1 * np.log(40) + 1)
    assert rotation_scale(config) == pytest.approx(expected)
    assert softmax_scale(config) == pytest.approx(0.1352337789, rel=1e-9)


def test_rotation_depends_on_the_difference_of_positions_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 2, 64)), jnp.float32) for _ in range(2))

    def score(query_position, key_position):
        rotated_q = rotate(q, jnp.full((1, 1), query_position), RELEASED)
        rotated_k = rotate(k, jnp.full((1, 1), key_position), RELEASED)
        return np.asarray(jnp.sum(rotated_q * rotated_k, axis=-1))

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert not np.allclose(score(7, 3), score(7, 4), rtol=1e-2)

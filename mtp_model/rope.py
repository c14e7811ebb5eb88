"""Rotary position embedding: pairs of dims turned by position, with YaRN's frequencies.

Source: DeepSeek-V3's inference/model.py and YaRN (arXiv 2309.00071); `attention_factor` and
`truncate` as in Transformers. R is the rotary head size.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mtp_model.config import ModelConfig, Yarn


def _correction_dim(rotations: float, size: int, theta: float, length: int) -> float:
    """Pair index whose wavelength makes `rotations` turns over `length` positions."""
    return size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_ramp(yarn: Yarn, size: int, theta: float) -> np.ndarray:
    """[R/2] 0 where a pair keeps its frequency, 1 where it is interpolated."""
    length = yarn.original_max_position_embeddings
    low = _correction_dim(yarn.beta_fast, size, theta, length)
    high = _correction_dim(yarn.beta_slow, size, theta, length)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    return np.clip((np.arange(size // 2) - low) / ((high - low) or 0.001), 0, 1)


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """float64 [R/2]: radians a position for each pair; YaRN applies at every length."""
    size, theta = config.qk_rope_head_dim, config.rope_theta
    frequencies = theta ** -(np.arange(0, size, 2) / size)
    if config.yarn is None:
        return frequencies
    ramp = _yarn_ramp(config.yarn, size, theta)
    return frequencies * (1 - ramp) + frequencies / config.yarn.factor * ramp


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotation_scale(config: ModelConfig) -> float:
    """What cos and sin are multiplied by (1 for DeepSeek-V3, whose two mscales are equal)."""
    yarn = config.yarn
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(config: ModelConfig) -> float:
    """What attention scores are multiplied by (0.1352337789 for DeepSeek-V3)."""
    scale = config.qk_head_dim**-0.5
    if config.yarn is None or not config.yarn.mscale_all_dim:
        return scale
    return scale * _mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2


def rotate(
    x: Float[Array, "B T N R"], positions_BT: Int[Array, "B T"], config: ModelConfig
) -> Float[Array, "B T N R"]:
    """Rotate the pairs (x[2i], x[2i+1]), or (x[i], x[i + R/2]), by their position.

    The result holds all first members, then all second ones: queries and keys are permuted
    alike, so their products do not change.
    """
    frequencies = jnp.asarray(inverse_frequencies(config), jnp.float32)
    # One angle for all heads. Not a product of matrices, whose inputs an accelerator may round.
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if config.rope_interleave:
        first, second = x[..., ::2], x[..., 1::2]
    else:
        first, second = jnp.split(x, 2, axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return (rotated * rotation_scale(config)).astype(x.dtype)

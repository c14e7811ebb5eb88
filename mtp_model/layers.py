"""Linear, embedding and norm: the leaves of the module tree, FP8 or not.

Weights keep the checkpoint's orientation [out, in]. O out, I in, D hidden, V vocab.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mtp_model.config import ModelConfig
from mtp_model.products import float32_product, product
from mtp_model.sharding import BATCH_AXES, RULES, Axes, active_mesh, gather_for_use, placement

INIT_STD = 0.02
FP8 = jnp.float8_e4m3fn
V = TypeVar("V", bound=nnx.Variable)


class RouterBias(nnx.Variable):
    """`e_score_correction_bias`: float32, moved by the balancing rule, never by a gradient."""


class BlockScale(nnx.Variable):
    """`weight_scale_inv`: float32 scales of an FP8 weight's blocks, no gradient.

    Beside a weight that is not FP8 it is kept for export only and does not enter the product.
    """


def annotated(kind: type[V], value: jax.Array | jax.ShapeDtypeStruct, axes: Axes) -> V:
    """A variable that names the logical axes of its dimensions; `load` places it by them."""
    return kind(value, out_sharding=axes, sharding_rules=RULES, eager_sharding=False)


def num_blocks(size: int, edge: int) -> int:
    """Blocks along a dimension; the last may be partial ([576] in blocks of 128 gives 5)."""
    return -(-size // edge)


def dequantise(
    weight: Float[Array, "*stack out in"],
    scale: Float[Array, "*stack out_blocks in_blocks"],
    block: tuple[int, int],
    dtype: jnp.dtype,
) -> Float[Array, "*stack out in"]:
    """float32(weight) * scale of its block, then the one cast to `dtype`."""
    *_, rows, cols = weight.shape
    by_row = jnp.repeat(scale, block[0], axis=-2)[..., :rows, :]
    by_element = jnp.repeat(by_row, block[1], axis=-1)[..., :cols]
    return (weight.astype(jnp.float32) * by_element).astype(dtype)


def init_normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> jax.Array:
    """Fresh float32 weights of standard deviation 0.02 (`initializer_range`)."""
    return jax.random.normal(rngs.params(), shape, jnp.float32) * INIT_STD


class Gathered(NamedTuple):
    """A stored matrix, or a stack of them, gathered for use; also what has its parts: gradients of
    them, and the mesh axes that they are split over."""

    weight: Any  # in the dtype of the product, or FP8
    scale: Any  # of the blocks of an FP8 weight, else None
    lora_A: Any  # of its adapter [..., R, in], else None
    lora_B: Any  # [..., out, R], times the adapter's scale


class Weight(nnx.Module):
    """One stored matrix (or a stack of them) with the scales of its FP8 blocks.

    Its subclasses say what the matrix does. shape: [..., out, in]; axes: a logical axis for each
    dimension; quantised False: not FP8 in the released format, so without scales.
    """

    lora_A: nnx.LoRAParam | None = None  # an adapter's, of rank R, where `mtp_model.lora` added one
    lora_B: nnx.LoRAParam | None = None
    lora_scale: float = 1.0

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: Axes,
        config: ModelConfig,
        rngs: nnx.Rngs,
        quantised: bool = True,
    ):
        self.axes = axes
        self.block = config.weight_block_size if quantised else None
        self.weight = annotated(nnx.Param, init_normal(rngs, shape), axes)
        if self.block is not None:
            grid = tuple(map(num_blocks, shape[-2:], self.block))
            ones = jnp.ones((*shape[:-2], *grid), jnp.float32)
            self.weight_scale_inv = annotated(BlockScale, ones, (*axes[:-2], None, None))

    def dense(self, dtype: jnp.dtype) -> Float[Array, "*stack out in"]:
        """The weight ready for a product in `dtype`: dequantised, gathered over storage axes, with
        what an adapter adds to it."""
        weight, _, a, b = self.dequantised(dtype)
        return weight if a is None else weight + product("...or,...ri->...oi", b, a)

    def dequantised(self, dtype: jnp.dtype) -> Gathered:
        """The weight in `dtype`, gathered over storage axes, and the adapter apart."""
        stored = self.gathered(dtype)
        if stored.scale is None:
            return stored
        assert self.block is not None
        weight = dequantise(stored.weight, stored.scale, self.block, dtype)
        return stored._replace(weight=weight, scale=None)

    def gathered(self, dtype: jnp.dtype) -> Gathered:
        """The weight gathered over storage axes, in `dtype` or as FP8 with the scales beside it."""
        weight, adapter = self.weight[...], self._adapter(dtype)
        if weight.dtype != FP8:
            return Gathered(gather_for_use(weight.astype(dtype), self.axes), None, *adapter)
        if self.block is None:
            raise ValueError("an FP8 weight without block scales: the config has no block size")
        return Gathered(gather_for_use(weight, self.axes), self.weight_scale_inv[...], *adapter)

    def _adapter(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
        """A, and B times the adapter's scale."""
        if self.lora_A is None or self.lora_B is None:
            return None, None
        *outer, rows, columns = self.axes
        a = gather_for_use(self.lora_A[...].astype(dtype), (*outer, "lora", columns))
        b = gather_for_use(self.lora_B[...].astype(dtype), (*outer, rows, "lora"))
        return a, b * jnp.asarray(self.lora_scale, dtype)


class Linear(Weight):
    """y = x W^T, no bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: Axes,
        config: ModelConfig,
        rngs: nnx.Rngs,
        quantised: bool = True,
    ):
        super().__init__((out_features, in_features), axes, config, rngs, quantised)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        weight, _, a, b = self.dequantised(x.dtype)
        y = product("...i,oi->...o", x, weight)
        if a is None:
            return y
        return y + product("...r,or->...o", product("...i,ri->...r", x, a), b)


class Embedding(Weight):
    """A table [V, D] with a row for each token: the input embedding, and the output head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        super().__init__(shape, ("vocab", "hidden"), config, rngs, quantised=False)

    def lookup(self, tokens: Int[Array, "*batch"], dtype: jnp.dtype) -> Float[Array, "*batch D"]:
        """Rows of the table.

        On a mesh the table is never gathered: each device looks up, in the part that it stores, the
        tokens of all devices that store another part of the same rows, and sends each its own.
        """
        table_VD, mesh = self.weight[...], active_mesh()
        if mesh is None:
            return jnp.take(table_VD, tokens, axis=0, mode="clip").astype(dtype)
        stored = placement(self.axes, table_VD.shape, mesh).spec
        of_vocabulary, peers = stored

        def local(table_VD, tokens_BT):
            if peers:
                tokens_BT = jax.lax.all_gather(tokens_BT, peers, axis=0, tiled=True)
            if not of_vocabulary:
                rows_BTD = jnp.take(table_VD, tokens_BT, axis=0, mode="clip").astype(dtype)
            else:
                own_BT = tokens_BT - jax.lax.axis_index(of_vocabulary) * table_VD.shape[0]
                inside_BT = (own_BT >= 0) & (own_BT < table_VD.shape[0])
                rows_BTD = jnp.take(table_VD, own_BT, axis=0, mode="clip").astype(dtype)
                rows_BTD = jnp.where(inside_BT[..., None], rows_BTD, jnp.zeros((), dtype))
            if peers:
                rows_BTD = jax.lax.all_to_all(rows_BTD, peers, 0, rows_BTD.ndim - 1, tiled=True)
            return jax.lax.psum(rows_BTD, of_vocabulary) if of_vocabulary else rows_BTD

        batch = PartitionSpec(BATCH_AXES)
        tokens = jnp.clip(tokens, 0, table_VD.shape[0] - 1)
        return jax.shard_map(local, in_specs=(stored, batch), out_specs=batch, check_vma=False)(
            table_VD, tokens
        )

    def logits(self, h: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Float32 logits over the vocabulary."""
        return self.ready(h.dtype).logits(h)

    def ready(self, dtype: jnp.dtype) -> "Head":
        """The head for many products in `dtype`: gathered here, and not again in each of them."""
        return Head(self.dense(dtype))


class Head(NamedTuple):
    """An output head as products take it."""

    weight_VD: Float[Array, "V D"]

    def logits(self, h: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Float32 logits over the vocabulary."""
        return float32_product("...d,vd->...v", h, self.weight_VD)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, the mean square in float32."""

    def __init__(self, size: int, config: ModelConfig):
        self.epsilon = config.rms_norm_eps
        self.weight = annotated(nnx.Param, jnp.ones((size,), jnp.float32), ("norm",))

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        x_f32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True)
        normed = (x_f32 * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
        weight = self.weight[...].astype(x.dtype)
        return normed * jnp.expand_dims(weight, tuple(range(x.ndim - 1)))

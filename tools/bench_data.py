"""Synthetic checkpoints with the released tensor sizes, as many layers as asked for.

Experts are 7168 x 2048, attention and dense layers those of V3; the vocabulary and the number of
experts are smaller, so that a few gigabytes hold every kind of tensor. Values are random, finite.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from converters.format.fp8 import Block
from converters.format.header import DTYPES, make_header, parse_header
from converters.format.mapping import SCALE_SUFFIX
from converters.format.writer import StreamWriter
from mtp_model.files.local import AppendedFile
from tools.make_tiny_checkpoint import is_quantised, tiny_config, weight_shapes

Flavour = Literal["fp8", "bf16"]

FILE_BYTES = 1 << 30
BLOCK: Block = (128, 128)
RELEASED_SIZES = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "vocab_size": 16160,
    "weight_block_size": list(BLOCK),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_synthetic(folder: Path, flavour: Flavour, gigabytes: float) -> int:
    """Write the checkpoint whose size is nearest to `gigabytes`; its bytes."""
    config = _config_of_size(flavour, gigabytes * 1e9)
    folder.mkdir(parents=True)
    pool = _Pool(np.random.default_rng(0))
    files = list(_cut(_tensors(config)))
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):06d}.safetensors"
        raw = make_header([(t.name, t.dtype, t.shape) for t in tensors], {"format": "pt"})
        with StreamWriter(AppendedFile(folder / name), parse_header(raw, name, str(folder))) as out:
            for tensor in tensors:
                for piece in pool.pieces(tensor):
                    out.write(piece)
        weight_map |= {tensor.name: name for tensor in tensors}
    index = {"metadata": {"total_size": _size(config)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return _size(config)


def _config_of_size(flavour: Flavour, nbytes: float) -> dict[str, Any]:
    """The config whose checkpoint is nearest to `nbytes`; every layer adds as much."""

    def with_layers(layers: int) -> dict[str, Any]:
        sizes = RELEASED_SIZES | {"num_hidden_layers": layers}
        return _of_flavour(tiny_config("fp8", num_mtp=1, q_lora=True, sizes=sizes), flavour)

    smallest = _size(with_layers(2))
    layer = _size(with_layers(3)) - smallest
    return with_layers(2 + max(round((nbytes - smallest) / layer), 0))


def _of_flavour(config: dict[str, Any], flavour: Flavour) -> dict[str, Any]:
    if flavour == "fp8":
        return config
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _size(config: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in _tensors(config))


def _tensors(config: dict[str, Any]) -> Iterator[_Tensor]:
    """In layer order; no copies: their bytes would have to repeat."""
    for name, shape in weight_shapes(config, copies=False):
        if name.endswith("e_score_correction_bias"):
            yield _Tensor(name=name, dtype="F32", shape=shape)
        elif "quantization_config" in config and is_quantised(name, shape):
            yield _Tensor(name=name, dtype="F8_E4M3", shape=shape)
            grid = tuple(-(-size // edge) for size, edge in zip(shape, BLOCK, strict=True))
            yield _Tensor(name=name + SCALE_SUFFIX, dtype="F32", shape=grid)
        else:
            yield _Tensor(name=name, dtype="BF16", shape=shape)


def _cut(tensors: Iterator[_Tensor]) -> Iterator[list[_Tensor]]:
    file: list[_Tensor] = []
    for tensor in tensors:
        if sum(t.nbytes for t in file) > FILE_BYTES:
            yield file
            file = []
        file.append(tensor)
    yield file


class _Pool:
    """Random values of every dtype, taken from a few megabytes again and again."""

    def __init__(self, rng: np.random.Generator):
        values = rng.standard_normal(4 << 20).astype(np.float32)
        bits = rng.integers(0, 256, 16 << 20, dtype=np.uint8)
        self._values = {
            "F32": np.abs(values) * np.float32(1e-4) + np.float32(1e-5),
            "BF16": values.astype(ml_dtypes.bfloat16),
            # 0x7f and 0xff are NaN.
            "F8_E4M3": np.where(bits & 0x7F == 0x7F, np.uint8(0), bits),
        }
        self._begin = 0

    def pieces(self, tensor: _Tensor) -> Iterator[np.ndarray]:
        """The bytes of a tensor; neighbours differ."""
        pool = self._values[tensor.dtype].view(np.uint8)
        left = tensor.nbytes
        self._begin = (self._begin + 4096 * 7) % (len(pool) // 2)
        while left:
            piece = pool[self._begin : self._begin + min(left, len(pool) // 2)]
            yield piece
            left -= len(piece)

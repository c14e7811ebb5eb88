"""A safetensors checkpoint's weights for the torch reference.

Read and dequantised without any of the converters' own code, which they help to check.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from converters.verifying.torch_config import Config

Get = Callable[[str], Tensor]


def weights_of(folder: Path, config: Config) -> Get:
    """Return `get(name)`: float32, an FP8 tensor times its block scales, which may be in any file.

    `get` raises ValueError for a name that no file has.
    """
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = safe_open(path, framework="pt")
        files |= dict.fromkeys(file.keys(), file)
    block = (config.get("quantization_config") or {}).get("weight_block_size", (1, 1))

    def read(name: str) -> Tensor:
        if name not in files:
            raise ValueError(f"{name} is in no safetensors file of {folder}")
        return files[name].get_tensor(name)

    def get(name: str) -> Tensor:
        stored = read(name)
        if stored.dtype == torch.float8_e4m3fn:
            return dequantise(stored, read(f"{name}_scale_inv"), block)
        return stored.float()

    return get


def dequantise(quantised: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return float32 W[i, j] = q[i, j] * scale[i // rows, j // columns]; blocks may be partial."""
    for dim, edge in enumerate(block):
        scales = scales.repeat_interleave(edge, dim).narrow(dim, 0, quantised.shape[dim])
    return quantised.float() * scales

"""A safetensors checkpoint's weights for the torch reference.

Read and dequantised without any of the converters' own code, which they help to check.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from converters.verifying.logits.torch_config import Config

Get = Callable[[str], Tensor]


def weights_of(folder: Path, config: Config) -> Get:
    """Return `get(name)`: float32, an FP8 tensor times its block scales, which may be in any file.

    A file is open while one of its tensors is read: what is mapped into memory does not grow with
    the checkpoint. `get` raises ValueError for a name that no file has.
    """
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    block = (config.get("quantization_config") or {}).get("weight_block_size", (1, 1))

    def read(name: str) -> Tensor:
        if name in files:
            with safe_open(files[name], framework="pt") as file:
                return file.get_tensor(name)
        match name.split("."):
            case [*module, "experts", expert, "gate_proj" | "up_proj" | "down_proj" as kind, leaf]:
                fused = "down_proj" if kind == "down_proj" else "gate_up_proj"
                whole = ".".join([*module, "experts", fused + leaf.removeprefix("weight")])
                if whole in files:
                    with safe_open(files[whole], framework="pt") as file:
                        return _of_expert(file.get_slice(whole)[int(expert)], kind)
        raise ValueError(f"{name} is in no safetensors file of {folder}")

    def get(name: str) -> Tensor:
        stored = read(name)
        if stored.dtype == torch.float8_e4m3fn:
            return dequantise(stored, read(f"{name}_scale_inv"), block)
        return stored.float()

    return get


def _of_expert(rows: Tensor, kind: str) -> Tensor:
    """Return one projection of what Transformers 5 fuses: gate's rows, and below them up's."""
    half = rows.shape[0] // 2
    return {"gate_proj": rows[:half], "up_proj": rows[half:], "down_proj": rows}[kind]


def dequantise(quantised: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return float32 W[i, j] = q[i, j] * scale[i // rows, j // columns]; blocks may be partial."""
    for dim, edge in enumerate(block):
        scales = scales.repeat_interleave(edge, dim).narrow(dim, 0, quantised.shape[dim])
    return quantised.float() * scales

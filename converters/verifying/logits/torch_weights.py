"""A safetensors checkpoint's weights for the torch reference.

Read and dequantised without any of the converters' own code, which they help to check. Files on
this machine are read by the safetensors library, others by ranges of their bytes.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from converters.verifying.logits.torch_config import Config

Get = Callable[[str], Tensor]
Stored = Callable[[str, int | None], Tensor]
"""A tensor as it is stored, by name; with a number only that entry of its first dimension."""
ReadInto = Callable[[str, int, np.ndarray], None]
"""Fills uint8 [n] with the bytes of a file from an offset on."""

_DTYPES = {
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "F32": torch.float32,
}
_LENGTH_BYTES = 8  # of the header's length, with which a safetensors file begins
_PIECE_BYTES = 64 << 20  # of one read


def weights_of(folder: Path, config: Config) -> Get:
    """Return `get(name)` of the files in a folder: float32, FP8 times its block scales.

    A file is open while one of its tensors is read: what is mapped into memory does not grow with
    the checkpoint. `get` raises ValueError for a name that no file has.
    """
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)

    def stored(name: str, index: int | None) -> Tensor:
        with safe_open(files[name], framework="pt") as file:
            return file.get_tensor(name) if index is None else file.get_slice(name)[index]

    return _weights(files, stored, config, str(folder))


def far_weights(files: Iterable[str], read_into: ReadInto, config: Config, where: str) -> Get:
    """Return `get(name)` of files that are not on this machine: only bytes that are asked for.

    Their headers are read now. where: what errors name.
    """
    places: dict[str, _Place] = {}
    for file in files:
        places |= _header(file, read_into)

    def stored(name: str, index: int | None) -> Tensor:
        place = places[name] if index is None else places[name].entry(index)
        raw = torch.empty(place.end - place.begin, dtype=torch.uint8)
        for low in range(0, len(raw), _PIECE_BYTES):
            read_into(place.file, place.begin + low, raw[low : low + _PIECE_BYTES].numpy())
        return raw.view(place.dtype).view(place.shape)

    return _weights(places, stored, config, where)


class _Place(NamedTuple):
    """Where a tensor's bytes are, from the beginning of its file, and what they are."""

    file: str
    begin: int
    end: int
    dtype: torch.dtype
    shape: list[int]

    def entry(self, index: int) -> "_Place":
        count, *shape = self.shape
        size = (self.end - self.begin) // count
        begin = self.begin + index * size
        return self._replace(begin=begin, end=begin + size, shape=shape)


def _header(file: str, read_into: ReadInto) -> dict[str, _Place]:
    """Every tensor of a file, of the dtypes that weights may have."""
    length = np.empty(_LENGTH_BYTES, np.uint8)
    read_into(file, 0, length)
    text = np.empty(int.from_bytes(length.tobytes(), "little"), np.uint8)
    read_into(file, _LENGTH_BYTES, text)
    data, found = _LENGTH_BYTES + len(text), {}
    for name, entry in json.loads(text.tobytes()).items():
        if name != "__metadata__" and entry["dtype"] in _DTYPES:
            begin, end = (data + offset for offset in entry["data_offsets"])
            found[name] = _Place(file, begin, end, _DTYPES[entry["dtype"]], entry["shape"])
    return found


def _weights(names: Iterable[str], stored: Stored, config: Config, where: str) -> Get:
    """Return `get(name)`: float32, FP8 times its block scales, which may be in any file."""
    known = frozenset(names)
    block = (config.get("quantization_config") or {}).get("weight_block_size", (1, 1))

    def read(name: str) -> Tensor:
        if name in known:
            return stored(name, None)
        match name.split("."):
            case [*module, "experts", expert, "gate_proj" | "up_proj" | "down_proj" as kind, leaf]:
                fused = "down_proj" if kind == "down_proj" else "gate_up_proj"
                whole = ".".join([*module, "experts", fused + leaf.removeprefix("weight")])
                if whole in known:
                    return _of_expert(stored(whole, int(expert)), kind)
        raise ValueError(f"{name} is in no safetensors file of {where}")

    def get(name: str) -> Tensor:
        values = read(name)
        if values.dtype == torch.float8_e4m3fn:
            return dequantise(values, read(f"{name}_scale_inv"), block)
        return values.float()

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

"""Shared by the tests of import and export: tiny checkpoints in, trees of files compared."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.format import fp8_kernels
from converters.format.listing import SourceCheckpoint, open_safetensors
from converters.importing.importer import ImportSummary, import_checkpoint
from converters.sources.open import open_source
from mtp_model.checkpoint.chunks import ChunkPolicy
from mtp_model.files.place import Place
from tools.make_tiny_checkpoint import NUMPY_DTYPES, make_tiny_checkpoint

# Tiny matrices are cut into row blocks, and small experts' tensors are gathered, as large ones are.
SMALL_CHUNKS = ChunkPolicy(max_bytes=1500, gather_below_bytes=800, row_multiple=8)


def make_source(folder: Path, **options: Any) -> Path:
    """A tiny checkpoint with a side file in a subfolder."""
    make_tiny_checkpoint(folder, **options)
    (folder / "figures").mkdir()
    (folder / "figures" / "model.svg").write_bytes(b"<svg/>" * 1000)
    return folder


def opened(src: Path) -> SourceCheckpoint:
    """What the importer needs of a source."""
    return open_safetensors(open_source(str(src)))


def run_import(src: Path, dst: str | Path | Place, **options: Any) -> ImportSummary:
    """Import with small chunks."""
    return import_checkpoint(opened(src), dst, **{"policy": SMALL_CHUNKS} | options)


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_same_files(got: Path, wanted: Path) -> None:
    """The same files with the same bytes; the message names those that differ."""
    found, needed = tree_bytes(got), tree_bytes(wanted)
    assert found.keys() == needed.keys(), found.keys() ^ needed.keys()
    differ = [name for name in needed if found[name] != needed[name]]
    assert not differ, differ


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors checkpoint, read without the converter's own reader."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= _file_tensors(file.read_bytes())
    return found


def _file_tensors(data: bytes) -> dict[str, np.ndarray]:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        values = np.frombuffer(data[begin:end], NUMPY_DTYPES[entry["dtype"]])
        found[name] = values.reshape(entry["shape"])
    return found


def quantised(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The codes nearest to weight / scale; weight is bfloat16, its bits as uint16, or float32."""
    bits, shift = {2: (np.uint16, 16), 4: (np.uint32, 0)}[weight.itemsize]
    codes = np.empty(weight.shape, np.uint8)
    fp8_kernels.quantise(codes, weight.view(bits), scale, *block, np.uint32(shift))
    return codes


def block_scales(weight: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The new scales of FP8 weights, the plain way: max |weight| / 448, 1 for a block of zeros."""
    shape = [-(-size // edge) for size, edge in zip(weight.shape, block, strict=True)]
    padded = np.zeros((shape[0], block[0], shape[1], block[1]), np.float32)
    whole = padded.reshape(shape[0] * block[0], shape[1] * block[1])
    whole[: weight.shape[0], : weight.shape[1]] = np.abs(weight.astype(np.float32))
    largest = padded.max(axis=(1, 3))
    scales = np.maximum(largest / np.float32(448), np.finfo(np.float32).tiny)
    return np.where(largest == 0, np.float32(1), scales)


def dequantised(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Float32 weights of FP8 codes and block scales, the plain way."""
    rows, columns = weight.shape
    spread = scale.repeat(block[0], axis=0)[:rows].repeat(block[1], axis=1)[:, :columns]
    return weight.astype(np.float32) * spread


def patch_tensor(folder: Path, name: str, values: Mapping[tuple[int, ...], bytes]) -> None:
    """Overwrite elements of a tensor in place, given as their bytes."""
    for file in folder.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        size = int.from_bytes(data[:8], "little")
        entry = json.loads(data[8 : 8 + size]).get(name)
        if entry is None:
            continue
        itemsize = NUMPY_DTYPES[entry["dtype"]].itemsize
        for index, value in values.items():
            at = int(np.ravel_multi_index(index, entry["shape"])) * itemsize
            begin = 8 + size + entry["data_offsets"][0] + at
            data[begin : begin + itemsize] = value
        file.write_bytes(data)
        return
    raise AssertionError(f"no tensor {name} in {folder}")

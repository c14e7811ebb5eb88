"""Checkpoints that lost their MTP module, and modules without a main model, made by plain means."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from roundtrip import read_tensors

from tools.make_tiny_checkpoint import write_safetensors

INDEX = "model.safetensors.index.json"
MTP_FILE = "mtp.safetensors"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def set_config(folder: Path, **values: Any) -> None:
    """Change keys of config.json; a value of `...` removes the key."""
    config = {key: value for key, value in (config_of(folder) | values).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def module_of(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint's MTP module, by their names below the layer."""
    prefix = f"model.layers.{config_of(folder)['num_hidden_layers']}."
    found = read_tensors(folder)
    return {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}


def write_files(folder: Path, files: dict[str, dict[str, np.ndarray]], *, index: bool) -> None:
    """Safetensors files, and an index that names all of them."""
    for file, tensors in files.items():
        write_safetensors(folder / file, tensors)
    if index:
        places = {name: file for file, tensors in files.items() for name in tensors}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def without_module(src: Path, dst: Path, **config: Any) -> Path:
    """A copy that lost its MTP module, as tools save it; its config says what is given."""
    shutil.copytree(src, dst)
    tensors, layers = read_tensors(src), config_of(src)["num_hidden_layers"]
    files: dict[str, dict[str, np.ndarray]] = {}
    for name, file in weight_map(src).items():
        (dst / file).unlink(missing_ok=True)
        if not name.startswith(f"model.layers.{layers}."):
            files.setdefault(file, {})[name] = tensors[name]
    write_files(dst, files, index=True)
    set_config(dst, **config)
    return dst


def draft_of(src: Path, dst: Path, *, copies: bool = True) -> Path:
    """The MTP module of a checkpoint alone, as SGLang wants a draft."""
    dst.mkdir()
    tensors = {f"model.layers.0.{name}": tensor for name, tensor in module_of(src).items()}
    if not copies:
        for name in ("embed_tokens.weight", "shared_head.head.weight"):
            del tensors[f"model.layers.0.{name}"]
    write_files(dst, {"nextn.safetensors": tensors}, index=False)
    changed = {"num_hidden_layers": 1, "architectures": ["DeepseekV3ForCausalLMNextN"]}
    config = config_of(src) | changed | {"first_k_dense_replace": 0}
    (dst / "config.json").write_text(json.dumps(config))
    return dst

"""Checkpoints that lost their MTP module, and modules without a main model, made by plain means;
and what has to come of putting them together."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from roundtrip import read_tensors, tree_bytes

from converters.cli.main import main
from tools.make_tiny_checkpoint import write_safetensors

INDEX = "model.safetensors.index.json"
MTP_FILE = "mtp.safetensors"
COPIES = {"embed_tokens.weight": "model.embed_tokens.weight"}
COPIES["shared_head.head.weight"] = "lm_head.weight"


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
    """The MTP module of a checkpoint alone, as SGLang's own script writes a draft: its config has
    one layer, and `first_k_dense_replace` above that."""
    dst.mkdir()
    tensors = {f"model.layers.0.{name}": tensor for name, tensor in module_of(src).items()}
    if not copies:
        for name in ("embed_tokens.weight", "shared_head.head.weight"):
            del tensors[f"model.layers.0.{name}"]
    write_files(dst, {"nextn.safetensors": tensors}, index=False)
    changed = {"num_hidden_layers": 1, "architectures": ["DeepseekV3ForCausalLMNextN"]}
    (dst / "config.json").write_text(json.dumps(config_of(src) | changed))
    return dst


def run(*args: object) -> None:
    assert main([str(arg) for arg in args]) == 0


def round_trip(main_model: Path, module: object, tmp_path: Path, *options: str) -> Path:
    """Import both, prove that it is what both give, export it; returns the export."""
    taken = ("--mtp-from", module)
    run("import", main_model, tmp_path / "ckpt", *taken, *options)
    run("verify", main_model, tmp_path / "ckpt", *taken)
    run("export", tmp_path / "ckpt", tmp_path / "out")
    run("verify", tmp_path / "out", tmp_path / "ckpt")
    return tmp_path / "out"


def assert_only_the_module_is_new(out: Path, main_model: Path) -> None:
    """The main model's files byte for byte, one more, and an index and a config that say so."""
    found, theirs = tree_bytes(out), tree_bytes(main_model)
    assert found.keys() - theirs.keys() <= {MTP_FILE, INDEX}
    may_differ = {INDEX, "config.json", MTP_FILE}
    assert {n: b for n, b in found.items() if n not in may_differ} == {
        n: b for n, b in theirs.items() if n not in may_differ
    }
    assert weight_map(out).keys() == read_tensors(out).keys()
    in_module = {n for n, file in weight_map(out).items() if file == MTP_FILE}
    layers = config_of(out)["num_hidden_layers"]
    assert in_module == {f"model.layers.{layers}.{name}" for name in module_of(out)}
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_tensors(out).values())


def assert_module(out: Path, wanted: dict[str, np.ndarray]) -> None:
    """The module's own tensors are these, its copies are the main model's."""
    found, whole = module_of(out), read_tensors(out)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        other = whole[COPIES[name]] if name in COPIES else wanted[name]
        assert (tensor.dtype, tensor.tobytes()) == (other.dtype, other.tobytes()), name

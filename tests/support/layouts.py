"""Checkpoints as other tools write them, made of tiny ones in the released format."""

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gcs_server import GcsServer, key_of
from hub_client import REPO, lone_hub
from roundtrip import SMALL_CHUNKS, assert_same_files, read_tensors, run_import, tree_bytes
from side_by_side import run_all
from verified import storage

from converters.exporting.exporter import export_checkpoint
from converters.format.listing import open_safetensors
from converters.importing.importer import import_checkpoint
from converters.sources.hub import HubSource
from converters.sources.open import open_source
from mtp_model.checkpoint.directory import Checkpoint, open_checkpoint
from tools.make_tiny_checkpoint import make_tiny_checkpoint, write_json, write_weights

Tensors = dict[str, np.ndarray]
Edit = Callable[[Tensors, Tensors], None]
"""Told the tensors of a tiny checkpoint, which it changes, and those of the same one in bf16."""

SCALE = "_scale_inv"


def make_edited(
    folder: Path, edit: Edit, *, quantization: Mapping[str, Any] | None = None, **options: Any
) -> Path:
    """A tiny checkpoint whose tensors were edited. quantization: keys of quantization_config."""
    plain = folder.with_name(folder.name + "-bf16")
    make_tiny_checkpoint(folder, **options)
    make_tiny_checkpoint(plain, **{**options, "dtype": "bf16"})
    tensors, in_bf16 = read_tensors(folder), read_tensors(plain)
    shutil.rmtree(plain)
    edit(tensors, in_bf16)
    for file in folder.glob("model*"):
        file.unlink()
    write_weights(folder, tensors, options.get("num_files", 7))
    if quantization:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= quantization
        write_json(folder / "config.json", config)
    return folder


def in_bf16(*parts: str, layers: tuple[int, ...] = tuple(range(9))) -> Edit:
    """Weights of these layers whose names have one of these parts, in bf16 and without scales."""
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)

    def edit(tensors: Tensors, plain: Tensors) -> None:
        for name in list(tensors):
            weight = name.removesuffix(SCALE)
            if name.startswith(prefixes) and any(part in weight for part in parts):
                if weight == name:
                    tensors[name] = plain[name]
                else:
                    del tensors[name]

    return edit


def fused(tensors: Tensors, layers: tuple[int, ...] = (2, 3, 4)) -> None:
    """Put the experts of these layers together as Transformers 5 saves them."""
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp.experts."
        for suffix in ("", "_scale_inv"):
            every: dict[str, list[np.ndarray]] = {}
            for number, projection in itertools.product(range(12), ("gate", "up", "down")):
                name = f"{prefix}{number}.{projection}_proj.weight{suffix}"
                if name in tensors:
                    every.setdefault(projection, []).append(tensors.pop(name))
            if every:
                both = zip(every["gate"], every["up"], strict=True)
                gate_up = [np.concatenate(pair) for pair in both]
                tensors[f"{prefix}gate_up_proj{suffix}"] = np.stack(gate_up)
                tensors[f"{prefix}down_proj{suffix}"] = np.stack(every["down"])


def round_trip(source: Path, folder: Path, **options: Any) -> Checkpoint:
    """Import, verify and export, all of which have to give the source's bytes."""
    run_import(source, folder / "ckpt", **options)
    checkpoint = open_checkpoint(folder / "ckpt")
    found = storage(source, folder / "ckpt")
    assert found.holds, (found.files, found.differences)
    summary = export_checkpoint(checkpoint, folder / "out")
    assert_same_files(folder / "out", source)
    assert summary.changed == ()
    return checkpoint


def assert_killed_imports_go_on(source: Path, folder: Path, *points: tuple[str, int]) -> None:
    """Imports in bf16 that were killed at these points end as one that was not: folder/whole."""
    run_import(source, folder / "whole", dtype="bf16")
    killed = {point: folder / "-".join(map(str, point)) for point in points}
    run_all([("import", source, dst, *point, (0, 1)) for point, dst in killed.items()])
    for dst in killed.values():
        assert run_import(source, dst, dtype="bf16").resumed_units > 0
        assert_same_files(dst, folder / "whole")


def assert_the_hub_gives_the_same(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import from the Hub and one from the folder differ in what they say of the source only."""
    run_import(source, folder / "local")
    with lone_hub(folder, monkeypatch) as hub:
        hub.add(REPO, tree_bytes(source))
        checkpoint = open_safetensors(HubSource(REPO))
        import_checkpoint(checkpoint, folder / "ckpt", policy=SMALL_CHUNKS)
    found, wanted = tree_bytes(folder / "ckpt"), tree_bytes(folder / "local")
    assert found.keys() == wanted.keys()
    assert {n for n in wanted if found[n] != wanted[n]} <= {"provenance.json", "COMPLETE"}


def assert_a_bucket_gives_the_same(source: Path, folder: Path, gcs: GcsServer, url: str) -> None:
    """Imports from a bucket have the local ones' chunks; their exports to it the source's bytes."""
    for name, content in tree_bytes(source).items():
        gcs.put(f"{key_of(url)}/source/{name}", content)
    for dtype, dst in (("keep", folder / "keep"), ("bf16", f"{url}/bf16")):
        run_import(source, folder / f"local-{dtype}", dtype=dtype)
        listing = open_safetensors(open_source(f"{url}/source"))
        import_checkpoint(listing, dst, dtype=dtype, policy=SMALL_CHUNKS)
        found, wanted = open_checkpoint(dst), open_checkpoint(folder / f"local-{dtype}")
        assert found.provenance["pieces"] == wanted.provenance["pieces"]
        files = found.provenance["source"]["files"]
        assert files == wanted.provenance["source"]["files"]
        assert export_checkpoint(found, f"{url}/{dtype}-out").changed == ()
        assert gcs.contents(f"{key_of(url)}/{dtype}-out") == tree_bytes(source)

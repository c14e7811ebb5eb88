"""Import and export: round trips byte for byte, and everything that may go wrong with values."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import xxhash
from changed import leaf_of_rows
from roundtrip import (
    SMALL_CHUNKS,
    assert_same_files,
    block_scales,
    dequantised,
    make_source,
    opened,
    patch_tensor,
    quantised,
    read_tensors,
    run_import,
    tree_bytes,
)

from converters.cli.common import source_of
from converters.exporting import encode, exporter
from converters.exporting import plan as export_plan
from converters.exporting import stream as export_stream
from converters.exporting.encode import Encoder, held_slots
from converters.exporting.exporter import export_checkpoint
from converters.format import fp8 as fp8_format
from converters.format.header import make_header, parse_header
from converters.format.listing import INDEX_FILE, open_safetensors
from converters.format.mapping import slots
from converters.importing.importer import import_checkpoint
from converters.sources.local import LocalSource
from mtp_model.checkpoint.chunks import Leaf
from mtp_model.checkpoint.derived import write_derived
from mtp_model.checkpoint.directory import (
    UNFINISHED,
    Checkpoint,
    CheckpointError,
    open_checkpoint,
)
from mtp_model.config import ModelConfig
from mtp_model.files.local import LocalPlace
from mtp_model.problems import ProblemsError, UserError
from tools.make_tiny_checkpoint import NUMPY_DTYPES

BF16 = np.dtype(ml_dtypes.bfloat16)
BLOCK = (8, 16)
Q_B = "self_attn.q_b_proj.weight"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "fp8", num_mtp=2)


@pytest.fixture(scope="module")
def kept(fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    dst = tmp_path_factory.mktemp("ckpt") / "kept"
    run_import(fp8, dst)
    return open_checkpoint(dst)


@pytest.fixture(scope="module")
def in_bf16(fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    dst = tmp_path_factory.mktemp("ckpt") / "bf16"
    run_import(fp8, dst, dtype="bf16")
    return open_checkpoint(dst)


@pytest.mark.parametrize(
    ("flavour", "dtype", "options"),
    [
        ("fp8", "keep", {}),
        ("fp8", "keep", {"num_mtp": 2, "copies": False}),
        ("fp8", "bf16", {"num_mtp": 2}),
        ("fp8", "bf16", {"copies": False, "q_lora": False}),
        ("fp8", "f32", {}),
        ("fp8", "keep", {"num_files": 1}),
        ("bf16", "keep", {"num_mtp": 2}),
        ("bf16", "keep", {"copies": False}),
        ("bf16", "bf16", {}),
        ("bf16", "f32", {"num_mtp": 0}),
        ("f32", "keep", {"num_mtp": 2, "copies": False}),
        ("f32", "keep", {}),
    ],
)
def test_round_trip_is_byte_for_byte(
    tmp_path: Path, flavour: str, dtype: str, options: dict[str, Any]
):
    src = make_source(tmp_path / "src", dtype=flavour, **options)
    run_import(src, tmp_path / "ckpt", dtype=dtype)
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    summary = export_checkpoint(checkpoint, tmp_path / "out")
    assert_same_files(tmp_path / "out", src)
    assert summary.changed == summary.requantised == ()
    assert all(file.same_as_source for file in summary.files)
    assert summary.num_tensors == len(read_tensors(src))


def test_the_small_chunks_cut_and_gather(kept: Checkpoint):
    leaves = kept.leaves
    assert leaves["moe_layers.mlp.experts.up_proj.weight"].chunk[:2] == (1, 1)
    assert leaves["moe_layers.mlp.experts.up_proj.weight_scale_inv"].chunk[:2] == (1, 12)
    assert leaves["lm_head.weight"].num_row_chunks > 10
    cut = [leaf for leaf in leaves.values() if leaf.tensor_shape[0] % leaf.chunk_rows]
    assert cut, "no leaf has an edge chunk"


def test_keep_stores_every_byte(fp8: Path, kept: Checkpoint):
    tensors = read_tensors(fp8)
    for slot in slots(ModelConfig.from_dict(kept.config_dict)).values():
        found = kept.read_rows(slot.path, slot.index, 0, slot.shape[0])
        assert found.dtype == tensors[slot.name].dtype, slot
        assert found.tobytes() == tensors[slot.name].tobytes(), slot


def test_bf16_is_the_dequantised_weight_and_keeps_the_scales(fp8: Path, in_bf16: Checkpoint):
    tensors = read_tensors(fp8)
    for slot in slots(ModelConfig.from_dict(in_bf16.config_dict)).values():
        wanted = tensors[slot.name]
        if slot.scale:
            wanted = dequantised(wanted, tensors[slot.scale], BLOCK).astype(BF16)
        found = in_bf16.read_rows(slot.path, slot.index, 0, slot.shape[0])
        assert found.dtype == wanted.dtype, slot
        assert found.tobytes() == wanted.tobytes(), slot


def test_orbax_alone_restores_what_was_imported(fp8: Path, kept: Checkpoint):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(kept.params)
    tensors = read_tensors(fp8)
    for slot in slots(ModelConfig.from_dict(kept.config_dict)).values():
        leaf = tree
        for key in slot.path.split("."):
            leaf = leaf[key]
        assert np.asarray(leaf)[slot.index].tobytes() == tensors[slot.name].tobytes(), slot


def test_provenance_has_the_digest_of_every_file_and_piece(fp8: Path, kept: Checkpoint):
    record = kept.provenance["source"]
    for file, found in record["files"].items():
        data = (fp8 / file).read_bytes()
        size = int.from_bytes(data[:8], "little")
        tensors = json.loads(data[8 : 8 + size])
        del tensors["__metadata__"]
        spans = sorted(entry["data_offsets"] for entry in tensors.values())
        digests = [xxhash.xxh3_128_digest(data[8 : 8 + size])]
        digests += [xxhash.xxh3_128_digest(data[8 + size + a : 8 + size + b]) for a, b in spans]
        assert found["digest"] == xxhash.xxh3_128_hexdigest(b"".join(digests)), file
        assert found["size"] == len(data)
    for piece in kept.pieces():
        assert xxhash.xxh3_128_hexdigest(piece.file.read_bytes()) == piece.digest
    assert kept.damaged_files() == []
    wanted = {"scope": "all", "dtype": "keep", "mtp_hidden_state": "post_norm", "copies": "check"}
    assert wanted.items() <= kept.provenance.items()


def test_hidden_state_of_the_user_is_recorded(fp8: Path, tmp_path: Path):
    run_import(fp8, tmp_path / "ckpt", scope="mtp", mtp_hidden_state="pre_norm")
    assert open_checkpoint(tmp_path / "ckpt").provenance["mtp_hidden_state"] == "pre_norm"


def test_progress_reaches_the_total(fp8: Path, tmp_path: Path):
    for run in (
        lambda report: run_import(fp8, tmp_path / "ckpt", progress=report),
        lambda report: export_checkpoint(
            open_checkpoint(tmp_path / "ckpt"), tmp_path / "out", progress=report
        ),
    ):
        seen: list[tuple[int, int]] = []
        run(lambda done, total, seen=seen: seen.append((done, total)))
        assert seen[0][0] == 0
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1] > 300_000


class SpySource(LocalSource):
    """Counts the bytes that are read of every file."""

    def __init__(self, name: str):
        super().__init__(name)
        self.read_bytes: dict[str, int] = {}

    def read_into(self, file: str, begin: int, out: Any) -> None:
        self.read_bytes[file] = self.read_bytes.get(file, 0) + out.nbytes
        super().read_into(file, begin, out)


def test_scope_mtp_reads_only_what_it_needs(fp8: Path, tmp_path: Path):
    source = SpySource(str(fp8))
    summary = import_checkpoint(open_safetensors(source), tmp_path / "ckpt", scope="mtp")
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    assert {path.split(".")[0] for path in checkpoint.leaves} == {
        "embed_tokens",
        "lm_head",
        "mtp",
        "norm",
    }
    tensors = read_tensors(fp8)
    needed = sum(tensors[name].nbytes for name in slots(checkpoint.config, "mtp"))
    assert sum(source.read_bytes.values()) == summary.source_bytes == needed
    record = checkpoint.provenance["source"]["files"]
    assert any(file["digest"] is None for file in record.values())
    with pytest.raises(ProblemsError, match="was imported with --scope mtp"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_as_bf16_drops_the_scales(fp8: Path, kept: Checkpoint, tmp_path: Path):
    summary = export_checkpoint(kept, tmp_path / "out", dtype="bf16")
    tensors, out = read_tensors(fp8), read_tensors(tmp_path / "out")
    scales = {name for name in tensors if name.endswith("_scale_inv")}
    assert out.keys() == tensors.keys() - scales
    assert f"{len(scales)} scales and config.json's quantization_config" in summary.notes[1]
    for name, found in out.items():
        wanted = tensors[name]
        if name + "_scale_inv" in scales:
            wanted = dequantised(wanted, tensors[name + "_scale_inv"], BLOCK).astype(BF16)
        assert found.dtype == wanted.dtype, name
        assert found.tobytes() == wanted.tobytes(), name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {k: v for k, v in kept.config_dict.items() if k != "quantization_config"}
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in out.values())
    run_import(tmp_path / "out", tmp_path / "again")  # what was written is a whole checkpoint
    assert (tmp_path / "out/figures/model.svg").read_bytes() == b"<svg/>" * 1000


def test_export_of_float32_as_bf16_rounds_once(tmp_path: Path):
    src = make_source(tmp_path / "src", dtype="f32")
    run_import(src, tmp_path / "ckpt")
    export_checkpoint(open_checkpoint(tmp_path / "ckpt"), tmp_path / "out", dtype="bf16")
    tensors, out = read_tensors(src), read_tensors(tmp_path / "out")
    for name, found in out.items():
        stays = name.endswith("e_score_correction_bias")
        wanted = tensors[name] if stays else tensors[name].astype(BF16)
        assert found.tobytes() == wanted.tobytes(), name
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def trained(base: Checkpoint, dst: Path, path: str, change: Any) -> tuple[Checkpoint, np.ndarray]:
    """A checkpoint with one leaf changed: `change` takes and gives a float32 array."""
    leaf = base.leaves[path]
    new = np.empty(leaf.shape, BF16)
    for index in np.ndindex(*leaf.shape[: leaf.num_stack_dims]):
        rows = base.read_rows(path, index, 0, leaf.tensor_shape[0])
        new[index] = rows.astype(np.float32).astype(BF16)
    new = change(new.astype(np.float32)).astype(BF16)

    def rows_of(index: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        return new[index][start:stop]

    changed = {path: leaf_of_rows(BF16, rows_of)}
    return write_derived(base, dst, changed, {}, policy=SMALL_CHUNKS), new


def test_only_trained_tensors_change(fp8: Path, in_bf16: Checkpoint, tmp_path: Path):
    path = f"mtp.block.{Q_B}"
    final, new = trained(in_bf16, tmp_path / "final", path, lambda w: w + 0.05)
    summary = export_checkpoint(final, tmp_path / "out")
    tensors, out = read_tensors(fp8), read_tensors(tmp_path / "out")
    names = [f"model.layers.{layer}.{Q_B}" for layer in (4, 5)]
    both = {*names, *(name + "_scale_inv" for name in names)}
    assert {n for n in tensors if out[n].tobytes() != tensors[n].tobytes()} == both
    assert set(summary.changed) == both
    costs = {cost.name: cost for cost in summary.requantised}
    assert set(costs) == set(names)
    for name, weight in zip(names, new, strict=True):
        scale = block_scales(weight, BLOCK)
        assert np.array_equal(out[name + "_scale_inv"], scale)
        assert np.array_equal(out[name].view(np.uint8), quantised(weight, scale, BLOCK))
        error = dequantised(out[name], scale, BLOCK) - weight.astype(np.float32)
        rms = np.sqrt((error**2).sum() / (weight.astype(np.float32) ** 2).sum())
        assert costs[name].rms_rel_err == pytest.approx(float(rms), rel=1e-4)
        assert 0 < costs[name].rms_rel_err < costs[name].max_rel_err < 1 / 16
    for name in (set(tree_bytes(tmp_path / "out")) & set(tree_bytes(fp8))) - {
        file.name for file in summary.files if not file.same_as_source
    }:
        assert (tmp_path / "out" / name).read_bytes() == (fp8 / name).read_bytes()


def test_rows_that_were_not_trained_keep_their_bytes(
    fp8: Path, in_bf16: Checkpoint, tmp_path: Path
):
    def one_row(weight: np.ndarray) -> np.ndarray:
        weight[0, 9] *= 3.0  # second row of blocks of layer 4
        return weight

    final, _ = trained(in_bf16, tmp_path / "final", f"mtp.block.{Q_B}", one_row)
    summary = export_checkpoint(final, tmp_path / "out")
    name = f"model.layers.4.{Q_B}"
    before, after = read_tensors(fp8)[name], read_tensors(tmp_path / "out")[name]
    same = (before.view(np.uint8) == after.view(np.uint8)).all(axis=1)
    assert same[:8].all()
    assert same[16:].all()
    assert not same[9]
    assert [cost.name for cost in summary.requantised] == [name]


def test_bytes_do_not_depend_on_how_rows_are_divided(
    in_bf16: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = "moe_layers.mlp.experts.down_proj.weight"
    final, _ = trained(in_bf16, tmp_path / "final", path, lambda w: w + 0.01)
    export_checkpoint(final, tmp_path / "one")
    for module in (encode, export_stream):
        monkeypatch.setattr(module, "PIECE_BYTES", 900)
    export_checkpoint(final, tmp_path / "two", workers=1)
    assert_same_files(tmp_path / "two", tmp_path / "one")
    written = read_tensors(tmp_path / "one")
    names = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
    dtypes = {name: names[tensor.dtype] for name, tensor in written.items()}
    encoder = Encoder(final, held_slots(final), dtypes)
    for name in sorted(written, reverse=True):  # scales without their weights
        data = b"".join(piece.data.tobytes() for _, piece in encoder.pieces(name))
        assert data == written[name].tobytes(), name


@pytest.mark.parametrize("order", [-1, 1])
def test_scales_may_come_before_their_weights_and_in_another_file(
    in_bf16: Checkpoint, tmp_path: Path, order: int, monkeypatch: pytest.MonkeyPatch
):
    """A weight is quantised once, where its scales come behind it; the bytes are the same."""
    path = f"mtp.block.{Q_B}"
    final, _ = trained(in_bf16, tmp_path / "final", path, lambda w: w + 0.05)
    plain = export_checkpoint(final, tmp_path / "plain")
    kept = export_plan.make_plan(final, "keep")
    tensors = sorted(
        (tensor for file in kept.files for tensor in file.tensors),
        key=lambda tensor: order * tensor.name.endswith("_scale_inv"),
    )
    half = len(tensors) // 2
    files = tuple(
        parse_header(make_header([(t.name, t.dtype, t.shape) for t in part], {}), name, "test")
        for name, part in (("a.safetensors", tensors[:half]), ("b.safetensors", tensors[half:]))
    )
    monkeypatch.setattr(
        exporter,
        "make_plan",
        lambda *_, **__: dataclasses.replace(kept, files=files, dtype="bf16"),
    )
    quantised: list[int] = []
    real = fp8_format.requantise_into
    monkeypatch.setattr(
        fp8_format,
        "requantise_into",
        lambda codes, *rest, **named: quantised.append(codes.size) or real(codes, *rest, **named),
    )
    summary = export_checkpoint(final, tmp_path / "out")
    found, wanted = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "plain")
    assert found.keys() == wanted.keys()
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
    assert set(summary.requantised) == set(plain.requantised)
    weights = sum(wanted[name].size for name in wanted if name + "_scale_inv" in wanted)
    assert sum(quantised) == (weights if order == 1 else 2 * weights)


def test_damage_is_not_exported(kept: Checkpoint, tmp_path: Path):
    """The negative control of every round trip: one bit of one chunk."""
    copy = write_derived(kept, tmp_path / "ckpt", {}, {})
    chunk = copy.params / "moe_layers.mlp.experts.up_proj.weight" / "1.5.0.0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.unlink()  # it is a hard link of the other checkpoint's
    chunk.write_bytes(data)
    with pytest.raises(ProblemsError, match=r"damaged +model\.layers\.3\.mlp\.experts\.5\.up_proj"):
        export_checkpoint(copy, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()
    assert list((tmp_path / "out").glob("*.safetensors"))  # it was noticed while that was written
    shutil.rmtree(tmp_path / "out")
    (copy.path / "figures/model.svg").write_bytes(b"<svg>")
    chunk.unlink()
    os.link(f"{kept.params}/{chunk.parent.name}/{chunk.name}", chunk)
    with pytest.raises(ProblemsError, match=r"damaged +figures/model\.svg was changed since"):
        export_checkpoint(copy, tmp_path / "out")
    (copy.path / "figures/model.svg").unlink()
    with pytest.raises(ProblemsError, match=r"damaged +figures/model\.svg was changed since"):
        export_checkpoint(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # before anything was written


def test_a_disk_that_forgets_is_noticed(
    kept: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = LocalPlace.digest

    def wrong(path: LocalPlace) -> str:
        return "0" * 32 if path.name.startswith("model-00003") else real(path)

    monkeypatch.setattr(LocalPlace, "digest", wrong)
    with pytest.raises(ProblemsError, match=r"model-00003.* the disk is failing"):
        export_checkpoint(kept, tmp_path / "out")
    assert (tmp_path / "out/.unfinished").is_dir()
    monkeypatch.setattr(LocalPlace, "digest", real)
    assert export_checkpoint(kept, tmp_path / "out").resumed_files >= 2


def test_copies_that_differ(tmp_path: Path):
    src = make_source(tmp_path / "src")
    name = "model.layers.4.shared_head.head.weight"
    patch_tensor(src, name, {(3, 3): b"\x00\x40"})
    with pytest.raises(ProblemsError, match=f"copy +{name} differs from lm_head.weight"):
        run_import(src, tmp_path / "ckpt")
    run_import(src, tmp_path / "ckpt", copies="main")  # continues
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    assert checkpoint.provenance["stale_copies"] == [name]
    summary = export_checkpoint(checkpoint, tmp_path / "out")
    assert summary.changed == (name,)
    out = read_tensors(tmp_path / "out")
    assert out[name].tobytes() == read_tensors(src)["lm_head.weight"].tobytes()


def test_all_header_problems_at_once(tmp_path: Path):
    src = make_source(tmp_path / "src", num_mtp=2)
    config = json.loads((src / "config.json").read_text()) | {"kv_lora_rank": 23, "v_head_dim": 15}
    with pytest.raises(ProblemsError) as caught:
        import_checkpoint(dataclasses.replace(opened(src), config=config), tmp_path / "ckpt")
    assert len(caught.value.problems) > 12
    assert not (tmp_path / "ckpt").exists()


def test_destinations_are_respected(fp8: Path, kept: Checkpoint, tmp_path: Path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="nothing in it was touched"):
            run_import(fp8, mine, overwrite=overwrite)
        with pytest.raises(CheckpointError, match="nothing in it was touched"):
            export_checkpoint(kept, mine, overwrite=overwrite)
        with pytest.raises(CheckpointError, match="nothing in it was touched"):
            export_checkpoint(kept, kept.path, overwrite=overwrite)
    assert tree_bytes(mine) == {"thesis.tex": b"precious"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_import_never_removes_its_source(
    fp8: Path, kept: Checkpoint, tmp_path: Path, overwrite: bool
):
    """Exports and originals lie in checkpoint directories, which --overwrite would empty first."""
    dst = Path(shutil.copytree(kept.path, tmp_path / "dst"))
    shutil.copytree(fp8, dst / "src")
    links, alone = tmp_path / "links", Path(shutil.copytree(fp8, tmp_path / "alone"))
    shutil.copytree(dst / "src", links, copy_function=lambda src, dst: Path(dst).symlink_to(src))
    (tmp_path / "link").symlink_to(dst)
    before = tree_bytes(tmp_path)
    for src, place in (
        (dst / "src", dst),
        (dst / "src", tmp_path / "link"),
        (links, dst),
        (alone, alone / "ckpt"),
        (alone, tmp_path),
    ):
        source = open_safetensors(LocalSource(str(src), follow_links=True))
        with pytest.raises(CheckpointError, match="overlap; name another place"):
            import_checkpoint(source, place, overwrite=overwrite)
    assert tree_bytes(tmp_path) == before


def test_overwrite_replaces_a_checkpoint(fp8: Path, kept: Checkpoint, tmp_path: Path):
    other = make_source(tmp_path / "other", dtype="bf16", seed=5, num_files=9)
    run_import(other, tmp_path / "ckpt")
    export_checkpoint(open_checkpoint(tmp_path / "ckpt"), tmp_path / "out")
    before = tree_bytes(tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="is a complete checkpoint"):
        run_import(fp8, tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="holds a checkpoint"):
        export_checkpoint(kept, tmp_path / "out")
    assert tree_bytes(tmp_path / "ckpt") == before
    run_import(fp8, tmp_path / "ckpt", overwrite=True)
    assert_same_files(tmp_path / "ckpt", kept.path)
    export_checkpoint(kept, tmp_path / "out", overwrite=True)
    assert_same_files(tmp_path / "out", fp8)


def test_overwrite_leaves_no_index_of_what_was_there(fp8: Path, tmp_path: Path):
    whole = make_source(tmp_path / "whole", num_files=1)
    assert not (whole / INDEX_FILE).exists()
    run_import(whole, tmp_path / "ckpt")
    shutil.copytree(fp8, tmp_path / "out")
    export_checkpoint(open_checkpoint(tmp_path / "ckpt"), tmp_path / "out", overwrite=True)
    assert_same_files(tmp_path / "out", whole)


@pytest.mark.parametrize("base", [False, True])
def test_overwrite_that_is_stopped_leaves_no_checkpoint_of_two(
    fp8: Path, kept: Checkpoint, tmp_path: Path, base: bool
):
    """Its files are in part those of one, in part those of another, and their names the same."""
    shutil.copytree(make_source(tmp_path / "other", seed=5), tmp_path / "out")
    options = {"overwrite": True, "base": opened(fp8) if base else None}

    def stop(done: int, total: int) -> None:
        if done > total * 3 // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(kept, tmp_path / "out", progress=stop, **options)
    assert tree_bytes(tmp_path / "out").keys() > {"model-00001-of-000007.safetensors"}
    with pytest.raises(ProblemsError, match="is unfinished: what was writing it was interrupted"):
        source_of(str(tmp_path / "out"), follow_links=False)
    shutil.copytree(tmp_path / "out", tmp_path / "moved", ignore=lambda *_: [UNFINISHED])
    with pytest.raises(ProblemsError, match=r"config\.json is missing"):
        opened(tmp_path / "moved")
    export_checkpoint(kept, tmp_path / "out", **options)
    assert_same_files(tmp_path / "out", fp8)


def test_a_full_disk_is_foreseen(
    fp8: Path, kept: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Usage:
        free = 100_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(UserError, match=r"needs 0\.4 MB more, its disk has 0\.1 MB free"):
        run_import(fp8, tmp_path / "ckpt")
    with pytest.raises(UserError, match="make room and run the same command again"):
        export_checkpoint(kept, tmp_path / "out")


def test_chunk_rows_follow_the_block_height(fp8: Path, tmp_path: Path):
    policy = type(SMALL_CHUNKS)(max_bytes=3000, gather_below_bytes=0, row_multiple=3)
    run_import(fp8, tmp_path / "ckpt", dtype="bf16", policy=policy)
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    cut = [leaf for leaf in checkpoint.leaves.values() if leaf.num_row_chunks > 1]
    assert cut
    assert all(leaf.chunk_rows % 24 == 0 for leaf in cut)
    export_checkpoint(checkpoint, tmp_path / "out")
    assert_same_files(tmp_path / "out", fp8)


def test_default_chunks_of_a_tiny_checkpoint_are_one_a_layer(fp8: Path, tmp_path: Path):
    import_checkpoint(opened(fp8), tmp_path / "ckpt")
    for leaf in open_checkpoint(tmp_path / "ckpt").leaves.values():
        stack = leaf.num_stack_dims
        wanted = Leaf.make(leaf.shape, leaf.dtype, stack)
        assert leaf.chunk == wanted.chunk
        assert leaf.num_chunks == (leaf.shape[0] if stack else 1)


def without_index(src: Path) -> None:
    (src / "model.safetensors.index.json").unlink()


def with_null_metadata(src: Path) -> None:
    for file in src.glob("*.safetensors"):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size]) | {"__metadata__": None}
        raw = json.dumps(header).encode()
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + size :])


@pytest.mark.parametrize("layout", [without_index, with_null_metadata])
def test_layouts_of_other_writers_come_back_as_they_were(
    tmp_path: Path, layout: Callable[[Path], None]
):
    src = make_source(tmp_path / "src")
    layout(src)
    run_import(src, tmp_path / "ckpt")
    export_checkpoint(open_checkpoint(tmp_path / "ckpt"), tmp_path / "out")
    assert_same_files(tmp_path / "out", src)
    run_import(tmp_path / "out", tmp_path / "again")

"""Export over a base: files that hold changed tensors are written, all others are the base's."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from changed import leaf_of_rows
from hub_client import lone_hub
from roundtrip import (
    SMALL_CHUNKS,
    assert_same_files,
    make_source,
    opened,
    patch_tensor,
    read_tensors,
    run_import,
    tree_bytes,
)

from converters.exporting import encode, reuse
from converters.exporting import stream as export_stream
from converters.exporting.exporter import export_checkpoint
from converters.exporting.result import ExportSummary
from converters.format.listing import list_checkpoint
from converters.importing.importer import import_checkpoint
from converters.sources.hub import HubSource
from converters.sources.open import open_source
from converters.verifying.verify import check_storage
from mtp_model.checkpoint.derived import ChangedLeaf, write_derived
from mtp_model.checkpoint.directory import UNFINISHED, Checkpoint, CheckpointError, open_checkpoint
from mtp_model.files.local import LocalPlace
from mtp_model.problems import ProblemsError, UserError

BF16 = np.dtype(ml_dtypes.bfloat16)
Q_B = "mtp.block.self_attn.q_b_proj.weight"
EH_PROJ = "mtp.eh_proj.weight"
EMBED, EMBED_COPY = "model.embed_tokens.weight", "model.layers.4.embed_tokens.weight"
HEAD, HEAD_COPY = "lm_head.weight", "model.layers.4.shared_head.head.weight"
MTP_NAMES = {
    "model.layers.4.eh_proj.weight",
    "model.layers.4.self_attn.q_b_proj.weight",
    "model.layers.4.self_attn.q_b_proj.weight_scale_inv",
}


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "src")


@pytest.fixture(scope="module")
def whole(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    dst = tmp_path_factory.mktemp("whole") / "ckpt"
    run_import(src, dst, dtype="bf16")
    return open_checkpoint(dst)


@pytest.fixture(scope="module")
def mtp(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    dst = tmp_path_factory.mktemp("mtp") / "ckpt"
    run_import(src, dst, dtype="bf16", scope="mtp")
    return open_checkpoint(dst)


@pytest.fixture(scope="module")
def tuned(mtp: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The MTP module alone, with two weights trained: one is FP8 in the source, one bfloat16."""
    return changed(mtp, tmp_path_factory.mktemp("tuned") / "final", Q_B, EH_PROJ)


def changed(ckpt: Checkpoint, dst: Path, *paths: str) -> Checkpoint:
    """A checkpoint with these leaves changed."""

    def leaf(path: str) -> ChangedLeaf:
        def rows(index: tuple[int, ...], start: int, stop: int) -> np.ndarray:
            values = ckpt.read_rows(path, index, start, stop).astype(np.float32)
            return (values * 1.5 + 0.01).astype(BF16)

        return leaf_of_rows(BF16, rows)

    leaves: Mapping[str, ChangedLeaf] = {path: leaf(path) for path in paths}
    return write_derived(ckpt, dst, leaves, {}, policy=SMALL_CHUNKS)


def export(ckpt: Checkpoint, dst: Path, src: Path, **options: Any) -> ExportSummary:
    return export_checkpoint(ckpt, dst, base=list_checkpoint(open_source(str(src))), **options)


def inode(file: Path) -> int:
    return file.stat().st_ino


def differing(folder: Path, src: Path) -> set[str]:
    """Names of the tensors that differ."""
    ours, theirs = read_tensors(folder), read_tensors(src)
    assert ours.keys() == theirs.keys()
    return {name for name in ours if ours[name].tobytes() != theirs[name].tobytes()}


def assert_links(summary: ExportSummary, src: Path) -> None:
    """Rewritten files are files of their own; all other safetensors are the base's own."""
    for file in summary.files:
        linked = inode(summary.path / file.name) == inode(src / file.name)
        assert linked == (file.how == "hard link") == (not file.changed), file
    for name in tree_bytes(src).keys() - {file.name for file in summary.files}:
        assert inode(summary.path / name) != inode(src / name), "people edit small files in place"


def test_a_tuned_mtp_module_makes_the_whole_checkpoint(
    src: Path, whole: Checkpoint, tuned: Checkpoint, tmp_path: Path
):
    before = tree_bytes(src)
    summary = export(tuned, tmp_path / "out", src)
    assert set(summary.changed) == MTP_NAMES == differing(tmp_path / "out", src)
    assert_links(summary, src)
    assert 0 < sum(file.how == "written" for file in summary.files) < len(summary.files)
    assert [cost.name for cost in summary.requantised] == [
        "model.layers.4.self_attn.q_b_proj.weight"
    ]
    assert tree_bytes(src) == before
    # The same training of a checkpoint that holds everything, exported without a base:
    everything = changed(whole, tmp_path / "final", Q_B, EH_PROJ)
    plain = export_checkpoint(everything, tmp_path / "plain")
    assert_same_files(tmp_path / "out", tmp_path / "plain")
    assert plain.requantised == summary.requantised
    assert export(everything, tmp_path / "out2", src).files == summary.files
    run_import(tmp_path / "out", tmp_path / "again", dtype="bf16")
    for ckpt in (tuned, open_checkpoint(tmp_path / "again")):
        assert check_storage(opened(tmp_path / "out"), ckpt).holds
    assert not check_storage(opened(src), tuned).holds


@pytest.mark.parametrize(
    ("scope", "flavour", "dtype"), [("mtp", "bf16", "keep"), ("main", "fp8", "keep")]
)
def test_of_what_nobody_changed_every_file_is_the_bases(
    tmp_path: Path, scope: str, flavour: str, dtype: str
):
    src = make_source(tmp_path / "src", dtype=flavour)
    run_import(src, tmp_path / "ckpt", scope=scope, dtype=dtype)
    summary = export(open_checkpoint(tmp_path / "ckpt"), tmp_path / "out", src)
    assert summary.changed == ()
    assert summary.written_bytes == 0
    assert_links(summary, src)
    assert_same_files(tmp_path / "out", src)


@pytest.mark.parametrize("scope", ["main", "mtp"])
def test_copies_follow_the_main_tensors(src: Path, tmp_path: Path, scope: str):
    run_import(src, tmp_path / "ckpt", scope=scope)
    final = changed(
        open_checkpoint(tmp_path / "ckpt"), tmp_path / "final", "embed_tokens.weight", HEAD
    )
    summary = export(final, tmp_path / "out", src)
    assert differing(tmp_path / "out", src) == {EMBED, EMBED_COPY, HEAD, HEAD_COPY}
    assert set(summary.changed) == {EMBED, EMBED_COPY, HEAD, HEAD_COPY}
    run_import(tmp_path / "out", tmp_path / "again")  # which compares copies
    assert_links(summary, src)


def test_a_stale_copy_of_the_base_is_replaced(tmp_path: Path):
    src = make_source(tmp_path / "src")
    patch_tensor(src, HEAD_COPY, {(3, 3): b"\x00\x40"})
    run_import(src, tmp_path / "ckpt", scope="mtp", copies="main")
    summary = export(open_checkpoint(tmp_path / "ckpt"), tmp_path / "out", src)
    assert summary.changed == (HEAD_COPY,)
    run_import(tmp_path / "out", tmp_path / "again")


def test_pieces_may_be_small(
    src: Path, tuned: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    export(tuned, tmp_path / "one", src)
    largest = 0
    real = export_stream.ReusedMemory.take

    def spied(memory: Any, nbytes: int) -> Any:
        nonlocal largest
        largest = max(largest, nbytes)
        return real(memory, nbytes)

    monkeypatch.setattr(export_stream.ReusedMemory, "take", spied)
    for module in (encode, export_stream, reuse):
        monkeypatch.setattr(module, "PIECE_BYTES", 900)
    export(tuned, tmp_path / "two", src, workers=1)
    assert_same_files(tmp_path / "two", tmp_path / "one")
    assert 0 < largest < max(tensor.nbytes for tensor in read_tensors(src).values())


def test_a_partial_checkpoint_needs_a_base(mtp: Checkpoint, tmp_path: Path):
    with pytest.raises(ProblemsError, match=r"imported with --scope mtp.*export it with --base"):
        export_checkpoint(mtp, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _another_seed(folder: Path) -> str:
    make_source(folder, seed=5)
    return rf"has to be what .* was imported from(.|\n)*base +{EMBED} in .* has other bytes"


def _other_sizes(folder: Path) -> str:
    make_source(folder, num_mtp=2)
    return r"model-00001.*another header(.|\n)*config\.json has other bytes"


def _fewer_files(folder: Path) -> str:
    make_source(folder, num_files=6)
    return (
        r"model-00001-of-000006.safetensors is no file of(.|\n)*model-00001-of-000007.* not there"
    )


def _changed_tensor(folder: Path) -> str:
    make_source(folder)
    patch_tensor(folder, HEAD, {(3, 3): b"\x00\x40"})
    patch_tensor(folder, HEAD_COPY, {(3, 3): b"\x00\x40"})
    return rf"base +{HEAD} in model-0.* has other bytes than what was imported"


def _changed_side_file(folder: Path) -> str:
    make_source(folder)
    (folder / "figures" / "model.svg").write_bytes(b"<svg>")
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b" ")
    return r"config\.json has other bytes(.|\n)*figures/model\.svg has other bytes"


def _missing_side_file(folder: Path) -> str:
    make_source(folder)
    (folder / "figures" / "model.svg").unlink()
    return r"base +figures/model\.svg is not there"


@pytest.mark.parametrize(
    "other",
    [
        _another_seed,
        _other_sizes,
        _fewer_files,
        _changed_tensor,
        _changed_side_file,
        _missing_side_file,
    ],
)
def test_another_base_is_refused(tuned: Checkpoint, tmp_path: Path, other: Callable[[Path], str]):
    told = other(tmp_path / "other")
    with pytest.raises(ProblemsError, match=told):
        export(tuned, tmp_path / "out", tmp_path / "other")
    assert not [*(tmp_path / "out").glob("*.safetensors")]
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_whole_checkpoint_notices_any_changed_tensor(whole: Checkpoint, tmp_path: Path):
    src = make_source(tmp_path / "src")
    name = "model.layers.3.mlp.experts.7.down_proj.weight"
    value = read_tensors(src)[name].view(np.uint8)[0, 0]
    patch_tensor(src, name, {(0, 0): bytes([value ^ 1])})
    with pytest.raises(ProblemsError, match=f"base +{name} in model-0"):
        export(whole, tmp_path / "out", src)
    assert not [*(tmp_path / "out").glob("*.safetensors")]


def test_files_that_are_no_part_of_the_source_stay_where_they_are(
    tuned: Checkpoint, tmp_path: Path
):
    src = make_source(tmp_path / "src")
    (src / "notes.txt").write_text("mine")
    export(tuned, tmp_path / "out", src)
    assert not (tmp_path / "out" / "notes.txt").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_base_is_never_written_to(tuned: Checkpoint, tmp_path: Path, overwrite: bool):
    src = make_source(tmp_path / "a" / "src")
    before = tree_bytes(tmp_path)
    (tmp_path / "link").symlink_to(src)
    for dst in (src, src / "out", tmp_path / "link", tmp_path / "a"):
        with pytest.raises(CheckpointError, match=r"overlap; name another place"):
            export(tuned, dst, src, overwrite=overwrite)
    (tmp_path / "link").unlink()
    assert tree_bytes(tmp_path) == before


def test_links_are_not_written_through(
    src: Path, whole: Checkpoint, tuned: Checkpoint, tmp_path: Path
):
    before, out = tree_bytes(src), tmp_path / "out"
    export(tuned, out, src)
    everything = changed(whole, tmp_path / "final", "moe_layers.input_layernorm.weight", HEAD)
    with pytest.raises(CheckpointError, match="--overwrite it"):
        export(everything, out, src)
    export_checkpoint(everything, out, overwrite=True)
    assert tree_bytes(src) == before
    assert HEAD_COPY in differing(out, src)
    export(tuned, out, src, overwrite=True)
    assert tree_bytes(src) == before
    assert differing(out, src) == MTP_NAMES


def fails(*_: Any, **__: Any) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def test_where_links_fail_files_are_copied(
    src: Path, tuned: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = export(tuned, tmp_path / "linked", src)
    monkeypatch.setattr(os, "link", fails)

    def clone(new: Any, request: int, old: int) -> int:
        assert request == 0x40049409
        return os.write(new.fileno(), os.read(old, 1 << 30))

    for ioctl, wanted in ((clone, "reflink"), (fails, "copy")):
        monkeypatch.setattr(fcntl, "ioctl", ioctl)
        summary = export(tuned, tmp_path / wanted, src)
        assert {file.how for file in summary.files if not file.changed} == {wanted}
        assert_same_files(tmp_path / wanted, tmp_path / "linked")
        read = {bool(file.digest) for file in summary.files if not file.changed}
        assert read == {wanted == "copy"}
    assert expected.written_bytes < summary.written_bytes


def test_a_snapshot_of_the_hubs_cache_may_be_the_base(src: Path, tuned: Checkpoint, tmp_path: Path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for name, content in tree_bytes(src).items():
        (blobs / name.replace("/", "-")).write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / name.replace("/", "-"))
    summary = export(tuned, tmp_path / "out", snapshot)
    assert_links(summary, snapshot)
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))


def test_a_model_on_the_hub_may_be_the_base(
    src: Path, tuned: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with lone_hub(tmp_path, monkeypatch) as hub:
        hub.add("org/Model-V3.1", tree_bytes(src))
        listing = list_checkpoint(HubSource("org/Model-V3.1"))
        summary = export_checkpoint(tuned, tmp_path / "out", base=listing)
    assert {file.how for file in summary.files} == {"copy", "written"}
    export(tuned, tmp_path / "local", src)
    assert_same_files(tmp_path / "out", tmp_path / "local")


def stop_at(share: float) -> Callable[[int, int], None]:
    def stop(done: int, total: int) -> None:
        if done > share * total:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8, 0.95])
def test_interrupted_it_continues(src: Path, tuned: Checkpoint, tmp_path: Path, share: float):
    export(tuned, tmp_path / "whole", src)
    with pytest.raises(KeyboardInterrupt):
        export(tuned, tmp_path / "out", src, progress=stop_at(share))
    assert (tmp_path / "out" / UNFINISHED).is_dir()
    assert not (tmp_path / "out" / "config.json").exists()
    seen: list[tuple[int, int]] = []
    summary = export(tuned, tmp_path / "out", src, progress=lambda *pair: seen.append(pair))
    assert_same_files(tmp_path / "out", tmp_path / "whole")
    assert_links(summary, src)
    assert (summary.resumed_files > 0) == (share >= 0.5)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert seen[0][0] > 0 or share < 0.2


def test_what_an_interrupted_one_compared_is_not_read_again(
    src: Path, tuned: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(KeyboardInterrupt):
        export(tuned, tmp_path / "out", src, progress=stop_at(0.6))
    monkeypatch.setattr(reuse, "_compare", fails)
    export(tuned, tmp_path / "out", src)
    assert differing(tmp_path / "out", src) == MTP_NAMES


def test_other_commands_do_not_continue_it(whole: Checkpoint, src: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        export(whole, tmp_path / "out", src, progress=stop_at(0.5))
    with pytest.raises(ProblemsError, match="--base was True when this began, is False"):
        export_checkpoint(whole, tmp_path / "out")


def test_a_base_replaced_meanwhile_is_noticed(tuned: Checkpoint, tmp_path: Path):
    src = make_source(tmp_path / "src")
    file = src / "model-00003-of-000007.safetensors"

    def touch(done: int, total: int) -> None:
        if done == total:
            os.utime(file, ns=(1, 1))

    with pytest.raises(ProblemsError, match=r"model-00003.* was replaced while it was read"):
        export(tuned, tmp_path / "out", src, progress=touch)
    os.utime(file, ns=(2, 2))
    with pytest.raises(ProblemsError, match=r"changed +model-00003.*mtime_ns"):
        export(tuned, tmp_path / "out", src)


def test_damage_is_not_exported(whole: Checkpoint, src: Path, tmp_path: Path):
    ckpt = write_derived(whole, tmp_path / "ckpt", {}, {})
    chunk = ckpt.params / "norm.weight" / "0"
    data = bytearray(chunk.read_bytes())
    chunk.unlink()  # it is a hard link of the other checkpoint's
    chunk.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ProblemsError, match=r"damaged +model\.norm\.weight"):
        export(ckpt, tmp_path / "out", src)
    assert not (tmp_path / "out/config.json").exists()


def test_the_room_that_copies_need_is_foreseen(
    src: Path, tuned: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Usage:
        free = 150_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    export(tuned, tmp_path / "out", src)
    monkeypatch.setattr(LocalPlace, "can_link", lambda *_: False)
    with pytest.raises(UserError, match="make room and run the same command again"):
        export(tuned, tmp_path / "out2", src)


def test_files_in_subfolders(tmp_path: Path):
    src, index = make_source(tmp_path / "src"), tmp_path / "src/model.safetensors.index.json"
    for name in ("model-00002-of-000007.safetensors", "model-00007-of-000007.safetensors"):
        (src / "weights").mkdir(exist_ok=True)
        (src / name).rename(src / "weights" / name)
        index.write_text(index.read_text().replace(name, f"weights/{name}"))
    run_import(src, tmp_path / "ckpt", dtype="bf16")
    export_checkpoint(open_checkpoint(tmp_path / "ckpt"), tmp_path / "plain")
    assert_same_files(tmp_path / "plain", src)
    final = changed(open_checkpoint(tmp_path / "ckpt"), tmp_path / "final", Q_B)
    assert_links(export(final, tmp_path / "out", src), src)
    export_checkpoint(final, tmp_path / "whole")
    assert_same_files(tmp_path / "out", tmp_path / "whole")


def test_import_of_the_result_by_default_policy(src: Path, tuned: Checkpoint, tmp_path: Path):
    export(tuned, tmp_path / "out", src)
    import_checkpoint(opened(tmp_path / "out"), tmp_path / "again")
    summary = export_checkpoint(open_checkpoint(tmp_path / "again"), tmp_path / "twice")
    assert all(file.same_as_source for file in summary.files)
    assert_same_files(tmp_path / "twice", tmp_path / "out")


def test_scale_fmt_ue8m0_is_kept_when_weights_are_quantised_again(tmp_path: Path):
    """Untouched scales stay as they are: the released V3.1 holds some that are no powers of two."""
    src = make_source(tmp_path / "src")
    file = src / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    file.write_text(json.dumps(config))
    run_import(src, tmp_path / "ckpt")
    tuned = changed(open_checkpoint(tmp_path / "ckpt"), tmp_path / "tuned", Q_B)
    export_checkpoint(tuned, tmp_path / "out")
    ours, theirs = read_tensors(tmp_path / "out"), read_tensors(src)
    scales = {name for name in ours if name.endswith("_scale_inv")}
    new = {name for name in scales if not np.array_equal(ours[name], theirs[name])}
    assert new
    assert all("q_b_proj" in name for name in new)
    for name in scales:
        mantissas = np.frexp(ours[name])[0]
        assert (mantissas == 0.5).all() == (name in new), name
    assert check_storage(opened(tmp_path / "out"), tuned).holds

"""Exports to gs:// against an emulator on loopback: the bytes of local ones, whole or not there."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from changed import leaf_of_rows
from gcs_server import GcsServer
from gcs_server import key_of as key
from roundtrip import assert_same_files, make_source, run_import, tree_bytes
from side_by_side import run_all

from converters.cli.main import main
from converters.exporting.exporter import export_checkpoint
from converters.exporting.result import ExportSummary
from converters.format.listing import list_checkpoint
from converters.sources.open import open_source
from mtp_model.checkpoint.claim import held
from mtp_model.checkpoint.derived import write_derived
from mtp_model.checkpoint.directory import UNFINISHED, Checkpoint, CheckpointError, open_checkpoint
from mtp_model.files import object_place
from mtp_model.files.object_place import AppendedObject, ObjectPlace
from mtp_model.files.objects import CloudError, join, state, states
from mtp_model.files.open import as_place

SIZES = {"n_routed_experts": 8, "num_hidden_layers": 2, "first_k_dense_replace": 1}
PART_BYTES = 1000  # so that files of some 10 kB have as many parts as files of some GB


@pytest.fixture(scope="module", autouse=True)
def _small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_place, "_PART_BYTES", PART_BYTES)
        yield


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "src", sizes=SIZES)


@pytest.fixture(scope="module")
def ckpt(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    dst = tmp_path_factory.mktemp("ckpt") / "ckpt"
    run_import(src, dst)
    return open_checkpoint(dst)


@pytest.fixture(scope="module")
def tuned(ckpt: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Another final norm: one file of the source changes."""
    norm = np.dtype(np.float32)
    change = {"norm.weight": leaf_of_rows(norm, lambda _, a, b: np.ones(b - a, norm))}
    return write_derived(ckpt, tmp_path_factory.mktemp("tuned") / "ckpt", change, {})


def upload(gcs: GcsServer, folder: Path, address: str) -> None:
    for name, content in tree_bytes(folder).items():
        gcs.put(f"{key(address)}/{name}", content)


def over_base(checkpoint: Checkpoint, dst: str | Path, base: str | Path) -> ExportSummary:
    listing = list_checkpoint(open_source(str(base)))
    return export_checkpoint(checkpoint, dst, base=listing)


def test_an_export_gives_the_bytes_of_the_source(
    gcs: GcsServer, url: str, src: Path, ckpt: Checkpoint
):
    gcs.log.clear()
    summary = export_checkpoint(ckpt, url)
    assert gcs.contents(key(url)) == tree_bytes(src)
    assert all(file.same_as_source for file in summary.files)
    parts = [name for method, name in gcs.log if method == "POST" and "/part-" in name]
    assert len(parts) > 200
    assert len([name for method, name in gcs.log if method == "COMPOSE"]) >= len(summary.files)
    assert list_checkpoint(open_source(url)).tensors.keys() == {
        tensor.name
        for file in list_checkpoint(open_source(str(src))).headers.values()
        for tensor in file.tensors
    }


def test_commands_export_to_addresses(
    gcs: GcsServer, url: str, src: Path, ckpt: Checkpoint, capsys: pytest.CaptureFixture[str]
):
    assert main(["export", str(ckpt.path), f"{url}/out"]) == 0
    told = capsys.readouterr().out
    assert f"{url}/out" in told
    assert f"NOT checked: {url}/out is not on this machine" in told
    assert "tensors agree; copies are the main model's" in told
    assert "vllm serve DIR " in told
    assert main(["verify", f"{url}/out", str(ckpt.path)]) == 0
    assert main(["inspect", f"{url}/out"]) == 0
    capsys.readouterr()
    assert main(["export", str(ckpt.path), f"{url}/out"]) == 1
    assert f"{url}/out holds a checkpoint" in capsys.readouterr().err
    assert main(["export", str(ckpt.path), f"{url}/out", "--overwrite"]) == 0
    assert gcs.contents(f"{key(url)}/out") == tree_bytes(src)
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(ckpt.path), f"{url}/out", "--push", "org/name"])
    assert "--push uploads a folder of this machine, not gs://" in capsys.readouterr().err


@pytest.mark.parametrize("to_cloud", [True, False])
def test_over_a_base_only_changed_files_are_sent(
    gcs: GcsServer, url: str, src: Path, tuned: Checkpoint, tmp_path: Path, to_cloud: bool
):
    """A base in the cloud: copies within it move no bytes; to a folder they are fetched."""
    wanted = tmp_path / "wanted"
    assert over_base(tuned, wanted, src).written_bytes > 0
    upload(gcs, src, f"{url}/base")
    gcs.log.clear()
    dst = f"{url}/out" if to_cloud else str(tmp_path / "out")
    summary = over_base(tuned, dst, f"{url}/base")
    changed = [file.name for file in summary.files if file.how == "written"]
    assert len(changed) == 1
    others = "copy in the cloud" if to_cloud else "copy"
    assert {file.how for file in summary.files} == {"written", others}
    copied = {name for method, name in gcs.log if method == "REWRITE"}
    if to_cloud:
        assert gcs.contents(f"{key(url)}/out") == tree_bytes(wanted)
        unchanged = (file.name for file in summary.files if file.how != "written")
        assert copied == {f"{key(url)}/out/{name}" for name in unchanged}
        sent = {name.split("/parts/")[1].split("/")[0] for _, name in gcs.log if "/part-" in name}
        assert sent == set(changed)
    else:
        assert_same_files(tmp_path / "out", wanted)
        assert not copied


def test_a_local_base_is_sent(
    gcs: GcsServer, url: str, src: Path, tuned: Checkpoint, tmp_path: Path
):
    over_base(tuned, tmp_path / "wanted", src)
    summary = over_base(tuned, url, src)
    assert gcs.contents(key(url)) == tree_bytes(tmp_path / "wanted")
    assert {file.how for file in summary.files} == {"written", "copy"}
    assert summary.written_bytes == sum(file.size for file in summary.files)


def test_a_base_is_not_written_into(gcs: GcsServer, url: str, src: Path, tuned: Checkpoint):
    upload(gcs, src, f"{url}/base")
    for place in (f"{url}/base", f"{url}/base/out", url):
        with pytest.raises(CheckpointError, match="overlap; name another place"):
            over_base(tuned, place, f"{url}/base")
    assert over_base(tuned, f"{url}/base2", f"{url}/base").files  # only begins like it
    assert gcs.contents(f"{key(url)}/base") == tree_bytes(src)


KILLED_AT = [("object", 2), ("object", 40), ("joined object", 3), ("object", -2)]


def test_killed_anywhere_it_continues_and_ends_with_the_same_bytes(
    gcs: GcsServer, url: str, src: Path, ckpt: Checkpoint
):
    gcs.log.clear()
    export_checkpoint(ckpt, f"{url}/whole")
    writes = [name for method, name in gcs.log if method == "POST" and not name.endswith("lock")]
    points = [(point, at if at > 0 else len(writes) + 1 + at) for point, at in KILLED_AT]
    commands = [
        ("export", ckpt.path, f"{url}/{number}", *point, (0, 1))
        for number, point in enumerate(points)
    ]
    run_all(commands)
    resumed = []
    for number, point in enumerate(points):
        dst = f"{url}/{number}"
        assert any(f"/{UNFINISHED}/" in name for name in gcs.keys(key(dst))), point
        assert f"{key(dst)}/config.json" not in gcs.keys(key(dst)), point
        assert main(["inspect", dst]) == 1, point
        noted = [name for name in gcs.keys(key(dst)) if "/journal-" in name]
        resumed.append(export_checkpoint(ckpt, dst).resumed_files)
        assert resumed[-1] == max(len(noted) - 1, 0), point
        assert gcs.contents(key(dst)) == tree_bytes(src), point
    assert resumed[0] == 0
    assert resumed[-1] == len(list(src.glob("*.safetensors")))


def test_a_file_that_went_missing_is_written_again(
    gcs: GcsServer, url: str, src: Path, ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr("converters.exporting.exporter._write_side_files", None)
        with pytest.raises(TypeError):
            export_checkpoint(ckpt, url)
    gone, cut = (name for name in gcs.keys(key(url)) if "00002-of" in name or "00004-of" in name)
    gcs.delete(gone)
    gcs.put(cut, gcs.content(cut)[:-1])
    summary = export_checkpoint(ckpt, url)
    assert summary.resumed_files == len(summary.files) - 2
    assert gcs.contents(key(url)) == tree_bytes(src)


def test_one_process_at_a_time_and_nothing_of_others(gcs: GcsServer, url: str, ckpt: Checkpoint):
    with (
        held(as_place(f"{url}/out")),
        pytest.raises(CheckpointError, match=rf"another process .* \(pid {os.getpid()} on"),
    ):
        export_checkpoint(ckpt, f"{url}/out")
    gcs.put(f"{key(url)}/theirs/thesis.tex", b"years")
    with pytest.raises(CheckpointError, match="is not empty and no safetensors checkpoint"):
        export_checkpoint(ckpt, f"{url}/theirs", overwrite=True)
    assert gcs.contents(f"{key(url)}/theirs") == {"thesis.tex": b"years"}
    run_import(Path(ckpt.provenance["source"]["name"]), as_place(f"{url}/ckpt"))
    with pytest.raises(CheckpointError, match="is not empty and no safetensors checkpoint"):
        export_checkpoint(ckpt, f"{url}/ckpt", overwrite=True)


def test_overwriting_leaves_nothing_of_before(
    gcs: GcsServer, url: str, src: Path, ckpt: Checkpoint
):
    upload(gcs, src, url)
    gcs.put(f"{key(url)}/stale-00001.safetensors", b"")
    export_checkpoint(ckpt, url, overwrite=True)
    assert gcs.contents(key(url)) == tree_bytes(src)


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 32_000, 32_001, 40_500])
def test_an_object_is_made_of_parts(gcs: GcsServer, url: str, size: int):
    """As one object, as up to 32 parts, and as more: parts of parts."""
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    path, scratch = as_place(url) / "file", as_place(url) / "parts"
    assert isinstance(path, ObjectPlace)
    assert isinstance(scratch, ObjectPlace)
    out = AppendedObject(path, scratch)
    for piece in np.array_split(data, 7):
        out.append(piece)
    assert not path.is_file()
    out.finish()
    assert gcs.contents(key(url)) == {"file": data.tobytes()}
    found = state(path)
    assert found
    assert states(path.parent) == {"file": found}
    assert found.size == size


def test_requests_whose_answer_was_lost_are_made_again(
    gcs: GcsServer, url: str, ckpt: Checkpoint, src: Path
):
    file = min(path.name for path in src.glob("*.safetensors"))
    gcs.lost |= {f"{key(url)}/{file}", f"{key(url)}/{UNFINISHED}/parts/{file}/part-00000"}
    export_checkpoint(ckpt, url)
    assert not gcs.lost
    assert gcs.contents(key(url)) == tree_bytes(src)


def test_an_object_that_is_stored_wrongly_is_noticed_and_deleted(
    gcs: GcsServer, url: str, ckpt: Checkpoint, src: Path
):
    file = sorted(path.name for path in src.glob("*.safetensors"))[1]
    for damaged in (file, f"{UNFINISHED}/parts/{file}/part-00003"):
        gcs.damaged.add(f"{key(url)}/{damaged}")
        with pytest.raises(CloudError, match=rf"{file}: .* were sent, .* are stored; it was del"):
            export_checkpoint(ckpt, url)
        assert not gcs.damaged
        assert f"{key(url)}/{file}" not in gcs.keys(key(url))
    assert export_checkpoint(ckpt, url).resumed_files == 1
    assert gcs.contents(key(url)) == tree_bytes(src)


def test_a_copy_in_the_cloud_that_is_stored_wrongly_is_noticed(
    gcs: GcsServer, url: str, src: Path, tuned: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    upload(gcs, src, f"{url}/base")

    def wrong(source: ObjectPlace, target: ObjectPlace) -> None:
        target.write_bytes(source.read_bytes()[::-1])

    with monkeypatch.context() as patch:
        patch.setattr("mtp_model.files.object_place.copy", wrong)
        with pytest.raises(CloudError, match="was copied with another checksum"):
            over_base(tuned, f"{url}/out", f"{url}/base")
    assert [name for name in gcs.keys(f"{key(url)}/out") if name.endswith(".safetensors")] == []


def test_refusals_name_the_object(gcs: GcsServer, url: str):  # noqa: ARG001
    parts = [as_place(f"{url}/absent")]
    with pytest.raises(CloudError, match=rf"{url}/whole: 404"):
        join(parts, as_place(f"{url}/whole"), as_place(f"{url}/scratch"))

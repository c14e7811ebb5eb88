"""gs:// against an emulator on loopback: as source, as destination, and as checkpoint."""

import json
import os
import platform
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from changed import leaf_of_rows
from flax import nnx
from gcs_server import BUCKET, GcsServer
from gcs_server import key_of as key
from roundtrip import SMALL_CHUNKS, assert_same_files, make_source, run_import, tree_bytes
from side_by_side import run_all

from converters.cli.main import main
from converters.exporting.exporter import export_checkpoint
from converters.format.listing import open_safetensors
from converters.importing.importer import import_checkpoint
from converters.sources.open import open_source
from finetune.cli import run as finetune
from mtp_model.checkpoint.claim import claim
from mtp_model.checkpoint.derived import write_derived
from mtp_model.checkpoint.directory import COMPLETE, UNFINISHED, CheckpointError, open_checkpoint
from mtp_model.files import lock as lock_module
from mtp_model.files.object_place import ObjectPlace
from mtp_model.files.objects import CloudError
from mtp_model.files.open import as_place
from mtp_model.load import load
from mtp_model.problems import ProblemsError
from mtp_model.sharding import make_mesh

SIZES = {"n_routed_experts": 8, "num_hidden_layers": 2, "first_k_dense_replace": 1}
DEAD = 2**22 + 1  # larger than any process id


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "src", sizes=SIZES)


@pytest.fixture(scope="module")
def local(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an import to a folder gives."""
    dst = tmp_path_factory.mktemp("local") / "ckpt"
    run_import(src, dst, dtype="bf16")
    return dst


@pytest.fixture(scope="module")
def stored(gcs: GcsServer, src: Path) -> str:  # noqa: ARG001
    """The same import in the cloud; tests leave it as it is."""
    run_import(src, as_place(f"gs://{BUCKET}/stored/ckpt"), dtype="bf16")
    return f"gs://{BUCKET}/stored/ckpt"


def upload(gcs: GcsServer, folder: Path, address: str) -> None:
    for name, content in tree_bytes(folder).items():
        gcs.put(f"{key(address)}/{name}", content)


def copy(gcs: GcsServer, address: str, to: str) -> None:
    for name, content in gcs.contents(key(address)).items():
        gcs.put(f"{key(to)}/{name}", content)


def test_an_import_gives_the_bytes_of_a_local_one(gcs: GcsServer, stored: str, local: Path):
    found, needed = gcs.contents(key(stored)), tree_bytes(local)
    assert found.keys() == needed.keys(), found.keys() ^ needed.keys()
    assert [name for name in needed if found[name] != needed[name]] == []


@pytest.mark.parametrize("over_a_mesh", [False, True])
def test_loads_the_same_weights(stored: str, local: Path, over_a_mesh: bool):
    mesh = make_mesh(expert=2, fsdp=4) if over_a_mesh else None
    got, wanted = (dict(nnx.to_flat_state(nnx.state(load(path, mesh)))) for path in (stored, local))
    assert got.keys() == wanted.keys()
    for path, leaf in wanted.items():
        assert got[path].dtype == leaf.dtype
        assert got[path][...].sharding == leaf[...].sharding
        assert np.asarray(got[path][...]).tobytes() == np.asarray(leaf[...]).tobytes(), path


def test_exports_the_bytes_of_the_source(stored: str, src: Path, tmp_path: Path):
    export_checkpoint(open_checkpoint(stored), tmp_path / "out")
    assert_same_files(tmp_path / "out", src)


def test_a_source_in_the_cloud_gives_the_same_checkpoint(
    gcs: GcsServer, url: str, src: Path, local: Path, tmp_path: Path
):
    upload(gcs, src, url)
    gcs.put(f"{key(url)}/figures/", b"")  # what consoles leave for a folder
    source = open_source(url)
    assert source.files() == {name: len(data) for name, data in tree_bytes(src).items()}
    checkpoint = open_safetensors(source)
    import_checkpoint(checkpoint, tmp_path / "ckpt", dtype="bf16", policy=SMALL_CHUNKS)
    got, wanted = (open_checkpoint(path).provenance for path in (tmp_path / "ckpt", local))
    assert got["source"] == wanted["source"] | {"name": url}
    assert got["pieces"] == wanted["pieces"]


def test_commands_take_addresses(
    gcs: GcsServer, url: str, src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    upload(gcs, src, f"{url}/src")
    assert main(["inspect", f"{url}/src"]) == 0
    assert main(["import", f"{url}/src", f"{url}/ckpt"]) == 0
    assert main(["verify", f"{url}/src", f"{url}/ckpt"]) == 0
    assert "export writes the source's bytes" in capsys.readouterr().out
    assert main(["export", f"{url}/ckpt", str(tmp_path / "out")]) == 0
    assert_same_files(tmp_path / "out", src)
    capsys.readouterr()
    assert main(["import", f"{url}/src", f"{url}/ckpt"]) == 0
    assert "pieces were there already" in capsys.readouterr().out
    assert main(["import", f"{url}/src", f"{url}/ckpt", "--dtype", "f32"]) == 1
    assert "is a complete checkpoint" in capsys.readouterr().err
    assert main(["inspect", f"{url}/ckpt"]) == 1
    assert "is a checkpoint directory" in capsys.readouterr().err
    assert main(["inspect", f"{url}/nothing"]) == 1
    assert "holds no objects" in capsys.readouterr().err


def test_verify_finds_a_deleted_and_a_changed_chunk(
    gcs: GcsServer, stored: str, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy(gcs, stored, url)
    assert main(["verify", url]) == 0
    chunks = [
        name for name in gcs.keys(f"{key(url)}/params/moe_layers.mlp") if "zarray" not in name
    ]
    gcs.delete(chunks[0])
    gcs.put(chunks[-1], bytes([gcs.content(chunks[-1])[0] ^ 1]) + gcs.content(chunks[-1])[1:])
    capsys.readouterr()
    assert main(["verify", url, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["digests"]["problems"]
    assert {problem["subject"] for problem in found} == {
        chunk.removeprefix(f"{key(url)}/") for chunk in (chunks[0], chunks[-1])
    }
    with pytest.raises(CheckpointError, match="is missing though the checkpoint is marked"):
        export_checkpoint(open_checkpoint(url), tmp_path / "out")


KILLED_AT = [2, 100, -1]  # writes of objects; from the end: side files, COMPLETE


def test_killed_anywhere_it_continues_and_ends_with_the_same_bytes(
    gcs: GcsServer, url: str, src: Path, local: Path
):
    gcs.log.clear()
    run_import(src, as_place(f"{url}/whole"), dtype="bf16")
    writes = [name for method, name in gcs.log if method == "POST" and not name.endswith("lock")]
    points = [at if at > 0 else len(writes) + 1 + at for at in KILLED_AT]
    commands = [("import", src, f"{url}/{n}", "object", n, (0, 1)) for n in points]
    run_all(commands)
    for n in points:
        dst = as_place(f"{url}/{n}")
        with pytest.raises(CheckpointError, match="is unfinished"):
            open_checkpoint(dst)
        summary = run_import(src, dst, dtype="bf16")
        assert (summary.resumed_units > 0) == (n >= 40), n
        assert gcs.contents(key(f"{url}/{n}")) == tree_bytes(local), n


def test_shares_of_several_workers_give_the_same_bytes(
    gcs: GcsServer, url: str, src: Path, local: Path
):
    first = run_import(src, as_place(url), dtype="bf16", worker=(0, 2))
    assert not first.finished
    assert run_import(src, as_place(url), dtype="bf16", worker=(1, 2)).finished
    assert gcs.contents(key(url)) == tree_bytes(local)


def test_another_plan_or_a_changed_source_is_refused(
    gcs: GcsServer, url: str, src: Path, local: Path
):
    upload(gcs, src, f"{url}/src")

    def import_it(**options):
        source = open_source(f"{url}/src")
        checkpoint = open_safetensors(source)
        return import_checkpoint(checkpoint, f"{url}/ckpt", policy=SMALL_CHUNKS, **options)

    assert not import_it(dtype="bf16", worker=(0, 2)).finished
    with pytest.raises(ProblemsError, match="was bf16 when"):
        import_it()
    config = gcs.content(f"{key(url)}/src/config.json")
    gcs.put(f"{key(url)}/src/config.json", config)  # the same bytes, written again
    with pytest.raises(ProblemsError, match=r"config\.json"):
        import_it(dtype="bf16", worker=(1, 2))
    assert import_it(overwrite=True, dtype="bf16").finished
    pieces = open_checkpoint(f"{url}/ckpt").provenance["pieces"]
    assert pieces == open_checkpoint(local).provenance["pieces"]


def test_one_process_at_a_time(gcs: GcsServer, url: str, src: Path):
    dst = as_place(url)
    with claim(dst):
        with pytest.raises(CheckpointError, match=rf"pid {os.getpid()} on {platform.node()}"):
            run_import(src, dst)
        with pytest.raises(CheckpointError, match="another process"):
            run_import(src, dst, worker=(0, 2))
    with (
        claim(dst, shared=True),
        claim(dst, shared=True),
        pytest.raises(CheckpointError, match="another process"),
        claim(dst),
    ):
        pass
    assert [name for name in gcs.keys(key(url)) if "lock" in name] == []
    with claim(dst):
        pass


def put_lock(gcs: GcsServer, url: str, **changes: object) -> str:
    """The lock of another process, made from one of ours."""
    lock = f"{key(url)}/{UNFINISHED}/lock"
    with ObjectPlace(BUCKET, lock).locked():
        record = json.loads(gcs.content(lock))
    gcs.put(lock, json.dumps(record | {"token": "another"} | changes).encode())
    return lock


def test_the_lock_of_a_process_that_died_here_is_taken_over(gcs: GcsServer, url: str):
    lock = put_lock(gcs, url, pid=DEAD)
    with claim(as_place(url)):
        assert json.loads(gcs.content(lock))["pid"] == os.getpid()
    assert gcs.keys(lock) == []


def test_a_lock_whose_answer_was_lost_is_ours(gcs: GcsServer, url: str):
    lock = f"{key(url)}/{UNFINISHED}/lock"
    gcs.lost.add(lock)
    with claim(as_place(url)):
        assert [method for method, name in gcs.log if name == lock][:2] == ["POST", "POST"]
    assert gcs.keys(lock) == []


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"namespace": "a container"}])
def test_of_a_process_elsewhere_a_person_decides(gcs: GcsServer, url: str, change: dict):
    lock = put_lock(gcs, url, pid=DEAD, renewed_s=None, **change)  # an earlier version's
    with pytest.raises(CheckpointError, match="another process") as told, claim(as_place(url)):
        pass
    assert f"pid {DEAD} on {change.get('host', platform.node())} since" in str(told.value)
    assert f"rm 'gs://{BUCKET}/{lock}*'" in str(told.value)
    gcs.delete(lock)
    with claim(as_place(url)):
        pass


@pytest.mark.parametrize("shared", [False, True])
def test_a_lock_of_elsewhere_is_taken_over_once_nobody_writes_it(
    gcs: GcsServer, url: str, monkeypatch: pytest.MonkeyPatch, shared: bool
):
    monkeypatch.setattr(lock_module, "_SILENT_S", 0.5)
    monkeypatch.setattr(lock_module, "_POLL_S", 0.05)
    lock = put_lock(gcs, url, host="elsewhere")
    record, ended = gcs.content(lock), threading.Event()

    def renew() -> None:
        while not ended.wait(0.05):
            gcs.put(lock, record)

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(CheckpointError, match="on elsewhere since"), claim(as_place(url)):
        pass
    ended.set()
    thread.join()
    with claim(as_place(url), shared=shared):
        pass


def test_a_lock_is_written_anew_while_it_is_held(
    gcs: GcsServer, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Who finds the own one deleted or taken over ends, whatever it is doing."""
    monkeypatch.setattr(lock_module, "_RENEWED_S", 0.05)
    ended = threading.Event()
    monkeypatch.setattr(lock_module.os, "_exit", lambda status: status == 1 and ended.set())
    lock = ObjectPlace(BUCKET, f"{key(url)}/lock")
    with lock.locked() as got:
        assert got
        seen, deadline = lock.generation(), time.monotonic() + 20
        while lock.generation() == seen:
            assert time.monotonic() < deadline
        gcs.lost.add(lock.key)  # an answer that does not arrive changes nothing
        while lock.key in gcs.lost:
            assert time.monotonic() < deadline
        with lock.locked() as second:
            assert not second
    assert not lock.exists()
    assert not ended.is_set()
    with lock.locked():
        gcs.put(lock.key, json.dumps({"token": "another"}).encode())
        assert ended.wait(20)
    assert lock.exists(), "it is another's"
    assert f"{lock} was deleted or taken over" in capsys.readouterr().err


def test_what_is_not_ours_is_not_touched(gcs: GcsServer, url: str, src: Path):
    gcs.put(f"{key(url)}/thesis.tex", b"years")
    with pytest.raises(CheckpointError, match="is not empty and no checkpoint directory"):
        run_import(src, as_place(url), overwrite=True)
    assert gcs.contents(key(url)) == {"thesis.tex": b"years"}


def test_overwrite_replaces_all_of_a_checkpoint(
    gcs: GcsServer, stored: str, url: str, src: Path, local: Path
):
    copy(gcs, stored, url)
    gcs.put(f"{key(url)}/stale.txt", b"")
    with pytest.raises(CheckpointError, match="name another or --overwrite it"):
        run_import(src, as_place(url), dtype="keep")
    run_import(src, as_place(url), dtype="bf16", overwrite=True)
    assert gcs.contents(key(url)) == tree_bytes(local)


def test_what_was_trained_goes_both_ways(
    gcs: GcsServer, stored: str, url: str, local: Path, tmp_path: Path
):
    norm = np.dtype(np.float32)
    change = {"norm.weight": leaf_of_rows(norm, lambda _, a, b: np.ones(b - a, norm))}
    down = write_derived(open_checkpoint(stored), tmp_path / "down", change, {})
    wanted = write_derived(open_checkpoint(local), tmp_path / "wanted", change, {})
    assert tree_bytes(tmp_path / "down").keys() == tree_bytes(tmp_path / "wanted").keys()
    assert down.provenance["pieces"] == wanted.provenance["pieces"]
    up = write_derived(open_checkpoint(local), url, change, {})
    assert up.provenance == wanted.provenance
    assert gcs.contents(key(url)) == tree_bytes(tmp_path / "wanted")
    with pytest.raises(CheckpointError, match="is the checkpoint itself"):
        write_derived(up, url, change, {}, overwrite=True)


def test_nothing_outside_an_object_is_read(gcs: GcsServer, url: str):
    gcs.put(f"{key(url)}/a", b"12345")
    source = open_source(url)
    assert source.read("a", 1, 4) == b"2345"
    for begin, nbytes in ((0, 6), (-1, 1), (5, 1)):
        with pytest.raises(ProblemsError, match="is 5 bytes, needed"):
            source.read("a", begin, nbytes)


def test_an_object_replaced_while_it_is_read_is_noticed(gcs: GcsServer, url: str):
    gcs.put(f"{key(url)}/a", b"12345")
    source = open_source(url)
    assert source.files() == {"a": 5}
    before = source.fingerprint("a")
    assert source.fingerprint("a") == before
    gcs.put(f"{key(url)}/a", b"123")
    assert source.fingerprint("a") != before
    assert source.fingerprint("a")["size"] == 3
    with pytest.raises(ProblemsError, match="bytes 0 to 5"):
        source.read("a", 0, 5)
    gcs.delete(f"{key(url)}/a")
    with pytest.raises(ProblemsError, match="is not in the folder"):
        source.fingerprint("a")


@pytest.mark.parametrize("fault", ["is missing", "is cut"])
def test_a_chunk_that_cannot_be_read_is_one_line(gcs: GcsServer, stored: str, url: str, fault: str):
    copy(gcs, stored, url)
    chunk = next(name for name in gcs.keys(f"{key(url)}/params/norm.weight") if name[-1] == "0")
    content = gcs.content(chunk)
    gcs.delete(chunk)
    if fault == "is cut":
        gcs.put(chunk, content[:-2])
    with pytest.raises(CheckpointError, match=re.escape(f"{url}/params/norm.weight cannot")):
        load(url)


@pytest.mark.parametrize("address", ["gs://bucket/nothing", "gs://bucket//x", "gs://other/x"])
def test_an_address_without_a_checkpoint_is_one_line(
    gcs: GcsServer,  # noqa: ARG001
    tmp_path: Path,
    address: str,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "text.txt").write_text("text")
    options = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    assert finetune(["train", "--checkpoint", address, *options]) == 1
    told = capsys.readouterr().err
    assert address in told
    assert "Traceback" not in told


@pytest.mark.parametrize("address", ["gs://", "gs:///x", "gs://bucket//x", "gs://bucket/../x"])
def test_addresses_that_are_none(address: str):
    with pytest.raises(CloudError, match="is no address; needed gs://BUCKET/FOLDER"):
        as_place(address)
    with pytest.raises(ProblemsError, match="is no address"):
        open_source(address)


def test_writes_are_conditional(gcs: GcsServer, url: str):
    path = as_place(url) / "a"
    assert isinstance(path, ObjectPlace)
    first = path.write_if(b"1", None)
    assert first
    assert path.write_if(b"2", None) is None
    path.write_bytes(b"3")
    assert path.write_if(b"4", first) is None
    assert path.write_if(None, first) is None
    assert path.read_bytes() == gcs.content(path.key) == b"3"
    assert path.write_if(None, path.generation())
    assert not path.exists()
    assert not (as_place(url) / COMPLETE).is_file()

"""What is wrong with a checkpoint directory, an export or a disk, and that the advice helps."""

import dataclasses
import hashlib
import json
import os
import re
import resource
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from advice import done, follows, told
from hub_client import REPO, TOKEN, lone_hub
from hub_server import Fault, HubServer
from modules import set_config, without_module
from roundtrip import assert_same_files, patch_tensor, tree_bytes

from converters.cli.main import main
from converters.exporting.files import ExportFiles
from converters.importing import finish
from converters.publishing.push import push_folder
from mtp_model.checkpoint.claim import held
from mtp_model.checkpoint.derived import write_derived
from mtp_model.checkpoint.directory import COMPLETE, UNFINISHED, CheckpointError, open_checkpoint
from mtp_model.files import object_place
from mtp_model.files.object_place import ObjectPlace
from mtp_model.files.objects import ObjectState
from mtp_model.load import load
from tools.make_tiny_checkpoint import make_tiny_checkpoint

COMMIT = "^POST .*/commit/"
DAMAGED = "params/mtp.eh_proj.weight/0.0.0"


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "src"
    make_tiny_checkpoint(folder, sizes={"num_hidden_layers": 3, "n_routed_experts": 8})
    return folder


@pytest.fixture(scope="module")
def whole(src: Path) -> Path:
    done("import", src, src.parent / "whole")
    return src.parent / "whole"


@pytest.fixture
def ckpt(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "ckpt"))


def refused_to_open(ckpt: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(ckpt)
    return str(caught.value)


# --- what a folder is


@follows("name a checkpoint directory that `convert-deepseek import` or training wrote")
@follows("name a directory that `convert-deepseek import` or training wrote")
@follows("first run `convert-deepseek import ")
def test_what_is_no_checkpoint_directory(src, whole, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    advice = " directory that `convert-deepseek import` or training wrote"
    for wrong in (tmp_path / "nowhere", tmp_path / "empty"):
        assert advice in told(capsys, "verify", wrong)
    done("verify", whole)
    command = re.search(r"first run `(.*) DST`", told(capsys, "verify", src))
    assert command
    program, *args = shlex.split(command[1])
    assert program == "convert-deepseek"
    done(*args, tmp_path / "dst")
    done("verify", tmp_path / "dst")


@follows("run the same command again, it continues where it stopped")
def test_an_unfinished_directory(src, tmp_path, capsys):
    done("import", src, tmp_path / "half", "--worker", "1/2")
    advice = "run the same command again, it continues where it stopped"
    assert advice in told(capsys, "verify", tmp_path / "half")
    done("import", src, tmp_path / "half")
    done("verify", tmp_path / "half")


@follows("put the file itself there (the folder as a whole may be a link)")
@pytest.mark.parametrize("name", [DAMAGED, "tokenizer.json", "params", "COMPLETE"])
def test_a_link_out_of_a_directory(src, ckpt, tmp_path, capsys, name):
    """Nobody reads what a directory from anywhere names outside of itself, not even to compare."""
    (tmp_path / "link").symlink_to(ckpt)
    done("verify", src, tmp_path / "link")
    away = tmp_path / "away"
    shutil.move(ckpt / name, away)
    (ckpt / name).symlink_to(away)
    for command in (("verify", ckpt), ("verify", src, ckpt), ("export", ckpt, tmp_path / "out")):
        assert f"{name} is a link out of the folder, to {away}; put" in told(capsys, *command)
    with pytest.raises(CheckpointError, match="link out of the folder"):
        load(ckpt)
    (ckpt / name).unlink()
    shutil.move(away, ckpt / name)
    done("verify", src, ckpt)


def test_a_pipe_in_a_directory_is_not_waited_for(ckpt, capsys):
    (ckpt / DAMAGED).unlink()
    os.mkfifo(ckpt / DAMAGED)
    assert f"{DAMAGED} is not a regular file" in told(capsys, "verify", ckpt)


def test_a_directory_in_the_cache_of_the_hub_is_read(src, ckpt, tmp_path):
    """It is a folder of links to the cache's own blobs."""
    snapshot, blobs = tmp_path / "models--x/snapshots/1", tmp_path / "models--x/blobs"
    shutil.copytree(ckpt, snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    done("verify", src, snapshot)


@pytest.mark.parametrize("way", ["copy", "import"])
@follows("copy all of it, or empty the folder and import it again")
def test_a_part_of_a_directory(src, whole, ckpt, capsys, way):
    (ckpt / COMPLETE).unlink()
    assert "copy all of it, or empty the folder and import it again" in told(capsys, "verify", ckpt)
    shutil.rmtree(ckpt)
    if way == "copy":
        shutil.copytree(whole, ckpt)
    else:
        ckpt.mkdir()
        done("import", src, ckpt)
    done("verify", ckpt)


def without_a_chunk(ckpt: Path) -> None:
    (ckpt / DAMAGED).unlink()


def with_half_a_chunk(ckpt: Path) -> None:
    os.truncate(ckpt / DAMAGED, 10)


def with_a_broken_record(ckpt: Path) -> None:
    (ckpt / "provenance.json").write_text("{")


def with_foreign_metadata(ckpt: Path) -> None:
    file = next(ckpt.glob("params/*/.zarray"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "order": "F"}))


def with_another_version(ckpt: Path) -> None:
    file = ckpt / COMPLETE
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 7}))


def with_a_flipped_bit(ckpt: Path) -> None:
    content = bytearray((ckpt / DAMAGED).read_bytes())
    content[3] ^= 1
    (ckpt / DAMAGED).write_bytes(content)


def with_another_side_file(ckpt: Path) -> None:
    (ckpt / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    "damage",
    [
        without_a_chunk,
        with_half_a_chunk,
        with_a_broken_record,
        with_foreign_metadata,
        with_another_version,
        with_a_flipped_bit,
        with_another_side_file,
    ],
)
@follows(
    "though the checkpoint is marked complete; copy it again, or import it again with --overwrite",
    "it was cut short; copy it again, or import it again with --overwrite",
    "; import it again with --overwrite, or use the toolkit that wrote it",
    "); import it again with --overwrite",
    "` finds it; import it again with --overwrite",
    "was changed since the import; restore it, or import again with --overwrite",
)
def test_a_damaged_directory_is_exported_once_it_is_imported_again(
    src, ckpt, tmp_path, capsys, damage: Callable[[Path], None]
):
    damage(ckpt)
    message = told(capsys, "export", ckpt, tmp_path / "out")
    assert re.search(r"import (it )?again with --overwrite", message)
    done("import", src, ckpt, "--overwrite")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    done("export", ckpt, tmp_path / "out")
    assert_same_files(tmp_path / "out", src)


def test_a_damaged_directory_is_loaded_once_it_is_imported_again(src, ckpt):
    with_half_a_chunk(ckpt)
    with pytest.raises(CheckpointError, match="or import it again with --overwrite"):
        load(ckpt)
    done("import", src, ckpt, "--overwrite")
    load(ckpt)


@follows("has other bytes than were written")
def test_a_module_of_a_damaged_directory(src, ckpt, tmp_path, capsys):
    lost = without_module(src, tmp_path / "lost")
    with_a_flipped_bit(ckpt)
    command = ("import", lost, tmp_path / "dst", "--mtp-from", ckpt)
    assert "copy it again, or import it again with --overwrite" in told(capsys, *command)
    done("import", src, ckpt, "--overwrite")
    done(*command)


# --- where a command may write


@follows(
    " is not empty and no checkpoint directory of this toolkit; nothing in it was touched; name "
    "another place, or empty it",
    " is not empty and no safetensors checkpoint; nothing in it was touched; name another place, "
    "or empty it",
)
@pytest.mark.parametrize("command", ["import", "export"])
def test_a_folder_of_somebody_else(src, whole, tmp_path, capsys, command):
    args = (command, src if command == "import" else whole)
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst/letters.txt").write_text("")
    assert "name another place, or empty it" in told(capsys, *args, tmp_path / "dst")
    done(*args, tmp_path / "other")
    (tmp_path / "dst/letters.txt").unlink()
    done(*args, tmp_path / "dst")


@pytest.mark.parametrize("command", ["import", "export"])
@follows("touched; name another place, or empty it")
def test_a_folder_of_somebody_else_that_was_only_claimed(src, whole, tmp_path, capsys, command):
    """As `--overwrite` leaves it that was killed at once: that is said anew, or nothing goes."""
    dst = Path(shutil.copytree(src, tmp_path / "dst"))
    (dst / UNFINISHED).mkdir()
    source = src if command == "import" else whole
    assert "nothing in it was touched; name another place" in told(capsys, command, source, dst)
    shutil.rmtree(dst / UNFINISHED)
    assert_same_files(dst, src)
    (dst / UNFINISHED).mkdir()
    done(command, source, dst, "--overwrite")
    shutil.rmtree(dst)
    (dst / UNFINISHED).mkdir(parents=True)
    done(command, source, dst)


@follows(" is a complete checkpoint; name another or --overwrite it")
@follows(" holds a checkpoint; name another place or --overwrite it")
@pytest.mark.parametrize("command", ["import", "export"])
def test_a_place_that_is_taken(src, whole, ckpt, tmp_path, capsys, command):
    if command == "import":
        args, dst = ("import", src, "--dtype", "bf16"), ckpt
    else:
        args, dst = ("export", whole, "--dtype", "bf16"), tmp_path / "dst"
        done("export", whole, dst)
    place = (*args[:2], dst, *args[2:])
    assert "or --overwrite it" in told(capsys, *place)
    done(*args[:2], tmp_path / "another", *args[2:])
    done(*place, "--overwrite")


@follows("; wait for it, or end it and run this again")
def test_a_place_that_another_process_writes(src, tmp_path, capsys):
    with held(tmp_path / "dst"):
        message = told(capsys, "import", src, tmp_path / "dst")
        assert "wait for it, or end it and run this again" in message
    done("import", src, tmp_path / "dst")


@follows(", which it is made of, overlap; name another place")
def test_an_export_into_its_base(src, whole, tmp_path, capsys):
    command = ("export", whole, src / "out", "--base", src)
    assert "overlap; name another place" in told(capsys, *command)
    done("export", whole, tmp_path / "out", "--base", src)


@follows(" is the checkpoint itself; name another place for the new one")
def test_a_trained_checkpoint_over_its_base(ckpt, tmp_path):
    base = open_checkpoint(ckpt)
    with pytest.raises(CheckpointError, match="name another place for the new one"):
        write_derived(base, ckpt, {}, {})
    write_derived(base, tmp_path / "another", {}, {})


@follows(" among them; run the same command again")
def test_chunks_that_were_not_written(src, ckpt, capsys, monkeypatch, tmp_path):
    real = finish._digests
    with monkeypatch.context() as patch:
        patch.setattr(finish, "_digests", lambda *args: {**real(*args), "norm.weight": {}})
        message = told(capsys, "import", src, tmp_path / "dst")
    assert "among them; run the same command again" in message
    done("import", src, tmp_path / "dst")
    assert open_checkpoint(tmp_path / "dst").leaves == open_checkpoint(ckpt).leaves


@follows("make room and run the same command again, or ", "name another place")
@follows("set TMPDIR to a folder on another disk")
@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk(src, whole, tmp_path, capsys, monkeypatch, command):
    class Usage:
        free = 1000

    args = (command, src if command == "import" else whole)
    real = shutil.disk_usage
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage)
        message = told(capsys, *args, tmp_path / "dst")
        assert "make room and run the same command again, or name another place" in message

        def of_another(path: object) -> object:  # another place has room
            return real(tmp_path) if "another" in str(path) else Usage

        (tmp_path / "another").mkdir()
        patch.setattr(shutil, "disk_usage", of_another)
        done(*args, tmp_path / "another/dst")
    done(*args, tmp_path / "dst")  # there is room now


def test_no_room_for_what_is_fetched(src, whole, tmp_path, capsys, monkeypatch):
    class Usage:
        free = 1000

    (tmp_path / "another").mkdir()
    real = shutil.disk_usage
    with lone_hub(tmp_path, monkeypatch) as hub:
        hub.add(REPO, tree_bytes(src))
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path: real(path) if "another" in str(path) else Usage
        )
        command = ("verify", REPO, whole)
        assert "set TMPDIR to a folder on another disk" in told(capsys, *command)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "another"))
        done(*command)


# --- what changes meanwhile


@pytest.mark.parametrize("limit_bytes", [4 << 10, 20 << 10])  # a chunk's, the journal's
@follows("; raise the limit or name another place")
def test_a_file_that_may_not_grow(src, tmp_path, capsys, limit_bytes):
    """An error of a descriptor, which knows no name: the message has that of the file."""
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        said = told(capsys, "import", src, tmp_path / "ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    assert f"{tmp_path}/ckpt/" in said
    assert "raise the limit" in said
    done("import", src, tmp_path / "ckpt")
    done("verify", src, tmp_path / "ckpt")


@follows("undo the change and run it again, or start over with --overwrite")
@pytest.mark.parametrize("way", ["undo", "overwrite"])
def test_a_source_that_changed_before_an_import_continued(src, tmp_path, capsys, way):
    theirs, dst = Path(shutil.copytree(src, tmp_path / "src")), tmp_path / "dst"
    done("import", theirs, dst, "--worker", "1/2")
    before = (theirs / "config.json").read_text()
    stat = (theirs / "config.json").stat()
    set_config(theirs, initializer_range=0.5)
    message = told(capsys, "import", theirs, dst)
    assert "undo the change and run it again, or start over with --overwrite" in message
    if way == "undo":
        (theirs / "config.json").write_text(before)
        os.utime(theirs / "config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        done("import", theirs, dst)
    else:
        done("import", theirs, dst, "--overwrite")


@follows("import it again with --overwrite")
def test_a_source_that_changed_during_an_import(src, tmp_path, capsys, monkeypatch):
    theirs, dst = Path(shutil.copytree(src, tmp_path / "src")), tmp_path / "dst"
    real = finish._side_pieces

    def touching(*args: object) -> object:
        patch_tensor(theirs, "lm_head.weight", {(0, 0): b"\x00\x40"})
        return real(*args)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(finish, "_side_pieces", touching)
        command = ("import", theirs, dst, "--copies", "main")
        assert "import it again with --overwrite" in told(capsys, *command)
    done(*command, "--overwrite")


@follows("run the same command again")
def test_a_base_that_changed_during_an_export(src, whole, tmp_path, capsys, monkeypatch):
    theirs, command = Path(shutil.copytree(src, tmp_path / "src")), ("export", whole)
    real = ExportFiles.take

    def touching(*args: object) -> object:
        (theirs / "tokenizer.json").touch()
        return real(*args)  # pyright: ignore[reportArgumentType]

    place = (*command, tmp_path / "out", "--base", theirs)
    with monkeypatch.context() as patch:
        patch.setattr(ExportFiles, "take", touching)
        assert "was replaced while it was read; run the same command again" in told(capsys, *place)
    again = told(capsys, *place)
    assert "start over with --overwrite" in again
    done(*place, "--overwrite")


# --- wrong usage


@follows("--mtp-from gives an MTP module, --scope main leaves it out; leave out one of them")
@follows("--mtp-from belongs to --base SRC, as at import; leave it out, or name both")
def test_options_that_do_not_go_together(src, whole, tmp_path, capsys):
    lost = without_module(src, tmp_path / "lost")
    module = ("--mtp-from", src)
    for number, (command, wrong, fewer) in enumerate(
        (
            ("import", ("--scope", "main", *module), ("--scope", "main")),
            ("import", ("--scope", "main", *module), module),
            ("export", module, ()),
        )
    ):
        args = (command, whole if command == "export" else lost, tmp_path / str(number))
        with pytest.raises(SystemExit):
            main([str(arg) for arg in (*args, *wrong)])
        assert "leave" in capsys.readouterr().err
        done(*args, *fewer)
    done("import", lost, tmp_path / "joined", *module)
    done("export", tmp_path / "joined", tmp_path / "both", "--base", lost, *module)


# --- the Hub and buckets


@follows("arrived with another sha256 than the source lists; run the same command again")
@follows(") though the Hub lists it; run the same command again")
def test_a_file_of_the_hub_that_arrives_otherwise(src, tmp_path, capsys, monkeypatch):
    absent = Fault(status=404, headers={"X-Error-Code": "EntryNotFound"}, times=99)
    with lone_hub(tmp_path, monkeypatch) as hub:
        hub.add(REPO, tree_bytes(src))
        done("import", REPO, tmp_path / "mtp", "--scope", "mtp")
        command = ("export", tmp_path / "mtp", tmp_path / "out", "--base", REPO)
        hub.fail("^(GET|HEAD) .*/resolve/.*-00001-of", absent)
        assert "the Hub lists it; run the same command again" in told(capsys, *command)
        hub.clear_faults()
        kept = tree_bytes(src)["model-00001-of-000007.safetensors"]  # no tensor of it was imported
        digest = hashlib.sha256(kept).hexdigest()
        hub.stored[digest] = kept[:-1] + bytes([kept[-1] ^ 1])
        message = told(capsys, *command)
        assert "another sha256 than the source lists; run the same command again" in message
        hub.stored[digest] = kept
        done(*command)


@follows("; make room there")
def test_no_room_for_what_the_hub_sends(src, tmp_path, capsys, monkeypatch):
    from huggingface_hub import file_download

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with lone_hub(tmp_path, monkeypatch) as hub:
        hub.add(REPO, tree_bytes(src))
        command = ("import", REPO, tmp_path / "dst")
        with monkeypatch.context() as patch:
            patch.setattr(file_download, "http_get", full)
            assert "make room there" in told(capsys, *command)
        done(*command)


# How huggingface_hub 2.4 itself calls httpx2 to send a large file.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@follows("is not UTF-8, which the Hub needs; convert it")
@follows("was sent and is not listed; push again", " were sent; push again")
@follows(", other bytes were sent; push again")
def test_a_push(whole, tmp_path, capsys, monkeypatch):
    def delist(hub: HubServer) -> None:
        files = hub.models[REPO].commits[hub.models[REPO].branches["main"]]
        hub.models[REPO].commit({n: data for n, data in files.items() if n != "tokenizer.json"})

    def replace_large(hub: HubServer) -> None:
        files = hub.models[REPO].commits[hub.models[REPO].branches["main"]]
        name = "model-00002-of-000007.safetensors"
        hub.models[REPO].commit({**files, name: files[name][:-1] + b"?"})

    def replace_small(hub: HubServer) -> None:
        files = hub.models[REPO].commits[hub.models[REPO].branches["main"]]
        hub.models[REPO].commit({**files, "tokenizer.json": b"{}"})

    with lone_hub(tmp_path, monkeypatch) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        command = ("export", whole, tmp_path / "out", "--push", REPO)
        hub.add(REPO, {"README.md": b"\xff"})
        assert "is not UTF-8, which the Hub needs; convert it" in told(capsys, *command)
        hub.models[REPO].commit({"README.md": b"converted"})
        for change, message in {
            delist: "was sent and is not listed; push again",
            replace_small: "were sent; push again",
            replace_large: "other bytes were sent; push again",
        }.items():
            hub.models[REPO].commit({})
            command = ("export", whole, tmp_path / change.__name__, "--push", REPO)
            last = partial(hub.after, COMMIT, partial(change, hub))
            hub.after(COMMIT, last)  # the first commit is of the weights alone
            assert message in told(capsys, *command)
            done(*command)


@follows(" is unfinished; run the export again, then push it")
def test_a_push_of_what_is_unfinished(whole, tmp_path):
    done("export", whole, tmp_path / "out")
    (tmp_path / "out" / UNFINISHED).mkdir()
    provenance = open_checkpoint(whole).provenance
    with pytest.raises(CheckpointError, match="run the export again, then push it"):
        push_folder(tmp_path / "out", REPO, provenance=provenance)
    done("export", whole, tmp_path / "out", "--overwrite")
    assert not (tmp_path / "out" / UNFINISHED).exists()


def with_other_checksums(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """What is asked of an object there has another checksum than its bytes."""
    real = object_place.state

    def state(place: ObjectPlace) -> ObjectState | None:
        found = real(place)
        is_ours = where in str(place) and str(place).endswith(".safetensors")
        return dataclasses.replace(found, crc32c=found.crc32c ^ 1) if found and is_ours else found

    monkeypatch.setattr(object_place, "state", state)


@pytest.mark.parametrize("over_base", [False, True])
@follows("it was deleted; run the same command again")
@follows(" was copied with another checksum; run the same command again")
def test_a_bucket_that_stores_other_bytes(src, whole, capsys, monkeypatch, gcs, url, over_base):
    command = ("export", whole, f"{url}/out")
    if over_base:
        for name, content in tree_bytes(src).items():
            gcs.put(f"{url.split('/', 3)[3]}/base/{name}", content)
        command += ("--base", f"{url}/base")
    with monkeypatch.context() as patch:
        with_other_checksums(patch, "/out/")
        message = told(capsys, *command)
    assert re.search("(it was deleted|another checksum); run the same command again", message)
    done(*command)

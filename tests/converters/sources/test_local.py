"""LocalSource: every byte asked for or an error, and no path that leaves the folder."""

import os
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from converters.sources import local as local_module
from converters.sources.local import LocalSource
from converters.sources.open import open_source
from converters.sources.source import byte_view
from mtp_model.problems import ProblemsError


def folder(tmp_path: Path, **files: bytes) -> Path:
    root = tmp_path / "checkpoint"
    root.mkdir()
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def test_files_are_sorted_with_sizes_and_without_the_bookkeeping_of_git_and_the_hub(tmp_path):
    root = folder(tmp_path, b=b"123", a=b"")
    for inner in (".git/lfs", ".cache/huggingface", "inference/configs"):
        (root / inner).mkdir(parents=True)
        (root / inner / "x").write_bytes(b"12")
    found = open_source(str(root)).files()
    assert list(found.items()) == [("a", 0), ("b", 3), ("inference/configs/x", 2)]


def test_reads_are_exact(tmp_path):
    source = open_source(str(folder(tmp_path, a=bytes(range(100)))))
    assert source.name == str(tmp_path / "checkpoint")
    assert source.read("a", 10, 5) == bytes(range(10, 15))
    assert source.read("a", 100, 0) == b""
    out = np.zeros((2, 3), ml_dtypes.bfloat16)
    source.read_into("a", 88, out)
    assert out.tobytes() == bytes(range(88, 100))
    source.read_into("a", 0, np.zeros((0, 3), np.float32))


def test_short_reads_are_continued(tmp_path, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    source = open_source(str(folder(tmp_path, a=bytes(range(100)))))
    assert source.read("a", 1, 99) == bytes(range(1, 100))


@pytest.mark.parametrize(("begin", "nbytes"), [(0, 11), (5, 6), (11, 0), (-1, 1), (0, 2**62)])
def test_bytes_that_the_file_lacks_are_refused_before_memory_is_taken(tmp_path, begin, nbytes):
    source = open_source(str(folder(tmp_path, a=bytes(10))))
    needed = f"a is 10 bytes, needed bytes {begin} to {begin + nbytes}; it is truncated"
    with pytest.raises(ProblemsError, match=needed):
        source.read("a", begin, nbytes)


def test_a_file_truncated_while_it_is_read_is_an_error(tmp_path):
    root = folder(tmp_path, a=bytes(100))
    source = open_source(str(root))
    source.read("a", 0, 100)
    os.truncate(root / "a", 40)
    with pytest.raises(ProblemsError, match="a ends at byte 40, needed bytes to 100; it was trunc"):
        source.read("a", 10, 90)


def test_a_failing_disk_is_named_with_the_byte(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    source = open_source(str(folder(tmp_path, a=bytes(100))))
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ProblemsError, match="a byte 3: Input/output error"):
        source.read("a", 3, 4)


def test_the_fingerprint_notices_a_change_of_a_file_that_is_open(tmp_path):
    root = folder(tmp_path, a=b"12")
    source = open_source(str(root))
    source.read("a", 0, 1)
    before = source.fingerprint("a")
    assert before == source.fingerprint("a")
    assert before["size"] == 2
    (root / "new").write_bytes(b"34")
    os.utime(root / "new", ns=(1, 1))
    (root / "new").rename(root / "a")
    assert source.fingerprint("a") != before


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("/etc/passwd", "is an absolute path; file names are relative to the checkpoint's folder"),
        ("../secret", "leaves the checkpoint's folder"),
        ("x/../../secret", "leaves the checkpoint's folder"),
        ("", "is not a plain relative path"),
        ("./a", "is not a plain relative path"),
        ("a//b", "is not a plain relative path"),
        ("a\0b", "is not a plain relative path"),
        ("b", "cannot be opened: No such file or directory"),
        ("x" * 300, "cannot be opened: File name too long"),
        ("a\udcff", "has a name that is not UTF-8; rename it"),
        ("folder", "is not a regular file"),
        ("pipe", "is not a regular file"),
        ("loop", "cannot be opened: Too many levels of symbolic links"),
        ("dangling", "cannot be opened: No such file or directory"),
        ("out", "is a link out of the folder, to .*/secret; read it with --follow-links,"),
    ],
)
def test_names_that_are_no_file_of_the_folder_are_refused(tmp_path, name, fault):
    root = folder(tmp_path, a=b"12")
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "folder").mkdir()
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nowhere")
    (root / "out").symlink_to("../secret")
    source = open_source(str(root))
    for use in (lambda: source.read(name, 0, 1), lambda: source.fingerprint(name)):
        with pytest.raises(ProblemsError, match=fault) as caught:
            use()
        str(caught.value).encode()


def test_the_listing_reports_all_files_that_it_refuses(tmp_path):
    root = folder(tmp_path, a=b"12")
    (tmp_path / "elsewhere").mkdir()
    (root / "dangling").symlink_to("nowhere")
    (root / "folder").symlink_to("../elsewhere")
    with pytest.raises(ProblemsError) as caught:
        open_source(str(root)).files()
    assert [problem.subject for problem in caught.value.problems] == ["dangling", "folder"]


def test_links_inside_the_folder_and_to_the_blobs_of_the_hub_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    (snapshot / "inner").mkdir(parents=True)
    blobs = tmp_path / "models--a--b/blobs"
    blobs.mkdir()
    (blobs / "hash").write_bytes(b"blob")
    (snapshot / "x").symlink_to("../../blobs/hash")
    (snapshot / "inner/y").symlink_to("../../../blobs/hash")
    (snapshot / "z").symlink_to("x")
    (tmp_path / "link").symlink_to(snapshot)
    source = open_source(str(tmp_path / "link"))
    assert source.files() == {"inner/y": 4, "x": 4, "z": 4}
    assert source.read("inner/y", 0, 4) == b"blob"
    (snapshot / "z").unlink()
    (snapshot / "z").symlink_to("../../refs")
    (tmp_path / "models--a--b/refs").write_bytes(b"")
    with pytest.raises(ProblemsError, match="z is a link out of the folder"):
        source.files()


def test_a_source_that_is_no_folder_is_refused(tmp_path):
    needed = "needed the folder that holds config.json and the safetensors files"
    with pytest.raises(ProblemsError, match=f"nowhere does not exist; {needed}"):
        open_source(str(tmp_path / "nowhere"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ProblemsError, match=f"is a file; {needed}"):
        open_source(str(tmp_path / "model.safetensors"))


def test_threads_share_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(local_module, "_OPEN_FILES", 2)
    root = folder(tmp_path, **{f"f{n}": bytes([n]) * 5000 for n in range(8)})
    source = LocalSource(str(root))
    wrong = []

    def read(first: int) -> None:
        for n in range(400):
            which = (first + n * 3) % 8
            if source.read(f"f{which}", n, 4000) != bytes([which]) * 4000:
                wrong.append(which)

    before = len(list(Path("/proc/self/fd").iterdir()))
    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 2


def test_byte_views_share_memory_and_need_contiguous_arrays():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    byte_view(array)[:] = 0
    assert not array.any()
    assert byte_view(b"").shape == (0,)
    with pytest.raises(ValueError, match="needs a C-contiguous array, found strides"):
        byte_view(array.T)

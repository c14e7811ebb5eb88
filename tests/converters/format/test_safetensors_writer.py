"""StreamWriter: the bytes of the reference library, visible only when whole, or nothing."""

import errno
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import xxhash

from converters.format import writer as safetensors_writer
from converters.format.header import make_header, parse_header
from converters.format.writer import StreamWriter
from mtp_model.files import local
from mtp_model.files.local import AppendedFile
from mtp_model.problems import ProblemsError

ROWS = [("a", "U8", (5000, 3)), ("none", "F32", (0, 2)), ("b", "BF16", (700,))]
RAW = make_header(ROWS, {"format": "pt"})
HEADER = parse_header(RAW, "x", "test")
A = np.arange(15000, dtype=np.uint8).reshape(5000, 3)
B = np.arange(700, dtype=ml_dtypes.bfloat16)
WHOLE = len(RAW).to_bytes(8, "little") + RAW + A.tobytes() + B.tobytes()


@pytest.fixture(params=["direct", "refused at open", "refused at write", "no O_DIRECT"])
def _filesystem(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways in which filesystems take O_DIRECT; buffers small enough for several flushes."""
    monkeypatch.setattr(local, "_STAGING_BYTES", 4096)
    os_open, os_pwrite, direct = os.open, os.pwrite, os.O_DIRECT
    refusal = OSError(errno.EINVAL, "Invalid argument")

    def refuse_open(path: Path, flags: int, *mode: int) -> int:
        if flags & direct:
            raise refusal
        return os_open(path, flags, *mode)

    def refuse_write(fd: int, data: memoryview, at: int) -> int:
        if local.fcntl.fcntl(fd, local.fcntl.F_GETFL) & direct:
            raise refusal
        return os_pwrite(fd, data, at)

    if request.param == "refused at open":
        monkeypatch.setattr(os, "open", refuse_open)
    elif request.param == "refused at write":
        monkeypatch.setattr(os, "pwrite", refuse_write)
    elif request.param == "no O_DIRECT":
        monkeypatch.setattr("mtp_model.files.direct.O_DIRECT", 0)


@pytest.mark.usefixtures("_filesystem")
@pytest.mark.parametrize("piece", [1000, 4096, 15000])
def test_the_file_and_its_digest(tmp_path, piece):
    path = tmp_path / "x.safetensors"
    with StreamWriter(AppendedFile(path), HEADER) as writer:
        for begin in range(0, A.size, piece):
            writer.write(A.reshape(-1)[begin : begin + piece])
        writer.write(b"")
        assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors.partial"]
        writer.write(B)
    assert path.read_bytes() == WHOLE
    assert writer.size == len(WHOLE)
    assert writer.digest == xxhash.xxh3_128_hexdigest(WHOLE)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    loaded = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(loaded["a"], A)


def write(path: Path, *buffers: np.ndarray | bytes) -> None:
    with StreamWriter(AppendedFile(path), HEADER) as writer:
        for buffer in buffers:
            writer.write(buffer)


def test_a_file_of_whole_pages_and_one_without_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_STAGING_BYTES", 4096)
    raw = make_header([("a", "U8", (8192 - 88,))], {})
    raw += b" " * (80 - len(raw))
    for name, header, data in (("pages", raw, bytes(8192 - 88)), ("empty", b"{}", b"")):
        writer = StreamWriter(AppendedFile(tmp_path / name), parse_header(header, name, "test"))
        writer.write(data)
        digest = writer.close()
        written = (tmp_path / name).read_bytes()
        assert written == len(header).to_bytes(8, "little") + header + data
        assert digest == xxhash.xxh3_128_hexdigest(written)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1001], at))
    write(tmp_path / "x", A, B)
    assert (tmp_path / "x").read_bytes() == WHOLE


def test_too_few_bytes_leave_no_file_and_name_the_tensor(tmp_path):
    writer = StreamWriter(AppendedFile(tmp_path / "x"), HEADER)
    writer.write(A[:1000])
    given = len(RAW) + 8 + 3000
    needs = f"x needs {len(WHOLE)} bytes, was given {given}: a ends after 3000 of its 15000 bytes"
    with pytest.raises(ProblemsError, match=needs):
        writer.close()
    assert not list(tmp_path.iterdir())


def test_too_many_bytes_leave_no_file(tmp_path):
    needs = f"x needs {len(WHOLE)} bytes, was given {len(WHOLE) + 1}"
    with pytest.raises(ProblemsError, match=needs):
        write(tmp_path / "x", A, B, b"1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("staging_bytes", [4096, 2**20])  # fails in write(), in close()
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_leaves_no_file_and_names_it(tmp_path, monkeypatch, call, staging_bytes):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local, "_STAGING_BYTES", staging_bytes)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/x.partial'"):
        write(tmp_path / "x", A, B)
    assert not list(tmp_path.iterdir())


class Interrupted:
    def update(self, view: memoryview) -> None:
        if len(view) == B.nbytes:
            raise KeyboardInterrupt


def test_an_interrupted_write_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"before")
    monkeypatch.setattr(safetensors_writer.xxhash, "xxh3_128", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", A, B)
    assert (tmp_path / "x").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_run_left_is_overwritten(tmp_path):
    (tmp_path / "x.partial").write_bytes(b"y" * 100_000)
    write(tmp_path / "x", A, B)
    assert (tmp_path / "x").read_bytes() == WHOLE


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").resolve().is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    StreamWriter(AppendedFile(tmp_path / "x"), parse_header(b"{}", "x", "test")).close()
    assert (tmp_path / "x").exists()

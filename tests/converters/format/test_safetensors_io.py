"""Headers: what the reference library writes is read, what is malformed is refused and why."""

import json
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from converters.format.header import DTYPES, Header, TensorInfo, make_header, read_header
from converters.sources.open import open_source
from mtp_model.files.untrusted_json import MAX_VALUES
from mtp_model.problems import ProblemsError


def read(tmp_path: Path, data: bytes) -> Header:
    (tmp_path / "x.safetensors").write_bytes(data)
    return read_header(open_source(str(tmp_path)), "x.safetensors")


def file_bytes(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def assert_refused(tmp_path: Path, data: bytes, *reports: str) -> None:
    with pytest.raises(ProblemsError) as caught:
        read(tmp_path, data)
    lines = [re.sub(" +", " ", str(problem)) for problem in caught.value.problems]
    assert lines == list(reports)
    assert caught.value.where == str(tmp_path)


def test_what_the_reference_library_wrote_is_read(tmp_path):
    arrays = {
        "scalar": np.array(1.5, np.float32),
        "empty": np.zeros((3, 0), np.int16),
        "weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "flag": np.array([True]),
    }
    data = safetensors.numpy.save(arrays, metadata={"format": "pt", "näme": "ü"})
    header = read(tmp_path, data)
    length = int.from_bytes(data[:8], "little")
    assert (header.file, header.size, header.raw) == ("x.safetensors", len(data), data[8:][:length])
    assert header.metadata == {"format": "pt", "näme": "ü"}
    assert {tensor.name for tensor in header.tensors} == arrays.keys()
    for tensor in header.tensors:
        stored = data[tensor.begin : tensor.begin + tensor.nbytes]
        array = np.frombuffer(stored, DTYPES[tensor.dtype]).reshape(tensor.shape)
        np.testing.assert_array_equal(array, arrays[tensor.name])


def test_make_header_writes_what_the_reference_library_writes():
    arrays = {"ä.weight": np.zeros((2, 3), np.float32), "b": np.zeros((5,), np.uint8)}
    rows = [("ä.weight", "F32", (2, 3)), ("b", "U8", (5,))]
    data = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    raw = make_header(rows, {"format": "pt"})
    assert data[8 : 8 + len(raw)] == raw
    assert len(raw) % 8 == 0
    assert make_header([], {}) == b"{}      "


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_one_that_the_reference_library_sizes_as_we_do(tmp_path, name):
    nbytes = 3 * DTYPES[name].itemsize
    data = file_bytes({"t": entry(name, [3], [0, nbytes])}, bytes(nbytes))
    assert read(tmp_path, data).tensors[0].nbytes == nbytes
    ((_, tensor),) = safetensors.deserialize(data)
    assert (tensor["dtype"], tensor["shape"]) == (name, [3])


def test_the_dtypes_of_the_release():
    released = {name: DTYPES[name] for name in ("BF16", "F32", "F8_E4M3")}
    assert released == {
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F32": np.dtype(np.float32),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    }


def test_tensors_come_in_offset_order_with_zero_length_ones_in_their_place(tmp_path):
    header = {
        "last": entry(offsets=[2, 4]),
        "none": entry("F32", [0, 7], [2, 2]),
        "first": entry(),
        "end": entry("F32", [7, 0], [4, 4]),
    }
    read_in = read(tmp_path, file_bytes(header, b"1234"))
    assert [tensor.name for tensor in read_in.tensors] == ["first", "none", "last", "end"]
    begin = read_in.size - 4
    assert read_in.tensors[1] == TensorInfo(
        name="none", dtype="F32", shape=(0, 7), file="x.safetensors", begin=begin + 2, nbytes=0
    )


def test_a_file_without_tensors(tmp_path):
    assert read(tmp_path, file_bytes(b"{}   ")).tensors == ()


LENGTH_FAULTS = {
    b"": "is 0 bytes; a safetensors file begins with the 8 bytes of its header length",
    bytes(7): "is 7 bytes; a safetensors file begins with the 8 bytes of its header length",
    struct.pack("<Q", 3) + b"{}": "is 10 bytes, its header alone needs 11; it is truncated",
    struct.pack("<Q", 100_000_001): "claims a header of 100000001 bytes, the format allows "
    "100000000",
    b"\xff" * 8: "claims a header of 18446744073709551615 bytes, the format allows 100000000",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": "is a Git LFS pointer, "
    "not the file it stands for; run `git lfs pull`",
}


@pytest.mark.parametrize("data", LENGTH_FAULTS)
def test_a_length_that_the_file_does_not_hold_is_refused(tmp_path, data):
    assert_refused(tmp_path, data, f"file x.safetensors {LENGTH_FAULTS[data]}")


JSON_FAULTS = {
    b"": "is not JSON: Expecting value at character 0 of 0",
    b"\0\0{}": "is not JSON: Expecting value at character 0 of 4",
    b" {}": "begins with b' {}', needed a JSON object from byte 0",
    b"[1]": "begins with b'[1]', needed a JSON object from byte 0",
    b'{"a":1': "is not JSON: Expecting ',' delimiter at character 6 of 6",
    b"{}x": "is not JSON: Extra data at character 2 of 3",
    b'{"\xff":1}': "is not UTF-8: byte 0xff at 2",
    b'{"a":1,"b":2,"a":3}': "has the key a twice",
    b'{"a":{"dtype":1,"dtype":1}}': "has the key dtype twice",
    b'{"\\ud800":1}': "has a lone surrogate in '\\ud800'",
    b'{"a":"\\udfff"}': "has a lone surrogate in '\\udfff'",
    b'{"a":NaN}': "holds NaN, which is not JSON",
    b'{"a":-Infinity}': "holds -Infinity, which is not JSON",
    b'{"a":1e999}': "holds 1e999, which is beyond a double",
    b'{"a":' + b"9" * 5000 + b"}": "holds a number with thousands of digits",
    b'{"a":' + b"[" * 200_000: "is nested too deeply",
    b'{"a":' * 200_000: "is nested too deeply",
}


@pytest.mark.parametrize("raw", JSON_FAULTS, ids=lambda raw: repr(raw[:12]))
def test_a_header_that_is_no_json_object_is_refused(tmp_path, raw):
    report = f"header x.safetensors has a header that {JSON_FAULTS[raw]}"
    assert_refused(tmp_path, file_bytes(raw), report)


KNOWN = ", ".join(DTYPES)
HUGE = 2**62
ENTRY_FAULTS: list[tuple[Any, str]] = [
    (3, "header t in x.safetensors is 3, needed dtype, shape and data_offsets"),
    ({"dtype": "U8"}, "header t in x.safetensors is {'dtype': 'U8'}, needed dtype, shape and "
    "data_offsets"),
    ({**entry(), "strides": [1]}, "header t in x.safetensors is {'data_offsets': [0, 2], 'dtype': "
    "'U8', 'shape': [2], 'strides': [1]}, needed dtype, shape and data_offsets"),
    (entry("F8"), f"dtype t in x.safetensors is F8, needed one of {KNOWN}"),
    (entry("F4"), f"dtype t in x.safetensors is F4, needed one of {KNOWN}"),
    (entry(None), f"dtype t in x.safetensors is None, needed one of {KNOWN}"),
    (entry(["U8"]), f"dtype t in x.safetensors is ['U8'], needed one of {KNOWN}"),
    (entry(shape=2), "shape t in x.safetensors is 2, needed a list of sizes"),
    (entry(shape=[-2]), "shape t in x.safetensors is [-2], needed a list of sizes"),
    (entry(shape=[True]), "shape t in x.safetensors is [True], needed a list of sizes"),
    (entry(shape=[2.0]), "shape t in x.safetensors is [2.0], needed a list of sizes"),
    (entry(shape=[3]), "shape t in x.safetensors is U8 [3], which needs 3 bytes; its data_offsets "
    "hold 2"),
    (entry("F32"), "shape t in x.safetensors is F32 [2], which needs 8 bytes; its data_offsets "
    "hold 2"),
    (entry(shape=[HUGE, HUGE, 0]), f"shape t in x.safetensors is U8 [{HUGE}, {HUGE}, 0], which "
    "needs more than 2**63 bytes; its data_offsets hold 2"),
    (entry(shape=[0, HUGE, HUGE], offsets=[0, 0]), f"shape t in x.safetensors is U8 [0, {HUGE}, "
    f"{HUGE}], which needs more than 2**63 bytes; its data_offsets hold 0"),
    (entry(shape=[2**32, 2**32], offsets=[0, 0]), "shape t in x.safetensors is U8 [4294967296, "
    "4294967296], which needs more than 2**63 bytes; its data_offsets hold 0"),
    (entry(offsets=[2, 0]), "offsets t in x.safetensors has data_offsets [2, 0], needed [begin, "
    "end]"),
    (entry(offsets=[-2, 0]), "offsets t in x.safetensors has data_offsets [-2, 0], needed [begin, "
    "end]"),
    (entry(offsets=[0]), "offsets t in x.safetensors has data_offsets [0], needed [begin, end]"),
    (entry(offsets="02"), "offsets t in x.safetensors has data_offsets 02, needed [begin, end]"),
]  # fmt: skip


@pytest.mark.parametrize("value", [b"[],", b"{},", b"0,"])
def test_more_values_than_any_header_has_cost_no_memory(tmp_path, value):
    raw = b'{"a":[' + value * MAX_VALUES + b"0]}"
    read(tmp_path, file_bytes({}))  # what is loaded once
    tracemalloc.start()
    with pytest.raises(ProblemsError, match="values, more than the 4000000 allowed"):
        read(tmp_path, file_bytes(raw))
    assert tracemalloc.get_traced_memory()[1] < 5 * len(raw)
    tracemalloc.stop()


def test_a_release_in_a_single_file_has_far_fewer_values():
    entries = ((f"model.layers.{n}.mlp.weight", "BF16", (16, 56)) for n in range(91_991))
    values = make_header(entries, {"format": "pt"})
    assert 5 * sum(map(values.count, (b",", b"[", b"{"))) < MAX_VALUES


@pytest.mark.parametrize(("value", "report"), ENTRY_FAULTS)
def test_a_malformed_tensor_is_refused(tmp_path, value, report):
    assert_refused(tmp_path, file_bytes({"t": value}, b"12"), report)


def test_metadata_has_to_be_text(tmp_path):
    report = "header x.safetensors has __metadata__ that is not text -> text"
    for metadata in ([], {"a": 1}, {"a": None}, "x"):
        assert_refused(tmp_path, file_bytes({"__metadata__": metadata}), report)


def test_tensors_that_overlap_or_leave_holes_are_refused(tmp_path):
    def check(*reports: str, **tensors: list[int]) -> None:
        header = {name: entry(shape=[e - b], offsets=[b, e]) for name, (b, e) in tensors.items()}
        reports_in = [f"offsets {report}" for report in reports]
        assert_refused(tmp_path, file_bytes(header, bytes(6)), *reports_in)

    place = "in x.safetensors begins at byte"
    overlap, hole = "it overlaps the tensor before it", "it leaves a hole"
    check(f"b {place} 2, the tensor before it ends at 4: {overlap}", a=[0, 4], b=[2, 6])
    check(f"b {place} 0, the tensor before it ends at 6: {overlap}", a=[0, 6], b=[0, 6])
    check(f"b {place} 3, the tensor before it ends at 2: {hole}", a=[0, 2], b=[3, 6])
    check(f"a {place} 1, the tensor before it ends at 0: {hole}", a=[1, 6])
    check(f"none {place} 2, the tensor before it ends at 6: {overlap}", a=[0, 6], none=[2, 2])
    check(
        f"b {place} 1, the tensor before it ends at 2: {overlap}",
        f"c {place} 9, the tensor before it ends at 3: {hole}",
        a=[0, 2],
        b=[1, 3],
        c=[9, 9],
    )


def test_a_file_of_another_size_than_its_header_needs_is_refused(tmp_path):
    whole = file_bytes({"t": entry()}, b"12")
    assert read(tmp_path, whole).size == len(whole)
    needs = f"its header needs {len(whole)}"
    cut, more = whole[:-1], whole + b"3"
    truncated = f"file x.safetensors is {len(cut)} bytes, {needs}: it is truncated"
    longer = f"file x.safetensors is {len(more)} bytes, {needs}: something was appended"
    assert_refused(tmp_path, cut, truncated)
    assert_refused(tmp_path, more, longer)


def test_all_malformed_tensors_are_one_report(tmp_path):
    header = {"a": 1, "b": entry("F5"), "__metadata__": 2, "c": entry(shape=[-1])}
    with pytest.raises(ProblemsError, match="4 problems in") as caught:
        read(tmp_path, file_bytes(header, b"12"))
    assert [problem.subject for problem in caught.value.problems] == ["x.safetensors", *"abc"]


def test_a_report_of_very_many_faults_is_cut_and_counts_them(tmp_path):
    header = file_bytes({str(n): n for n in range(5000)})
    with pytest.raises(ProblemsError, match="1001 problems in") as caught:
        read(tmp_path, header)
    last = caught.value.problems[-1]
    assert str(last) == "more      x.safetensors has 4000 more problems"


def test_names_in_reports_are_short_and_printable(tmp_path):
    with pytest.raises(ProblemsError) as caught:
        read(tmp_path, file_bytes({"\x1b[31mred\n" + "x" * 1000: 3}))
    assert "'\\x1b[31mred\\nxxx" in str(caught.value)
    assert "x'... (1009 characters) in x.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 500

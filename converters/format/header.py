"""Safetensors headers, read and made.

Format: 8 bytes, the little-endian length of the header; the header, JSON padded with spaces; the
tensors' bytes without holes. https://github.com/huggingface/safetensors#format
"""

import itertools
import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from converters.sources.source import Source
from mtp_model.files.untrusted_json import JsonError, is_text_map, parse, shown
from mtp_model.problems import Problem, ProblemsError, raise_if_any

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}
"""Safetensors dtype name -> numpy dtype, for every dtype whose elements are whole bytes."""

_LENGTH_BYTES = 8
_MAX_PROBLEMS = 1000  # a hostile header of 100 MB has room for millions
_parsing = threading.Lock()  # such a header takes gigabytes to parse: never two at a time
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor of a file; `begin` counts from the start of the file.

    fused_in: the tensor of the file that it is a part of, where another layout joins several.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    nbytes: int
    fused_in: str | None = None

    @property
    def name_in_file(self) -> str:
        return self.fused_in or self.name


@dataclass(frozen=True, kw_only=True)
class Header:
    """One safetensors file. `raw` is the header text, verbatim, without its 8 length bytes."""

    file: str
    size: int
    raw: bytes
    metadata: dict[str, str]
    tensors: tuple[TensorInfo, ...]
    """In offset order, which leaves no byte of the file outside a tensor."""


def read_header(source: Source, file: str) -> Header:
    """The header of one file, without reading its tensors; ProblemsError tells all its faults."""
    size = int(source.fingerprint(file)["size"])
    fault = None
    if size < _LENGTH_BYTES:
        fault = f"is {size} bytes; a safetensors file begins with the 8 bytes of its header length"
        raise ProblemsError(source.name, [Problem("file", shown(file), fault)])
    start = source.read(file, 0, min(size, len(_LFS_POINTER)))
    nbytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if start == _LFS_POINTER:
        fault = "is a Git LFS pointer, not the file it stands for; run `git lfs pull`"
    elif nbytes > MAX_HEADER_BYTES:
        fault = f"claims a header of {nbytes} bytes, the format allows {MAX_HEADER_BYTES}"
    elif _LENGTH_BYTES + nbytes > size:
        fault = f"is {size} bytes, its header alone needs {_LENGTH_BYTES + nbytes}; it is truncated"
    if fault:
        raise ProblemsError(source.name, [Problem("file", shown(file), fault)])
    raw = source.read(file, _LENGTH_BYTES, nbytes)
    with _parsing:
        header = parse_header(raw, file, source.name)
    raise_if_any(source.name, _size_problems(header, size))
    return header


def start_of_file(raw: bytes) -> bytes:
    """What stands in a file before its first tensor: the header text behind its length."""
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw


def parse_header(raw: bytes, file: str, where: str) -> Header:
    """What header text says; `size` is then the size of the file that it needs."""
    entries = _entries(raw, file, where)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # some writers put null there
    data_begin = _LENGTH_BYTES + len(raw)
    tensors: list[TensorInfo] = []

    def problems() -> Iterator[Problem]:
        if not is_text_map(metadata):
            yield Problem("header", shown(file), "has __metadata__ that is not text -> text")
        for name, entry in entries.items():
            found = _read_entry(name, entry, file, data_begin)
            if isinstance(found, Problem):
                yield found
            else:
                tensors.append(found)

    raise_if_any(where, bounded(problems(), file))
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.nbytes))
    raise_if_any(where, bounded(_layout_problems(tensors, data_begin), file))
    size = data_begin + sum(tensor.nbytes for tensor in tensors)
    return Header(file=file, size=size, raw=raw, metadata=metadata, tensors=tuple(tensors))


def _entries(raw: bytes, file: str, where: str) -> dict[str, Any]:
    fault = None
    entries = None
    try:
        entries = parse(raw)
    except JsonError as err:
        fault = f"has a header that {err}"
    if not fault and not (raw.startswith(b"{") and isinstance(entries, dict)):
        fault = f"has a header that begins with {raw[:8]!r}, needed a JSON object from byte 0"
    if fault:
        raise ProblemsError(where, [Problem("header", shown(file), fault)])
    assert isinstance(entries, dict)
    return entries


def _read_entry(name: str, entry: object, file: str, data_begin: int) -> TensorInfo | Problem:
    subject = shown(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        found = f"in {shown(file)} is {shown(entry)}, needed dtype, shape and data_offsets"
        return Problem("header", subject, found)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        found = f"in {shown(file)} is {shown(dtype)}, needed one of {', '.join(DTYPES)}"
        return Problem("dtype", subject, found)
    if not _are_sizes(shape):
        found = f"in {shown(file)} is {shown(shape)}, needed a list of sizes"
        return Problem("shape", subject, found)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        found = f"in {shown(file)} has data_offsets {shown(offsets)}, needed [begin, end]"
        return Problem("offsets", subject, found)
    begin, end = offsets
    nbytes = _nbytes(shape, DTYPES[dtype].itemsize)
    if nbytes != end - begin:
        needs = f"{nbytes} bytes" if nbytes is not None else "more than 2**63 bytes"
        found = f"in {shown(file)} is {dtype} {shown(shape)}, which needs {needs}"
        return Problem("shape", subject, f"{found}; its data_offsets hold {shown(end - begin)}")
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        file=file,
        begin=data_begin + begin,
        nbytes=end - begin,
    )


def _are_sizes(value: object) -> bool:
    # type() and not isinstance(): JSON's true is an int to Python
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _nbytes(shape: list[int], itemsize: int) -> int | None:
    """Bytes of a tensor; None when its sizes, zeros aside, are more than numpy can address.

    Counted step by step, so that absurd sizes cost nothing.
    """
    nbytes = itemsize
    for size in shape:
        nbytes *= max(size, 1)
        if nbytes >= 2**63:
            return None
    return 0 if 0 in shape else nbytes


def _layout_problems(tensors: list[TensorInfo], data_begin: int) -> Iterator[Problem]:
    expected = data_begin
    for tensor in tensors:
        if tensor.begin != expected:
            fault = "overlaps the tensor before it" if tensor.begin < expected else "leaves a hole"
            at = f"in {shown(tensor.file)} begins at byte {shown(tensor.begin - data_begin)}"
            needed = f"the tensor before it ends at {shown(expected - data_begin)}"
            yield Problem("offsets", shown(tensor.name), f"{at}, {needed}: it {fault}")
        expected = max(expected, tensor.begin + tensor.nbytes)


def _size_problems(header: Header, size: int) -> Iterator[Problem]:
    if size != header.size:
        state = "it is truncated" if size < header.size else "something was appended"
        found = f"is {size} bytes, its header needs {shown(header.size)}: {state}"
        yield Problem("file", shown(header.file), found)


def bounded(problems: Iterable[Problem], file: str) -> list[Problem]:
    """The first thousand problems, and how many more there are of `file`."""
    remaining = iter(problems)
    found = list(itertools.islice(remaining, _MAX_PROBLEMS))
    more = sum(1 for _ in remaining)
    return [*found, Problem("more", shown(file), f"has {more} more problems")] if more else found


def make_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Header text for tensors (name, dtype, shape) stored in this order, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)

"""Files that hold nothing but token ids: which numbers they are, and where documents end.

.npy says itself what it holds; of a .bin that is said by Megatron's index beside it (.idx), by
llm.c's header in it, or by its name (.uint16.bin). It is never guessed: read as other numbers, it
would be other text. Headers are checked against the sizes of the files before anything is taken
from them.
"""

import ast
import io
import os
import re
import struct
from collections.abc import Callable, Container, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from finetune.data.files.kinds import FileError, Span
from mtp_model.files.place import Place
from mtp_model.files.untrusted_json import shown

_BLOCK_TOKENS = 1 << 18
BY_NAME = {f".{name}": np.dtype(name).newbyteorder("<") for name in ("uint16", "uint32", "int32")}
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
# Megatron's index: a magic, version 1, a code of the numbers' type, two counts.
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
# llm.c's header: 256 int32, of which the first says which tokenizer, the third how many tokens.
_LLMC_TYPES = {20240520: "<u2", 20240801: "<u4"}
_LLMC_BYTES = 1024


class TokenFile(NamedTuple):
    """What a file of token ids holds."""

    dtype: np.dtype
    begin: int  # first byte of the first token
    num_tokens: int
    ends: np.ndarray | None  # of documents, in tokens; None: each ends with EOS


def is_index(name: str, beside: Container[str]) -> bool:
    """Whether a file is the index of one beside it."""
    stem, dot, suffix = name.rpartition(".")
    return suffix == "idx" and f"{stem}{dot}bin" in beside


def open_token_file(path: Place, file: BinaryIO) -> TokenFile:
    """What an open .npy or .bin holds. Raises FileError."""
    nbytes = os.fstat(file.fileno()).st_size
    name = PurePosixPath(path.name)
    if name.suffix.lower() == ".npy":
        return _npy(file, nbytes)
    index = path.parent / f"{name.stem}.idx"
    if index.is_file():
        try:
            return _megatron(index.read_bytes(), nbytes)
        except FileError as error:
            raise FileError(f"has an index, {index.name}, that {error}") from error
    return _llmc(file, nbytes) or _flat(name, nbytes)


def token_spans(
    file: BinaryIO,
    tokens: TokenFile,
    vocab_size: int,
    eos: tuple[int, ...],
    see: Callable[[bytes], None],
) -> Iterator[Span]:
    """Documents of an open file, each token checked. `see` is given all that decides them."""
    see(f"{tokens.dtype.str} {tokens.begin}".encode())
    file.seek(tokens.begin)
    number, first, size = 0, 0, tokens.dtype.itemsize
    for done in range(0, tokens.num_tokens, _BLOCK_TOKENS):
        block = file.read(min(_BLOCK_TOKENS, tokens.num_tokens - done) * size)
        see(block)
        ids = np.frombuffer(block, tokens.dtype)
        _raise_if_outside(ids, done, vocab_size)
        for end in _ends(tokens, ids, done, eos).tolist():
            if end > first:
                number += 1
                yield Span(number, tokens.begin + first * size, (end - first) * size, None)
                first = end
    if tokens.ends is not None:
        see(tokens.ends.tobytes())


def _ends(tokens: TokenFile, ids: np.ndarray, done: int, eos: tuple[int, ...]) -> np.ndarray:
    """Where documents end in a block of tokens, before which are `done` others."""
    after = done + ids.size
    if tokens.ends is not None:
        first, last = np.searchsorted(tokens.ends, (done, after), side="right")
        return tokens.ends[first:last]
    ends = done + 1 + np.flatnonzero(np.isin(ids, eos))
    return np.append(ends, after) if after == tokens.num_tokens else ends


def _raise_if_outside(ids: np.ndarray, done: int, vocab_size: int) -> None:
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if wrong.size:
        place = int(wrong[0])
        found = f"has token {ids[place]} at {done + place}, read as {ids.dtype.name}"
        raise FileError(f"{found}; the vocabulary is 0 to {vocab_size - 1}")


def _raise_unless_whole(found: int, begin: int, count: int, dtype: np.dtype) -> None:
    needed = begin + count * dtype.itemsize
    if found != needed:
        what = f"is {found:,} bytes, needed {needed:,}"
        raise FileError(f"{what} for {count:,} tokens of {dtype.name}: it is cut, or damaged")


def _npy(file: BinaryIO, nbytes: int) -> TokenFile:
    """By the header of NumPy's format, version 1.0, which all arrays of numbers have."""
    if file.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
        raise FileError("is not a .npy file of version 1.0")
    header = file.read(int.from_bytes(file.read(2), "little"))
    try:
        found: Any = ast.literal_eval(header.decode("latin-1").strip())
        kind, shape = found["descr"], found["shape"]
    except (ValueError, SyntaxError, TypeError, LookupError, RecursionError, MemoryError) as error:
        told = "" if isinstance(error, MemoryError) else str(error)  # words from Python 3.12 on
        why = shown(told or "it cannot be parsed")
        raise FileError(f"has a header that is none of NumPy's: {why}") from error
    is_whole = isinstance(kind, str) and re.fullmatch(r"[<>|][iu][1248]", kind)
    if not is_whole or not isinstance(shape, tuple) or [*map(type, shape)] != [int]:
        what = f"has {_written(kind)} of shape {_written(shape)}"
        raise FileError(f"{what}, needed whole numbers in one dimension: one token after another")
    dtype, begin, count = np.dtype(kind), file.tell(), shape[0]
    if not 0 <= count <= nbytes:
        what = f"is {nbytes:,} bytes, too few for the tokens that its header tells of"
        raise FileError(f"{what} ({_written(count)}): it is cut, or damaged")
    _raise_unless_whole(nbytes, begin, count, dtype)
    return TokenFile(dtype, begin, count, None)


def _written(value: Any) -> str:
    """A value of a header for a message: Python refuses to write numbers of thousands of digits."""
    try:
        return shown(repr(value))
    except ValueError:
        return "a number of thousands of digits"


def _megatron(index: bytes, nbytes: int) -> TokenFile:
    """By the index of Megatron, whose documents are one or more sequences each."""
    if len(index) < _INDEX_HEADER.size or not index.startswith(_INDEX_MAGIC):
        raise FileError("is none of Megatron's: remove it, or name the data by its numbers' type")
    _, version, code, sequences, documents = _INDEX_HEADER.unpack_from(index)
    if version != 1 or code not in _INDEX_TYPES:
        raise FileError(f"has version {version} and type {code}, needed version 1 and integers")
    needed = _INDEX_HEADER.size + 12 * sequences + 8 * documents
    if len(index) != needed:
        what = f"is {len(index):,} bytes, needed {needed:,} for {sequences:,} sequences"
        raise FileError(f"{what} of text and {documents:,} documents")
    dtype, arrays = np.dtype(_INDEX_TYPES[code]), io.BytesIO(index[_INDEX_HEADER.size :])
    lengths = np.frombuffer(arrays.read(4 * sequences), "<i4").astype(np.int64)
    pointers = np.frombuffer(arrays.read(8 * sequences), "<i8")
    firsts = np.frombuffer(arrays.read(), "<i8")
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 0).any() or (pointers != ends[:-1] * dtype.itemsize).any():
        raise FileError("has sequences that do not follow each other without gaps")
    if not firsts.size or firsts[0] or firsts[-1] != sequences or (np.diff(firsts) < 0).any():
        raise FileError("has documents that are not all of its sequences, in their order")
    count = int(ends[-1])
    if nbytes != count * dtype.itemsize:
        raise FileError(f"tells of {count * dtype.itemsize:,} bytes of tokens, not of {nbytes:,}")
    return TokenFile(dtype, 0, count, ends[firsts[1:]])


def _llmc(file: BinaryIO, nbytes: int) -> TokenFile | None:
    """By the header of llm.c, None for a file without one."""
    header = np.frombuffer(file.read(12), np.uint8)
    if header.size < 12 or int(header.view("<i4")[0]) not in _LLMC_TYPES:
        return None
    magic, _, count = (int(number) for number in header.view("<i4"))
    dtype = np.dtype(_LLMC_TYPES[magic])
    _raise_unless_whole(nbytes, _LLMC_BYTES, count, dtype)
    return TokenFile(dtype, _LLMC_BYTES, count, None)


def _flat(path: PurePosixPath, nbytes: int) -> TokenFile:
    """By the file's name: nanoGPT and others write numbers and nothing else."""
    dtype = BY_NAME.get("".join(path.suffixes[-2:-1]).lower())
    if dtype is None:
        names = " or ".join(f"{path.stem}{name}.bin" for name in BY_NAME)
        raise FileError(
            f"does not say which numbers it holds: rename it to {names}, or put Megatron's .idx "
            "beside it; or move it away where it is no text"
        )
    if nbytes % dtype.itemsize:
        raise FileError(f"is {nbytes:,} bytes, which is no whole number of {dtype.name}")
    return TokenFile(dtype, 0, nbytes // dtype.itemsize, None)

"""Kinds of data files: what a file's name says it is, and where the records in it begin and end.

Every kind is read as a stream: what is held at a time is one record, of at most RECORD_BYTES.
"""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from mtp_model.files.untrusted_json import JsonError, shown, unique_members
from mtp_model.problems import UserError

RECORD_BYTES = 16 << 20  # tokenising one takes some fifty times as much memory
_BLOCK = 1 << 20
_JSON_SPACE = " \t\n\r"
_TURN_CELLS = {"messages", "conversations"}  # of tables: they hold JSON
_TOKEN_CELLS = {"input_ids", "loss_mask", "labels", "attention_mask"}
LINES, ARRAY, TABLE, PROSE, PARQUET = ".jsonl", ".json", ".csv", ".txt", ".parquet"
TOKENS, ARROW, ARRAY_RECORD = ".bin", ".arrow", ".array_record"
_HUB = ("hf:", "datasets")  # of a Path, which has one slash where two were
GZIP, ZSTD = ".gz", ".zst"
PACKED = {GZIP, ZSTD}
UNPACKED = {PARQUET, ARROW, ARRAY_RECORD}  # row by row into lines of JSON
_KINDS = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": ARRAY,
    ".csv": TABLE,
    ".txt": PROSE,
    ".md": PROSE,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".feather": ARROW,
    ".array_record": ARRAY_RECORD,
    ".arrayrecord": ARRAY_RECORD,
    ".npy": TOKENS,
    ".bin": TOKENS,
}
NAMES = (
    ".jsonl, .ndjson, .json, .csv, .txt, .md, any of these with .gz or .zst, .parquet, .arrow, "
    ".feather, .array_record, .arrayrecord, .npy, .bin"
)


class FileError(UserError):
    """What makes the rest of a file unreadable."""


@dataclass(frozen=True)
class FileKind:
    """What a file's name says it is."""

    name: str  # as it stands at the end of the file's name
    form: str
    packed_as: str  # .gz, .zst, "" for one that is read as it is


@dataclass(frozen=True)
class Span:
    """Where a record is in a file, and its number: of its line, or its place in an array."""

    number: int
    begin: int
    nbytes: int
    value: Any  # parsed JSON; None for prose


@dataclass(frozen=True)
class Broken:
    """A record that cannot be parsed; the file goes on after it."""

    number: int
    why: str


def is_on_hub(path: Path) -> bool:
    """Whether a path names a data set on the Hub: hf://datasets/ORG/NAME."""
    return path.parts[:2] == _HUB


def hub_name(path: Path) -> str:
    """A path on the Hub as it was given."""
    return f"hf://{'/'.join(path.parts[1:])}"


def kind_of(name: str) -> FileKind | None:
    """The kind that a file's name says, None for one that is not read."""
    suffixes = [each.lower() for each in PurePosixPath(name).suffixes[-2:]]
    packed_as = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ""
    suffix = suffixes[-1] if suffixes else ""
    form = _KINDS.get(suffix)
    if form is None or (packed_as and form in UNPACKED | {TOKENS}):
        return None
    return FileKind(suffix + packed_as, form, packed_as)


def spans(form: str, file: BinaryIO, see: Callable[[bytes], None]) -> Iterator[Span | Broken]:
    """Records of an open file. `see` is given its bytes, for a digest.

    Raises FileError where it cannot go on, UnicodeDecodeError where the bytes are no UTF-8.
    """
    start = _start(file)
    file.seek(start)
    return _SPANS[form](file, start, see)


def parse(form: str, content: bytes, header: tuple[str, ...]) -> Any:
    """The JSON value of a span's bytes."""
    if form == TABLE:
        [cells] = csv.reader((line.decode() for line in io.BytesIO(content)), strict=True)
        return _row(header, cells)
    return loads(content)


def loads(text: str | bytes) -> Any:
    """A value of JSON in which no key is given twice: of two values one would be lost.

    Bytes are UTF-8: json itself would guess at UTF-16, in which lines end elsewhere.
    """
    decoded = text.decode() if isinstance(text, bytes) else text
    return json.loads(decoded, object_pairs_hook=unique_members)


def read_header(file: BinaryIO) -> tuple[str, ...]:
    """Names of a table's columns."""
    file.seek(_start(file))
    return tuple(next(_rows(file), ([], 0, 0, 0))[0])


def _start(file: BinaryIO) -> int:
    """Where a file's content begins: a byte order mark is no part of it."""
    file.seek(0)
    return len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0


# --- lines of JSON


def _line_spans(file: BinaryIO, begin: int, see: Callable[[bytes], None]) -> Iterator[Any]:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            see(line)
            yield _parsed(number, begin, line)
        begin += len(line)


def _parsed(number: int, begin: int, line: bytes) -> Span | Broken:
    try:
        return Span(number, begin, len(line), loads(line))
    except JsonError as error:
        return Broken(number, str(error))
    except json.JSONDecodeError as error:
        if number == 1 and line.lstrip()[:1] == b"[":
            raise FileError("begins with an array: name it .json") from error
        return Broken(number, f"is not JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return Broken(number, f"is not UTF-8: {error.reason}")
    except (ValueError, RecursionError) as error:
        return Broken(number, f"is not JSON: {error}")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    number = 0
    while line := file.readline(RECORD_BYTES + 1):
        number += 1
        if len(line) > RECORD_BYTES:
            raise FileError(f"line {number} is {_too_long()}")
        yield line


def raise_if_too_long(what: str, nbytes: int) -> None:
    """FileError for a row or record of more bytes than one may have."""
    if nbytes > RECORD_BYTES:
        raise FileError(f"has a {what} {_too_long()}")


def _too_long() -> str:
    return f"longer than {RECORD_BYTES >> 20} MiB, the most that one record may have: cut it up"


# --- an array of records, or records one after the other


class _JsonStream:
    """A file of JSON, of which only what is being parsed is held."""

    def __init__(self, file: BinaryIO, begin: int, see: Callable[[bytes], None]):
        self.file, self.see = file, see
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.json = json.JSONDecoder(object_pairs_hook=unique_members)
        self.text, self.at, self.at_end = "", 0, False
        self.byte = begin  # of text[at]

    def more(self) -> bool:
        """Read on, twice as far each time. False at the end of the file."""
        self.text, self.at = self.text[self.at :], 0
        block = self.file.read(max(_BLOCK, len(self.text)))
        self.see(block)
        self.at_end = not block
        self.text += self.decoder.decode(block, final=self.at_end)
        return not self.at_end

    def peek(self) -> str:
        """The next character that is no space, or nothing at the end of the file."""
        while True:
            while (mark := self.text[self.at : self.at + 1]) and mark in _JSON_SPACE:
                self.skip()
            if mark or not self.more():
                return mark

    def skip(self) -> None:
        """Go past one character of ASCII."""
        self.at, self.byte = self.at + 1, self.byte + 1

    def take(self, number: int) -> Span:
        """The value that begins here."""
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                why = f"record {number} is not JSON: {error.msg}"
            except JsonError as error:
                raise FileError(f"record {number} {error}") from error
            except (ValueError, RecursionError) as error:
                raise FileError(f"record {number} is not JSON: {error}") from error
            else:
                if end < len(self.text) or self.at_end or self.text[end - 1] in '}]"':
                    return self._span(number, value, end)
                why = ""  # a number that may go on
            if len(self.text) - self.at > RECORD_BYTES:
                raise FileError(why or f"record {number} is {_too_long()}")
            if not self.more() and why:
                raise FileError(why)

    def _span(self, number: int, value: Any, end: int) -> Span:
        begin, nbytes = self.byte, len(self.text[self.at : end].encode())
        self.byte, self.at = begin + nbytes, end
        if nbytes > RECORD_BYTES:
            raise FileError(f"record {number} is {_too_long()}")
        return Span(number, begin, nbytes, value)


def _array_spans(file: BinaryIO, begin: int, see: Callable[[bytes], None]) -> Iterator[Any]:
    stream, number = _JsonStream(file, begin, see), 0
    if in_array := stream.peek() == "[":
        stream.skip()
    while mark := stream.peek():
        if in_array and mark == "]" and not number:
            break
        number += 1
        yield stream.take(number)
        if in_array:
            if (mark := stream.peek()) != ",":
                break
            stream.skip()
    if not in_array:
        return
    if mark != "]":
        found = f"has {mark!r}" if mark else "ends"
        raise FileError(f"{found} after record {number}, where an array goes on or is closed")
    stream.skip()
    if stream.peek():
        raise FileError("goes on after its array")


# --- tables


def _table_spans(file: BinaryIO, begin: int, see: Callable[[bytes], None]) -> Iterator[Any]:
    rows = _rows(file, see)
    header = tuple(next(rows, ([], 0, 0, 0))[0])
    if len(set(header)) < len(header):
        raise FileError(f"has a column twice in its header: {shown(', '.join(header))}")
    for cells, number, offset, nbytes in rows:
        if not cells:
            continue
        if len(cells) != len(header):
            yield Broken(number, f"has {len(cells)} columns, the header has {len(header)}")
            continue
        try:
            yield Span(number, begin + offset, nbytes, _row(header, cells))
        except JsonError as error:
            yield Broken(number, str(error))
        except (ValueError, RecursionError) as error:
            yield Broken(number, f"has a cell that is not JSON: {error}")


def _rows(
    file: BinaryIO, see: Callable[[bytes], None] = lambda _: None
) -> Iterator[tuple[list[str], int, int, int]]:
    """Cells, line number, first byte and bytes of each row, from where the file stands."""
    csv.field_size_limit(RECORD_BYTES)  # of the process: the module's own is 128 KiB
    used = [0, 0]  # bytes and lines

    def lines() -> Iterator[str]:
        for line in _lines(file):
            see(line)
            used[0] += len(line)
            used[1] += 1
            if used[0] - before > RECORD_BYTES:
                raise FileError(f"line {number} begins a row that is {_too_long()}")
            yield line.decode()

    before, number = 0, 1
    reader = csv.reader(lines(), strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise FileError(f"line {number} is not CSV: {error}") from error
        yield cells, number, before, used[0] - before
        before, number = used[0], used[1] + 1


def _row(header: tuple[str, ...], cells: list[str]) -> dict[str, Any]:
    """A row as a record; columns of turns and of tokens hold JSON."""
    holds_json = _TURN_CELLS | (_TOKEN_CELLS if "input_ids" in header else set())
    return {
        name: (loads(cell) if cell else None) if name in holds_json else cell
        for name, cell in zip(header, cells, strict=True)
    }


# --- prose


def _prose_spans(file: BinaryIO, begin: int, see: Callable[[bytes], None]) -> Iterator[Any]:
    """All of the file, one document."""
    decoder, nbytes = codecs.getincrementaldecoder("utf-8")(), 0
    while block := file.read(_BLOCK):
        decoder.decode(block)
        see(block)
        nbytes += len(block)
    decoder.decode(b"", final=True)
    if nbytes:
        yield Span(1, begin, nbytes, None)


_SPANS = {LINES: _line_spans, ARRAY: _array_spans, TABLE: _table_spans, PROSE: _prose_spans}

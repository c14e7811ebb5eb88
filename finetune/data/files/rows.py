"""Files of rows that other libraries read (.parquet, .arrow, .array_record), as lines of JSON.

The libraries are those of the extra `data`, and are needed for their own files alone. A few bytes
of such a file may stand for many: a value is stored once for all rows that have it, a number with
how often it comes. So sizes are looked at before values are made of them.
"""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol

import numpy as np

from finetune.data.files.kinds import (
    ARRAY_RECORD,
    ARROW,
    PARQUET,
    RECORD_BYTES,
    FileError,
    loads,
    raise_if_too_long,
)
from finetune.data.files.tf_example import parse_example
from finetune.data.records import FORM_KEYS, KNOWN_KEYS
from mtp_model.files.untrusted_json import JsonError, shown

_BLOCK = 1 << 20
_ROWS = 64  # held at a time
_BATCH_BYTES = 128 << 20  # of Arrow; 64 rows of usual dictionaries (1 MiB) are less
_HEADER_BYTES = 32  # of a page of parquet: more than its first three numbers take
_DICTIONARY_PAGE = 2
_TEXTS = ("string", "large_string", "binary", "large_binary")
_VIEWS = ("string_view", "binary_view")  # of text elsewhere, 16 bytes each
_LISTS = ("list", "large_list", "fixed_size_list")
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_PANDAS_INDEX = "__index_level_"  # a column that pandas writes unasked
_ARROW_FILE = b"ARROW1"  # how Arrow's files begin that are no streams
NOT_INSTALLED = "which is not installed: pip install 'deepseek-mtp[data]'"


class Out(Protocol):
    """Where lines are written to."""

    def write(self, block: bytes, /) -> object: ...


def unpack_rows(form: str, file: BinaryIO, out: Out) -> None:
    """Rows as lines of JSON. Of columns that no record has, only the names are kept."""
    unpack = {PARQUET: _unpack_parquet, ARROW: _unpack_arrow, ARRAY_RECORD: _unpack_array_record}
    unpack[form](file, out)


def _path_of(file: BinaryIO) -> str:
    """What opens an open file once more: it may have no name."""
    return f"/dev/fd/{file.fileno()}"


# --- tables of Arrow


@contextmanager
def _arrow_errors(what: str) -> Iterator[None]:
    try:
        import pyarrow as arrow
    except ImportError as error:
        raise FileError(f"needs pyarrow, {NOT_INSTALLED}") from error
    try:
        yield
    except FileError:  # in words already; it is a ValueError too
        raise
    # Of what Python has no value for: the year 10,000, nanoseconds, a column that is there twice.
    except (arrow.ArrowException, ArithmeticError, LookupError, ValueError) as error:
        raise FileError(f"is not {what} that can be read: {error}") from error
    except OSError as error:
        if error.errno:  # the system's, of a disk
            raise
        raise FileError(f"is not {what} that can be read: {error}") from error


def _unpack_parquet(file: BinaryIO, out: Out) -> None:
    with _arrow_errors("a parquet file"):
        import pyarrow.parquet as parquet

        table = parquet.ParquetFile(file, buffer_size=_BLOCK, pre_buffer=False)
        known, others = _columns(table.schema_arrow.names)
        for number in range(table.num_row_groups):
            rows = _rows_at_once(file, table.metadata.row_group(number), known)
            for batch in table.iter_batches(rows, row_groups=[number], columns=known):
                _write_rows(batch, others, out)


def _rows_at_once(file: BinaryIO, group: Any, known: list[str]) -> int:
    """How many rows of a row group may be decoded together, going by its largest values."""
    most = _ROWS
    for column in map(group.column, range(group.num_columns)):
        if column.num_values and column.path_in_schema.partition(".")[0] in known:
            values = -(-column.num_values // max(group.num_rows, 1))  # in a row, of a list several
            raise_if_too_long("row", 2 * (values - 1))  # "1," at least
            largest = max(8, _dictionary_bytes(file, column))
            most = min(most, _BATCH_BYTES // (values * largest))
    return max(most, 1)


def _dictionary_bytes(file: BinaryIO, column: Any) -> int:
    """Bytes of the values that rows of a column refer to, 0 without such: none is longer.

    The column's first page says it, in Thrift's compact protocol: which kind of page, its bytes
    unpacked, its bytes in the file.
    """
    begin = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)), default=0)
    file.seek(begin)
    header = file.read(_HEADER_BYTES)
    numbers, at = [], 0
    for _ in range(2):
        if header[at : at + 1] != b"\x15":  # the next field, an integer of 32 bits
            raise FileError(f"is not a parquet file that can be read: no page begins at {begin}")
        number, at = _varint(header, at + 1)
        numbers.append(number >> 1)  # zigzag, of what is not negative
    kind, nbytes = numbers
    return nbytes if kind == _DICTIONARY_PAGE else 0


def _varint(header: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    number, shift = 0, 0
    for byte in header[at:]:
        at, number = at + 1, number | (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return number, at


def _unpack_arrow(file: BinaryIO, out: Out) -> None:
    """A stream, as `datasets` writes it, or a file (Feather). Mapped: sizes in it cost nothing."""
    with _arrow_errors("an Arrow file"):
        import pyarrow as arrow

        with arrow.memory_map(_path_of(file)) as mapped:
            is_file = bytes(mapped.read(len(_ARROW_FILE))) == _ARROW_FILE
            mapped.seek(0)
            reader = arrow.ipc.open_file(mapped) if is_file else arrow.ipc.open_stream(mapped)
            known, others = _columns(reader.schema.names)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                batch.validate(full=True)  # offsets in it may point anywhere
                chosen = batch.select(known)
                for begin in range(0, chosen.num_rows, _ROWS):
                    _write_rows(chosen.slice(begin, _ROWS), others, out)
            if not is_file:
                _raise_unless_ended(mapped)


def _raise_unless_ended(mapped: Any) -> None:
    """FileError for a stream that goes on, or whose writer did not come to say that it ends."""
    end = mapped.tell()
    mapped.seek(max(0, end - len(_STREAM_END)))
    last, behind = mapped.read(end - mapped.tell()), mapped.size() - end
    if last != _STREAM_END:
        raise FileError(
            "is an Arrow stream without its end: it was cut, or its writer was stopped before it "
            "closed the file. Write it again"
        )
    if behind:
        raise FileError(f"has {behind:,} bytes behind the end of its Arrow stream: one a file")


def _columns(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """The columns that records have, and the others with nothing in them."""
    names = [name for name in names if not name.startswith(_PANDAS_INDEX)]
    known = [name for name in names if name in KNOWN_KEYS]
    if not FORM_KEYS & set(known):
        found = shown(", ".join(names))
        raise FileError(f"has the columns {found}, needed one of {', '.join(sorted(FORM_KEYS))}")
    return known, dict.fromkeys(set(names) - set(known), "")


def _write_rows(batch: Any, others: dict[str, str], out: Out) -> None:
    """Rows as lines, as many at a time as may be values of Python together."""
    least = sum(map(_least_bytes, batch.columns))
    if least > RECORD_BYTES:
        half = batch.num_rows // 2
        if not half:
            raise_if_too_long("row", least)
        _write_rows(batch.slice(0, half), others, out)
        _write_rows(batch.slice(half), others, out)
        return
    for row in batch.to_pylist():
        line = json.dumps(row | others, default=_plain).encode() + b"\n"
        raise_if_too_long("row", len(line))
        out.write(line)


def _least_bytes(array: Any) -> int:
    """What an array has at least in JSON, without making its values."""
    import pyarrow as arrow

    if isinstance(array, arrow.ExtensionArray):
        array = array.storage
    kind = array.type
    if _is(kind, *_TEXTS):
        return _sum(_computed("binary_length", array))
    if _is(kind, *_VIEWS):
        lengths = np.frombuffer(array.buffers()[1], "<i4")[::4]
        lengths = lengths[array.offset : array.offset + len(array)].astype(np.int64)
        return int(lengths[array.is_valid().to_numpy(zero_copy_only=False)].sum())
    if _is(kind, "dictionary") and _is(kind.value_type, *_TEXTS):
        # Each value is looked at once, however many rows have it.
        counted = array.indices.value_counts()
        values = array.dictionary.take(counted.field("values"))
        lengths = _computed("binary_length", values).cast("int64")
        return _sum(_computed("multiply", lengths, counted.field("counts")))
    if _is(kind, "struct"):
        names = 5 * kind.num_fields * (len(array) - array.null_count)  # "":1,
        return names + sum(map(_least_bytes, array.flatten()))
    if _is(kind, *_LISTS):
        inner = array.flatten()
        return 2 * len(inner) + _least_bytes(inner)  # 1,
    inner = kind.value_type if _is(kind, "dictionary") else kind
    if _is(inner, "nested", "dictionary", "run_end_encoded", *_TEXTS, *_VIEWS):
        raise FileError(f"has a column of {kind}, which is not read: write it as text or lists")
    return 0


def _sum(lengths: Any) -> int:
    return _computed("sum", lengths.cast("int64")).as_py() or 0


def _computed(function: str, *arrays: Any) -> Any:
    """What a function of Arrow makes of arrays: by its name, since checkers see none of them."""
    from pyarrow import compute

    return compute.call_function(function, arrays)


def _is(kind: Any, *names: str) -> bool:
    """Whether a type of Arrow is one of those that have these names."""
    from pyarrow import types

    return any(getattr(types, f"is_{name}")(kind) for name in names)


def _plain(value: Any) -> Any:
    """Dates and the like as something that is no text, so that they are refused where text goes."""
    return {"type": type(value).__name__}


# --- ArrayRecord


def _unpack_array_record(file: BinaryIO, out: Out) -> None:
    """Records of JSON as they are, those of TensorFlow as JSON."""
    try:
        # Compiled, without types: by its name, since what a checker says depends on what is there.
        array_record_module = importlib.import_module("array_record.python.array_record_module")
    except ImportError as error:
        raise FileError(f"needs array-record, {NOT_INSTALLED}") from error
    reader = array_record_module.ArrayRecordReader(
        _path_of(file), "readahead_buffer_size:0,max_parallelism:0"
    )
    try:
        _write_records(reader, out)
    except (IndexError, RuntimeError) as error:
        raise FileError(f"is not an ArrayRecord file that can be read: {error}") from error


def _write_records(reader: Any, out: Out) -> None:
    """All records as lines. RuntimeError where one is damaged, as late as when it is closed."""
    try:
        if not reader.ok():
            raise FileError("is not a whole ArrayRecord file")
        count = reader.num_records()
        for begin in range(0, count, _ROWS):
            records = reader.read(begin, min(begin + _ROWS, count))
            for number, record in enumerate(records, start=begin + 1):
                raise_if_too_long(f"record {number}", len(record))
                out.write(_json_line(number, record))
            if not reader.ok() or len(records) != min(_ROWS, count - begin):
                raise FileError(f"is damaged after record {begin}")
    finally:
        reader.close()


def _json_line(number: int, record: bytes) -> bytes:
    """A record as a line. What is wrong within the line is said when it is read."""
    example = parse_example(record, KNOWN_KEYS)
    if example is None and b"\n" not in record.strip():
        return record.strip() + b"\n"
    try:
        return json.dumps(loads(record) if example is None else example).encode() + b"\n"
    except (JsonError, ValueError, RecursionError) as error:
        raise FileError(f"has a record {number} that is not JSON: {error}") from error

"""Files of rows that other libraries read (.parquet, .arrow, .array_record), as lines of JSON.

The libraries are those of the extra `data`, and are needed for their own files alone.
"""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from finetune.data.files.kinds import (
    ARRAY_RECORD,
    ARROW,
    PARQUET,
    FileError,
    loads,
    raise_if_too_long,
)
from finetune.data.files.tf_example import parse_example
from finetune.data.records import FORM_KEYS, KNOWN_KEYS
from mtp_model.files.untrusted_json import JsonError, shown

_BLOCK = 1 << 20
_ROWS = 64  # held at a time
_PANDAS_INDEX = "__index_level_"  # a column that pandas writes unasked
_ARROW_FILE = b"ARROW1"  # how Arrow's files begin that are no streams
_EXTRA = "which is not installed: pip install 'deepseek-mtp[data]'"


def unpack_rows(form: str, file: BinaryIO, out: BinaryIO) -> None:
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
        raise FileError(f"needs pyarrow, {_EXTRA}") from error
    try:
        yield
    # Of what Python has no value for: the year 10,000, nanoseconds, a column that is there twice.
    except (arrow.ArrowException, ArithmeticError, LookupError, ValueError) as error:
        raise FileError(f"is not {what} that can be read: {error}") from error
    except OSError as error:
        if error.errno:  # the system's, of a disk
            raise
        raise FileError(f"is not {what} that can be read: {error}") from error


def _unpack_parquet(file: BinaryIO, out: BinaryIO) -> None:
    with _arrow_errors("a parquet file"):
        import pyarrow.parquet as parquet

        table = parquet.ParquetFile(file, buffer_size=_BLOCK, pre_buffer=False)
        known, others = _columns(table.schema_arrow.names)
        for batch in table.iter_batches(_ROWS, columns=known):
            _write_rows(batch, others, out)


def _unpack_arrow(file: BinaryIO, out: BinaryIO) -> None:
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


def _columns(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """The columns that records have, and the others with nothing in them."""
    names = [name for name in names if not name.startswith(_PANDAS_INDEX)]
    known = [name for name in names if name in KNOWN_KEYS]
    if not FORM_KEYS & set(known):
        found = shown(", ".join(names))
        raise FileError(f"has the columns {found}, needed one of {', '.join(sorted(FORM_KEYS))}")
    return known, dict.fromkeys(set(names) - set(known), "")


def _write_rows(batch: Any, others: dict[str, str], out: BinaryIO) -> None:
    for row in batch.to_pylist():
        line = json.dumps(row | others, default=_plain).encode() + b"\n"
        raise_if_too_long("row", len(line))
        out.write(line)


def _plain(value: Any) -> Any:
    """Dates and the like as something that is no text, so that they are refused where text goes."""
    return {"type": type(value).__name__}


# --- ArrayRecord


def _unpack_array_record(file: BinaryIO, out: BinaryIO) -> None:
    """Records of JSON as they are, those of TensorFlow as JSON."""
    try:
        # Compiled, without types: by its name, since what a checker says depends on what is there.
        array_record_module = importlib.import_module("array_record.python.array_record_module")
    except ImportError as error:
        raise FileError(f"needs array-record, {_EXTRA}") from error
    reader = array_record_module.ArrayRecordReader(
        _path_of(file), "readahead_buffer_size:0,max_parallelism:0"
    )
    try:
        _write_records(reader, out)
    except (IndexError, RuntimeError) as error:
        raise FileError(f"is not an ArrayRecord file that can be read: {error}") from error


def _write_records(reader: Any, out: BinaryIO) -> None:
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

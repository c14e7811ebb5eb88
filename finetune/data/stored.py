"""Data files that can be read anywhere: as they are, or once put into a temporary file.

What is packed (.gz, .parquet) cannot be read from the middle, and what is in a bucket not without a
request for each document. It is put into a file without a name in the folder for temporary files,
which is gone when the process is.
"""

import errno
import json
import os
import resource
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from gzip import BadGzipFile, GzipFile
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data.kinds import LINES, PARQUET, RECORD_BYTES, FileError, FileKind
from finetune.data.records import FORM_KEYS, KNOWN_KEYS
from mtp_model.files.local import raise_if_full
from mtp_model.files.place import Place
from mtp_model.files.untrusted_json import shown
from mtp_model.reporting import human_bytes

# Text is packed about 3 to 10 times; what a file of zeros gives is a thousand times.
_MOST_UNPACKED = 200
_ALWAYS_UNPACKED_BYTES = 1 << 30
_BLOCK = 1 << 20
_ROWS = 64  # of parquet held at a time
_PANDAS_INDEX = "__index_level_"  # a column that pandas writes unasked
_OTHER_FOLDER = "set TMPDIR to another folder"
Say = Callable[[str], None]


class StoredFile:
    """A data file, open as bytes from any place in it."""

    def __init__(self, path: Place, kind: FileKind, say: Say):
        """Raises FileError for a packed file that is damaged, OSError for one that is not there.

        say: is told what takes long.
        """
        self.form = LINES if kind.form == PARQUET else kind.form
        self._here = None if path.is_far else Path(str(path))
        self._temporary: BinaryIO | None = None
        if path.is_far:
            with _room(""):
                self._temporary = _fetched(path, self._new_file(), say)
        if kind.is_packed or kind.form == PARQUET:
            with self.open() as packed, _room("unpacked "):
                unpacked = self._new_file()
                (_unpack_parquet if kind.form == PARQUET else _unpack_gzip)(packed, unpacked)
                unpacked.flush()
            if self._temporary:
                self._temporary.close()
            self._temporary = unpacked

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file from its beginning."""
        if self._temporary is None:
            assert self._here
            with self._here.open("rb") as file:
                yield file
        else:
            self._temporary.seek(0)
            yield self._temporary

    def read(self, begin: int, nbytes: int) -> bytes:
        """Bytes from any place. May be called by several threads."""
        if self._temporary is not None:
            return os.pread(self._temporary.fileno(), nbytes, begin)
        assert self._here
        with self._here.open("rb") as file:
            file.seek(begin)
            return file.read(nbytes)

    def _new_file(self) -> BinaryIO:
        """A file without a name, for as long as this lives."""
        _raise_file_limit()
        file = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, file.close)
        return file


def raise_unless_room(files: Iterable[tuple[Place, int]]) -> None:
    """UserError where the folder for temporary files has no room for all that is fetched to it.

    files: with their bytes.
    """
    needed = sum(nbytes for file, nbytes in files if file.is_far)
    raise_if_full({Path(tempfile.gettempdir()): needed} if needed else {}, _OTHER_FOLDER)


def _fetched(path: Place, out: BinaryIO, say: Say) -> BinaryIO:
    """All of a file that is on no disk of this machine, in one whose text is then read."""
    done, size = 0, human_bytes(path.size())
    for piece in path.pieces():
        out.write(piece)
        done += len(piece)
        say(f"fetching {path.name}, {human_bytes(done)} of {size}")
    out.flush()
    return out


def _raise_file_limit() -> None:
    """As many files may be open from here on as this process can have at all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:  # often 1,024, which is fewer than a folder of data may have files
        with suppress(ValueError, OSError):  # a system that says "any number" and means fewer
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def _room(how: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = tempfile.gettempdir()
        why = f"does not fit {how}into {where}: make room there, or {_OTHER_FOLDER}"
        raise FileError(why) from error


def _unpack_gzip(packed: BinaryIO, out: BinaryIO) -> None:
    most = max(_ALWAYS_UNPACKED_BYTES, _MOST_UNPACKED * os.fstat(packed.fileno()).st_size)
    written = 0
    try:
        with GzipFile(fileobj=packed) as unpacked:
            while block := unpacked.read(_BLOCK):
                written += len(block)
                if written > most:
                    why = f"is more than {_MOST_UNPACKED} times larger unpacked, as no text is"
                    raise FileError(f"{why}: unpack it yourself if it is meant to be so")
                out.write(block)
    except (BadGzipFile, EOFError, zlib.error) as error:
        raise FileError(f"is not a whole gzip file: {error}") from error


def _unpack_parquet(file: BinaryIO, out: BinaryIO) -> None:
    """Rows as lines of JSON. Of columns that no record has, only the names are kept."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        why = "needs pyarrow, which is not installed: pip install 'deepseek-mtp[data]'"
        raise FileError(why) from error
    try:
        table = parquet.ParquetFile(file, buffer_size=_BLOCK, pre_buffer=False)
        names = [name for name in table.schema_arrow.names if not name.startswith(_PANDAS_INDEX)]
        known = [name for name in names if name in KNOWN_KEYS]
        if not FORM_KEYS & set(known):
            found = shown(", ".join(names))
            raise FileError(f"has the columns {found}, needed one of {_shown_forms()}")
        others = dict.fromkeys(set(names) - set(known), "")
        for batch in table.iter_batches(_ROWS, columns=known):
            for row in batch.to_pylist():
                out.write(_line(row | others))
    except FileError:
        raise
    # Of what Python has no value for: the year 10,000, nanoseconds, a column that is there twice.
    except (arrow.ArrowException, ArithmeticError, LookupError, ValueError) as error:
        raise FileError(f"is not a parquet file that can be read: {error}") from error


def _line(row: dict[str, Any]) -> bytes:
    line = json.dumps(row, default=_plain).encode() + b"\n"
    if len(line) > RECORD_BYTES:
        raise FileError(f"has a row longer than {RECORD_BYTES >> 20} MiB: cut it up")
    return line


def _plain(value: Any) -> Any:
    """Dates and the like as something that is no text, so that they are refused where text goes."""
    return {"type": type(value).__name__}


def _shown_forms() -> str:
    return ", ".join(sorted(FORM_KEYS))

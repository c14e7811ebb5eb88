"""Data files that can be read anywhere: as they are, or once put into a temporary file.

What is packed (.gz, .zst) or made of rows (.parquet, .arrow, .array_record) cannot be read from the
middle, and what is in a bucket not without a request for each document. It is put into a file
without a name in the folder for temporary files, which is gone when the process is.
"""

import errno
import importlib
import os
import resource
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from gzip import BadGzipFile, GzipFile
from pathlib import Path
from typing import BinaryIO

from finetune.data.files.kinds import GZIP, LINES, UNPACKED, ZSTD, FileError, FileKind
from finetune.data.files.rows import NOT_INSTALLED, unpack_rows
from mtp_model.files.local import raise_if_full
from mtp_model.files.place import Place
from mtp_model.reporting import human_bytes

# Text is packed about 3 to 10 times; what a file of zeros gives is a thousand times.
_MOST_UNPACKED = 200
_ALWAYS_UNPACKED_BYTES = 1 << 30
_BLOCK = 1 << 20
_OTHER_FOLDER = "set TMPDIR to another folder"
Say = Callable[[str], None]


class StoredFile:
    """A data file, open as bytes from any place in it."""

    def __init__(self, path: Place, kind: FileKind, say: Say):
        """Raises FileError for a packed file that is damaged, OSError for one that is not there.

        say: is told what takes long.
        """
        self.form = LINES if kind.form in UNPACKED else kind.form
        self._here = None if path.is_far else Path(str(path))
        self._temporary: BinaryIO | None = None
        if path.is_far:
            with _room(""):
                self._temporary = _fetched(path, self._new_file(), say)
        if kind.packed_as or kind.form in UNPACKED:
            with self.open() as packed, _room("unpacked "):
                unpacked = self._new_file()
                out = _Unpacked(unpacked, os.fstat(packed.fileno()).st_size)
                if kind.packed_as:
                    for block in _UNPACKING[kind.packed_as](packed):
                        out.write(block)
                else:
                    unpack_rows(kind.form, packed, out)
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


class _Unpacked:
    """A file that is written from a packed one of `nbytes`, as long as it may be of one."""

    def __init__(self, file: BinaryIO, nbytes: int):
        self.file, self.left = file, max(_ALWAYS_UNPACKED_BYTES, _MOST_UNPACKED * nbytes)

    def write(self, block: bytes) -> None:
        self.left -= len(block)
        if self.left < 0:
            why = f"is more than {_MOST_UNPACKED} times larger unpacked, as no text is"
            raise FileError(f"{why}: unpack it yourself (rows as .jsonl) if it is meant to be so")
        self.file.write(block)


def _blocks_of_gzip(packed: BinaryIO) -> Iterator[bytes]:
    try:
        with GzipFile(fileobj=packed) as unpacked:
            while block := unpacked.read(_BLOCK):
                yield block
    except (BadGzipFile, EOFError, zlib.error) as error:
        raise FileError(f"is not a whole gzip file: {error}") from error


def _blocks_of_zstd(packed: BinaryIO) -> Iterator[bytes]:
    """By Python's own reader, which 3.14 has, or pyarrow's. Windows above 128 MiB are refused."""
    unpacked, errors = _opened_zstd(packed)
    try:
        while block := unpacked.read(_BLOCK):
            yield bytes(block)
    except errors as error:
        if isinstance(error, OSError) and error.errno:  # the system's, of a disk
            raise
        raise FileError(f"is not a whole zstd file: {error}") from error


def _opened_zstd(packed: BinaryIO) -> tuple[BinaryIO, tuple[type[Exception], ...]]:
    """What reads a file, and what it raises for one that is damaged or cut short."""
    with suppress(ImportError):
        own = importlib.import_module("compression.zstd")
        return own.ZstdFile(packed), (own.ZstdError, EOFError)
    try:
        import pyarrow
    except ImportError as error:
        raise FileError(f"needs pyarrow, {NOT_INSTALLED}") from error
    return pyarrow.CompressedInputStream(packed, "zstd"), (OSError, pyarrow.ArrowException)


_UNPACKING = {GZIP: _blocks_of_gzip, ZSTD: _blocks_of_zstd}

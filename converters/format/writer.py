"""Write one safetensors file from start to end, its header first."""

from types import TracebackType
from typing import Self

import xxhash

from converters.format.header import Header, start_of_file
from converters.sources.source import Buffer, byte_view
from mtp_model.files.place import Appended
from mtp_model.problems import Problem, ProblemsError


class StreamWriter:
    """A safetensors file that appears only when it is whole and durable.

    As a context manager it closes at the end of the block, or discards on an exception. One thread
    writes one file; several files may be written at once.
    """

    def __init__(self, file: Appended, header: Header):
        self._file = file
        self._header = header
        self._hash = xxhash.xxh3_128()
        self._position = 0
        self.size = self._header.size
        """Of the finished file, in bytes."""
        self.write(start_of_file(header.raw))

    def write(self, buffer: Buffer) -> None:
        """Append a C-contiguous buffer: tensors in offset order, in pieces of any size."""
        view = byte_view(buffer)
        if self._position + len(view) > self.size:
            raise self._error(f"needs {self.size} bytes, was given {self._position + len(view)}")
        self._hash.update(view.data)
        self._file.append(view)
        self._position += len(view)

    def close(self) -> str:
        """Finish the file: make it durable and visible; its xxh3-128 as 32 hex digits."""
        if self._position != self.size:
            self.discard()
            raise self._error(self._what_lacks(self._header))
        self._file.finish()
        return self.digest

    def discard(self) -> None:
        """Remove what was written. Does nothing after close() or a second time."""
        self._file.discard()

    @property
    def digest(self) -> str:
        """xxh3-128 of all bytes so far, length and header included, as 32 hex digits."""
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _what_lacks(self, header: Header) -> str:
        ends = ((tensor, tensor.begin + tensor.nbytes) for tensor in header.tensors)
        tensor = next(tensor for tensor, end in ends if end > self._position)
        given = f"ends after {self._position - tensor.begin} of its {tensor.nbytes} bytes"
        return f"needs {self.size} bytes, was given {self._position}: {tensor.name} {given}"

    def _error(self, detail: str) -> ProblemsError:
        return ProblemsError(str(self._file.path), [Problem("file", self._file.path.name, detail)])

"""A folder of Google Cloud Storage as the source of a checkpoint: `gs://bucket/folder`.

tensorstore tells no object's size, only whether a byte is there: sizes are found by asking, which
for a safetensors file takes two questions, since its header says what its size should be.
"""

import contextlib
import functools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from converters.problems import Problem, ProblemsError, raise_if_any
from converters.source import BOOKKEEPING, Buffer, Fingerprint, byte_view, name_fault
from converters.staging import Finish, Read
from converters.strict_json import shown
from mtp_model.cloud import CloudError, CloudPath, as_path
from mtp_model.store import COMPLETE, PROVENANCE

_THREADS = 32
_LARGEST_HEADER_BYTES = 100_000_000
_PLACEHOLDER = "/"  # what consoles leave where somebody made a folder


class CloudSource:
    """The objects below a folder. What was replaced since is noticed by its generation."""

    def __init__(self, name: str):
        self.name = name
        try:
            folder = as_path(name)
        except CloudError as error:
            raise ProblemsError(name, [Problem("file", shown(name), str(error))]) from error
        assert isinstance(folder, CloudPath), name
        self._folder = folder
        self._lock = threading.Lock()
        self._sizes: dict[tuple[str, bytes], int] = {}

    def files(self) -> dict[str, int]:
        return dict(self._found)

    @functools.cached_property
    def _found(self) -> dict[str, int]:
        names = self._names()
        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(names, pool.map(self._size, names), strict=True))

    def _names(self) -> list[str]:
        try:
            found = self._folder.names()
        except CloudError as error:
            raise self._error(self.name, f"cannot be listed: {error}") from error
        names = [n for n in found if not n.endswith(_PLACEHOLDER)]
        names = [n for n in names if not set(n.split("/")[:-1]) & set(BOOKKEEPING)]
        if not names:
            raise self._error(self.name, "holds no objects; needed config.json and safetensors")
        if {COMPLETE, PROVENANCE} <= set(names):
            found = "is a checkpoint directory, not a safetensors checkpoint"
            advice = "name what it was imported from, or what `convert-deepseek export` made of it"
            raise self._error(self.name, f"{found}; {advice}")
        faults = [(name, name_fault(name)) for name in names]
        raise_if_any(self.name, [Problem("file", shown(n), f) for n, f in faults if f])
        return names

    def read(self, file: str, begin: int, nbytes: int) -> bytes:
        self._check_range(file, begin, nbytes)  # before memory is taken for it
        try:
            return (self._folder / file).read_range(begin, nbytes)
        except (CloudError, FileNotFoundError) as error:
            raise self._error(file, f"bytes {begin} to {begin + nbytes}: {error}") from error

    def read_into(self, file: str, begin: int, out: Buffer) -> None:
        view = byte_view(out)
        view[:] = np.frombuffer(self.read(file, begin, len(view)), np.uint8)

    def fingerprint(self, file: str) -> Fingerprint:
        generation = self._generation(file)
        return {"size": self._size(file, generation), "generation": generation.hex()}

    @contextlib.contextmanager
    def staged(
        self,
        reads: Mapping[str, Sequence[Read]],  # noqa: ARG002
        folder: Path,  # noqa: ARG002
    ) -> Iterator[Finish]:
        """Nothing is fetched ahead: ranges are read from the bucket as they are needed.

        To have this at all says that the source is far, and that nothing is to be read twice.
        """
        yield lambda _step: None

    def _check_range(self, file: str, begin: int, nbytes: int) -> None:
        size = self._found.get(file)
        if size is None:
            raise self._error(file, "is not in the folder")
        if begin < 0 or nbytes < 0 or begin + nbytes > size:
            raise self._error(file, f"is {size} bytes, needed bytes {begin} to {begin + nbytes}")

    def _generation(self, file: str) -> bytes:
        try:
            found = (self._folder / file).generation()
        except CloudError as error:
            raise self._error(file, f"cannot be read: {error}") from error
        if found is None:
            raise self._error(file, "is not in the folder")
        return found

    def _size(self, file: str, generation: bytes | None = None) -> int:
        """Bytes of an object, asked once for each of its generations."""
        key = file, generation or self._generation(file)
        if key not in self._sizes:
            path = self._folder / file
            guess = _said_size(path) if file.endswith(".safetensors") else 0
            size = _measured(path, guess)
            with self._lock:
                self._sizes[key] = size
        return self._sizes[key]

    def _error(self, file: str, detail: str) -> ProblemsError:
        return ProblemsError(self.name, [Problem("file", shown(file), detail)])


def _measured(path: CloudPath, guess: int) -> int:
    """The size of an object, quick if it is the guess."""
    low, high = 0, guess + 1  # the size is at least low, and less than high once that is found
    if guess and _has_byte(path, guess - 1):
        low = guess
    while _has_byte(path, high - 1):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _has_byte(path, middle - 1) else (low, middle)
    return low


def _has_byte(path: CloudPath, position: int) -> bool:
    try:
        return len(path.read_range(position, 1)) == 1
    except CloudError as error:
        if "OUT_OF_RANGE" in str(error):
            return False
        raise


def _said_size(path: CloudPath) -> int:
    """The size that the header of a safetensors file implies; 0 where it makes no sense.

    It is only a guess: whoever reads the header for what it says checks all of it.
    """
    try:
        length = int.from_bytes(path.read_range(0, 8), "little")
        if length > _LARGEST_HEADER_BYTES:
            return 0
        header = json.loads(path.read_range(8, length))
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        size = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return 0
    return size if isinstance(size, int) and 0 < size < 1 << 62 else 0

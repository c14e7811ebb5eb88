"""Objects of Google Cloud Storage with as much of pathlib as checkpoint directories need.

Knows tensorstore's key-value stores and nothing of what is stored. An object is written whole or
not at all; there are no folders, only names that begin alike.
"""

import errno
import functools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_model.problems import UserError

SCHEME = "gs://"
_REQUESTS_AT_ONCE = 32  # as many as tensorstore sends by itself


class CloudError(UserError):
    """A request that was refused, or an address that cannot be one."""


@dataclass(frozen=True)
class CloudPath:
    """`gs://bucket/key`: an object, or what is below it. `key` is empty for the whole bucket."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "CloudPath":
        return CloudPath(self.bucket, f"{self.key}/{name}".lstrip("/"))

    @property
    def name(self) -> str:
        """What is behind the last slash."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "CloudPath":
        """What is before the last slash."""
        return CloudPath(self.bucket, self.key.rpartition("/")[0])

    def mkdir(self, **_: bool) -> None:
        """Nothing to do: a folder is there as soon as something is in it."""

    def is_file(self) -> bool:
        """Whether there is an object of just this name."""
        return self.generation() is not None

    def is_dir(self) -> bool:
        """Whether there are objects below."""
        return bool(self.names())

    def exists(self) -> bool:
        """Whether there is anything."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator["CloudPath"]:
        """Everything directly below, sorted."""
        return (self / name for name in sorted({key.partition("/")[0] for key in self.names()}))

    def names(self, beginning: str = "") -> list[str]:
        """Names of all objects below, however deep, from here on, that begin so; sorted."""
        first = f"{self.key}/{beginning}".lstrip("/")
        found = _asked(self, _store(self.bucket).list(_key_range(first)))
        below = len(first) - len(beginning)
        return sorted(key.decode()[below:] for key in found)

    def generation(self) -> bytes | None:
        """What changes whenever the object is written; None when there is none."""
        if not self.key:
            return None
        read = _asked(self, _store(self.bucket).read(self.key, byte_range=slice(0, 0)))
        return None if read.state == "missing" else read.stamp.generation

    def read_bytes(self) -> bytes:
        """All of the object; FileNotFoundError when there is none."""
        return self._content(_store(self.bucket).read(self.key))

    def read_range(self, begin: int, nbytes: int) -> bytes:
        """Bytes of the object; CloudError when it ends before them."""
        if nbytes == 0:
            return b""
        part = slice(begin, begin + nbytes)
        return self._content(_store(self.bucket).read(self.key, byte_range=part))

    def write_bytes(self, data: bytes) -> None:
        """Write the object, whole."""
        _asked(self, _store(self.bucket).write(self.key, data))

    def write_if(self, data: bytes | None, generation: bytes | None) -> bytes | None:
        """Write (None: delete) if the object is still of this generation (None: is absent).

        Returns its new generation, None if it was not as told: nothing was done then.
        """
        expected = _absent() if generation is None else generation
        stamp = _asked(self, _store(self.bucket).write(self.key, data, if_equal=expected))
        return stamp.generation or None

    def unlink(self) -> None:
        """Delete the object, if there is one."""
        _asked(self, _store(self.bucket).write(self.key, None))

    def delete_tree(self) -> None:
        """Delete the object and everything below."""
        if self.key:
            self.unlink()
        _asked(self, _store(self.bucket).delete_range(_key_range(f"{self.key}/".lstrip("/"))))

    def zarr_store(self) -> Any:
        """The array that is stored here, opened by tensorstore."""
        import tensorstore as ts

        kvstore = {"driver": "gcs", "bucket": self.bucket, "path": f"{self.key}/"}
        return _asked(self, ts.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True))

    def _content(self, read: Any) -> bytes:
        found = _asked(self, read)
        if found.state == "missing":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return found.value


AnyPath = Path | CloudPath
"""A place on this machine's file systems, or in an object store."""


def is_cloud(path: object) -> bool:
    """Whether the user's words mean a place in an object store."""
    return str(path).startswith(SCHEME)


def as_path(path: str | AnyPath) -> AnyPath:
    """The place that the user's words mean; CloudError for an address that is none."""
    if isinstance(path, CloudPath):
        return path
    if not is_cloud(path):
        return Path(path)
    bucket, _, key = str(path).removeprefix(SCHEME).partition("/")
    key = key.rstrip("/")
    if not bucket or (key and {"", ".", ".."} & set(key.split("/"))):
        raise CloudError(f"{path} is no address; needed gs://BUCKET/FOLDER without empty parts")
    return CloudPath(bucket, key)


def read_all(paths: Iterable[CloudPath]) -> list[bytes]:
    """Contents of small objects, many requests at once."""
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(CloudPath.read_bytes, paths))


@functools.cache
def _store(bucket: str) -> Any:
    import tensorstore as ts  # takes a while, and local paths don't need it

    try:
        return ts.KvStore.open({"driver": "gcs", "bucket": bucket}).result()
    except ValueError as error:
        raise CloudError(f"{SCHEME}{bucket}: {error}") from error


@functools.cache
def _absent() -> bytes:
    """The generation of an object that is not there."""
    import tensorstore as ts

    memory = ts.KvStore.open({"driver": "memory"}).result()
    return memory.read("absent").result().stamp.generation


def _key_range(beginning: str) -> Any:
    import tensorstore as ts

    if not beginning:
        return ts.KvStore.KeyRange()
    return ts.KvStore.KeyRange(beginning, beginning[:-1] + chr(ord(beginning[-1]) + 1))


def _asked(path: CloudPath, future: Any) -> Any:
    """The answer to a request; CloudError when it was refused."""
    try:
        return future.result()
    except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
        raise CloudError(f"{path}: {error}") from error

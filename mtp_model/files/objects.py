"""Objects of Google Cloud Storage: one class for what may be asked of an object.

An object is written whole or not at all; there are no folders, only names that begin alike.
Bytes are read and written by tensorstore, which reads several times as fast as google-cloud-storage
(docs/performance.md); the latter tells sizes and checksums, and joins and copies in the cloud.
"""

import base64
import errno
import functools
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import google_crc32c

from mtp_model.problems import UserError

SCHEME = "gs://"
_REQUESTS_AT_ONCE = 32  # as many as tensorstore sends by itself
_MOST_AT_ONCE = 32  # objects that one request joins
_JOINS_AT_ONCE = 8
_PIECES_AT_ONCE = 8


class CloudError(UserError):
    """A request that was refused, or an address that cannot be one."""


@dataclass(frozen=True, kw_only=True)
class ObjectState:
    """An object, as the service has stored it. `generation` changes whenever it is written."""

    size: int
    crc32c: int
    generation: int
    written_s: float  # when, since 1970


@dataclass(frozen=True)
class StoredObject:
    """`gs://bucket/key`: an object, or what is below it. `key` is empty for the whole bucket."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.bucket, f"{self.key}/{name}".lstrip("/"))

    @property
    def name(self) -> str:
        """What is behind the last slash."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Self:
        """What is before the last slash."""
        return type(self)(self.bucket, self.key.rpartition("/")[0])

    def is_file(self) -> bool:
        """Whether there is an object of just this name."""
        return self.generation() is not None

    def is_dir(self) -> bool:
        """Whether there are objects below."""
        return bool(self.names())

    def exists(self) -> bool:
        """Whether there is anything."""
        return self.is_file() or self.is_dir()

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

    def delete_tree(self, *, ignore_errors: bool = False) -> None:  # noqa: ARG002
        """Delete the object and everything below."""
        if self.key:
            self.unlink()
        _asked(self, _store(self.bucket).delete_range(_key_range(f"{self.key}/".lstrip("/"))))

    def _content(self, read: Any) -> bytes:
        found = _asked(self, read)
        if found.state == "missing":
            raise missing(self)
        return found.value


def missing(path: StoredObject) -> FileNotFoundError:
    """What is raised where there is no object."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def pieces(path: StoredObject, piece_bytes: int) -> Iterator[bytes]:
    """An object's bytes as one moment had them, asked for in pieces, some at a time.

    CloudError where it is replaced meanwhile, or arrives with another checksum than it is stored.
    """
    found = state(path)
    if found is None:
        raise missing(path)
    begins = range(0, found.size, piece_bytes)
    asked = (
        _store(path.bucket).read(path.key, byte_range=slice(a, min(a + piece_bytes, found.size)))
        for a in begins
    )
    coming = deque(itertools.islice(asked, _PIECES_AT_ONCE))
    generations, crc32c = set(), google_crc32c.Checksum()
    while coming:
        read = _asked(path, coming.popleft())
        coming.extend(itertools.islice(asked, 1))
        generations.add(read.stamp.generation)
        if read.state == "missing" or len(generations) > 1:
            break
        crc32c.update(read.value)
        yield read.value
    if len(generations) > 1 or int.from_bytes(crc32c.digest(), "big") != found.crc32c:
        raise CloudError(f"{path} was replaced while it was read; run the same command again")


def states(folder: StoredObject) -> dict[str, ObjectState]:
    """All objects below a folder, by their names in it, sorted."""
    prefix = f"{folder.key}/".lstrip("/")
    with _refusals(folder):
        blobs = list(_client().list_blobs(folder.bucket, prefix=prefix or None))
    found = {blob.name.removeprefix(prefix): _state(blob) for blob in blobs}
    return dict(sorted(found.items()))


def state(path: StoredObject) -> ObjectState | None:
    """One object, None where there is none."""
    with _refusals(path):
        blob = _bucket(path).get_blob(path.key)
    return blob and _state(blob)


def join(parts: Sequence[StoredObject], target: StoredObject, scratch: StoredObject) -> None:
    """Make `target` of the parts' bytes, in this order. What lies between is left in `scratch`."""
    level = 0
    with ThreadPoolExecutor(_JOINS_AT_ONCE) as pool:
        while len(parts) > _MOST_AT_ONCE:
            groups = [parts[i : i + _MOST_AT_ONCE] for i in range(0, len(parts), _MOST_AT_ONCE)]
            level += 1
            parts = [scratch / f"joined-{level}-{i:05}" for i in range(len(groups))]
            list(pool.map(_compose, groups, parts))
    _compose(parts, target)


def copy(source: StoredObject, target: StoredObject) -> None:
    """Make `target` of the source's bytes without moving them through this machine."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    old, new, token = _blob(source), _blob(target), None
    with _refusals(target):
        while True:
            token, _, _ = new.rewrite(old, token=token, retry=DEFAULT_RETRY)
            if token is None:
                return


def _compose(parts: Sequence[StoredObject], target: StoredObject) -> None:
    from google.cloud.storage.retry import DEFAULT_RETRY  # doing it twice gives the same

    with _refusals(target):
        _blob(target).compose([_blob(part) for part in parts], retry=DEFAULT_RETRY)


def _state(blob: Any) -> ObjectState:
    # It is withheld from those who may list an object and not read it.
    crc32c = int.from_bytes(base64.b64decode(blob.crc32c or ""), "big")
    return ObjectState(
        size=int(blob.size),
        crc32c=crc32c,
        generation=int(blob.generation),
        written_s=blob.time_created.timestamp(),
    )


def _blob(path: StoredObject) -> Any:
    return _bucket(path).blob(path.key)


def _bucket(path: StoredObject) -> Any:
    return _client().bucket(path.bucket)


@functools.cache
def _client() -> Any:
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage  # takes a while, and local paths don't need it

    try:
        return storage.Client(project=None)
    except DefaultCredentialsError:
        return storage.Client.create_anonymous_client()  # public buckets can be read


@contextmanager
def _refusals(path: StoredObject) -> Iterator[None]:
    """CloudError for every way in which a request may fail."""
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    try:
        yield
    except (GoogleAPIError, GoogleAuthError, RequestException) as error:
        raise CloudError(f"{path}: {error}") from error


def read_all(paths: Iterable[StoredObject]) -> list[bytes]:
    """Contents of small objects, many requests at once."""
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(StoredObject.read_bytes, paths))


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


def _asked(path: StoredObject, future: Any) -> Any:
    """The answer to a request; CloudError when it was refused."""
    try:
        return future.result()
    except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
        raise CloudError(f"{path}: {error}") from error

"""What key-value stores cannot do with objects: tell sizes and checksums, join, copy in the cloud.

By google-cloud-storage; all that is read and written goes through files/objects.py.
"""

import base64
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mtp_model.files.objects import CloudError, CloudPath

_MOST_AT_ONCE = 32  # objects that one request joins
_REQUESTS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class ObjectState:
    """An object, as the service has stored it. `generation` changes whenever it is written."""

    size: int
    crc32c: int
    generation: int


def states(folder: CloudPath) -> dict[str, ObjectState]:
    """All objects below a folder, by their names in it, sorted."""
    prefix = f"{folder.key}/".lstrip("/")
    with _refusals(folder):
        blobs = list(_client().list_blobs(folder.bucket, prefix=prefix or None))
    found = {blob.name.removeprefix(prefix): _state(blob) for blob in blobs}
    return dict(sorted(found.items()))


def state(path: CloudPath) -> ObjectState | None:
    """One object, None where there is none."""
    with _refusals(path):
        blob = _bucket(path).get_blob(path.key)
    return blob and _state(blob)


def join(parts: Sequence[CloudPath], target: CloudPath, scratch: CloudPath) -> None:
    """Make `target` of the parts' bytes, in this order. What lies between is left in `scratch`."""
    level = 0
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        while len(parts) > _MOST_AT_ONCE:
            groups = [parts[i : i + _MOST_AT_ONCE] for i in range(0, len(parts), _MOST_AT_ONCE)]
            level += 1
            parts = [scratch / f"joined-{level}-{i:05}" for i in range(len(groups))]
            list(pool.map(_compose, groups, parts))
    _compose(parts, target)


def copy(source: CloudPath, target: CloudPath) -> None:
    """Make `target` of the source's bytes without moving them through this machine."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    old, new, token = _blob(source), _blob(target), None
    with _refusals(target):
        while True:
            token, _, _ = new.rewrite(old, token=token, retry=DEFAULT_RETRY)
            if token is None:
                return


def _compose(parts: Sequence[CloudPath], target: CloudPath) -> None:
    from google.cloud.storage.retry import DEFAULT_RETRY  # doing it twice gives the same

    with _refusals(target):
        _blob(target).compose([_blob(part) for part in parts], retry=DEFAULT_RETRY)


def _state(blob: Any) -> ObjectState:
    # It is withheld from those who may list an object and not read it.
    crc32c = int.from_bytes(base64.b64decode(blob.crc32c or ""), "big")
    return ObjectState(size=int(blob.size), crc32c=crc32c, generation=int(blob.generation))


def _blob(path: CloudPath) -> Any:
    return _bucket(path).blob(path.key)


def _bucket(path: CloudPath) -> Any:
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
def _refusals(path: CloudPath) -> Iterator[None]:
    """CloudError for every way in which a request may fail."""
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    try:
        yield
    except (GoogleAPIError, GoogleAuthError, RequestException) as error:
        raise CloudError(f"{path}: {error}") from error

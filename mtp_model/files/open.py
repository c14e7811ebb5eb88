"""The place that a path or an address means."""

from pathlib import Path

from mtp_model.files.local import LocalPlace
from mtp_model.files.object_place import ObjectPlace
from mtp_model.files.objects import SCHEME, CloudError
from mtp_model.files.place import Place


def is_address(path: object) -> bool:
    """Whether the user's words mean a place in an object store."""
    return str(path).startswith(SCHEME)


def as_place(path: str | Path | Place) -> Place:
    """The place that the user's words mean; CloudError for an address that is none."""
    if isinstance(path, ObjectPlace | LocalPlace):
        return path
    return object_place(str(path)) if is_address(path) else LocalPlace(str(path))


def object_place(address: str) -> ObjectPlace:
    """The place of `gs://BUCKET/FOLDER`; CloudError for an address that is none."""
    bucket, _, key = address.removeprefix(SCHEME).partition("/")
    key = key.rstrip("/")
    if not bucket or (key and {"", ".", ".."} & set(key.split("/"))):
        raise CloudError(
            f"{address} is no address; needed {SCHEME}BUCKET/FOLDER without empty parts"
        )
    return ObjectPlace(bucket, key)

"""The place that a path or an address means."""

from pathlib import Path

from mtp_model.files.local import LocalPlace
from mtp_model.files.object_place import ObjectPlace
from mtp_model.files.objects import SCHEME, CloudError
from mtp_model.files.place import Place

_SCHEME_OF_PATHS = "gs:/"  # pathlib makes one slash of several


def is_address(path: object) -> bool:
    """Whether the user's words mean a place in an object store."""
    return str(path).startswith(_SCHEME_OF_PATHS)


def as_place(path: str | Path | Place) -> Place:
    """The place that the user's words mean; CloudError for an address that is none."""
    if isinstance(path, ObjectPlace | LocalPlace):
        return path
    text = str(path)
    if is_address(text) and not text.startswith(SCHEME):
        text = SCHEME + text.removeprefix(_SCHEME_OF_PATHS)
    return object_place(text) if is_address(text) else LocalPlace(text)


def absolute(path: Path) -> Path:
    """The same path, whatever folder the process is in; an address is that already."""
    return path if is_address(path) else path.absolute()


def written(path: object) -> str:
    """A path as the user writes it; of an address pathlib keeps one slash."""
    return str(as_place(str(path))) if is_address(path) else str(path)


def object_place(address: str) -> ObjectPlace:
    """The place of `gs://BUCKET/FOLDER`; CloudError for an address that is none."""
    bucket, _, key = address.removeprefix(SCHEME).partition("/")
    key = key.rstrip("/")
    if not bucket or (key and {"", ".", ".."} & set(key.split("/"))):
        raise CloudError(
            f"{address} is no address; needed {SCHEME}BUCKET/FOLDER without empty parts"
        )
    return ObjectPlace(bucket, key)

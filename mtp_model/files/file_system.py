"""Objects as a file system of fsspec, by which Orbax reads and writes in a bucket.

Orbax writes arrays by tensorstore itself. Its small files go through etils' paths, which ask fsspec
for what begins with gs://; this answers, so that nothing more has to be installed.
"""

import functools
import io
import os
from typing import Any

from fsspec import AbstractFileSystem, register_implementation

from mtp_model.files.object_place import ObjectPlace
from mtp_model.files.objects import missing, state
from mtp_model.files.open import as_place
from mtp_model.files.place import Place


def path_for_orbax(place: Place) -> str:
    """A folder as Orbax names it, which from then on finds objects as this toolkit does."""
    if place.is_far:
        _register()
    return str(place)


@functools.cache
def _register() -> None:
    os.environ["EPATH_USE_TF"] = "false"  # else etils takes TensorFlow's, where that is installed
    register_implementation("gcs", _Objects, clobber=True)


class _Objects(AbstractFileSystem):
    """What etils asks of a file system. Folders are there while something is in them."""

    protocol = ("gcs", "gs")
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return os.fspath(path).removeprefix("gs://").removeprefix("gcs://").rstrip("/")

    def info(self, path: Any, **_: Any) -> dict[str, Any]:
        name, place = self._strip_protocol(path), self._place(path)
        if found := state(place):
            return {"name": name, "size": found.size, "type": "file"}
        if place.is_dir():
            return {"name": name, "size": 0, "type": "directory"}
        raise missing(place)

    def ls(self, path: Any, detail: bool = True, **_: Any) -> list[Any]:
        folder, names = self._strip_protocol(path), self._place(path).names()
        inner = {name.partition("/")[0]: "/" in name for name in names}
        if not detail:
            return [f"{folder}/{name}" for name in inner]
        return [
            {"name": f"{folder}/{name}", "size": 0, "type": "directory" if deep else "file"}
            for name, deep in inner.items()
        ]

    def mkdir(self, path: Any, create_parents: bool = True, **_: Any) -> None:
        """Nothing to do: what is written into a folder makes it."""

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        """Nothing to do, as in mkdir."""

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:  # noqa: ARG002
        place = self._place(path)
        place.delete_tree() if recursive else place.unlink()

    def _open(self, path: Any, mode: str = "rb", *_: Any, **_options: Any) -> Any:
        place = self._place(path)
        return io.BytesIO(place.read_bytes()) if mode == "rb" else _Written(place)

    def _place(self, path: Any) -> ObjectPlace:
        place = as_place(f"gs://{self._strip_protocol(path)}")
        assert isinstance(place, ObjectPlace)
        return place


class _Written(io.BytesIO):
    """An object that is written when it is closed."""

    def __init__(self, place: ObjectPlace):
        super().__init__()
        self._place = place

    def close(self) -> None:
        if not self.closed:
            self._place.write_bytes(self.getvalue())
        super().close()

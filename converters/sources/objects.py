"""A folder of Google Cloud Storage as the source of a checkpoint: `gs://bucket/folder`."""

import functools

import numpy as np

from converters.sources.source import (
    BOOKKEEPING,
    Buffer,
    Fingerprint,
    Source,
    byte_view,
    kind_fault,
    range_fault,
)
from mtp_model.files.object_place import ObjectPlace
from mtp_model.files.objects import CloudError, ObjectState, state, states
from mtp_model.files.open import object_place
from mtp_model.files.place import name_fault
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem, ProblemsError, raise_if_any

_PLACEHOLDER = "/"  # what consoles leave where somebody made a folder


class CloudSource(Source):
    """The objects below a folder. What was replaced since is noticed by its generation.

    Nothing is fetched ahead: ranges are read from the bucket as they are needed.
    """

    is_far = True

    def __init__(self, name: str):
        self.name = name
        try:
            self._folder = object_place(name)
        except CloudError as error:
            raise ProblemsError(name, [Problem("file", shown(name), str(error))]) from error

    @property
    def folder(self) -> ObjectPlace:
        return self._folder

    def place(self, file: str) -> ObjectPlace:
        return self._folder / file

    def files(self) -> dict[str, int]:
        return {name: found.size for name, found in self._found.items()}

    @functools.cached_property
    def _found(self) -> dict[str, ObjectState]:
        try:
            found = states(self._folder)
        except CloudError as error:
            raise self._error(self.name, f"cannot be listed: {error}") from error
        names = [name for name in found if name and not name.endswith(_PLACEHOLDER)]
        names = [n for n in names if not set(n.split("/")[:-1]) & set(BOOKKEEPING)]
        if not names:
            raise self._error(self.name, "holds no objects; needed config.json and safetensors")
        if fault := kind_fault(names):
            raise self._error(self.name, fault)
        faults = [(name, name_fault(name)) for name in names]
        raise_if_any(self.name, [Problem("file", shown(n), f) for n, f in faults if f])
        return {name: found[name] for name in names}

    def read(self, file: str, begin: int, nbytes: int) -> bytes:
        self._check_range(file, begin, nbytes)  # before memory is taken for it
        try:
            return self.place(file).read_range(begin, nbytes)
        except (CloudError, FileNotFoundError) as error:
            raise self._error(file, f"bytes {begin} to {begin + nbytes}: {error}") from error

    def read_into(self, file: str, begin: int, out: Buffer) -> None:
        view = byte_view(out)
        view[:] = np.frombuffer(self.read(file, begin, len(view)), np.uint8)

    def fingerprint(self, file: str) -> Fingerprint:
        try:
            found = state(self.place(file))
        except CloudError as error:
            raise self._error(file, f"cannot be read: {error}") from error
        if found is None:
            raise self._error(file, "is not in the folder")
        return {"size": found.size, "generation": found.generation}

    def _check_range(self, file: str, begin: int, nbytes: int) -> None:
        if file not in self._found:
            raise self._error(file, "is not in the folder")
        if fault := range_fault(self._found[file].size, begin, nbytes):
            raise self._error(file, fault)

    def _error(self, file: str, detail: str) -> ProblemsError:
        return ProblemsError(self.name, [Problem("file", shown(file), detail)])

"""What an export did, for whoever shows it."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from converters.exporting.encode import Requantisation
from mtp_model.files.place import How, Place


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """A file that was written and read back, or that is the base's.

    how: `written`, or how it was taken from the base. digest: xxh3-128; None for a link, which is
    not read. same_as_source: every byte is the source's. changed: tensors whose bytes are not the
    source's (empty for another dtype). requantised: those of them that got new scales, and what it
    cost.
    """

    name: str
    size: int
    how: How | Literal["written", "copy"] = "written"
    digest: str | None
    same_as_source: bool
    changed: tuple[str, ...] = ()
    requantised: tuple[Requantisation, ...] = ()

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "ExportedFile":
        """A line of the journal, which may hold more."""
        costs = tuple(Requantisation(**cost) for cost in line["requantised"])
        own = {field.name: line[field.name] for field in fields(cls) if field.name in line}
        return cls(**own | {"changed": tuple(line["changed"]), "requantised": costs})


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What an export did; `notes` are for the user, a line each.

    base: the source that unchanged files were taken from, if any. written_bytes: of safetensors
    files that are no links. num_side_files: all others, which are always written. mtp_modules: how
    many the files hold, whatever config.json says. draft: the engine that they are for, where they
    are an MTP module alone.
    """

    path: Place
    base: str | None
    files: tuple[ExportedFile, ...]
    num_side_files: int
    num_tensors: int
    mtp_modules: int
    written_bytes: int
    resumed_files: int
    notes: tuple[str, ...]
    draft: str | None = None

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of all tensors whose bytes are not the source's."""
        return tuple(name for file in self.files for name in file.changed)

    @property
    def requantised(self) -> tuple[Requantisation, ...]:
        """Every weight that got new scales, and what that cost."""
        return tuple(cost for file in self.files for cost in file.requantised)

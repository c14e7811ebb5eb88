"""Compares headers and side files of a source with what export writes; reads no tensor.

With equal tensors that is all that is left of a file: their order, their places, metadata, padding.
"""

from collections.abc import Iterator

from converters.exporting.plan import ExportPlan, as_bf16, make_plan
from converters.exporting.reuse import source_file_digest
from converters.format.listing import Listing
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.files.place import digest
from mtp_model.problems import Problem

_OF_THE_HUB = frozenset({"README.md", ".gitattributes"})  # pages of a model there, no part of it


def differing_files(
    listing: Listing, checkpoint: Checkpoint, plan: ExportPlan
) -> tuple[Problem, ...]:
    """Every file of either side that export would write otherwise, whatever its tensors hold.

    A model card may be another: `export --push` writes one.

    plan: plan_of_source. Scopes do not matter: the checkpoint knows the headers of tensors that it
    does not hold.
    """
    return (*_headers(listing, plan), *_side_files(listing, checkpoint, plan))


def plan_of_source(listing: Listing, checkpoint: Checkpoint) -> ExportPlan:
    """The export that the source may be: the one whose tensors have the source's dtypes."""
    kept = make_plan(checkpoint, "keep", has_base=True)
    found = {name: tensor.dtype for name, tensor in listing.tensors.items()}
    if found == kept.dtypes or checkpoint.provenance["scope"] != "all":
        return kept
    rounded = as_bf16(kept, checkpoint)
    return rounded if found == rounded.dtypes else kept


def _headers(listing: Listing, plan: ExportPlan) -> Iterator[Problem]:
    written = {file.file: file.raw for file in plan.files}
    for file in sorted(written.keys() | listing.headers.keys()):
        if file not in written:
            yield _unknown(file)
        elif file not in listing.headers:
            yield _missing(file)
        elif listing.headers[file].raw != written[file]:
            detail = "has another header: tensors in another order or place, or other metadata"
            yield Problem("header", file, detail)


def _side_files(listing: Listing, checkpoint: Checkpoint, plan: ExportPlan) -> Iterator[Problem]:
    replaced = {file: digest(content) for file, content in plan.replaced.items()}
    written = checkpoint.side_file_digests() | replaced
    sizes, found = listing.source.files(), set(listing.copied_files)
    for file in sorted((written.keys() | found) - _OF_THE_HUB):
        if file not in written:
            yield _unknown(file)
        elif file not in found:
            yield _missing(file)
        elif source_file_digest(listing, file, sizes[file]) != written[file]:
            yield Problem("file", file, "has other bytes")


def _unknown(file: str) -> Problem:
    return Problem("file", file, "is in the source alone: export does not write it")


def _missing(file: str) -> Problem:
    return Problem("file", file, "is not in the source: export writes it")

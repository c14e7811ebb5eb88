"""The end of an import: side files, provenance, COMPLETE; knows units only by their digests."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from converters.format.listing import Listing
from converters.importing.plan import Plan, side_files
from converters.importing.provenance import source_record, tool_versions
from converters.importing.units import Done
from converters.sources.source import read_pieces, replaced_files
from mtp_model.checkpoint.writer import Digests, ParamsWriter
from mtp_model.problems import Problem, raise_if_any


def finish_import(writer: ParamsWriter, plan: Plan, done: Mapping[str, Done]) -> None:
    """Write side files and metadata, and mark the directory complete; every unit is done.

    Raises ProblemsError for copies that differ where they are checked, and for a changed source.
    """
    listing, options = plan.conversion.listing, plan.options
    tensors = {name: value for unit in done.values() for name, value in unit.tensors.items()}
    stale = [problem.subject for problem in _stale_copies(plan, tensors)]
    if options.copies == "check":
        raise_if_any(listing.source.name, _stale_copies(plan, tensors))
    side = {
        file: writer.write_side_file(file, _side_pieces(listing, file))
        for file in side_files(listing)
    }
    changed = replaced_files(
        listing.source, plan.fingerprint["files"], "import it again with --overwrite"
    )
    raise_if_any(listing.source.name, changed)
    writer.finish(
        provenance={
            "source": source_record(listing, tensors),
            "plan": plan.digest,
            **asdict(options),
            "stale_copies": stale,
            "tools": tool_versions(),
        },
        digests=_digests(plan, done),
        headers={file: header.raw.decode() for file, header in listing.headers.items()},
        side_files=side,
    )


def _stale_copies(plan: Plan, tensors: Mapping[str, str]) -> Iterator[Problem]:
    for slot in plan.conversion.slots.values():
        if slot.copy_of and slot.name in tensors and tensors[slot.name] != tensors[slot.copy_of]:
            advice = "import with --copies main to take the main model's"
            yield Problem("copy", slot.name, f"differs from {slot.copy_of}; {advice}")


def _side_pieces(listing: Listing, file: str) -> Iterator[bytes]:
    size = int(listing.source.fingerprint(file)["size"])
    return read_pieces(listing.source, file, size)


def _digests(plan: Plan, done: Mapping[str, Done]) -> Digests:
    """Chunk digests by leaf, in the order of the table and of the units."""
    found: Digests = {path: {} for path in plan.conversion.leaves}
    for unit in plan.units:
        if not unit.is_copy:
            found[unit.path] |= done[unit.key].pieces
    return found

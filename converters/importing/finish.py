"""The end of an import: side files, provenance.json with digests of all that was read, COMPLETE.

A file without tensors has the xxh3_128 of its bytes. A safetensors file has the xxh3_128 of the
digests (16 bytes each) of its header text and of its tensors, in the order in which it stores
them, so that tensors may be read in any order and by several processes.
"""

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from converters.format.header import Header
from converters.format.listing import Listing, SourceCheckpoint
from converters.format.mapping import TABLE_VERSION, Slot, buffers
from converters.format.values import copy_fault
from converters.importing.convert import Done
from converters.importing.plan import ImportPlan
from converters.sources.source import Fingerprint, Source, read_pieces, replaced_files
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.checkpoint.writer import Digests, ParamsWriter
from mtp_model.files.place import digest
from mtp_model.problems import Problem, raise_if_any
from mtp_model.rope import inverse_frequencies

_FREQUENCY_TOLERANCE = 1e-4  # other tools compute powers in float32
_TOOLS = ("deepseek-mtp", "numpy", "ml_dtypes", "numba", "xxhash")


def finish_import(writer: ParamsWriter, plan: ImportPlan, done: Mapping[str, Done]) -> None:
    """Write side files and metadata, and mark the directory complete; every unit is done.

    Raises ProblemsError for a source that was changed meanwhile.
    """
    listing, options = plan.conversion.listing, plan.options
    tensors = {name: value for unit in done.values() for name, value in unit.tensors.items()}
    raise_if_stale(plan, tensors)  # copies and what they repeat may be of two processes' shares
    stale = [slot.name for slot in _stale_slots(plan, tensors)]
    side = {
        file: writer.write_side_file(file, _side_pieces(listing, file))
        for file in listing.copied_files
    }
    changed = replaced_files(
        listing.source, plan.fingerprint["files"], "import it again with --overwrite"
    )
    raise_if_any(listing.source.name, changed)
    writer.finish(
        provenance={
            **_origin(listing, tensors),
            "plan": plan.digest,
            **asdict(options),
            "stale_copies": stale,
            "tools": _tool_versions(),
        },
        digests=_digests(plan, done),
        headers={file: header.raw.decode() for file, header in listing.headers.items()},
        side_files=side,
    )


def raise_if_stale(plan: ImportPlan, tensors: Mapping[str, str]) -> None:
    """ProblemsError for copies that differ from what they repeat, where copies are checked.

    tensors: digests of what was read, by name.
    """
    if plan.options.copies == "check":
        raise_if_any(plan.conversion.listing.source.name, _stale_copies(plan, tensors))


def foreign_buffers(checkpoint: Checkpoint) -> list[str]:
    """Names of stored rotary frequencies that are not what config.json gives.

    No logit depends on them: every reader of a checkpoint computes its own from the config.
    """
    wanted = inverse_frequencies(checkpoint.config)
    found = []
    for name, slot in buffers(checkpoint.config).items():
        if slot.path in checkpoint.leaves:
            values = checkpoint.read_rows(slot.path, (), 0, slot.shape[0])
            allowed = _FREQUENCY_TOLERANCE if values.dtype == np.float32 else 1e-2
            if not np.allclose(values.astype(np.float32), wanted, rtol=allowed, atol=0):
                found.append(name)
    return found


def _stale_copies(plan: ImportPlan, tensors: Mapping[str, str]) -> Iterator[Problem]:
    listing = plan.conversion.listing
    for slot in _stale_slots(plan, tensors):
        assert slot.copy_of
        copy, original = listing.tensors[slot.name], listing.tensors[slot.copy_of]
        advice = "import with --copies main to take the main model's"
        detail = f"{copy_fault(listing, copy, original)}; {advice}"
        yield Problem("copy", slot.name, detail)


def _stale_slots(plan: ImportPlan, tensors: Mapping[str, str]) -> Iterator[Slot]:
    """Copies with another digest than what they repeat, of those that were read."""
    for slot in plan.conversion.slots.values():
        if slot.copy_of is None or slot.name not in tensors or slot.copy_of not in tensors:
            continue
        if tensors[slot.name] != tensors[slot.copy_of]:
            yield slot


def _side_pieces(listing: Listing, file: str) -> Iterator[bytes]:
    size = int(listing.source.fingerprint(file)["size"])
    return read_pieces(listing.source, file, size)


def _digests(plan: ImportPlan, done: Mapping[str, Done]) -> Digests:
    """Chunk digests by leaf, in the order of the table and of the units."""
    found: Digests = {path: {} for path in plan.conversion.leaves}
    for unit in plan.units:
        if not unit.is_copy:
            found[unit.path] |= done[unit.key].pieces
    return found


def _origin(checkpoint: SourceCheckpoint, digests: Mapping[str, str]) -> dict[str, Any]:
    """Where the weights come from, and the MTP module where that is another checkpoint.

    digests: of all tensors that were read, by name.
    """
    source, taken = checkpoint.source, checkpoint.taken
    if not taken:
        return {"source": _source_record(source.name, source, checkpoint.headers, digests)}
    theirs = {name: digests[ours] for name, ours in taken.names.items() if ours in digests}
    return {
        "source": _source_record(taken.main, source, checkpoint.headers, digests),
        "mtp_source": _source_record(taken.source.name, taken.source, taken.headers, theirs),
    } | ({"mtp_new_layers": list(taken.new_layers)} if taken.new_layers else {})


def _source_record(
    name: str, source: Source, headers: Mapping[str, Header], digests: Mapping[str, str]
) -> dict[str, Any]:
    """Name of a source, and size and digests of its safetensors files."""
    return {
        "name": name,
        "files": {
            file: _file_record(header, [digests.get(tensor.name) for tensor in header.tensors])
            | _listed_digest(source.fingerprint(file))
            for file, header in sorted(headers.items())
        },
    }


def _listed_digest(state: Fingerprint) -> dict[str, Any]:
    """The sha256 of a file where the source lists it, as the Hub does: it covers what isn't read.

    An export takes it to tell a base by.
    """
    return {key: value for key, value in state.items() if key == "sha256"}


def _digest_of_safetensors(header_digest: str, tensor_digests: list[str]) -> str:
    """Digest of a safetensors file from those of its header and of its tensors in offset order."""
    return digest(bytes.fromhex(header_digest + "".join(tensor_digests)))


def _tool_versions() -> dict[str, str]:
    """Versions of what the bytes may depend on."""
    return {"python": platform.python_version(), "table": str(TABLE_VERSION)} | {
        name: _version(name) for name in _TOOLS
    }


def _file_record(header: Header, tensors: list[str | None]) -> dict[str, Any]:
    """The file's digest is None when some of its tensors were not read: the scope left them out."""
    header_digest = digest(header.raw)
    read = [tensor for tensor in tensors if tensor is not None]
    whole = len(read) == len(tensors)
    return {
        "size": header.size,
        "digest": _digest_of_safetensors(header_digest, read) if whole else None,
        "header": header_digest,
        "tensors": tensors,
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # this toolkit, run from a checkout

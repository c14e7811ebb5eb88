"""`convert-deepseek import`: safetensors to a checkpoint directory."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from converters.cli.arguments import Import
from converters.cli.common import open_both, print_result, source_of, time_and_rate
from converters.format.check import check
from converters.format.fit import compare
from converters.format.listing import Listing
from converters.importing.importer import ImportSummary, import_checkpoint
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.config import HiddenState, ModelConfig
from mtp_model.problems import raise_if_any
from mtp_model.progress import progress
from mtp_model.reporting import (
    Facts,
    Section,
    human_bytes,
    plural,
)


def run_import(command: Import) -> int:
    """Check everything that can be, then import."""
    listing, config_dict = open_both(source_of(command.src))
    config, notes = _checked(listing, config_dict, command)
    assert command.share
    began_s = time.monotonic()
    with progress("import") as report:
        summary = import_checkpoint(
            listing,
            config,
            command.dst,
            scope=command.scope,
            dtype=command.dtype,
            copies=command.copies,
            workers=command.workers,
            overwrite=command.overwrite,
            progress=report,
            worker=command.share,
            mtp_hidden_state=_hidden_state(command),
        )
    seconds = time.monotonic() - began_s
    if notes is None and summary.finished:
        stale = open_checkpoint(command.dst).provenance["stale_copies"]
        notes = tuple(f"{name} differs; the main model's is taken" for name in stale)
    plain = {**dataclasses.asdict(summary), "notes": notes or (), "seconds": seconds}
    print_result(imported(summary, notes or (), seconds), plain, as_json=command.json)
    return 0


def _checked(
    listing: Listing, config_dict: dict[str, Any], command: Import
) -> tuple[ModelConfig, tuple[str, ...] | None]:
    """The config, and what to tell of stale copies; None where import itself has to find these.

    Scales and copies of a far source are not read twice: import checks them as they arrive.
    """
    if listing.source.is_far:
        found = compare(listing, config_dict, scope=command.scope)
        raise_if_any(listing.source.name, found.problems)
        assert found.config is not None
        return found.config, None
    with progress("check") as report:
        checked = check(
            listing, config_dict, scope=command.scope, copies=command.copies, progress=report
        )
    return checked.config, checked.notes


def _hidden_state(command: Import) -> HiddenState | None:
    return None if command.mtp_hidden_state == "config" else command.mtp_hidden_state


def imported(summary: ImportSummary, notes: Sequence[str], seconds: float) -> Iterator[Section]:
    """What `import` prints."""
    pairs = [
        ("checkpoint", str(summary.path)),
        ("read", f"{plural(summary.num_tensors, 'tensor')}, {human_bytes(summary.source_bytes)}"),
        ("written", human_bytes(summary.stored_bytes)),
        ("time", time_and_rate(summary.source_bytes, seconds)),
    ]
    index, count = summary.worker
    if count > 1:
        pairs.append(("worker", f"{index + 1} of {count}, {plural(summary.num_units, 'piece')}"))
    if summary.resumed_units:
        resumed = f"{summary.resumed_units:,} of {summary.num_units:,} pieces were there"
        pairs.append(("continued", f"{resumed} already"))
    pairs += [("stale copy", note) for note in notes]
    if not summary.finished:
        others = "this share is done, others are not; the last of them finishes the checkpoint"
        pairs.append(("unfinished", others))
    yield Facts(pairs)

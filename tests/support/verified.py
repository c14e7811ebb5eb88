"""Shared by the tests of verify: a source and its import, compared."""

from pathlib import Path

from converters.format.check import read_config
from converters.format.listing import Listing, list_checkpoint
from converters.sources.open import open_source
from converters.verifying.verify import StorageCheck, check_storage
from mtp_model.checkpoint.directory import open_checkpoint

Pair = tuple[Path, Path]
"""A source and a checkpoint directory."""


def opened(source: Path) -> Listing:
    return list_checkpoint(open_source(str(source)))


def storage(source: Path, checkpoint: Path, **options) -> StorageCheck:
    listing = opened(source)
    return check_storage(
        listing, read_config(listing.source), open_checkpoint(checkpoint), **options
    )

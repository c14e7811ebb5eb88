"""Shared by the tests of verify: a source and its import, compared."""

from pathlib import Path

from converters.format.listing import SourceCheckpoint, open_safetensors
from converters.sources.open import open_source
from converters.verifying.verify import StorageCheck, check_storage
from mtp_model.checkpoint.directory import open_checkpoint

Pair = tuple[Path, Path]
"""A source and a checkpoint directory."""


def opened(source: Path) -> SourceCheckpoint:
    return open_safetensors(open_source(str(source)))


def storage(source: Path, checkpoint: Path, **options) -> StorageCheck:
    return check_storage(opened(source), open_checkpoint(checkpoint), **options)

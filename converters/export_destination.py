"""The folder that an export writes: whose it is, what is left there to go on from.

Knows nothing of tensors.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from converters.journal import Fingerprint, begun_by_another, delete_journals
from converters.listing import SUFFIX
from mtp_model.destination import LOCK, locked
from mtp_model.store import CONFIG, PARAMS, UNFINISHED, CheckpointError

_RECORD = Path(".cache", "deepseek-mtp")  # what is in .cache is no part of a checkpoint


@contextmanager
def claimed(dst: Path, fingerprint: Fingerprint, *, overwrite: bool) -> Iterator[None]:
    """Hold `dst`, which is empty, or of this very export, or may be overwritten."""
    folder = dst / UNFINISHED
    if not folder.is_dir():
        _take_up(dst, fingerprint)
    if not folder.is_dir() or (dst / PARAMS).exists():
        _raise_if_occupied(dst, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK) as got:
        if not got:
            advice = "wait for it, or end it and run this again"
            raise CheckpointError(f"another process is writing {dst}; {advice}")
        forget_record(dst)
        if overwrite and begun_by_another(folder, fingerprint):
            delete_journals(folder)
        yield


def keep_record(dst: Path) -> None:
    """Finish `dst`, but keep the journal: the same command finds there what it need not redo."""
    (dst / _RECORD).parent.mkdir(exist_ok=True)
    (dst / UNFINISHED).rename(dst / _RECORD)


def forget_record(dst: Path) -> None:
    """Undo keep_record, for what is a finished checkpoint and nothing else."""
    if (dst / _RECORD).is_dir():
        shutil.rmtree(dst / _RECORD)
        with suppress(OSError):  # others keep their things there too
            (dst / _RECORD).parent.rmdir()


def raise_if_within(dst: Path, source: Path) -> None:
    """Raise CheckpointError when one of the two folders is the other, or in it."""
    ours, theirs = dst.resolve(), source.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise CheckpointError(f"{dst} and the base {source} overlap; name another place")


def raise_if_full(dst: Path, needed: int) -> None:
    """Raise CheckpointError when the disk of `dst` has not so many bytes."""
    free = shutil.disk_usage(dst).free
    if needed > free:
        raise CheckpointError(
            f"{dst} needs {needed / 1e9:.1f} GB more, its disk has {free / 1e9:.1f} GB free; "
            "make room and run the same command again, or name another place"
        )


def _take_up(dst: Path, fingerprint: Fingerprint) -> None:
    """Go on with a finished export of this very checkpoint."""
    if (dst / _RECORD).is_dir() and not begun_by_another(dst / _RECORD, fingerprint):
        (dst / _RECORD).rename(dst / UNFINISHED)


def _raise_if_occupied(dst: Path, overwrite: bool) -> None:
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return
    if (dst / PARAMS).exists() or not (dst / CONFIG).is_file() or not any(dst.glob("*" + SUFFIX)):
        raise CheckpointError(
            f"{dst} is not empty and no safetensors checkpoint; nothing in it was touched; name "
            "another place, or empty it"
        )
    if not overwrite:
        raise CheckpointError(f"{dst} holds a checkpoint; name another place or --overwrite it")

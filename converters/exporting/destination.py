"""The folder that an export writes: whose it is, and what is left there to go on from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.format.listing import SUFFIX
from mtp_model.checkpoint.claim import held, names_in, raise_if_filled
from mtp_model.checkpoint.directory import CONFIG, PARAMS, UNFINISHED, CheckpointError
from mtp_model.files.journal import Fingerprint, begun_by_another, delete_journals, has_journals
from mtp_model.files.open import as_place
from mtp_model.files.place import Place

_CACHE, _RECORD = ".cache", ".cache/deepseek-mtp"  # what is in .cache is no part of a checkpoint


@contextmanager
def claimed(dst: Place, fingerprint: Fingerprint, *, overwrite: bool) -> Iterator[None]:
    """Hold `dst`, which is empty, or of this very export, or may be overwritten."""
    folder = dst / UNFINISHED
    if not folder.is_dir():
        _take_up(dst, fingerprint)
    if not folder.is_dir() or (dst / PARAMS).exists():
        _raise_if_occupied(dst, overwrite)
    with held(dst):
        forget_record(dst)
        if overwrite and begun_by_another(folder, fingerprint):
            delete_journals(folder)
        if not (overwrite or has_journals(folder)):
            raise_if_filled(dst)
        yield


def keep_record(dst: Place) -> None:
    """Finish `dst`, but keep the journal: the same command finds there what it need not redo."""
    (dst / _CACHE).make_folder()
    (dst / UNFINISHED).move_to(dst / _RECORD)


def forget_record(dst: str | Path | Place) -> None:
    """Undo keep_record: what is left is a finished checkpoint and nothing else."""
    dst = as_place(dst)
    if (dst / _RECORD).is_dir():
        (dst / _RECORD).delete_tree()
        if not (dst / _CACHE).entries():  # others keep their things there too
            (dst / _CACHE).delete_tree()


def _take_up(dst: Place, fingerprint: Fingerprint) -> None:
    """Go on with a finished export of this very checkpoint."""
    if (dst / _RECORD).is_dir() and not begun_by_another(dst / _RECORD, fingerprint):
        (dst / _RECORD).move_to(dst / UNFINISHED)


def _raise_if_occupied(dst: Place, overwrite: bool) -> None:
    names = names_in(dst)
    is_begun = UNFINISHED in names and PARAMS not in names  # by another process, just now
    if not names or is_begun:
        return
    has_weights = any(name.endswith(SUFFIX) for name in names)
    if PARAMS in names or CONFIG not in names or not has_weights:
        raise CheckpointError(
            f"{dst} is not empty and no safetensors checkpoint; nothing in it was touched; name "
            "another place, or empty it"
        )
    if not overwrite:
        raise CheckpointError(f"{dst} holds a checkpoint; name another place or --overwrite it")

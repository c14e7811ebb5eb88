"""The folder that a checkpoint is being written into: claim, lock, clear.

An unfinished folder is visible as such throughout: `.unfinished/` is made before anything else,
and stays until COMPLETE is written.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mtp_model.checkpoint.directory import COMPLETE, UNFINISHED, CheckpointError
from mtp_model.files.open import as_place
from mtp_model.files.place import Place

LOCK = "lock"


@contextlib.contextmanager
def claim(dst: str | Path | Place, *, shared: bool = False) -> Iterator[None]:
    """Hold a destination against other processes; CheckpointError when another one holds it.

    Several processes that split one import hold it `shared`.
    """
    dst = as_place(dst)
    raise_if_foreign(dst)
    with held(dst, shared=shared):
        try:
            yield
        finally:
            if (dst / COMPLETE).is_file():
                (dst / UNFINISHED).delete_tree(ignore_errors=True)


@contextlib.contextmanager
def held(dst: str | Path | Place, *, shared: bool = False) -> Iterator[None]:
    """Mark a folder as unfinished and hold it; CheckpointError when another process does."""
    unfinished = as_place(dst) / UNFINISHED
    unfinished.make_folder(marked=True)
    with (unfinished / LOCK).locked(shared=shared) as got:
        if not got:
            who = (unfinished / LOCK).holder()
            raise CheckpointError(
                f"another process is writing {dst}{who}; wait for it, or end it and run this again"
            )
        yield


def clear(dst: Place, *, overwrite: bool) -> None:
    """Empty a claimed destination; a complete checkpoint in it only with `overwrite`."""
    if (dst / COMPLETE).is_file():
        if not overwrite:
            raise CheckpointError(f"{dst} is a complete checkpoint; name another or --overwrite it")
        (dst / COMPLETE).unlink()
    for entry in dst.entries():
        if entry.name != UNFINISHED:
            entry.delete_tree()


def names_in(dst: Place) -> set[str]:
    """Names of all that is directly in a folder; none where nothing is, "" for a file.

    Another process may be making the folder just now: what is said was so at one moment.
    """
    return {entry.name for entry in dst.entries()} or ({""} if dst.is_file() else set())


def raise_if_foreign(dst: Place) -> None:
    """Raise CheckpointError for a destination that holds anything but a checkpoint directory."""
    names = names_in(dst)
    if names and not names & {COMPLETE, UNFINISHED}:
        raise CheckpointError(
            f"{dst} is not empty and no checkpoint directory of this toolkit; nothing in it was "
            "touched; name another place, or empty it"
        )


def raise_if_filled(dst: Place) -> None:
    """Raise CheckpointError for a claimed destination in which something is, though no journal
    tells of it: whoever claimed it before was stopped before it wrote."""
    if names_in(dst) - {UNFINISHED}:
        raise CheckpointError(
            f"{dst} is not empty, and nothing tells that it is this command's; nothing in it was "
            "touched; name another place, or empty it"
        )

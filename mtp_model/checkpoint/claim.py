"""The folder a checkpoint is being written into: claim, lock, clear; knows not what is written.

An unfinished folder is visible as such throughout: `.unfinished/` is made before anything else,
and stays until COMPLETE is written.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator

from mtp_model.checkpoint.directory import COMPLETE, UNFINISHED, CheckpointError
from mtp_model.files.lock import holder, object_locked
from mtp_model.files.objects import AnyPath, CloudPath

LOCK = "lock"
_BEGUN = "begun"


@contextlib.contextmanager
def claim(dst: AnyPath, *, shared: bool = False) -> Iterator[None]:
    """Hold a destination against other processes; CheckpointError when another one holds it.

    Several processes that split one import hold it `shared`.
    """
    raise_if_foreign(dst)
    with held(dst, shared=shared):
        try:
            yield
        finally:
            if (dst / COMPLETE).is_file():
                delete(dst / UNFINISHED, ignore_errors=True)


@contextlib.contextmanager
def held(dst: AnyPath, *, shared: bool = False) -> Iterator[None]:
    """Mark a folder as unfinished and hold it; CheckpointError when another process does."""
    (dst / UNFINISHED).mkdir(parents=True, exist_ok=True)
    if isinstance(dst, CloudPath):
        (dst / UNFINISHED / _BEGUN).write_bytes(b"")  # no folder is there with nothing in it
    lock = dst / UNFINISHED / LOCK
    with locked(lock, shared=shared) as got:
        if not got:
            who = f" ({holder(lock)})" if isinstance(lock, CloudPath) else ""
            raise CheckpointError(
                f"another process is writing {dst}{who}; wait for it, or end it and run this again"
            )
        yield


@contextlib.contextmanager
def locked(file: AnyPath, *, shared: bool = False, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a file, released when the process ends, however it ends; False: not got."""
    if isinstance(file, CloudPath):
        with object_locked(file, shared=shared, wait=wait) as got:
            yield got
        return
    with file.open("a") as held:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(held, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def clear(dst: AnyPath, *, overwrite: bool) -> None:
    """Empty a claimed destination; a complete checkpoint in it only with `overwrite`."""
    if (dst / COMPLETE).is_file():
        if not overwrite:
            raise CheckpointError(f"{dst} is a complete checkpoint; name another or --overwrite it")
        (dst / COMPLETE).unlink()
    for entry in dst.iterdir():
        if entry.name != UNFINISHED:
            delete(entry)


def delete(entry: AnyPath, *, ignore_errors: bool = False) -> None:
    """Delete a file, or a folder with all that is in it."""
    if isinstance(entry, CloudPath):
        entry.delete_tree()
    elif entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=ignore_errors)
    else:
        entry.unlink()


def entries(dst: AnyPath) -> set[str]:
    """Names of all that is directly in a folder; none where nothing is, "" for a file.

    Another process may be making the folder just now: what is said was so at one moment.
    """
    if not dst.exists():
        return set()
    return {entry.name for entry in dst.iterdir()} if dst.is_dir() else {""}


def raise_if_foreign(dst: AnyPath) -> None:
    """Raise CheckpointError for a destination that holds anything but a checkpoint directory."""
    names = entries(dst)
    if names and not names & {COMPLETE, UNFINISHED}:
        raise CheckpointError(
            f"{dst} is not empty and no checkpoint directory of this toolkit; nothing in it was "
            "touched; name another place, or empty it"
        )

"""What a stopped run continues from: the training state and how far the run is, saved by Orbax.

Beside Orbax's files stand sums of our own over every leaf, and a digest of the record that holds
them. So a restored state is the saved one, bit for bit, or the checkpoint is told to be damaged.
Sums are made where the leaves are, each device adding what it holds: no mesh changes them.
"""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from finetune.settings import CheckpointSettings
from mtp_model import cluster
from mtp_model.checkpoint.directory import digest_of_json
from mtp_model.files.file_system import path_for_orbax
from mtp_model.files.local import raise_if_full
from mtp_model.files.memory import available_bytes
from mtp_model.files.objects import CloudError
from mtp_model.files.open import as_place
from mtp_model.files.place import Place
from mtp_model.problems import UserError
from mtp_model.sharding import active_mesh, everywhere

T = TypeVar("T")
_METADATA_BYTES = 1 << 20  # of a checkpoint, and of the logs that grow beside it
_RECORD = "progress/metadata"  # where Orbax puts what it saves as JSON under `progress`
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what a killed process was writing
_DELETED = ".deleted"  # what is about to be deleted has no number any more
_FULL = ("No space left", "Disk quota exceeded")
_MARK = "commit_success.txt"  # which Orbax writes last, where names do not change at one moment
_NOT_DAMAGE = ("Permission denied", "PERMISSION_DENIED", "ut of memory")
_NOT_DAMAGE += ("UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")


class DamagedError(UserError):
    """A checkpoint of a run that is not what was saved: what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class RunPosition:
    """How far a run is, and what it was fed; saved as `progress` beside the training state."""

    step: int = 0
    tokens: int = 0  # trained on, padding not counted
    position: dict[str, Any] | None = None  # finetune.data.packing.Position, as JSON
    inputs: dict[str, str] | None = None  # digests; other data or weights cannot continue a run


def raise_unless_room(
    folder: Place, state: Any, *, checkpoints: int = 1, bytes_more: int = 0
) -> None:
    """UserError unless the disk has room for so many checkpoints, and for `bytes_more`."""
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    needed = checkpoints * (nbytes + nbytes // 16 + _METADATA_BYTES) + bytes_more
    raise_if_full(folder.room_for(needed), "move the run to another disk")


def saved_steps(folder: Path | Place) -> list[int]:
    """Steps of the checkpoints that are in a folder, which need not be there yet."""
    found = (entry for entry in as_place(folder).entries() if entry.name.isdecimal())
    return sorted(int(entry.name) for entry in found if _is_whole(entry))


def _is_whole(checkpoint: Place) -> bool:
    """Whether all of it was written: a folder has its number then, in a bucket there is a mark."""
    return not checkpoint.is_far or (checkpoint / _MARK).is_file()


def room_for(saved: Sequence[int], settings: CheckpointSettings, steps: int) -> int:
    """How many checkpoints more than are there a run of so many steps has at a time."""
    done = max(saved, default=0)
    coming = sorted({*range(settings.every, steps, settings.every), steps})
    coming = [step for step in coming if step > done]
    passing = [step for step in saved if not _is_for_good(step, settings)]
    for_good = sum(_is_for_good(step, settings) for step in coming)
    others = min(len(coming) - for_good, settings.keep + 1 - len(passing))
    return for_good + max(others, 0)


def _is_for_good(step: int, settings: CheckpointSettings) -> bool:
    """Whether the checkpoint of a step is kept however many come after it."""
    return settings.keep_every > 0 and step % settings.keep_every == 0


class Checkpoints:
    """The numbered checkpoints of a run; a half-written one has no number yet.

    The next step takes over the state's buffers, so a save may go on beside it only from a copy
    in this machine's memory, made before `save` returns. Where memory has no room for a copy, the
    run waits until the checkpoint is on the disk. Of a state that is spread over devices Orbax
    makes the copy; each host's process writes what its devices hold.
    """

    def __init__(self, folder: Path | Place, settings: CheckpointSettings):
        self._folder, self._settings = as_place(folder).absolute(), settings
        # Orbax logs, with tracebacks and more than once, what it also raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        self._newest = -1
        if cluster.is_first():
            self._folder.make_folder()
            self._delete_leftovers()
        cluster.wait("checkpoints can be read")

    def save(self, state: Any, at: RunPosition) -> None:
        """Save under the step the run is at; older checkpoints beyond those to keep are deleted.

        UserError where the disk has no room, before anything is written: the others stay whole.
        """
        if at.step == self._newest:  # saved just now
            return
        self.wait()
        raise_unless_room(self._folder, state)
        self._newest = at.step
        leaves = _by_name(state)
        record = asdict(at) | {"state": _sums(leaves)}
        if any(len(leaf.devices()) > 1 for leaf in leaves.values()):
            self._begin(leaves, record)  # the copy is made when it returns
            self._saving = self._writer.submit(self._finish, at.step)
        elif _copy_fits(leaves):
            copies = {name: np.array(_on_host(leaf)) for name, leaf in leaves.items()}
            self._saving = self._writer.submit(self._write, copies, record)
        else:
            self._write({name: _on_host(leaf) for name, leaf in leaves.items()}, record)

    def raise_if_failed(self) -> None:
        """Raise what ended the save that went on beside the last steps, if anything did."""
        if self._saving and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what was saved is on the disk; raises what kept it from getting there."""
        saving, self._saving = self._saving, None
        if saving:
            saving.result()

    def steps(self) -> Iterator[int]:
        """Steps of the checkpoints that are there, newest first."""
        return reversed(saved_steps(self._folder))

    def newest_said(self) -> str:
        """Which checkpoint a run that ends now leaves, for a message."""
        newest = next(self.steps(), None)
        if newest is None:
            return "there is no checkpoint yet"
        return f"the checkpoint of step {newest} is kept in {self._folder}"

    def position(self, step: int) -> RunPosition:
        """Where a checkpoint is in its run. DamagedError where its record is not as written."""
        return self._record(step)[0]

    def restore(self, step: int, like: T) -> T:
        """The state of a checkpoint in the place of `like`, whose buffers are freed for it.

        The sum over every leaf is compared. DamagedError names what differs.
        """
        wanted = {name: _abstract(leaf) for name, leaf in _by_name(like).items()}
        _, sums = self._record(step)
        if sums is not None and sums.keys() != wanted.keys():
            odd = ", ".join(sorted(sums.keys() ^ wanted.keys())[:3])
            raise UserError(f"{self._at(step)} holds the state of another model: {odd}")
        for leaf in jax.tree.leaves(like):
            leaf.delete()
        args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        where = path_for_orbax(self._at(step))
        found = _or_damaged(lambda: self._orbax.restore(where, args=args))
        leaves = found["state"]
        found = _sums(leaves)
        for name, saved in (sums or {}).items():
            if len(saved) == len(found[name]) and found[name] != saved:  # earlier ones were longer
                raise DamagedError(f"{name} is not what was saved")
        return jax.tree.unflatten(
            jax.tree.structure(like), [leaves[name] for name in _by_name(like)]
        )

    def set_aside(self, step: int) -> Place:
        """Take a damaged checkpoint's number away; returns where it is now."""
        aside = self._folder / f"{step}.damaged"
        if aside.exists():
            aside.delete_tree(ignore_errors=True)
        self._at(step).move_to(aside)
        return aside

    def close(self) -> None:
        """Wait for the last save and end the thread that makes them."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._orbax.close()

    def _write(self, leaves: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        self._begin(leaves, record)
        self._finish(record["step"])

    def _begin(self, leaves: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(dict(leaves)),
            progress=ocp.args.JsonSave({**record, "digest": digest_of_json(record)}),
        )
        with self._room_for(record["step"]):
            where = path_for_orbax(self._at(record["step"]))
            self._orbax.save(where, args=args, force=True)

    def _finish(self, step: int) -> None:
        with self._room_for(step):
            self._orbax.wait_until_finished()
        if not cluster.is_first():
            return
        for old in saved_steps(self._folder)[: -self._settings.keep]:
            if _is_for_good(old, self._settings):
                continue
            if self._folder.is_far:
                (self._at(old) / _MARK).unlink()
            else:
                self._at(old).move_to(self._folder / f"{old}{_DELETED}")
        self._delete_leftovers()

    @contextlib.contextmanager
    def _room_for(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tensorstore has a ValueError for a full disk
            if self._folder.is_far and isinstance(error, ValueError | OSError):
                raise UserError(
                    f"{self._at(step)} could not be written ({error}); the checkpoints before it "
                    "are whole; run the same command again"
                ) from error
            if not any(words in str(error) for words in _FULL):
                raise
            if cluster.is_first():
                self._delete_leftovers()
            raise UserError(
                f"the disk of {self._folder} is full: the checkpoint of step {step} was not "
                "written, those before it are whole; make room and run the same command again"
            ) from error

    def _record(self, step: int) -> tuple[RunPosition, dict[str, str] | None]:
        """Position and sums by leaf; None for those that an earlier version did not write."""
        file = self._at(step) / _RECORD
        try:
            record = json.loads(file.read_bytes())
            sums, digest = record.pop("state", None), record.pop("digest", None)
            position = RunPosition(**record)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise DamagedError(f"{_RECORD} is missing") from None
        except CloudError:
            raise
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise DamagedError(f"{_RECORD} is not what was saved") from None
        earlier = sums is None and digest is None
        whole = earlier or digest == digest_of_json(record | {"state": sums})
        if not whole or position.step != step:
            raise DamagedError(f"{_RECORD} is not what was saved")
        return position, sums

    def _at(self, step: int) -> Place:
        return self._folder / str(step)

    def _delete_leftovers(self) -> None:
        """Delete what a killed process was writing or deleting."""
        for path in self._folder.entries():
            half = path.name.isdecimal() and not _is_whole(path)
            if half or _UNFINISHED in path.name or path.name.endswith(_DELETED):
                path.delete_tree(ignore_errors=True)


def _or_damaged(restore: Callable[[], T]) -> T:
    """What Orbax restores. Of damaged files it complains with many kinds of exceptions."""
    if sys.unraisablehook is not _LATE_READS:
        _LATE_READS.others = sys.unraisablehook
        sys.unraisablehook = _LATE_READS
    try:
        return restore()
    except (PermissionError, MemoryError, CloudError):
        raise
    except Exception as error:
        if any(words in str(error) for words in _NOT_DAMAGE):
            raise
        said = " ".join(str(error).split())
        raise DamagedError(f"it cannot be read ({said[:200] or type(error).__name__})") from error


class _LateReads:
    """Drops the complaints of reads that end after Orbax has given up a damaged checkpoint.

    They would tell an event loop that is closed by then, from threads of their own, and Python
    would print a traceback of each. All else goes to the hook that was there before.
    """

    def __init__(self) -> None:
        self.others = sys.unraisablehook

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self.others(unraisable)


_LATE_READS = _LateReads()


def _copy_fits(leaves: Mapping[str, jax.Array]) -> bool:
    """Whether memory has room for a copy, and three times that for what else comes."""
    return 4 * sum(leaf.nbytes for leaf in leaves.values()) <= available_bytes()


def _on_host(leaf: jax.Array) -> np.ndarray:
    """The leaf in this machine's memory; on CPU its very buffer, which the next step overwrites.

    Not `np.asarray` there: JAX would keep that view, and copy the leaf instead of overwriting it.
    """
    if leaf.is_fully_addressable and len(leaf.devices()) == 1:
        (device,) = leaf.devices()
        if device.platform == "cpu":
            if leaf.dtype == jnp.bfloat16:  # which numpy takes from nobody
                as_bits: Any = jax.lax.bitcast_convert_type(leaf, jnp.uint16)
                return np.from_dlpack(as_bits).view(leaf.dtype)
            buffer: Any = leaf
            return np.from_dlpack(buffer)
    return np.asarray(leaf)


def _sums(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
    """By leaf: 32 bits that one changed element always changes, and more of them nearly always."""
    sums = jax.device_get(_sums_of(dict(leaves)))
    return {name: f"{int(total):08x}" for name, total in sums.items()}


@jax.jit
def _sums_of(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """uint32 sums of all elements, each mixed with its place; on a mesh on each device."""
    mesh = active_mesh()
    sums = {name: _sum(leaf) for name, leaf in leaves.items()}
    return sums if mesh is None else jax.lax.with_sharding_constraint(sums, everywhere(mesh))


@jax.jit  # so that leaves of one shape are traced once
def _sum(leaf: jax.Array) -> jax.Array:
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
    place = jnp.zeros((1,) * leaf.ndim, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        along = [size if each == axis else 1 for each in range(leaf.ndim)]
        count = jnp.arange(size, dtype=jnp.uint32).reshape(along)
        place = _mixed(place) + count * jnp.uint32(0x9E3779B1)
    return jnp.sum(_mixed(words ^ place), dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """Each uint32 to another one, far from that of its neighbours: MurmurHash3's finaliser."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path: a checkpoint that says what it holds, and needs no class of ours."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}

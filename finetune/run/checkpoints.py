"""What a killed run continues from: the training state and how far the run is, saved by Orbax."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from mtp_model.files.local import raise_if_full

T = TypeVar("T")
_METADATA_BYTES = 1 << 20  # of a checkpoint, and of the logs that grow beside it


@dataclass(frozen=True, kw_only=True)
class RunPosition:
    """How far a run is, and what it was fed; saved as `progress` beside the training state."""

    step: int = 0
    tokens: int = 0  # trained on, padding not counted
    position: dict[str, Any] | None = None  # finetune.data.packing.Position, as JSON
    inputs: dict[str, str] | None = None  # digests; other data or weights cannot continue a run


def raise_unless_room(
    folder: Path, state: Any, *, checkpoints: int = 1, bytes_more: int = 0
) -> None:
    """UserError unless the disk has room for so many checkpoints, and for `bytes_more`."""
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    needed = checkpoints * (nbytes + nbytes // 16 + _METADATA_BYTES) + bytes_more
    raise_if_full({folder: needed}, "move the run to another disk")


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that are in a folder, which need not be there yet."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


class Checkpoints:
    """The numbered checkpoints of a run; a half-written one is never seen."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
            # The next step takes over the state's buffers; on CPU an asynchronous save may still
            # be reading them.
            enable_async_checkpointing=False,
        )
        self._folder = folder.absolute()
        self.manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, state: Any, at: RunPosition) -> None:
        """Save under the step the run is at; older checkpoints beyond those to keep are deleted.

        UserError where the disk has no room, before anything is written: the others stay whole.
        """
        raise_unless_room(self._folder, state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_by_name(state)),
            progress=ocp.args.JsonSave(asdict(at)),
        )
        self.manager.save(at.step, args=args, force=True)

    def latest(self) -> RunPosition | None:
        """Where the newest checkpoint is in its run, None where there is none."""
        step = self.manager.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return RunPosition(**self.manager.restore(step, args=args)["progress"])

    def restore(self, step: int, like: T) -> T:
        """The state of a checkpoint in the place of `like`, whose buffers are freed for it."""
        wanted = {name: _abstract(leaf) for name, leaf in _by_name(like).items()}
        for leaf in jax.tree.leaves(like):
            leaf.delete()
        args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        restored = self.manager.restore(step, args=args)["state"]
        leaves = [restored[name] for name in _names(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def close(self) -> None:
        self.manager.close()


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _names(tree: Any) -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path: a checkpoint that says what it holds, and needs no class of ours."""
    return dict(zip(_names(tree), jax.tree.leaves(tree), strict=True))

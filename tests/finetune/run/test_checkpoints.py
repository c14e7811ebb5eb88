"""Checkpoints of a run: whole or said to be damaged, written beside the steps that follow."""

import json
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from finetune.run import checkpoints as module
from finetune.run.checkpoints import (
    Checkpoints,
    DamagedError,
    RunPosition,
    room_for,
    saved_steps,
)
from finetune.settings import CheckpointSettings
from mtp_model.problems import UserError

RECORD = "progress/metadata"


def state(seed: int) -> dict[str, jax.Array]:
    values = np.random.default_rng(seed).normal(size=(3, 64)).astype(np.float32)
    return {"weight": jnp.asarray(values), "count": jnp.int32(seed), "bias": jnp.zeros((5,))}


def as_bytes(tree: dict[str, jax.Array]) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in tree.items()}


@pytest.fixture
def checkpoints(tmp_path: Path):
    opened = Checkpoints(tmp_path / "checkpoints", CheckpointSettings(keep=2))
    yield opened
    opened.close()


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        at = RunPosition(step=step, inputs={"data": "d"}, position={"next": (0, step)})
        checkpoints.save(state(step), at)
    checkpoints.wait()


def test_the_newest_are_kept_and_give_back_what_was_saved(checkpoints: Checkpoints, tmp_path: Path):
    save(checkpoints, 1, 2, 3)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["2", "3"]
    assert list(checkpoints.steps()) == [3, 2]
    assert checkpoints.position(3).position == {"next": [0, 3]}
    for step in (2, 3):
        assert as_bytes(checkpoints.restore(step, state(0))) == as_bytes(state(step))


def test_those_of_every_so_many_steps_stay(tmp_path: Path):
    kept = CheckpointSettings(every=1, keep=1, keep_every=3)
    opened = Checkpoints(tmp_path, kept)
    for step in range(1, 8):
        save(opened, step)
    assert saved_steps(tmp_path) == [3, 6, 7]
    opened.close()
    # Each is written before an older one goes: 3, 6, and 7 beside 5 or 6.
    assert room_for([], kept, 7) == 4
    assert room_for([3, 6], kept, 7) == 1
    assert room_for([3, 4], kept, 7) == 2
    assert room_for([], CheckpointSettings(every=2, keep=2), 7) == 3
    assert room_for([2, 4], CheckpointSettings(every=2, keep=2), 7) == 1
    assert room_for([7], kept, 7) == 0


def test_plain_orbax_reads_them(checkpoints: Checkpoints, tmp_path: Path):
    save(checkpoints, 3)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        assert manager.latest_step() == 3
        found = manager.restore(3, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    assert as_bytes(found["state"]) == as_bytes(state(3))


@pytest.mark.parametrize("room", [True, False])
def test_the_next_step_may_take_over_the_buffers(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, room: bool
):
    """With room in memory the save goes on beside it, from a copy; else it is done before."""
    monkeypatch.setattr(module, "available_bytes", lambda: 1 << 40 if room else 0)
    overwritten, real, done = threading.Event(), Checkpoints._write, []

    def late(self: Checkpoints, *args: object) -> None:
        if room:
            assert overwritten.wait(60)
        real(self, *args)  # pyright: ignore[reportArgumentType]
        done.append(threading.current_thread().name)

    monkeypatch.setattr(Checkpoints, "_write", late)
    begun = {name: jnp.copy(leaf) for name, leaf in state(1).items()}
    place = begun["weight"].unsafe_buffer_pointer()
    checkpoints.save(begun, RunPosition(step=1))
    assert bool(done) is not room
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 7, tree), donate_argnums=0)
    moved = jax.block_until_ready(step(begun))
    assert moved["weight"].unsafe_buffer_pointer() == place, "overwritten, not copied by JAX"
    overwritten.set()
    checkpoints.wait()
    assert done[0].startswith("checkpoint") is room
    assert as_bytes(checkpoints.restore(1, state(0))) == as_bytes(state(1))


def test_a_save_that_is_under_way_is_no_checkpoint(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What a kill leaves then is visibly unfinished, and deleted by the next one who opens it."""
    save(checkpoints, 1)
    folder, copied = tmp_path / "checkpoints", tmp_path / "killed"
    real = ocp.CompositeCheckpointHandler.finalize

    def look(*args: object) -> None:
        shutil.copytree(folder, copied)
        real(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(ocp.CompositeCheckpointHandler, "finalize", look)
    save(checkpoints, 2)
    names = {path.name for path in copied.iterdir()}
    assert len(names) == 2
    assert saved_steps(copied) == [1]
    again = Checkpoints(copied, CheckpointSettings(keep=2))
    assert [path.name for path in copied.iterdir()] == ["1"]
    assert as_bytes(again.restore(1, state(0))) == as_bytes(state(1))
    again.close()


def test_a_full_disk_leaves_the_checkpoint_before_it(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(checkpoints, 1)

    def full(*_: object, **__: object) -> None:
        checkpoints._orbax._metadata_store.wait_until_finished()  # else it may fail later
        raise ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CompositeCheckpointHandler, "async_save", full)
        with pytest.raises(UserError, match=r"is full: the checkpoint of step 2 was not written"):
            save(checkpoints, 2)
    # Orbax may still write beside us: what is left is no checkpoint, and the next save deletes it.
    assert list(checkpoints.steps()) == [1]
    save(checkpoints, 3)
    assert list(checkpoints.steps()) == [3, 1]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}


def test_what_ended_a_save_is_told_before_the_next(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object) -> None:
        raise OSError("broken")

    monkeypatch.setattr(Checkpoints, "_write", broken)
    checkpoints.save(state(1), RunPosition(step=1))
    while not checkpoints._saving or not checkpoints._saving.done():
        pass
    with pytest.raises(OSError, match="broken"):
        checkpoints.raise_if_failed()
    checkpoints.raise_if_failed()


# --- damage


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def remove(path: Path, _: random.Random) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("damage", [flip, cut, remove])
def test_damage_is_found_or_changes_nothing(
    checkpoints: Checkpoints, tmp_path: Path, damage: Callable[[Path, random.Random], None]
):
    """In each file of a checkpoint, in some places; and each folder is removed."""
    save(checkpoints, 3)
    folder, rng = tmp_path / "checkpoints" / "3", random.Random(8)
    whole = shutil.copytree(folder, tmp_path / "whole")
    paths = [p for p in whole.rglob("*") if p.is_file() or damage is remove]
    found = set()
    for path in sorted(paths) * (1 if damage is remove else 4):
        name = path.relative_to(whole).as_posix()
        damage(folder / name, rng)
        try:
            checkpoints.position(3)
            restored = checkpoints.restore(3, state(0))
        except DamagedError:
            found.add(name)
        else:
            assert as_bytes(restored) == as_bytes(state(3)), name
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
    assert RECORD in found
    assert any(name.startswith("state/") for name in found)
    assert as_bytes(checkpoints.restore(3, state(0))) == as_bytes(state(3))


def test_only_late_reads_are_dropped(monkeypatch: pytest.MonkeyPatch):
    """Of a restore that Orbax gave up; all else reaches the hook that was there before."""
    seen = []
    monkeypatch.setattr(module._LATE_READS, "others", lambda unraisable: seen.append(unraisable))
    for error in (RuntimeError("Event loop is closed"), RuntimeError("other"), OSError("other")):
        module._LATE_READS(SimpleNamespace(exc_value=error))
    assert [str(each.exc_value) for each in seen] == ["other", "other"]


def test_a_bit_that_orbax_does_not_miss_is_named(checkpoints: Checkpoints, tmp_path: Path):
    """The digest alone tells: another state of the same shapes under this record."""
    save(checkpoints, 3, 4)
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "4" / "state")
    shutil.copytree(folder / "3" / "state", folder / "4" / "state")
    with pytest.raises(DamagedError, match="count is not what was saved"):
        checkpoints.restore(4, state(0))


def test_checkpoints_of_earlier_versions_have_no_digests(checkpoints: Checkpoints, tmp_path: Path):
    save(checkpoints, 3)
    file = tmp_path / "checkpoints" / "3" / RECORD
    record = json.loads(file.read_text())
    earlier = {name: record[name] for name in ("step", "tokens", "position", "inputs")}
    file.write_text(json.dumps(earlier))
    assert as_bytes(checkpoints.restore(3, state(0))) == as_bytes(state(3))
    for name in ("state", "digest"):  # but one that lost only a part of them is damaged
        file.write_text(json.dumps({key: record[key] for key in record if key != name}))
        with pytest.raises(DamagedError, match="is not what was saved"):
            checkpoints.position(3)


def test_another_models_state_is_no_damage(checkpoints: Checkpoints):
    save(checkpoints, 3)
    with pytest.raises(UserError, match="holds the state of another model: other") as caught:
        checkpoints.restore(3, state(0) | {"other": jnp.zeros(3)})
    assert not isinstance(caught.value, DamagedError)


def test_a_damaged_one_is_set_aside(checkpoints: Checkpoints, tmp_path: Path):
    save(checkpoints, 2, 3)
    assert checkpoints.set_aside(3) == tmp_path / "checkpoints" / "3.damaged"
    assert list(checkpoints.steps()) == [2]
    save(checkpoints, 4)
    checkpoints.set_aside(4)
    assert list(checkpoints.steps()) == [2]

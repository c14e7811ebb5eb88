"""Where a run goes on: the newest checkpoint that is whole, and what is said about it.

The loop begins with a state, wherever that comes from.
"""

import contextlib
from collections.abc import Iterator

import jax.numpy as jnp
from rich.console import Console

from finetune.data.run_text import RunText
from finetune.objective.objectives import lambdas
from finetune.run.changes import differences, given_to_all
from finetune.run.checkpoints import Checkpoints, DamagedError, RunPosition
from finetune.run.directory import RunDirectory, RunError
from finetune.run.learning_rate import learning_rates
from finetune.run.metrics import RunLog
from finetune.settings import RunSettings
from finetune.state import TrainState
from mtp_model import cluster
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.files.objects import CloudError
from mtp_model.files.open import as_place
from mtp_model.files.place import Place

_LOOKED_AT = 1000  # files of the data, each of which may be a request
_NAMED = 5
# What of a step depends on how many there are in all.
_FOLLOWS_STEPS = {
    "the learning rate": lambda settings: learning_rates(settings.optimizer, settings.steps),
    "lambda": lambdas,
}


def inputs_of(text: RunText, base: Checkpoint) -> dict[str, str]:
    """Digests of what is trained on and of what is trained: none may change in a run."""
    return {"data": text.digest, "checkpoint": base.digest}


def given(settings: RunSettings, text: RunText, base: Checkpoint) -> dict[str, str]:
    """What every process of a cluster must have been given."""
    return given_to_all(settings) | inputs_of(text, base)


def resume(
    run: RunDirectory,
    checkpoints: Checkpoints,
    first_state: TrainState,
    inputs: dict[str, str],
    settings: RunSettings,
    console: Console,
) -> tuple[TrainState, RunPosition]:
    """The newest checkpoint, or the beginning; damaged ones are set aside.

    first_state: what a new run begins with; freed where a checkpoint takes its place.
    inputs: digests of data and weights. RunError when they have changed, or no checkpoint is whole.
    """
    damaged = []
    for step in checkpoints.steps():
        try:
            at = checkpoints.position(step)
            _raise_if_changed(run, at, inputs, settings)
            state = checkpoints.restore(step, first_state)
        except DamagedError as damage:
            if cluster.count() > 1:
                raise _to_begin_again(checkpoints, step, damage) from damage
            aside = checkpoints.set_aside(step)
            damaged.append(
                f"the checkpoint of step {step} is damaged ({damage}); it is {aside} now"
            )
            console.print(damaged[-1], markup=False)
        else:
            console.print(f"continuing after step {at.step}")
            _go_on_with(run, settings, at.step, console)
            return state, at
    if damaged:
        raise RunError(
            f"no checkpoint of {run.place} is whole; the same command begins anew at step 1, if no "
            "copy of a checkpoint is put there first:\n  " + "\n  ".join(damaged)
        )
    _go_on_with(run, settings, 0, console)
    return first_state, RunPosition(inputs=inputs)


def _to_begin_again(checkpoints: Checkpoints, step: int, damage: DamagedError) -> RunError:
    """What one process says of a damaged checkpoint: others may have read their part of it."""
    with contextlib.suppress(FileNotFoundError, CloudError):  # another process was faster
        checkpoints.set_aside(step)
    return RunError(
        f"the checkpoint of step {step} is damaged ({damage}); it was set aside: run the same "
        "command on every host again, to go on from the one before it"
    )


def _raise_if_changed(
    run: RunDirectory, at: RunPosition, inputs: dict[str, str], settings: RunSettings
) -> None:
    """RunError when data or weights are not those that a checkpoint was trained with."""
    before = at.inputs or {}
    # Earlier versions had the digest of the held-out text behind that of the data.
    changed = [name for name in inputs if not before[name].startswith(inputs[name])]
    if changed:
        newer = _written_since(run, settings) if "data" in changed else ""
        raise RunError(
            f"{run.place} cannot be continued: {' and '.join(changed)} changed since it began; "
            f"restore what it was, or start anew with --overwrite{newer}"
        )


def _written_since(run: RunDirectory, settings: RunSettings) -> str:
    """Which files of the data were written after the run began: what people look for first."""
    files = [file for path in (*settings.data, *settings.states) for file in _files(as_place(path))]
    began_s = run.began_s
    newer = [str(file) for file in files[:_LOOKED_AT] if file.written_s() > began_s]
    if not newer:
        return ""
    more = f" and {len(newer) - _NAMED} more" if len(newer) > _NAMED else ""
    return f"; written since then: {', '.join(newer[:_NAMED])}{more}"


def _files(place: Place) -> list[Place]:
    return [place] if place.is_file() else [place / name for name in sorted(place.sizes())]


def _go_on_with(run: RunDirectory, settings: RunSettings, done: int, console: Console) -> None:
    """Save settings that may change and have, and say what follows from them."""
    saved = run.saved_settings() or settings
    cluster.wait("settings are read")
    aside = run.go_on_with(settings) if cluster.is_first() else None
    for line in differences(saved, settings).values():
        console.print(line)
    if aside:
        console.print(f"the result of {saved.steps} steps is {aside} now")
    for line in changes_of_course(saved, settings, done):
        console.print(line)


def changes_of_course(saved: RunSettings, now: RunSettings, done: int) -> Iterator[str]:
    """What the next step does otherwise since the run has another number of steps."""
    if done >= now.steps:
        return
    for what, of in _FOLLOWS_STEPS.items():
        old, new = (float(of(each)(jnp.asarray(done + 1))) for each in (saved, now))
        if old != new:
            yield (
                f"{what} follows {now.steps} steps from step {done + 1} on: {new:.3g} "
                f"there, {old:.3g} with {saved.steps}"
            )


def say_what_is_done_again(log: RunLog, at: RunPosition, console: Console) -> None:
    """Lines of the logs that were damaged, and steps that they tell of but no checkpoint holds."""
    for fault in log.faults:
        console.print(fault)
    rows = (log.step_rows.last or {"step": 0})["step"]
    if rows < at.step:
        console.print(f"{log.metrics} ends with step {rows}; lines up to step {at.step} are lost")
    if log.seen > at.step:
        where = f"the checkpoint of step {at.step}" if at.step else "the beginning"
        steps = f"{at.step + 1} to {log.seen}"
        console.print(f"going on from {where}: steps {steps} are computed again")

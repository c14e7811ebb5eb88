"""Settings side by side: what may change in a run that goes on, what has, what must be alike."""

import shlex
from typing import Any

from finetune.settings import RunSettings, flat, option
from finetune.settings_rules import MESH
from mtp_model.files.open import written

MAY_CHANGE = (
    "checkpoint",
    "data",
    "states",
    "out",
    "steps",
    "eval_data",
    "compute_dtype",  # compared by what it stood for when the run began
    "remat",  # what is computed is the same
    "batch.accumulation",
    "evaluation.every",
    "evaluation.rows",
    "checkpoints.every",
    "checkpoints.keep",
    "checkpoints.keep_every",
    "lora.keep",
    "skip_unusable",  # which samples there are is compared; one found damaged has no tokens then
    *MESH,
)


def differences(before: RunSettings, now: RunSettings) -> dict[str, str]:
    """By name, a line for each setting that differs."""
    old, new = flat(before), flat(now)
    return {
        name: f"{option(name)} was {_shown(old[name])}, is now {_shown(new[name])}"
        for name in old
        if old[name] != new[name]
    }


def forbidden_changes(before: RunSettings, now: RunSettings) -> list[str]:
    """One line for each change that would make another run of it: one with other mathematics.

    A run may be moved and copied, with its data and its checkpoint (their contents are compared by
    digest), lengthened, and measured and saved more or less often.
    """
    changed = differences(before, now)
    allowed = set(MAY_CHANGE)
    if before.eval_data and now.eval_data:
        allowed |= {"evaluation.holdout_every"}  # holds nothing out
    elif before.eval_data or now.eval_data:
        allowed -= {"eval_data"}  # what was held out would be trained on, or the reverse
    if before.objective.lk:
        allowed -= {"batch.accumulation"}  # lk weighs by what is computed at a time
    if now.steps < before.steps:
        allowed -= {"steps"}  # the learning rate would have fallen faster
    return [line for name, line in changed.items() if name not in allowed]


def given_to_all(settings: Any) -> dict[str, str]:
    """Values by option: what every process of a cluster must have been given alike."""
    values = flat(settings).items()
    return {
        option(name): _shown(value) for name, value in values if not name.startswith("cluster.")
    }


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return shlex.join(map(written, value)) or "nothing"
    return written(value)

"""The learning rate over the steps of a run."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from finetune.settings import OptimizerSettings, Schedule


def learning_rates(settings: OptimizerSettings, steps: int) -> Callable[[Any], Any]:
    """Learning rate of a step (counted from 1): linear up to the highest, then by its schedule.

    The last step has `final_fraction` of the highest, unless the rate is constant.
    """
    warmup = math.ceil(settings.warmup_fraction * steps)
    falling = max(steps - warmup, 1)
    left_of = _SCHEDULES[settings.schedule]
    low = 1.0 if settings.schedule == "constant" else settings.final_fraction

    def rate(step):
        rising = step / max(warmup, 1)
        progress = jnp.clip((step - warmup) / falling, 0.0, 1.0)
        fallen = low + (1.0 - low) * left_of(progress)
        return settings.learning_rate * jnp.where(step < warmup, rising, fallen)

    return rate


# What is left of the way down, 1 to 0, after a part of the steps that follow warm-up.
_DECAY = 0.2  # of the steps, in which wsd falls
_SCHEDULES: dict[Schedule, Callable[[Any], Any]] = {
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda _: 1.0,
    "wsd": lambda progress: jnp.minimum(1.0, (1.0 - progress) / _DECAY),
}

"""Runs `finetune-deepseek` in a process of its own that is killed (SIGKILL) at a chosen point.

python killed_training.py POINT COUNT ARGUMENT...

The process dies when it is about to do POINT for the COUNTth time.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
from orbax.checkpoint._src.path import atomicity

from finetune import cli
from finetune.metrics import RunLog
from mtp_model import store_writer


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_line(log: RunLog, row: dict[str, Any]) -> None:
    """Leave the start of a line in metrics.jsonl."""
    with log.metrics.open("a") as file:
        file.write(str(row)[:20])


def before(owner: Any, name: str, count: int, last_words: Callable[..., None] = die) -> None:
    """Die when `owner.name` is called for the count-th time."""
    real, calls = getattr(owner, name), iter(range(1, 1 << 30))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            last_words(*args)
            die()
        return real(*args, **kwargs)

    setattr(owner, name, counted)


POINTS: dict[str, Callable[[int], None]] = {
    "step": lambda n: before(RunLog, "step", n, half_a_line),
    "checkpoint": lambda n: before(atomicity.AtomicRenameTemporaryPath, "finalize", n),
    "final": lambda n: before(store_writer, "write_buffer", n),
}


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    point, count, *arguments = sys.argv[1:]
    POINTS[point](int(count))
    sys.exit(cli.run(arguments))

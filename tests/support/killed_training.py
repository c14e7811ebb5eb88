"""Runs `finetune-deepseek` in a process of its own that is killed (SIGKILL) at a chosen point.

python killed_training.py POINT COUNT ARGUMENT...

The process dies when it is about to do POINT for the COUNTth time.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
from dying import before
from orbax.checkpoint._src.path import atomicity

from finetune import cli
from finetune.run.metrics import RunLog
from mtp_model.files.local import LocalPlace


def half_a_line(log: RunLog, row: dict[str, Any]) -> None:
    """Leave the start of a line in metrics.jsonl."""
    with log.metrics.open("a") as file:
        file.write(str(row)[:20])


POINTS: dict[str, Callable[[int], None]] = {
    "step": lambda n: before(RunLog, "step", n, half_a_line),
    "checkpoint": lambda n: before(atomicity.AtomicRenameTemporaryPath, "finalize", n),
    "final": lambda n: before(LocalPlace, "write_buffer", n),
}


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    point, count, *arguments = sys.argv[1:]
    POINTS[point](int(count))
    sys.exit(cli.run(arguments))

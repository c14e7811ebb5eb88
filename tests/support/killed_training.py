"""Runs `finetune-deepseek` in a process of its own that is ended at a chosen point.

python killed_training.py POINT COUNT SIGNALS ARGUMENT...

When it is about to do POINT for the COUNTth time the process gets SIGNALS (`KILL`, `TERM`,
`INT,INT`, ...), or finds that the disk is full (`FULL`).
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from dying import before
from orbax.checkpoint._src.path import atomicity

from finetune import cli
from finetune import train as loop
from finetune.captured import capture
from finetune.generation import answers
from finetune.generation.growing import GrowingObject
from finetune.run import checkpoints
from finetune.run.checkpoints import Checkpoints
from finetune.run.metrics import RunLog
from mtp_model.files.local import LocalPlace


def half_a_line(log: RunLog, row: dict[str, Any]) -> None:
    """Leave the start of a line in metrics.jsonl."""
    with log.metrics.open("a") as file:
        file.write(str(row)[:20])


KILLED: dict[str, Callable[[int], None]] = {
    "step": lambda n: before(RunLog, "step", n, half_a_line),
    "checkpoint": lambda n: before(atomicity.AtomicRenameTemporaryPath, "finalize", n),
    "final": lambda n: before(LocalPlace, "write_buffer", n),
    "answers": lambda n: before(GrowingObject, "add", n),
    "answers counted": lambda n: before(answers.Answers, "_say", n),
    "answers joined": lambda n: before(GrowingObject, "clear", n),
    "sample": lambda n: before(capture, "write_sample", n),
    "samples counted": lambda n: before(capture, "_save", n),
}
POINTS: dict[str, tuple[Any, str]] = {
    "load": (loop, "load_for_training"),
    "compile": (jax.stages.Lowered, "compile"),
    "evaluation": (loop, "_evaluate"),
    "step": (RunLog, "step"),
    "checkpoint": (Checkpoints, "_write"),
    "final": (LocalPlace, "write_buffer"),
    "save": (ocp.CompositeCheckpointHandler, "async_save"),
}


def act_at(point: str, count: int, act: Callable[[], None]) -> None:
    """Call `act` when the process is about to do `point` for the count-th time."""
    owner, name = POINTS[point]
    real, calls = getattr(owner, name), iter(range(1, 1 << 30))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            act()
        return real(*args, **kwargs)

    setattr(owner, name, counted)


def send(signals: str) -> None:
    """Send them, with time to be heard after each."""
    for name in signals.split(","):
        os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
        time.sleep(0.3)


def full() -> None:
    raise ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']")


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    point, count, signals, *arguments = sys.argv[1:]
    if point == "none":
        pass
    elif signals == "KILL":
        checkpoints.available_bytes = lambda: 0  # what is saved does not depend on its speed
        answers.SENT_EVERY_S = 0.0
        KILLED[point](int(count))
    elif signals == "FULL":
        act_at("save", int(count), full)
    elif point == "compile":  # while it does
        later = threading.Timer(0.1, send, (signals,))
        act_at(point, int(count), later.start)
    else:
        act_at(point, int(count), lambda: send(signals))
    cli.main(arguments)

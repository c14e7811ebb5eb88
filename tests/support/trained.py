"""Small runs of training: their settings as a command line, their logs, and copies of them."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
from rich.console import Console

from finetune.run import metrics
from finetune.settings import RunSettings
from finetune.train import Result
from mtp_model.checkpoint.directory import open_checkpoint

SIZES = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
TIMES = ("tokens_per_s", "step_s", "compile_s")  # what differs from run to run
QUIET = Console(quiet=True)


def read_rows(file: Path) -> list[dict]:
    return list(metrics.read_rows(file))


def arguments(settings: RunSettings, out: Path) -> list[str]:
    """The settings as a command line."""
    words = {
        "--checkpoint": settings.checkpoint,
        "--out": out,
        "--steps": settings.steps,
        "--objective.ce": settings.objective.ce,
        "--batch.rows": settings.batch.rows,
        "--batch.row-tokens": settings.batch.row_tokens,
        "--optimizer.learning-rate": settings.optimizer.learning_rate,
        "--optimizer.warmup-fraction": settings.optimizer.warmup_fraction,
        "--evaluation.every": settings.evaluation.every,
        "--evaluation.rows": settings.evaluation.rows,
        "--checkpoints.every": settings.checkpoints.every,
    }
    mixed = ["--data-weights", *settings.data_weights] if settings.data_weights else []
    several = ["--data", *settings.data, *mixed]
    return ["train", *map(str, (*(word for pair in words.items() for word in pair), *several))]


def command(point: str, count: int, signals: str, argv: list[str]) -> list[str]:
    """What runs killed_training.py."""
    script = Path(__file__).with_name("killed_training.py")
    return [sys.executable, str(script), point, str(count), signals, *argv]


def environment(argv: list[str], beside: Path | None = None) -> dict[str, str]:
    """For processes that train one run after the other, and compile once, if they have to.

    beside: where that is kept, for a run that is in no folder.
    """
    compiled = (beside or Path(argv[argv.index("--out") + 1])).with_name("compiled")
    if not compiled.exists():  # a folder of their own: one that is killed leaves half a file
        shutil.copytree(jax.config.jax_compilation_cache_dir, compiled)
    return os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # small ones too: nothing is in memory
    }


def run_until(
    point: str, count: int, signals: str, argv: list[str], beside: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own that is ended at a point (see killed_training.py)."""
    return subprocess.run(
        command(point, count, signals, argv),
        env=environment(argv, beside),
        capture_output=True,
        text=True,
        check=False,
    )


def assert_same_result(one: Path, other: Path) -> None:
    """Two runs have the same logs, without times, and the same bits in the end."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert rows_without_times(one / name) == rows_without_times(other / name), name
    pieces = [open_checkpoint(run / "final").provenance["pieces"] for run in (one, other)]
    assert pieces[0] == pieces[1]


def rows_without_times(file: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(file)]


def unfinished_copy(finished: Result, settings: RunSettings, out: Path) -> RunSettings:
    """The finished run without its result, as if it had been killed before writing it."""
    shutil.copytree(finished.run.path, out)
    shutil.rmtree(out / "final")
    return dataclasses.replace(settings, out=out)

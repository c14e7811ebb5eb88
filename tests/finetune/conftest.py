"""One small checkpoint, one text, and one run that nothing disturbed, for all tests of training."""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from imported import import_tiny
from trained import QUIET, SIZES

from finetune import cli
from finetune import train as loop
from finetune.planning import plan, slices
from finetune.run import plots
from finetune.settings import (
    BatchSettings,
    CheckpointSettings,
    EvaluationSettings,
    ObjectiveSettings,
    OptimizerSettings,
    RunSettings,
)
from finetune.train import train
from mtp_model import progress, reporting


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """FP8 weights, one dense layer, one MoE layer, one MTP module."""
    return import_tiny(tmp_path_factory.mktemp("base"), dtype="fp8", sizes=SIZES, num_files=2)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "code.jsonl"
    lines = Path(cli.__file__).read_text().split("\n\n")
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    return file


@pytest.fixture(scope="session")
def settings(checkpoint, data, tmp_path_factory):
    return RunSettings(
        checkpoint=str(checkpoint),
        data=(data,),
        out=tmp_path_factory.mktemp("runs") / "whole",
        steps=7,
        objective=ObjectiveSettings(ce=1.0),
        batch=BatchSettings(rows=2, row_tokens=32),
        optimizer=OptimizerSettings(learning_rate=3e-3, warmup_fraction=0.3),
        evaluation=EvaluationSettings(every=2, rows=2),
        checkpoints=CheckpointSettings(every=3),
    )


@pytest.fixture(scope="session")
def finished_and_log(settings):
    """A run of --train mtp that nothing disturbed, with its drawings, and the lines it wrote to a
    log."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as log:
        patch.setattr(loop, "draw_curves", plots.draw_curves)
        patch.setattr(plots, "drawing", reporting.drawing)
        patch.setattr(progress, "LINE_EVERY_S", 0.02)
        result = train(settings, QUIET)
    return result, log.getvalue().splitlines()


@pytest.fixture(scope="session")
def finished(finished_and_log):
    return finished_and_log[0]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, in which nothing is ever left to be seen."""
    where = tmp_path / "temporary"
    where.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(where))
    yield where
    assert list(where.iterdir()) == []


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling is most of a plan's time, and for what else it says it is not needed."""
    none = slices.Compiled(None, None, None, None, True)
    monkeypatch.setattr(plan, "compile_step", lambda *_: none)

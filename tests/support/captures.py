"""Small captures, and runs that train on them."""

import dataclasses
from pathlib import Path

from finetune.captured.capture import CaptureSettings, capture
from finetune.settings import BatchSettings, EvaluationSettings, ObjectiveSettings, RunSettings

SIZE = {"rows": 2, "row_tokens": 32}


def capture_of(checkpoint: Path, records: Path, out: Path, **changes) -> Path:
    settings = CaptureSettings(
        checkpoint=str(checkpoint), data=(records,), out=out, stored="float32", **SIZE
    )
    capture(dataclasses.replace(settings, **changes))
    return out


def run_settings(checkpoint: Path, states: Path, out: Path = Path("none"), **changes):
    settings = RunSettings(
        checkpoint=str(checkpoint),
        states=(states,),
        out=out,
        steps=3,
        batch=BatchSettings(**SIZE),
        objective=ObjectiveSettings(ce=0.5, e2e_tv=0.5),
        evaluation=EvaluationSettings(every=2, rows=4, holdout_every=3),
    )
    return dataclasses.replace(settings, **changes)

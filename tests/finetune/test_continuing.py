"""Runs that go on elsewhere, longer, or from an earlier checkpoint; and those that may not."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from trained import (
    QUIET,
    assert_same_result,
    read_rows,
    rows_without_times,
    unfinished_copy,
)

from finetune import cli
from finetune.run.changes import forbidden_changes, given_to_all
from finetune.run.directory import RunDirectory, RunError
from finetune.run.resuming import changes_of_course
from finetune.settings import (
    EvaluationSettings,
    ObjectiveSettings,
    OptimizerSettings,
    RunSettings,
    SettingsError,
)
from finetune.settings_file import read_yaml
from finetune.train import Result, train
from mtp_model.checkpoint.directory import open_checkpoint


def said(settings: RunSettings) -> str:
    """Train; what was printed."""
    out = io.StringIO()
    train(settings, Console(file=out, width=10_000, highlight=False))
    return out.getvalue()


def after_step_6(finished: Result, settings: RunSettings, out: Path) -> RunSettings:
    copy = unfinished_copy(finished, settings, out)
    shutil.rmtree(out / "checkpoints" / "7")
    return copy


# --- from an earlier checkpoint


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_continues(
    finished: Result, settings: RunSettings, tmp_path: Path
):
    """Also a line that is broken; the rows after the checkpoint are computed again."""
    copy = unfinished_copy(finished, settings, tmp_path / "run")
    shutil.rmtree(copy.out / "checkpoints" / "7" / "state" / "d")
    with (copy.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    lines = said(copy).splitlines()
    (damaged,) = (line for line in lines if " is damaged (" in line)
    assert damaged.startswith("the checkpoint of step 7 is damaged (it cannot be read (")
    assert damaged.endswith(f"it is {copy.out}/checkpoints/7.damaged now")
    assert "continuing after step 6" in lines
    assert f"{copy.out}/metrics.jsonl line 8 is broken and left out" in lines
    assert "going on from the checkpoint of step 6: steps 7 to 7 are computed again" in lines
    assert_same_result(copy.out, finished.run.path)


def test_without_any_whole_checkpoint_the_next_command_begins_anew(
    finished: Result, settings: RunSettings, tmp_path: Path
):
    copy = unfinished_copy(finished, settings, tmp_path / "run")
    for step in ("6", "7"):
        (copy.out / "checkpoints" / step / "progress" / "metadata").write_text("{}")
    with pytest.raises(RunError, match=r"no checkpoint of .* is whole; the same command begins"):
        train(copy, QUIET)
    assert "going on from the beginning: steps 1 to 7 are computed again" in said(copy)
    assert_same_result(copy.out, finished.run.path)


# --- elsewhere


def test_a_run_its_data_and_its_checkpoint_may_be_moved(
    finished: Result, settings: RunSettings, checkpoint: Path, data: Path, tmp_path: Path
):
    """By its own config.yaml the run that was moved goes on, not the place where it was."""
    copy = after_step_6(finished, settings, tmp_path / "moved" / "run")
    shutil.copytree(checkpoint, tmp_path / "moved" / "base")
    shutil.copy(data, tmp_path / "moved" / "text.jsonl")
    words = ["train", "--config", str(copy.out / "config.yaml")]
    words += ["--checkpoint", str(tmp_path / "moved/base")]
    words += ["--data", str(tmp_path / "moved/text.jsonl")]
    assert cli.run(words) == 0
    assert_same_result(copy.out, finished.run.path)
    saved = read_yaml(copy.out / "config.yaml")
    assert (saved.out, saved.checkpoint) == (copy.out, str(tmp_path / "moved/base"))
    assert saved.data == (tmp_path / "moved/text.jsonl",)


def test_what_measures_and_saves_may_change(
    finished: Result, settings: RunSettings, tmp_path: Path
):
    """The result is the same; another held-out text is measured at once, and compared with that."""
    copy = after_step_6(finished, settings, tmp_path / "run")
    changed = dataclasses.replace(
        copy,
        evaluation=EvaluationSettings(every=1, rows=1),
        checkpoints=dataclasses.replace(copy.checkpoints, every=1, keep=1),
    )
    printed = said(changed)
    for words in ("--evaluation.rows was 2, is now 1", "--checkpoints.keep was 2, is now 1"):
        assert words in printed
    pieces = [open_checkpoint(run / "final").provenance for run in (copy.out, finished.run.path)]
    assert pieces[0]["pieces"] == pieces[1]["pieces"]
    rows = read_rows(copy.out / "evaluations.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 6, 7]
    assert len({row["held_out"] for row in rows}) == 2
    before = pieces[0]["derived"][-1]["held_out"]["before"]
    assert (before["step"], before["held_out"]) == (6, rows[-1]["held_out"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": 4}, "--seed was 0, is now 4"),
        ({"steps": 5}, "--steps was 7, is now 5"),
        ({"data_weights": (2.0,)}, "--data-weights was nothing, is now 2.0"),
        ({"compute_dtype": "bfloat16"}, "--compute-dtype was float32, is now bfloat16"),
        ({"eval_data": ("x.txt",)}, "--eval-data was nothing, is now "),
        (
            {"evaluation": EvaluationSettings(every=2, rows=2, holdout_every=9)},
            "--evaluation.holdout-every was 20, is now 9",
        ),
        (
            {"optimizer": OptimizerSettings(learning_rate=3e-3, warmup_fraction=0.3, beta1=0.5)},
            "--optimizer.beta1 was 0.9, is now 0.5",
        ),
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name(
    finished: Result, settings: RunSettings, tmp_path: Path, change: dict, line: str
):
    copy = unfinished_copy(finished, settings, tmp_path / "run")
    if "eval_data" in change:
        change = {"eval_data": (tmp_path / "x.txt",)}
    with pytest.raises(RunError, match="is a run with other settings") as caught:
        train(dataclasses.replace(copy, **change), QUIET)
    faults = str(caught.value).split("\n  ")[1:]
    assert len(faults) == 1
    assert faults[0].startswith(line)


def test_parts_of_a_batch_are_other_mathematics_for_lk_alone(settings: RunSettings):
    """It weighs by the acceptance of what is computed at a time."""
    in_parts = dataclasses.replace(settings.batch, accumulation=2)
    for objective, refused in ((ObjectiveSettings(lk=1.0), 1), (ObjectiveSettings(kl=1.0), 0)):
        run = dataclasses.replace(settings, objective=objective)
        found = forbidden_changes(run, dataclasses.replace(run, batch=in_parts))
        assert found == ["--batch.accumulation was 1, is now 2"] * refused


def test_auto_stays_what_it_stood_for(finished: Result, settings: RunSettings, tmp_path: Path):
    copy = after_step_6(finished, settings, tmp_path / "run")
    run = RunDirectory(path=copy.out)
    run.raise_unless_usable(dataclasses.replace(copy, compute_dtype="float32"), overwrite=False)
    run.resolved.write_text("compute_dtype: bfloat16\n")  # as if begun elsewhere
    assert "computed in bfloat16" in said(copy)
    run.resolved.write_text("compute_dtype: flo")
    (copy.out / "final" / "COMPLETE").unlink()
    with pytest.raises(SettingsError, match="write `compute_dtype: float32` or"):
        train(copy, QUIET)


def test_what_processes_were_given_is_said_as_it_was_given():
    data = (Path("a b"), Path("c"))
    given = given_to_all(RunSettings(checkpoint="ck", data=data, out=Path("run")))
    assert (given["--data"], given["--out"]) == ("'a b' c", "run")


# --- longer

CONSTANT = OptimizerSettings(learning_rate=3e-3, warmup_fraction=0, final_fraction=1)


def test_a_lengthened_run_with_a_constant_rate_equals_the_long_one(
    settings: RunSettings, tmp_path: Path
):
    """A finished one; its result is kept under another name."""
    short = dataclasses.replace(settings, steps=4, optimizer=CONSTANT, out=tmp_path / "short")
    train(short, QUIET)
    result = open_checkpoint(short.out / "final").provenance["pieces"]
    with pytest.raises(RunError, match="more --steps than 4 to go on"):
        train(short, QUIET)
    longer = dataclasses.replace(short, steps=6)
    printed = said(longer)
    assert "--steps was 4, is now 6" in printed
    assert "learning rate" not in printed
    assert open_checkpoint(short.out / "final-of-4-steps").provenance["pieces"] == result
    long = dataclasses.replace(longer, out=tmp_path / "long")
    train(long, QUIET)
    assert_same_result(short.out, long.out)
    train(dataclasses.replace(long, steps=4), QUIET, overwrite=True)
    assert read_yaml(long.out / "config.yaml").steps == 4


def test_a_lambda_that_depends_on_the_steps_follows_the_new_number(settings: RunSettings):
    short = dataclasses.replace(
        settings,
        steps=3,
        optimizer=CONSTANT,
        mtp_lambda=0.4,
        mtp_lambda_end=0.1,
        mtp_lambda_schedule="linear",
    )
    (said_of_it,) = changes_of_course(short, dataclasses.replace(short, steps=5), 3)
    assert said_of_it == "lambda follows 5 steps from step 4 on: 0.175 there, 0.1 with 3"
    assert not [*changes_of_course(short, short, 2)]
    assert not [*changes_of_course(short, dataclasses.replace(short, steps=5), 5)]


def test_a_rate_that_depends_on_the_steps_follows_the_new_number(
    finished: Result, settings: RunSettings, tmp_path: Path
):
    copy = tmp_path / "run"
    shutil.copytree(finished.run.path, copy)
    printed = said(dataclasses.replace(settings, out=copy, steps=14))
    old, new = rows_without_times(finished.run.metrics), rows_without_times(copy / "metrics.jsonl")
    assert new[:7] == old, "what was done stays"
    assert new[7]["lr"] > 2 * old[6]["lr"]
    assert new[13]["lr"] == pytest.approx(old[6]["lr"])
    where = f"the learning rate follows 14 steps from step 8 on: {new[7]['lr']:.3g} there"
    assert f"{where}, {old[6]['lr']:.3g} with 7" in printed
    derived = open_checkpoint(copy / "final").provenance["derived"][-1]
    assert (derived["settings"]["steps"], derived["computed_in"]) == (14, "float32")
    assert yaml.safe_load((copy / "resolved.yaml").read_text()) == {"compute_dtype": "float32"}
    assert json.dumps(derived["held_out"]["after"]["step"]) == "14"
    report = json.loads((copy / "report.json").read_text())
    assert report["settings"]["steps"] == 14
    assert report["after"]["acceptance"] == derived["held_out"]["after"]["acceptance"]

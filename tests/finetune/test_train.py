"""Training: what moves, what it leaves behind, and that a killed run loses nothing."""

import dataclasses
import functools
import json
import re
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from browser import assert_readable
from flax import nnx
from gcs_server import BUCKET
from imported import import_tiny
from roundtrip import tree_bytes
from trained import (
    QUIET,
    SIZES,
    arguments,
    read_rows,
    rows_without_times,
    run_until,
    unfinished_copy,
)

from finetune import cli
from finetune.data.packing import Batch
from finetune.data.records import DataError
from finetune.optimizer import make_optimizer
from finetune.run.directory import RunDirectory, RunError
from finetune.settings import (
    BatchSettings,
    CheckpointSettings,
    EvaluationSettings,
    OptimizerSettings,
    RunSettings,
    SettingsError,
)
from finetune.settings_file import read_yaml
from finetune.state import TRAINABLE, make_train_step, start
from finetune.train import StoppedError, train
from finetune.weights import load_for_training
from mtp_model import progress
from mtp_model.checkpoint.directory import CheckpointError, open_checkpoint
from mtp_model.files.local import LocalPlace
from mtp_model.load import load
from mtp_model.problems import UserError


@functools.cache
def loaded(path: Path) -> nnx.State:
    return nnx.state(load(path))


@functools.cache
def loaded_dense(path: Path) -> nnx.State:
    return nnx.state(load(path, dtype=np.float32))


def leaf_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes of every leaf of a checkpoint directory, as stored."""
    leaves = nnx.to_flat_state(loaded(path))
    values = {".".join(name): np.asarray(leaf[...]) for name, leaf in leaves}
    return {name: (str(value.dtype), value.tobytes()) for name, value in values.items()}


def trained_names(path: Path, mode) -> set[str]:
    state = loaded(path)
    parameters = nnx.filter_state(state, TRAINABLE[mode])
    names = {".".join(name) for name, _ in nnx.to_flat_state(parameters)}
    biases = {name for name in map(".".join, dict(nnx.to_flat_state(state))) if "bias" in name}
    return names | {name for name in biases if mode == "all" or name.startswith("mtp.")}


# --- what moves


def moved(before: Path, after: Path) -> set[str]:
    old = nnx.to_flat_state(loaded_dense(before))
    new = dict(nnx.to_flat_state(loaded_dense(after)))
    same = {
        ".".join(name)
        for name, leaf in old
        if np.asarray(leaf[...]).tobytes() == np.asarray(new[name][...]).tobytes()
    }
    return {".".join(name) for name in new} - same


def test_mtp_alone_moves_and_the_main_model_keeps_its_bytes(checkpoint, finished):
    final = finished.run.final
    trained = trained_names(checkpoint, "mtp")
    assert moved(checkpoint, final) == trained
    assert "mtp.block.mlp.gate.e_score_correction_bias" in trained
    old, new = leaf_bytes(checkpoint), leaf_bytes(final)
    assert {name for name in old if old[name] != new[name]} == trained
    assert {new[name][0] for name in trained} == {"float32"}
    frozen = {name for name in old if not name.startswith("mtp.")}
    assert "moe_layers.mlp.gate.e_score_correction_bias" in frozen
    for name in frozen:  # hard links: not even a byte was copied
        for file in (checkpoint / "params" / name).iterdir():
            if not file.name.startswith("."):
                assert file.samefile(final / "params" / name / file.name), name


def test_train_all_moves_every_parameter_and_router_bias(finished, settings, tmp_path):
    """In bfloat16, without held-out text, on a checkpoint that training wrote."""
    every = dataclasses.replace(
        settings,
        checkpoint=str(finished.run.final),
        out=tmp_path / "all",
        train="all",
        steps=2,
        compute_dtype="bfloat16",
        evaluation=EvaluationSettings(holdout_every=0),
    )
    result = train(every, QUIET)
    trained = trained_names(finished.run.final, "all")
    assert moved(finished.run.final, result.run.final) == trained
    assert {"embed_tokens.weight", "moe_layers.mlp.gate.e_score_correction_bias"} <= trained
    scales = {name for name in leaf_bytes(finished.run.final) if name.endswith("scale_inv")}
    assert scales
    assert not scales & trained
    assert (result.before, result.after) == (None, None)
    assert result.run.curves.is_file()
    assert [entry["settings"]["train"] for entry in derivations(result.run.final)] == ["mtp", "all"]
    row = read_rows(result.run.metrics)[-1]
    expected = row["main_loss"] + 0.1 * row["mtp_loss"][0]
    assert row["loss"] == pytest.approx(expected, rel=1e-5)


def derivations(path: Path) -> list[dict]:
    return open_checkpoint(path).provenance["derived"]


def test_trainable_parameters_are_float32_and_frozen_ones_as_stored(checkpoint):
    split = load_for_training(checkpoint, "mtp", "float32")
    stored, dense = loaded(checkpoint), loaded_dense(checkpoint)
    name = ("block", "mlp", "experts", "gate_proj", "weight")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(split.trainable)} == {"float32"}
    found = dict(nnx.to_flat_state(split.trainable))["mtp", *name][...]
    np.testing.assert_array_equal(found, dense.mtp.block.mlp.experts.gate_proj.weight[...])
    assert stored.mtp.block.mlp.experts.gate_proj.weight[...].dtype == jnp.float8_e4m3fn
    frozen = dict(nnx.to_flat_state(split.frozen))
    assert frozen["moe_layers", "mlp", "experts", "gate_proj", "weight"].dtype == jnp.float8_e4m3fn


# --- what a run leaves behind


def test_metrics_have_the_documented_fields(finished):
    rows = read_rows(finished.run.metrics)
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert list(rows[0]) == [
        *("step", "loss", "main_loss", "mtp_loss", "acceptance", "agreement", "reached"),
        *("greedy_share", "grad_norm", "lr", "tokens", "tokens_per_s", "step_s", "compile_s"),
    ]
    assert ["compile_s" in row for row in rows] == [True] + 6 * [False]
    assert max(row["step_s"] for row in rows) < rows[0]["compile_s"], "steps are not compiled"
    assert all(len(row["mtp_loss"]) == len(row["acceptance"]) == 1 for row in rows)
    assert rows[-1]["tokens"] == sum(round(row["tokens_per_s"] * row["step_s"]) for row in rows), (
        "tokens are counted from the start"
    )
    assert all(row["loss"] == pytest.approx(row["mtp_loss"][0], rel=1e-6) for row in rows)


def test_evaluations_are_at_start_every_n_steps_and_end(finished):
    rows = read_rows(finished.run.evaluations)
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 7]
    assert len({row["main_loss"] for row in rows}) == 1, "the frozen main model does not change"
    assert finished.before is not None
    assert finished.after is not None
    assert finished.after.mtp_loss[0] < finished.before.mtp_loss[0], "it learns"


def test_curves_tensorboard_and_settings_are_written(finished, settings):
    assert finished.run.curves.read_bytes().startswith(b"\x89PNG")
    (events,) = finished.run.tensorboard.iterdir()
    assert b"train/mtp_loss/depth_1" in events.read_bytes()
    assert b"held_out/agreement/depth_1" in events.read_bytes()
    saved = read_yaml(finished.run.config)
    assert saved == settings
    assert saved.compute_dtype == "auto"
    assert finished.run.resolved.read_text() == "compute_dtype: float32\n"


def test_a_finished_run_has_a_report(finished, settings, tmp_path):
    run = finished.run
    report = json.loads((run.path / "report.json").read_text())
    assert report["report_version"] == 1
    assert report["settings"]["steps"] == settings.steps
    assert report["before"] == json.loads(json.dumps(finished.before.to_json()))
    assert report["after"] == json.loads(json.dumps(finished.after.to_json()))
    assert report["before"] != report["after"]
    assert "| mean accepted length (95 %) |" in (run.path / "report.md").read_text()
    assert run.page.read_text().count("<svg") == 3
    assert_readable(run.page, tmp_path)


def test_final_says_where_it_comes_from(finished, checkpoint):
    final = open_checkpoint(finished.run.final)
    (derived,) = derivations(final.path)
    assert derived["base"]["path"] == str(checkpoint)
    assert derived["settings"]["steps"] == 7
    for name in ("tokenizer.json", "config.json"):
        assert (final.path / name).read_bytes() == (checkpoint / name).read_bytes()


def test_newest_checkpoints_are_kept(finished):
    kept = {path.name for path in finished.run.checkpoints.iterdir()}
    assert kept == {"6", "7"}


# --- killed and resumed


def killed(point: str, count: int, argv: list[str]) -> None:
    done = run_until(point, count, "KILL", argv)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_run_killed_three_times_equals_one_that_was_not(finished, settings):
    """Killed in a step, in a checkpoint, in writing the result: the same bits in the end."""
    out = settings.out.with_name("killed")
    argv = arguments(settings, out)
    killed("step", 5, argv)
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert not (out / "metrics.jsonl").read_text().endswith("\n"), "half a line is left"
    killed("checkpoint", 1, argv)  # of step 6, after going on from that of step 3
    assert [path.name for path in (out / "checkpoints").iterdir() if path.name.isdigit()] == ["3"]
    killed("final", 4, argv)
    assert not (out / "final" / "COMPLETE").exists()
    assert cli.run(argv) == 0
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        expected = rows_without_times(finished.run.path / name)
        assert rows_without_times(out / name) == expected, name
    one, other = (open_checkpoint(path / "final") for path in (out, finished.run.path))
    assert one.provenance["pieces"] == other.provenance["pieces"]


# --- runs that are refused


@pytest.mark.usefixtures("finished")
def test_a_finished_run_is_not_touched(settings):
    with pytest.raises(RunError, match=r"is a finished run .* or --overwrite"):
        train(settings, QUIET)


def test_other_settings_are_refused_by_name(finished, settings, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished.run.path, out)
    shutil.rmtree(out / "final")
    optimizer = dataclasses.replace(settings.optimizer, clip_norm=3.0)
    with pytest.raises(RunError) as caught:
        train(dataclasses.replace(settings, optimizer=optimizer, seed=4, out=out), QUIET)
    assert "--optimizer.clip-norm was 1.0, is now 3.0" in str(caught.value)
    assert "--seed was 0, is now 4" in str(caught.value)


def test_changed_data_cannot_continue_a_run(finished, settings, data, tmp_path):
    copy = unfinished_copy(finished, settings, tmp_path / "run")
    before = data.read_text()
    data.write_text(before + json.dumps({"text": "more"}) + "\n")
    try:
        with pytest.raises(RunError, match="cannot be continued: data changed since it began"):
            train(copy, QUIET)
    finally:
        data.write_text(before)


def test_two_processes_cannot_train_in_one_place(finished, settings, tmp_path):
    copy = unfinished_copy(finished, settings, tmp_path / "run")
    with (
        LocalPlace(copy.out / "lock").locked(),
        pytest.raises(RunError, match="another process is training"),
    ):
        train(copy, QUIET)


def test_a_foreign_folder_is_never_touched(settings, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="is not empty and no run; nothing in it was touched"):
            train(dataclasses.replace(settings, out=tmp_path), QUIET, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_overwrite_begins_anew_and_deletes_only_what_a_run_wrote(finished, settings, tmp_path):
    """The new run stops because its loss is not finite; the checkpoint before that is kept."""
    copy = unfinished_copy(finished, settings, tmp_path / "run")
    (copy.out / "notes.txt").write_text("mine")
    broken = dataclasses.replace(
        copy,
        optimizer=OptimizerSettings(learning_rate=1e38, warmup_fraction=0),
        checkpoints=CheckpointSettings(every=1),
        evaluation=EvaluationSettings(holdout_every=0),
    )
    with pytest.raises(StoppedError, match=r"step 2: loss \w+, .* checkpoint of step 1 is kept"):
        train(broken, QUIET, overwrite=True)
    assert (copy.out / "notes.txt").read_text() == "mine"
    assert [row["step"] for row in read_rows(copy.out / "metrics.jsonl")] == [1]
    assert [path.name for path in (copy.out / "checkpoints").iterdir()] == ["1"]
    assert read_yaml(copy.out / "config.yaml").optimizer.learning_rate == 1e38
    assert not (copy.out / "evaluations.jsonl").read_text()
    assert not (copy.out / "final").exists()


def test_what_is_wrong_with_the_input_is_said_before_anything_is_written(settings, tmp_path):
    out = tmp_path / "run"
    cases = [
        (
            SettingsError,
            "row-tokens is 2, needed 3 or more",
            {"batch": BatchSettings(row_tokens=2)},
        ),
        (CheckpointError, "does not exist", {"checkpoint": tmp_path / "no"}),
        (DataError, r"no\.txt cannot be read", {"data": (tmp_path / "no.txt",)}),
    ]
    for error, message, wrong in cases:
        with pytest.raises(error, match=message):
            train(dataclasses.replace(settings, out=out, **wrong), QUIET)
        assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mtp": 0, "num_files": 1}, "has no MTP modules"),
        ({"import_options": {"scope": "main"}}, "was imported with --scope main"),
    ],
)
def test_a_checkpoint_without_mtp_cannot_be_trained(settings, tmp_path, options, message):
    lacking = import_tiny(tmp_path, dtype="bf16", sizes=SIZES, **options)
    with pytest.raises(CheckpointError, match=message):
        train(dataclasses.replace(settings, checkpoint=str(lacking), out=tmp_path / "run"), QUIET)


# --- commands


def test_the_train_command_prints_before_and_after_and_what_is_next(
    finished, settings, capsys, monkeypatch
):
    monkeypatch.chdir(finished.run.path.parent)
    monkeypatch.setattr(cli, "train", lambda *_, **__: finished)
    assert cli.run(arguments(settings, settings.out)) == 0
    out = capsys.readouterr().out
    for words in ("MTP loss, depth 1", "mean accepted length", "whole/curves.png"):
        assert words in out
    assert "next: convert-deepseek export whole/final DST" in out
    spaced = RunDirectory(path=finished.run.path.parent / "a run's")
    monkeypatch.setattr(cli, "train", lambda *_, **__: dataclasses.replace(finished, run=spaced))
    assert cli.run(arguments(settings, settings.out)) == 0
    last = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    assert shlex.split(last) == ["convert-deepseek", "export", "a run's/final", "DST"]


def test_a_checkpoint_in_the_cloud_gives_the_same_result(
    finished, checkpoint, settings, tmp_path, gcs, url
):
    for name, content in tree_bytes(checkpoint).items():
        gcs.put(f"{url.removeprefix(f'gs://{BUCKET}/')}/{name}", content)
    result = train(dataclasses.replace(settings, checkpoint=url, out=tmp_path / "run"), QUIET)
    assert tree_bytes(result.run.final / "params") == tree_bytes(finished.run.final / "params")
    assert result.after == finished.after


def test_a_log_says_how_far_training_is(finished_and_log):
    lines = finished_and_log[1]
    assert re.fullmatch(r"compile the step: \d s so far", lines[0])
    reached = r"train: 7 of 7 steps, [\d.]+ steps/s, 0 s left, loss \d\.\d{3}, [\d,]+ tokens/s"
    assert re.fullmatch(reached, lines[-1])


def test_evaluate_prints_a_table_or_json(finished, data, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.02)
    options = ["--data", str(data), "--rows", "2", "--row-tokens", "32", "--max-rows", "4"]
    command = ["evaluate", "--checkpoint", str(finished.run.final), *options, "--draft-tokens", "2"]
    assert cli.run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["mtp_loss"]) == len(found["acceptance"]) == 2, "the one module is reused"
    assert found["tokens"] <= 4 * 32
    assert cli.run(command) == 0
    out, err = capsys.readouterr()
    done = r"evaluate: 2 of 2 batches, .* 0 s left, document \d+ of \d+"
    assert re.fullmatch(done, err.splitlines()[-1]), "it says how far it is"
    assert "draft 2" in out
    assert "mean accepted length" in out


def test_a_failure_has_status_1_and_one_message(settings, tmp_path, capsys):
    argv = arguments(dataclasses.replace(settings, checkpoint=str(tmp_path)), tmp_path / "run")
    assert cli.run(argv) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert "is no checkpoint directory" in err
    assert not out


def test_a_full_disk_is_one_line_before_training(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Nothing was trained, and no checkpoint is half there."""
    run = dataclasses.replace(settings, out=tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    with pytest.raises(UserError, match=r"checkpoints needs .* MB more, its disk has 2.0 MB free"):
        train(run, QUIET)
    assert not (tmp_path / "run/checkpoints").exists()
    assert not (tmp_path / "run/metrics.jsonl").exists()
    capsys.readouterr()


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """There is room for the first checkpoint and not for the second; the same command goes on."""
    run = dataclasses.replace(settings, out=tmp_path / "run")
    asked: list[int] = []

    def disk_usage(_: object) -> SimpleNamespace:
        asked.append(0)  # by the whole run, by the first checkpoint, by the second
        return SimpleNamespace(free=10**9 if len(asked) < 3 else 100)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", disk_usage)
        with pytest.raises(UserError, match="make room and run the same command again"):
            train(run, QUIET)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["3"]
    train(run, QUIET)
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == settings.steps


@pytest.mark.parametrize("mode", ["mtp", "all"])
def test_a_step_without_a_target_moves_nothing(settings: RunSettings, checkpoint: Path, mode: str):
    """No weight by decay, no moment, no router bias; a step with a target moves all of them."""
    split = load_for_training(str(checkpoint), mode, "float32")
    optimizer = make_optimizer(settings.optimizer, 10, lambda _: True)
    step = make_train_step(split.graphdef, optimizer, dataclasses.replace(settings, train=mode))
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 300, (2, 16)).astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    learnt = Batch(tokens, ones, positions, ones)
    idle = Batch(tokens, ones, positions, np.zeros_like(ones))
    begun, _ = step(start(split, optimizer), split.frozen, learnt)
    before = jax.device_get(begun)
    after, _ = step(begun, split.frozen, idle)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)
    moved, _ = step(after, split.frozen, learnt)
    for old, new in zip(jax.tree.leaves(before.biases), jax.tree.leaves(moved.biases), strict=True):
        assert not np.array_equal(old, new)


def test_overwrite_never_deletes_the_checkpoint_that_it_trains(finished, settings, tmp_path):
    """Somebody trains on from a run's result, and names the run again; by a link too."""
    out = tmp_path / "run"
    shutil.copytree(finished.run.path, out)
    (tmp_path / "latest").symlink_to(out / "final")
    before = sorted(out.rglob("*"))
    for checkpoint in (out / "final", tmp_path / "latest"):
        again = dataclasses.replace(settings, checkpoint=str(checkpoint), out=out)
        with pytest.raises(RunError, match=r"--overwrite would delete .*; give --out another"):
            train(again, QUIET, overwrite=True)
        assert sorted(out.rglob("*")) == before

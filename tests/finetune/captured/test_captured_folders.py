"""A folder of captured samples is whole, or it is said what it lacks and how to mend it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from advice import follows
from captures import capture_of, run_settings
from imported import import_folder
from trained import QUIET, read_rows

from finetune.captured import capture
from finetune.captured.documents import open_states
from finetune.captured.folder import PROGRESS_FILE, SamplesThere
from finetune.captured.sample import open_sample
from finetune.data.records import DataError
from finetune.run.checkpoints import saved_steps
from finetune.settings import BatchSettings, CheckpointSettings, RunSettings, SettingsError
from finetune.train import train
from finetune.weights import open_trainable
from mtp_model import progress


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def described(settings: RunSettings) -> str:
    """What a run says of its samples."""
    base = open_trainable(settings.checkpoint, captured=True)[0]
    return open_states(settings, base, "float32", lambda _: None).description


@pytest.fixture
def copy(states: Path, tmp_path: Path) -> Path:
    return shutil.copytree(states, tmp_path / "copy")


def test_samples_that_are_gone_are_missed_and_captured_again(
    checkpoint: Path, mtp_only: Path, records: Path, states: Path, copy: Path
):
    settings = run_settings(mtp_only, copy)
    count = len(list(states.glob("*.safetensors")))
    damaged, gone = copy / "sample-00000002.safetensors", copy / "sample-00000005.safetensors"
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(DataError) as caught:
        described(settings)
    assert f"{copy} lacks 1 of the {count} samples that were captured, {gone.name}" in str(
        caught.value
    )
    left = dataclasses.replace(settings, skip_unusable=True)
    assert described(left).split(" ")[0] == str(count - 2 - (count - 2) // 3)
    damaged.unlink()
    with pytest.raises(DataError, match=f"lacks 2 of the {count} samples .*{damaged.name} first"):
        described(settings)
    others = {path: path.stat().st_mtime_ns for path in copy.glob("*.safetensors")}
    capture_of(checkpoint, records, copy)
    assert contents(copy) == contents(states)
    kept = [path for path, time in others.items() if path.stat().st_mtime_ns == time]
    assert len(kept) >= len(others) - 4  # only batches that lack one are computed
    assert described(settings)


def test_a_run_that_meets_a_damaged_sample_goes_on_without_it_or_with_it_mended(
    checkpoint: Path, mtp_only: Path, records: Path, copy: Path, tmp_path: Path
):
    damaged = sorted(copy.glob("*.safetensors"))[1]
    content = bytearray(damaged.read_bytes())
    content[-200] ^= 1  # of the states
    damaged.write_bytes(content)
    settings = run_settings(
        mtp_only, copy, tmp_path / "run", steps=8, checkpoints=CheckpointSettings(every=1)
    )
    settings = dataclasses.replace(settings, batch=BatchSettings(rows=1, row_tokens=32), seed=1)
    with pytest.raises(DataError, match=f"{damaged} is damaged"):
        train(settings, QUIET)
    assert saved_steps(settings.out / "checkpoints")
    shutil.copytree(settings.out, tmp_path / "other")
    without = dataclasses.replace(settings, skip_unusable=True)
    assert len(read_rows(train(without, QUIET).run.metrics)) == 8
    damaged.unlink()
    capture_of(checkpoint, records, copy)
    mended = train(dataclasses.replace(settings, out=tmp_path / "other"), QUIET)
    assert len(read_rows(mended.run.metrics)) == 8


def test_a_capture_that_is_mended_can_be_interrupted(
    checkpoint: Path, records: Path, states: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
):
    class KilledError(Exception):
        pass

    def stop_after_two(done: int, *_: object) -> None:
        if done == 2:
            raise KilledError

    for name in ("sample-00000000", "sample-00000006"):
        (copy / f"{name}.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(progress, "_nothing", stop_after_two)
        patch.setattr(progress, "_hushed", True)
        with pytest.raises(KilledError):
            capture_of(checkpoint, records, copy)
    assert not json.loads((copy / PROGRESS_FILE).read_bytes())["finished"]
    capture_of(checkpoint, records, copy)
    assert contents(copy) == contents(states)


def test_a_whole_capture_is_not_computed_again(
    checkpoint: Path, records: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(capture, "load", None)
    before = contents(copy)
    capture_of(checkpoint, records, copy)
    assert contents(copy) == before
    (copy / "sample-00000000.safetensors").unlink()
    with pytest.raises(TypeError):
        capture_of(checkpoint, records, copy)


def test_which_samples_are_there_is_read_off_their_names():
    far = "sample-999999999999999999"  # no memory for all numbers below it
    names = ("sample-00000003", "sample-00000000", "sample-00000004", "sample-4", "vllm", far)
    found = SamplesThere.among(f"{name}.safetensors" for name in (*names, "other/sample-00000001"))
    assert found == SamplesThere([(0, 1), (3, 5), (10**18 - 1, 10**18)])
    assert found.has(range(0))
    assert found.has(range(1))
    assert not found.has(range(2))
    assert found.has(range(3, 5))
    assert not found.has(range(3, 6))
    assert SamplesThere.among(()).has(range(0))
    assert not SamplesThere.among(()).has(range(1))


def test_captures_in_a_folder_are_finished_too(mtp_only: Path, copy: Path):
    assert described(run_settings(mtp_only, copy.parent))
    file = copy / PROGRESS_FILE
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"finished": False}))
    with pytest.raises(DataError, match=f"{copy} is not finished"):
        described(run_settings(mtp_only, copy.parent))


def test_samples_that_are_measured_and_learnt_are_said(mtp_only: Path, states: Path, copy: Path):
    """Where a folder is given twice, as it is said of text."""
    warning = "documents held out are trained on too"
    count = len(list(states.glob("*.safetensors")))
    both = run_settings(mtp_only, states, eval_data=(states,))
    assert f"warning: {count} {warning}" in described(both)
    assert warning in described(dataclasses.replace(both, states=(copy, copy.parent), eval_data=()))
    assert warning not in described(run_settings(mtp_only, states, eval_data=(copy,)))


def test_samples_that_no_row_holds_are_said(mtp_only: Path, states: Path):
    """`evaluate` refuses them, and training is not what it would be beside the main model."""
    lengths = [open_sample(path).num_tokens for path in states.glob("*.safetensors")]
    longest = max(lengths)
    for row_tokens in (longest - 1, longest):
        batch = BatchSettings(rows=2, row_tokens=row_tokens)
        told = described(run_settings(mtp_only, states, batch=batch))
        longer = sum(each > row_tokens for each in lengths)
        assert (f"warning: {longer} samples are longer than a row" in told) == (longer > 0)
        assert ("longer than a row" in told) == (row_tokens < longest)


@follows(": give --state pre_norm")
def test_states_that_the_modules_are_not_fed_are_not_captured(
    checkpoint: Path, records: Path, tmp_path: Path
):
    """`train` would refuse them, after hours."""
    source = shutil.copytree(checkpoint.with_name("source"), tmp_path / "source")
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps(config | {"mtp_hidden_state": "pre_norm"}))
    fed = tmp_path / "checkpoint"
    import_folder(source, fed)
    with pytest.raises(SettingsError, match="are fed states before the norm: give --state pre_n"):
        capture_of(fed, records, tmp_path / "states", state="post_norm")
    assert not (tmp_path / "states").exists()
    assert described(run_settings(fed, capture_of(fed, records, tmp_path / "states")))

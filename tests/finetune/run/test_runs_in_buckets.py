"""Runs that are kept in a bucket: they go on after a kill, with nothing of this machine."""

import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from gcs_server import BUCKET, GcsServer, key_of
from roundtrip import tree_bytes
from trained import arguments, assert_same_result, run_until

from finetune import cli
from finetune.run.checkpoints import Checkpoints, DamagedError, RunPosition, saved_steps
from finetune.run.directory import RunError, opened
from finetune.run.mirror import Mirror
from finetune.run.resuming import _raise_if_changed
from finetune.settings import CheckpointSettings, RunSettings, SettingsError
from finetune.settings_file import read_yaml, write_yaml
from finetune.train import Result
from mtp_model.files.object_place import ObjectPlace
from mtp_model.files.objects import CloudError
from mtp_model.files.open import as_place
from mtp_model.problems import UserError

pytestmark = pytest.mark.usefixtures("temporary")

KEPT = CheckpointSettings(keep=2)


def test_a_run_that_was_killed_goes_on_from_the_bucket_alone(
    gcs: GcsServer,
    url: str,
    finished: Result,
    settings: RunSettings,
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """Weights, text and run in a bucket: the files in the end are those of an undisturbed run."""
    for name, content in tree_bytes(checkpoint).items():
        gcs.put(f"{key_of(url)}/v3/{name}", content)
    gcs.put(f"{key_of(url)}/text/code.jsonl", data.read_bytes())
    far = dataclasses.replace(settings, checkpoint=f"{url}/v3", data=(Path(f"{url}/text"),))
    argv = arguments(far, Path(f"{url}/run"))
    killed = run_until("step", 5, "KILL", argv, settings.out)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = f"{key_of(url)}/run"
    rows = gcs.content(f"{run}/metrics.jsonl").splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3], "as the checkpoint needs them"
    assert saved_steps(as_place(f"{url}/run/checkpoints")) == [3]

    lock = json.loads(gcs.content(f"{run}/lock"))
    gcs.put(f"{run}/lock", json.dumps(lock | {"host": "elsewhere", "renewed_s": 0}).encode())
    again = ["train", "--config", f"{url}/run/config.yaml"]
    assert cli.run(again) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"another process is training in {url}/run (pid {lock['pid']} on elsewhere" in said
    assert f"if it is gone: gcloud storage rm '{url}/run/lock*'" in said
    for key in gcs.keys(f"{run}/lock"):
        gcs.delete(key)

    assert cli.run(again) == 0
    out, err = capsys.readouterr()
    assert "continuing after step 3" in err
    for line in (f"report: {url}/run/report.html", f"checkpoint: {url}/run/final"):
        assert line in out
    for name, content in gcs.contents(run).items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert_same_result(tmp_path / "copy", finished.run.path)
    names = {path.name for path in finished.run.path.iterdir()} - {"lock"}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names
    assert len(list((tmp_path / "copy/tensorboard").iterdir())) == 2  # one of each process
    assert read_yaml(tmp_path / "copy/config.yaml") == dataclasses.replace(
        far, out=Path(f"{url}/run"), compute_dtype="auto"
    )
    assert gcs.keys("") == gcs.keys(key_of(url)), "nothing beside it"


# --- checkpoints


def state(seed: int) -> dict[str, jax.Array]:
    values = np.random.default_rng(seed).normal(size=(3, 64)).astype(np.float32)
    return {"weight": jnp.asarray(values), "count": jnp.int32(seed)}


def as_bytes(tree: dict[str, jax.Array]) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in tree.items()}


@pytest.fixture
def checkpoints(url: str) -> Iterator[Checkpoints]:
    kept = Checkpoints(as_place(url), KEPT)
    yield kept
    kept.close()


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(state(step), RunPosition(step=step))
    checkpoints.wait()


def test_the_newest_are_kept_and_give_back_what_was_saved(
    gcs: GcsServer, url: str, checkpoints: Checkpoints
):
    save(checkpoints, 1, 2, 3)
    assert {name.partition("/")[0] for name in gcs.contents(key_of(url))} == {"2", "3"}
    for step in (2, 3):
        assert checkpoints.position(step).step == step
        assert as_bytes(checkpoints.restore(step, state(0))) == as_bytes(state(step))


def test_checkpoints_are_copied_either_way(gcs: GcsServer, url: str, tmp_path: Path):
    here = Checkpoints(tmp_path / "here", KEPT)
    save(here, 1)
    here.close()
    for name, content in tree_bytes(tmp_path / "here").items():
        gcs.put(f"{key_of(url)}/{name}", content)
    there = Checkpoints(as_place(url), KEPT)
    assert list(there.steps()) == [1]
    assert as_bytes(there.restore(1, state(0))) == as_bytes(state(1))
    save(there, 2)
    there.close()
    for name, content in gcs.contents(key_of(url)).items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    back = Checkpoints(tmp_path / "back", KEPT)
    assert list(back.steps()) == [2, 1]
    assert as_bytes(back.restore(2, state(0))) == as_bytes(state(2))
    back.close()


def test_what_a_kill_leaves_of_a_checkpoint_is_none(
    gcs: GcsServer, url: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
):
    """What was there as Orbax had written all but its mark; and one whose mark was deleted."""
    save(checkpoints, 1)
    real = ocp.CompositeCheckpointHandler.finalize

    def look(*args: object) -> None:
        for name, content in gcs.contents(key_of(url)).items():
            gcs.put(f"{key_of(url)}/killed/{name}", content)
        real(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(ocp.CompositeCheckpointHandler, "finalize", look)
    save(checkpoints, 2)
    killed = as_place(f"{url}/killed")
    assert [entry.name for entry in killed.entries()] == ["1", "2"]
    assert saved_steps(killed) == [1]
    assert saved_steps(as_place(url)) == [1, 2]
    gcs.delete(f"{key_of(url)}/2/commit_success.txt")
    assert saved_steps(as_place(url)) == [1]
    for folder in (killed, as_place(url)):
        again = Checkpoints(folder, KEPT)
        assert list(again.steps()) == [1]
        assert gcs.keys(f"{folder}/2/".removeprefix(f"gs://{BUCKET}/")) == []
        assert as_bytes(again.restore(1, state(0))) == as_bytes(state(1))
        again.close()


def test_a_damaged_one_is_set_aside_and_a_refused_request_is_no_damage(
    gcs: GcsServer, url: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
):
    save(checkpoints, 1, 2)
    with monkeypatch.context() as patch:

        def refused(self: ObjectPlace) -> bytes:
            raise CloudError(f"{self}: 403")

        patch.setattr(ObjectPlace, "read_bytes", refused)
        with pytest.raises(CloudError, match="403"):
            checkpoints.position(2)
        patch.setattr(Checkpoints, "_record", lambda *_: (None, None))
        with pytest.raises(CloudError, match="403"):
            checkpoints.restore(2, state(0))
    (part,) = gcs.keys(f"{key_of(url)}/2/state/d/")
    gcs.put(part, gcs.content(part)[:-1])
    with pytest.raises(DamagedError):
        checkpoints.restore(2, state(0))
    assert str(checkpoints.set_aside(2)) == f"{url}/2.damaged"
    assert list(checkpoints.steps()) == [1]
    assert gcs.keys(f"{key_of(url)}/2/") == []


def test_what_cannot_be_written_is_one_line(
    checkpoints: Checkpoints, url: str, monkeypatch: pytest.MonkeyPatch
):
    save(checkpoints, 1)

    def refused(*_: object, **__: object) -> None:
        raise ValueError("PERMISSION_DENIED: no storage.objects.create")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CompositeCheckpointHandler, "async_save", refused)
        with pytest.raises(UserError, match=f"{url}/2 could not be written .PERMISSION_DENIED"):
            save(checkpoints, 2)
    save(checkpoints, 3)
    assert list(checkpoints.steps()) == [3, 1]


# --- the folder


def test_what_is_no_run_is_not_touched(gcs: GcsServer, url: str, settings: RunSettings):
    gcs.put(f"{key_of(url)}/precious.txt", b"mine")
    with opened(Path(url)) as run, pytest.raises(RunError, match="is not empty and no run"):
        run.raise_unless_usable(settings, overwrite=True)
    assert gcs.contents(key_of(url)) == {"precious.txt": b"mine"}


def test_overwrite_deletes_only_what_a_run_wrote(
    gcs: GcsServer, url: str, settings: RunSettings, tmp_path: Path
):
    write_yaml(dataclasses.replace(settings, seed=9), tmp_path / "config.yaml")
    gcs.put(f"{key_of(url)}/config.yaml", (tmp_path / "config.yaml").read_bytes())
    with opened(Path(url)) as run, pytest.raises(SettingsError, match=f"{url}/resolved.yaml"):
        run.raise_unless_usable(settings, overwrite=False)
    gcs.put(f"{key_of(url)}/resolved.yaml", b"compute_dtype: float32\n")
    written = ("metrics.jsonl", "report.html", "checkpoints/3/a", "final/b", "final-of-4-steps/c")
    for name in (*written, "notes.txt", "final-words/d"):
        gcs.put(f"{key_of(url)}/{name}", b"")
    with opened(Path(url)) as run:
        with pytest.raises(RunError, match=f"{url} is a run with other settings"):
            run.raise_unless_usable(settings, overwrite=False)
        run.raise_unless_usable(settings, overwrite=True)
        with run.claim(settings, "float32", overwrite=True):
            kept = {"config.yaml", "resolved.yaml", "lock", "notes.txt", "final-words/d"}
            assert gcs.contents(key_of(url)).keys() == kept
            with opened(Path(url)) as other, pytest.raises(RunError, match="another process is"):
                other.claim(settings, "float32", overwrite=False).__enter__()
    assert "lock" not in gcs.contents(key_of(url))


def test_a_longer_run_keeps_its_result_by_another_name(
    gcs: GcsServer, url: str, settings: RunSettings
):
    with opened(Path(url)) as run, run.claim(settings, "float32", overwrite=False):
        for name in ("final/COMPLETE", "final/a", "report.html"):
            gcs.put(f"{key_of(url)}/{name}", name.encode())
        aside = run.go_on_with(dataclasses.replace(settings, steps=9))
    found = gcs.contents(key_of(url))
    assert str(aside) == f"{url}/final-of-7-steps"
    assert found.keys() == {
        *("config.yaml", "resolved.yaml", "final-of-7-steps/COMPLETE", "final-of-7-steps/a"),
    }
    assert b"steps: 9\n" in found["config.yaml"]


def test_objects_that_were_written_since_are_named(gcs: GcsServer, url: str, settings: RunSettings):
    gcs.put(f"{key_of(url)}/text/before.jsonl", b"")
    far = dataclasses.replace(settings, data=(Path(f"{url}/text"),))
    with opened(Path(f"{url}/run")) as run, run.claim(far, "float32", overwrite=False):
        at = RunPosition(step=1, inputs={"data": "old"})
        for name in ("b", "a"):
            gcs.put(f"{key_of(url)}/text/{name}.jsonl", b"")
        newer = f"with --overwrite; written since then: {url}/text/a.jsonl, {url}/text/b.jsonl$"
        with pytest.raises(RunError, match=newer):
            _raise_if_changed(run, at, {"data": "new"}, far)
        _raise_if_changed(run, at, {"data": "old"}, far)


def test_what_has_changed_is_sent_whole(gcs: GcsServer, url: str, tmp_path: Path):
    gcs.put(f"{key_of(url)}/log", b"1\n")
    gcs.put(f"{key_of(url)}/other", b"not asked for")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "gone").write_text("here only")
    mirror = Mirror(tmp_path / "here", as_place(url))
    mirror.fetch("log", "gone")
    assert tree_bytes(tmp_path / "here") == {"log": b"1\n"}
    with (tmp_path / "here" / "log").open("ab") as log:
        log.write(b"2\n")
    (tmp_path / "here" / "sub").mkdir()
    (tmp_path / "here" / "sub" / "new").write_bytes(b"new")
    gcs.log.clear()
    mirror.send()
    assert gcs.contents(key_of(url)) == {
        "log": b"1\n2\n",
        "other": b"not asked for",
        "sub/new": b"new",
    }
    written = [key for method, key in gcs.log if method == "POST"]
    assert sorted(written) == [f"{key_of(url)}/log", f"{key_of(url)}/sub/new"]
    (tmp_path / "here" / "sub" / "new").write_bytes(b"newer")
    mirror.send(every_s=60)
    assert gcs.content(f"{key_of(url)}/sub/new") == b"new", "not so soon"
    gcs.log.clear()
    mirror.send()
    assert [key for method, key in gcs.log if method == "POST"] == [f"{key_of(url)}/sub/new"]

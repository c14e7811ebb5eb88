"""Several processes train one run: on more or fewer of them it goes on, one that dies ends all.

Meshes, and what is computed on them, are in test_meshes.py.
"""

import dataclasses
import time
from pathlib import Path

import clusters
import jax
import killed_training
import numpy as np
import pytest
from advice import follows
from trained import QUIET, arguments, environment, read_rows

from finetune import cli
from finetune.run.checkpoints import saved_steps
from finetune.settings import OptimizerSettings, RunSettings
from finetune.train import train
from mtp_model import cluster
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.problems import UserError

STEPS = 8


@pytest.fixture(scope="module")
def smooth(settings: RunSettings, tmp_path_factory) -> RunSettings:
    """A run whose steps are as long as its gradients, which Adam's own are not near 0.

    Of a mixture, whose small part begins many epochs.
    """
    small = tmp_path_factory.mktemp("small") / "small.jsonl"
    small.write_text("".join(f'{{"text": "small {number}"}}\n' for number in range(5)))
    return dataclasses.replace(
        settings,
        data=(*settings.data, small),
        data_weights=(2.0, 1.0),
        out=tmp_path_factory.mktemp("smooth") / "whole",
        steps=STEPS,
        optimizer=OptimizerSettings(learning_rate=0.3, epsilon=1.0, warmup_fraction=0.3),
        batch=dataclasses.replace(settings.batch, rows=4),
        checkpoints=dataclasses.replace(settings.checkpoints, every=2),
        evaluation=dataclasses.replace(settings.evaluation, every=4, rows=4),
    )


def begin(settings: RunSettings, out: Path, count: int, ended: dict[int, list[str]], logs: Path):
    """Start so many processes of the run; `ended` ones are at a point (see killed_training.py)."""
    argv = arguments(settings, out)
    argv += ["--optimizer.epsilon", str(settings.optimizer.epsilon)]

    def command(address: str, process: int) -> list[str]:
        where = ["coordinator", address, "processes", str(count), "process", str(process)]
        words = [w if n % 2 else f"--cluster.{w}" for n, w in enumerate(where)]
        point = ended.get(process, ["none", "0", ""])
        return [killed_training.__file__, *point, *argv, *(words if count > 1 else [])]

    return clusters.start(count, 4 // count, command, logs, environment(argv))


@follows("give address, number of processes and number of this one")
def test_a_run_goes_on_with_more_and_fewer_processes(smooth: RunSettings, tmp_path: Path):
    """2, of which one dies; 4, of which one is told to stop; 2 again."""
    whole = train(smooth, QUIET).run
    out = tmp_path / "run"

    processes = begin(smooth, out, 2, {1: ["step", "4", "KILL,KILL"]}, tmp_path / "a")
    assert processes[1].wait(300) == -9
    died = time.monotonic()
    assert clusters.end(processes, 60)[0] != 0
    assert time.monotonic() - died < 60
    said = (tmp_path / "a" / "0.log").read_text()
    assert "lost the others" in said or "tasks are unhealthy" in said
    assert saved_steps(out / "checkpoints") == [2]

    processes = begin(smooth, out, 4, {3: ["step", "2", "TERM"]}, tmp_path / "b")
    assert clusters.end(processes, 300) == [0] * 4
    (stopped,) = set(saved_steps(out / "checkpoints")) - {2}
    assert stopped in (4, 5)  # the next step may have begun
    said = (tmp_path / "b" / "0.log").read_text()
    assert "continuing after step 2" in said
    assert "a signal to another process: stopped, all steps are saved" in said

    processes = begin(smooth, out, 2, {}, tmp_path / "c")
    assert clusters.end(processes, 300) == [0, 0]
    assert "curves:" in (tmp_path / "c" / "0.log").read_text()
    assert "curves:" not in (tmp_path / "c" / "1.log").read_text()

    for name in ("metrics.jsonl", "evaluations.jsonl"):
        found, wanted = (read_rows(path / name) for path in (out, whole.path))
        assert [row["step"] for row in found] == [row["step"] for row in wanted]
        np.testing.assert_allclose(
            [row["mtp_loss"] for row in found], [row["mtp_loss"] for row in wanted], rtol=1e-5
        )
    tokens = [
        [row["tokens"] for row in read_rows(path / "metrics.jsonl")] for path in (out, whole.path)
    ]
    assert tokens[0] == tokens[1]  # no document twice, and none left out
    found, wanted = (open_checkpoint(path / "final") for path in (out, whole.path))
    assert found.damaged_files() == []
    for name in wanted.provenance["derived"][0]["changed"]:
        leaf = wanted.leaves[name]
        for index in np.ndindex(*leaf.shape[: leaf.num_stack_dims]):
            one, other = (
                c.read_rows(name, index, 0, leaf.tensor_shape[0]) for c in (found, wanted)
            )
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())


@follows("give every host the same command, files and version")
def test_processes_that_were_given_something_else_are_told(monkeypatch):
    said = [{"--steps": "3", "data": "a"}, {"--steps": "3", "data": "a"}, {"--steps": "4"}]
    monkeypatch.setattr(cluster, "all_say", lambda _: said)
    with pytest.raises(UserError, match="process 2 has 4, process 0 3") as caught:
        cluster.raise_unless_alike(said[0])
    assert "data: process 2 has None, process 0 a" in str(caught.value)
    said[2] = said[0]
    cluster.raise_unless_alike(said[0])


def test_a_cluster_of_which_half_is_known_is_refused(monkeypatch):
    def lacking(*_: object, **__: object) -> None:
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", lacking)
    cluster.join(None, None, None)  # there is none
    with pytest.raises(UserError, match="not all of the cluster is known"):
        cluster.join("127.0.0.1:1", None, None)


def test_other_errors_of_jax_are_not_taken_for_a_lost_process(monkeypatch):
    gone = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")
    assert cluster.lost(gone) is None  # a process alone has lost nobody
    monkeypatch.setattr(cluster, "count", lambda: 2)
    assert "lost the others" in str(cluster.lost(gone))
    assert cluster.lost(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")) is None


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo all-reduce failed"),
        ValueError("UNAVAILABLE: Gloo all-reduce failed"),
        TimeoutError("Timed out while waiting for async_write_complete barrier."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_tells_that_a_process_is_gone_is_told_with_what_to_do(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Orbax says it in its own way, where the other one dies while a checkpoint is written."""

    def dies(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_train", dies)
    monkeypatch.setattr(cluster, "count", lambda: 2)
    assert cli.run(["train", "--checkpoint", "c", "--data", "d", "--out", "o"]) == 1
    told = capsys.readouterr().err
    assert "lost the others" in told
    assert "Run the same command on every host" in told

"""Several processes keep one run in a bucket, and go on from there after one of them was killed."""

from pathlib import Path

import clusters
import killed_training
import numpy as np
import pytest
from gcs_server import GcsServer, key_of
from trained import arguments, environment, read_rows

from finetune.run.checkpoints import saved_steps
from finetune.settings import RunSettings
from finetune.train import Result
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.files.open import as_place


@pytest.mark.usefixtures("gcs")
def test_two_processes_go_on_from_the_bucket(
    gcs: GcsServer, url: str, finished: Result, settings: RunSettings, tmp_path: Path
):
    argv = arguments(settings, Path(f"{url}/run"))
    env = environment(argv, beside=tmp_path / "run")

    def begin(name: str, *point: str) -> list:
        def command(address: str, process: int) -> list[str]:
            where = {"coordinator": address, "processes": "2", "process": str(process)}
            words = [f"--cluster.{key}={value}" for key, value in where.items()]
            ended = point if process == 1 and point else ("none", "0", "")
            return [killed_training.__file__, *ended, *argv, *words]

        return clusters.start(2, 1, command, tmp_path / name, env)

    processes = begin("a", "step", "7", "KILL,KILL")
    assert processes[1].wait(300) == -9
    assert clusters.end(processes, 60)[0] != 0
    saved = saved_steps(as_place(f"{url}/run/checkpoints"))
    assert saved[-1] in (3, 6)  # the save of 6 may not be finished, that of 3 is before it begins
    assert clusters.end(begin("b"), 300) == [0, 0], (tmp_path / "b" / "0.log").read_text()
    first, second = ((tmp_path / "b" / f"{number}.log").read_text() for number in range(2))
    assert f"continuing after step {saved[-1]}" in first
    assert "curves:" in first
    assert "curves:" not in second

    run = f"{key_of(url)}/run"
    (tmp_path / "metrics.jsonl").write_bytes(gcs.content(f"{run}/metrics.jsonl"))
    found, wanted = (
        [row["mtp_loss"] for row in read_rows(path / "metrics.jsonl")]
        for path in (tmp_path, finished.run.path)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3)
    final, alone = open_checkpoint(f"{url}/run/final"), open_checkpoint(finished.run.final)
    assert final.damaged_files() == []
    assert final.leaves == alone.leaves

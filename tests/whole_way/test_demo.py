"""`make demo` goes the whole way; here with a few steps only, so that its commands cannot rot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.usefixtures("_torch")
def test_demo(tmp_path):
    command = [sys.executable, "-m", "tools.demo", "--out", tmp_path / "run", "--steps-scale", "0"]
    environment = os.environ | {"COLUMNS": "120", "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "main model, bytes changed" in done.stdout
    assert "0 of 3,882,920" in done.stdout
    assert (tmp_path / "run" / "finetuning" / "curves.png").stat().st_size > 10_000
    exported = sorted(path.name for path in (tmp_path / "run" / "exported").iterdir())
    assert exported == sorted(path.name for path in (tmp_path / "run" / "released").iterdir())

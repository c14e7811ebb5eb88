"""Runs commands of killed.py in processes of their own; knows nothing of what they do."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def run_all(commands: Sequence[Sequence[object]], status: int = -signal.SIGKILL) -> None:
    """Run commands side by side; all have to end with this exit status."""
    ran = subprocess.run(
        [sys.executable, HERE / "killed.py", json.dumps(commands, default=str)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parents[1])))},
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr.decode()
    assert json.loads(ran.stdout) == [status] * len(commands), ran.stderr.decode()

"""How commands end: a message for what a user can mend, a traceback for what is our bug."""

import errno
import subprocess
import sys

import numpy as np
import pytest

from mtp_model.commands import exit_status
from mtp_model.problems import UserError


def ended(error: BaseException | None) -> tuple[int, list[str]]:
    """Exit status and messages of a command that raises `error`, or returns 0."""
    told: list[str] = []

    def run() -> int:
        if error:
            raise error
        return 0

    return exit_status(run, tell=lambda e: told.append(str(e)), interrupted="stopped"), told


def test_success_says_nothing():
    assert ended(None) == (0, [])


@pytest.mark.parametrize(
    "error", [UserError("mend this"), OSError(errno.ENOSPC, "No space left on device", "run/x")]
)
def test_what_a_user_can_mend_is_one_message(error: Exception):
    assert ended(error) == (1, [str(error)])


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert ended(KeyboardInterrupt()) == (130, [])
    assert capsys.readouterr().err == "stopped\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="broadcast"):
        exit_status(
            lambda: int((np.ones(2) + np.ones(3)).sum()),
            tell=lambda _: pytest.fail("told as if the user had erred"),
            interrupted="",
        )
    with pytest.raises(KeyError):
        ended(KeyError("slot"))


@pytest.mark.parametrize("module", ["converters.cli.main", "finetune.cli"])
def test_a_reader_that_has_gone_ends_it_in_silence(module: str):
    """As in `convert-deepseek ... | head -1`."""
    code = (
        "import sys; from mtp_model.commands import exit_status\n"
        f"import {module}\n"
        "def run():\n    for _ in range(100000): print('a line of a result')\n    return 0\n"
        "sys.exit(exit_status(run, tell=print, interrupted=''))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()

"""How commands end: a message for what a user can mend, a traceback for what is our bug."""

import errno
import os
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


def test_what_a_user_can_mend_is_one_message():
    assert ended(UserError("mend this")) == (1, ["mend this"])
    assert ended(OSError("unknown")) == (1, ["unknown"])


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "; make room and run the same command again"),
        (errno.ENOENT, "; needed a path that is there, or a folder that files can be made in"),
        (errno.EACCES, "; needed a place that this user may read, and write where something"),
        (errno.EISDIR, "; needed a file"),
        (errno.EFBIG, ": a limit (`ulimit -f`) or its disk allows no file of this size; raise"),
        (errno.EIO, ""),
    ],
)
def test_what_the_system_refused_is_said_with_what_was_needed(number: int, advice: str):
    status, (said,) = ended(OSError(number, os.strerror(number), "run/x"))
    assert status == 1
    assert said.startswith(f"run/x: {os.strerror(number)}{advice}")


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


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "｜"), ("latin-1", "\\uff5c")])  # noqa: RUF001
def test_characters_that_a_locale_lacks_are_escaped(encoding: str, shown: str):
    """DeepSeek's special tokens have some, which `inspect-data` prints."""
    code = (
        "import sys; from mtp_model.commands import exit_status\n"
        "from mtp_model.reporting import show, stdout\n"
        "def run():\n    print('\\uff5c'); show(stdout(), ['a\\uff5c'])\n    return 0\n"
        "sys.exit(exit_status(run, tell=print, interrupted=''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding) == f"{shown}\na{shown}\n"


def test_a_command_whose_stdout_is_closed_does_its_work(tmp_path):
    code = (
        "import sys; from mtp_model.commands import exit_status\n"
        "from mtp_model.reporting import show, stdout\n"
        f"def run():\n    with open({str(tmp_path / 'made')!r}, 'w') as file:\n"
        "        file.write('made')\n        file.flush()\n"
        "        print('a result'); show(stdout(), ['a result'])\n    return 0\n"
        "sys.exit(exit_status(run, tell=print, interrupted=''))"
    )
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" -c "$1" >&-', sys.executable, code],
        stderr=subprocess.PIPE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "made").read_text() == "made"


def test_a_closed_stderr_is_no_fault():
    """As in `convert-deepseek ... 2>&-`: nothing else gets its number, and what it says is lost."""
    code = (
        "import os, sys; from mtp_model.commands import exit_status\n"
        "from mtp_model.reporting import show, stderr\n"
        "def run():\n"
        "    show(stderr(), ['progress'])\n"
        "    return int(os.open(os.devnull, os.O_RDONLY) <= 2)\n"
        "sys.exit(exit_status(run, tell=print, interrupted=''))"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")

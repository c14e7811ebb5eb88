"""Progress on stderr: lines in a log, a bar on a terminal."""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import time

import pytest

from mtp_model import progress
from mtp_model.progress import above_bars


def wait_for(stream: pytest.CaptureFixture[str], words: str) -> str:
    """What stderr says until `words` are there; fails after 10 s."""
    said, end_s = "", time.monotonic() + 10
    while words not in said:
        assert time.monotonic() < end_s, said
        time.sleep(0.01)
        said += stream.readouterr().err
    return said


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.02)


def test_a_log_gets_a_line_at_least_every_30_seconds():
    assert progress.LINE_EVERY_S <= 30


def test_a_line_has_done_total_rate_and_time_left(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = progress._Lines("import", "B", 0, None)
    said = []
    for now[0], done in ((0.0, 1), (4.0, 2), (11.0, 12), (12.0, 20), (31.0, 32)):
        lines.report(done * 10**9, 40 * 10**9)
        said.append(lines._line())
    assert said[2] == "import: 12.00 GB of 40.00 GB, 1.00 GB/s, 28 s left"
    assert said[4] == "import: 32.00 GB of 40.00 GB, 1.00 GB/s, 8 s left"


def test_steps_of_a_resumed_run_count_from_the_first_that_is_done_anew(
    monkeypatch: pytest.MonkeyPatch,
):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = progress._Lines("train", "steps", 100, 4_000)
    now[0] = 200.0
    assert lines._line() == "train: 100 of 4,000 steps, 3 min so far", "it compiles"
    lines.report(101, 4_000, "loss 2.100, 800 tokens/s")
    now[0] = 210.0
    lines.report(121, 4_000, "loss 2.000, 900 tokens/s")
    expected = "train: 121 of 4,000 steps, 2.00 steps/s, 32 min left, loss 2.000, 900 tokens/s"
    assert lines._line() == expected


@pytest.mark.usefixtures("often")
def test_lines_come_while_the_work_says_nothing(capsys: pytest.CaptureFixture[str]):
    with progress.progress("import"):
        assert re.match(r"import: \d+ s so far\n", wait_for(capsys, "far\n"))
    with progress.progress("evaluate", "batches") as report:
        report(7, None)
        wait_for(capsys, "evaluate: 7 batches, 0 s so far\n")
    with progress.progress("plan") as report:
        report(0, None, "compiling")  # no amount, no rate, no time left that nobody knows
        wait_for(capsys, "plan: 0 s so far, compiling\n")


@pytest.mark.usefixtures("often")
def test_the_last_line_says_what_was_reached(capsys: pytest.CaptureFixture[str]):
    with progress.progress("train", "steps", 0, 5) as report:
        wait_for(capsys, "train: 0 of 5 steps, 0 s so far\n")
        report(4, 5)
        report(5, 5, "loss 1.000")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train: 5 of 5 steps, ")
    assert last.endswith(" 0 s left, loss 1.000")


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]):
    with progress.progress("import") as report:
        report(1, 1)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("often")
def test_a_log_that_cannot_be_written_stops_no_work(monkeypatch: pytest.MonkeyPatch):
    class Full(io.StringIO):
        tries = 0

        def write(self, _: str) -> int:
            self.tries += 1
            raise OSError(28, "No space left on device")

    full = Full()
    monkeypatch.setattr(sys, "stderr", full)
    with progress.progress("import") as report:
        report(1, 2)
        end_s = time.monotonic() + 10
        while full.tries < 2 and time.monotonic() < end_s:
            time.sleep(0.01)
    assert full.tries >= 2


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(("columns", "shown"), [(0, "import: 0 s so far"), (100, "import: 00:00")])
def test_a_terminal_without_columns_gets_lines(
    columns: int, shown: str, monkeypatch: pytest.MonkeyPatch
):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w") as terminal:  # noqa: PTH123 (a descriptor, no path)
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress.progress("import"):
            assert shown in os.read(ours, 1000).decode()
    os.close(ours)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called in the test: between a fixture and the test, pytest sets sys.stderr anew."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return terminal


def wait_until_drawn(terminal: Terminal, what: str) -> None:
    end_s = time.monotonic() + 10
    while what not in terminal.getvalue():
        assert time.monotonic() < end_s, terminal.getvalue()
        time.sleep(0.01)


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch):
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(progress, "_REDRAW_EVERY_S", 0.02)
    with progress.progress("import") as report:
        report(500_000_000, 2_000_000_000)
        wait_until_drawn(terminal, "500M/2.00G")
    assert "import:  25%|" in terminal.getvalue()
    assert not terminal.getvalue().rpartition("\r")[2].strip(), "the bar goes at the end"


def test_a_bar_without_an_amount_shows_how_long_it_takes(monkeypatch: pytest.MonkeyPatch):
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(progress, "_REDRAW_EVERY_S", 0.02)
    with progress.progress("plan") as report:
        report(0, None, "compiling")
        wait_until_drawn(terminal, "plan: 00:00, compiling")
        report(1, 4, "running")
        wait_until_drawn(terminal, "25%")


def test_what_is_printed_above_the_bar_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch):
    terminal = use_terminal(monkeypatch)
    with progress.progress("train", "steps", 0, 8) as report:
        report(2, 8, "loss 1.000")
        with above_bars():
            print("step 2, held-out", file=sys.stderr)
    printed = terminal.getvalue()
    start = printed.index("step 2, held-out\n")
    assert printed[start - 1] == "\r"
    assert "2/8" in printed[start:], "the bar is drawn again"

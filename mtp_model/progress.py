"""How far a long command is, on stderr: a bar on a terminal, elsewhere a line now and then."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from tqdm import tqdm

from mtp_model.reporting import human_bytes, human_time

LINE_EVERY_S = 10.0  # the README promises a line every 30 s
_REDRAW_EVERY_S = 1.0
_NOTHING_COUNTED = "{desc}: {elapsed}{postfix}"  # of a bar, before there is an amount (compiling)

_hushed = False

OnProgress = Callable[[int, int], None]
"""What long work calls with how much is done, and of how much in all; any of its threads may."""


class Report(Protocol):
    """So much is done of so much (None: nobody knows), with a note; any thread may say it."""

    def __call__(self, done: int, total: int | None, note: str = "") -> None: ...


@contextlib.contextmanager
def progress(
    what: str, unit: str = "B", done: int = 0, total: int | None = None
) -> Iterator[Report]:
    """Show amount, rate and time left of what runs inside, which says how far it is.

    A thread shows them, so that they also come while the work is in one long step (compiling).
    unit: "B" for bytes, else a noun in the plural ("steps").
    """
    if _hushed:
        yield _nothing
        return
    terminal = _can_draw_a_bar()
    display = (_Bar if terminal else _Lines)(what, unit, done, total)
    ended = threading.Event()

    def keep_showing() -> None:
        while not ended.wait(_REDRAW_EVERY_S if terminal else LINE_EVERY_S):
            display.refresh()

    thread = threading.Thread(target=keep_showing, name="progress", daemon=True)
    thread.start()
    try:
        yield display.report
    finally:
        ended.set()
        thread.join()
        display.close()


def _nothing(done: int, total: int | None, note: str = "") -> None:
    """What is reported where nothing is said."""


def hush() -> None:
    """Say nothing from here on: another process of the same command says it."""
    global _hushed
    _hushed = True


def _can_draw_a_bar() -> bool:
    """Whether stderr is a terminal that has columns; some in containers say they have none."""
    if not sys.stderr.isatty():
        return False
    with contextlib.suppress(OSError):
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return True


def above_bars() -> contextlib.AbstractContextManager[None]:
    """What is printed inside stands above the bar that is on the terminal, if any."""
    return tqdm.external_write_mode(file=sys.stderr)


class _Bar:
    """tqdm's bar, which any thread may move."""

    def __init__(self, what: str, unit: str, done: int, total: int | None):
        self._lock = threading.Lock()
        self._moved = False
        self._bar = tqdm(
            desc=what,
            initial=done,
            total=total,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            smoothing=0.05,
            dynamic_ncols=True,
            leave=False,
            file=sys.stderr,
            bar_format=None if done or total else _NOTHING_COUNTED,
        )

    def report(self, done: int, total: int | None, note: str = "") -> None:
        bar = self._bar
        with self._lock:
            if not self._moved:  # what a resumed run found, or what was compiled, is not speed
                bar.initial = bar.n = bar.last_print_n = done
                self._moved = True
            bar.total = total
            bar.bar_format = None if done or total else _NOTHING_COUNTED
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

    def refresh(self) -> None:
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """A line at each `refresh`, and a last one where there was one: short work says nothing."""

    def __init__(self, what: str, unit: str, done: int, total: int | None):
        self._what, self._unit = what, unit
        self._opened_s = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._last = (done, total, "")
        self._file = sys.stderr
        self._said = False

    def report(self, done: int, total: int | None, note: str = "") -> None:
        self._first = self._first or (time.monotonic(), done)
        self._last = (done, total, note)

    def refresh(self) -> None:
        self._said = True
        with contextlib.suppress(OSError, ValueError):  # a log that has gone stops no work
            print(self._line(), file=self._file, flush=True)

    def close(self) -> None:
        if self._said:
            self.refresh()

    def _line(self) -> str:
        done, total, note = self._last
        now = time.monotonic()
        first_s, already = self._first or (now, done)
        rate = (done - already) / max(now - first_s, 1e-9)  # what a resumed run found is not speed
        parts = [self._amount(done, total)] if done or total else []
        if rate > 0:
            parts.append(f"{self._counted(rate)}/s")
            parts += [f"{human_time((total - done) / rate)} left"] if total else []
        else:
            parts.append(f"{human_time(now - self._opened_s)} so far")
        return f"{self._what}: " + ", ".join([*parts, note] if note else parts)

    def _amount(self, done: int, total: int | None) -> str:
        if total is None:
            return self._counted(done)
        if self._unit == "B":
            return f"{human_bytes(done)} of {human_bytes(total)}"
        return f"{done:,} of {total:,} {self._unit}"

    def _counted(self, count: float) -> str:
        if self._unit == "B":
            return human_bytes(count)
        return f"{count:,.{0 if isinstance(count, int) else 2}f} {self._unit}"

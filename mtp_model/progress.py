"""How far a long command is, on stderr; must not know what is being done.

On a terminal a bar; elsewhere a plain line now and then, so that logs stay readable.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mtp_model.reporting import human_bytes, stderr

LINE_EVERY_S = 10.0

Report = Callable[[int, int], None]
"""Told the bytes that are done, and their total; any thread may."""


@contextlib.contextmanager
def progress(what: str) -> Iterator[Report]:
    """Show bytes, rate and time left of what runs inside."""
    if not sys.stderr.isatty():
        yield _Lines(what)
        return
    columns = TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=stderr(), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """A line every LINE_EVERY_S seconds; none for what takes less."""

    def __init__(self, what: str):
        self._what = what
        self._began: tuple[float, int] | None = None
        self._told_s = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        began_s, already = self._began = self._began or (now, done)
        if now - self._told_s < LINE_EVERY_S:
            return
        self._told_s = now
        rate = (done - already) / max(now - began_s, 1e-9)  # what a resumed run found is not speed
        left = f", {(total - done) / rate:,.0f} s left" if rate > 0 else ""
        amounts = f"{human_bytes(done)} of {human_bytes(total)}, {human_bytes(rate)}/s"
        print(f"{self._what}: {amounts}{left}", file=sys.stderr, flush=True)

"""How SIGTERM and Ctrl-C end a run: at once where nothing is lost, else after the step, saved.

A thread hears the signals, because Python runs a handler only between two of its instructions and
compiling, or a step, is one of them for minutes.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from mtp_model import cluster
from mtp_model.commands import INTERRUPTED

STATUS = {signal.SIGTERM: 0, signal.SIGINT: INTERRUPTED}  # a preempted job has not failed


class Stopped(Exception):  # noqa: N818
    """The run ends here because a signal asked it to; all it has done is saved."""

    def __init__(self, status: int):
        super().__init__()
        self.status = status


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The first signal that came, and the exit status it leads to."""

    name: str
    status: int


class Stopping:
    """Whether the run was asked to stop, and what is said then.

    advice: how to go on, the last line that a stopped run prints.
    """

    def __init__(self, advice: str):
        self._advice = advice
        self._asked: _Asked | None = None
        self._in_steps = False
        self._lock = threading.Lock()

    def is_asked(self) -> bool:
        """Whether a signal has come: what takes long looks now and then.

        In a cluster, to any process: all of them look at the same places, and stop at one.
        """
        return cluster.is_anywhere(self._asked is not None)

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Inside, signals end the run as described; for the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        old = {number: signal.signal(number, _nothing) for number in STATUS}
        old_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_writer)
            for number, handler in old.items():
                signal.signal(number, handler)
            os.close(writer)  # which ends the thread
            thread.join()
            os.close(reader)

    @contextlib.contextmanager
    def after_the_step(self) -> Iterator[None]:
        """Inside, a signal waits until `stop` is called, or for the end, where it raises Stopped.

        Outside, it ends the process at once: nothing is lost there.
        """
        with self._lock:
            self._in_steps = True
        yield
        with self._lock:
            self._in_steps = False
        self.stop()

    def stop(self) -> None:
        """Raise Stopped if a signal has come; whoever calls this has saved what there is."""
        if self.is_asked():
            raise Stopped(self._asked.status if self._asked else 0)

    def _listen(self, reader: int) -> None:
        while numbers := os.read(reader, 16):
            for number in numbers:
                if number in STATUS:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        with self._lock:
            if self._asked and number == signal.SIGINT:
                self._leave(f"{number.name} again: stopped at once", INTERRUPTED)
            if self._asked:
                return
            if not self._in_steps:
                self._leave(f"{number.name}: stopped", STATUS[number])
            self._asked = _Asked(name=number.name, status=STATUS[number])
        _say(f"{number.name}: finishing this step and saving; Ctrl-C stops at once")

    def _leave(self, said: str, status: int) -> None:
        """End the process now. Its files are such that a kill leaves nothing broken."""
        _say(f"{said}; {self._advice}")
        os._exit(status)

    def say_goodbye(self) -> None:
        """The last line of a run that stopped after its step."""
        who = self._asked.name if self._asked else "a signal to another process"
        _say(f"{who}: stopped, all steps are saved; {self._advice}")


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """A handler that only keeps the signal from ending the process."""


def _say(line: str) -> None:
    """A line on stderr, below a bar that may be there; a terminal that has gone is no matter."""
    with contextlib.suppress(OSError, ValueError):
        print(f"\n{line}" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


NOT_STOPPING = Stopping("")
"""For callers that hear no signals."""

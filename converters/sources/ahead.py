"""Files fetched before they are read and deleted after, a few at a time."""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from mtp_model.files.place import Place

MOST_FILES = 4  # on disk at once; a layer of V3 spans up to four, and waits for them all

_END_S = 5.0  # for threads to end; what hangs in a request is left to end with the process


@dataclass
class _File:
    """`users` are the steps that will read it and are not finished."""

    name: str
    users: int = 0
    queued: bool = True
    awaited: bool = False
    path: Path | None = None
    error: Exception | None = None


class Ahead:
    """Fetches the files that each of `steps` reads, in the order of the steps.

    A file that all its steps are finished with is deleted. At most MOST_FILES are there at once,
    and those that readers wait for.
    """

    def __init__(
        self,
        steps: Mapping[str, Sequence[str]],
        fetch: Callable[[str], Path],
        delete: Callable[[str], None],
    ):
        """fetch: returns where a file is, once it is there; called by several threads."""
        self._steps = dict(steps)
        self._fetch, self._delete = fetch, delete
        self._files: dict[str, _File] = {}
        for name in (name for files in steps.values() for name in files):
            self._files.setdefault(name, _File(name)).users += 1
        self._changed = threading.Condition()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._fetch_all, daemon=True) for _ in range(MOST_FILES)
        ]
        for thread in self._threads:
            thread.start()

    def path(self, name: str) -> Path | None:
        """Where a file is; waits for it. None for one that is no unfinished step's."""
        file = self._files.get(name)
        if file is None:
            return None
        with self._changed:
            file.awaited = True
            self._changed.notify_all()
            while file.users and not file.path and not file.error and not self._stopped:
                self._changed.wait()
            if file.error:
                raise file.error
            return file.path

    def finish(self, step: str) -> None:
        """A step has read all it needs."""
        with self._changed:
            for name in self._steps.pop(step):
                file = self._files[name]
                file.users -= 1
                self._delete_if_read(file)
            self._changed.notify_all()

    def close(self, stop: Callable[[], None]) -> None:
        """End. Files that were fetched and not yet read stay. stop: makes running fetches raise."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        stop()
        for thread in self._threads:
            thread.join(_END_S)

    def _delete_if_read(self, file: _File) -> None:
        if file.path and not file.users:
            self._delete(file.name)
            file.path = None

    def _fetch_all(self) -> None:
        while file := self._next():
            path, error = None, None
            try:
                path = self._fetch(file.name)
            except Exception as err:  # whoever waits for the file raises it
                error = err
            with self._changed:
                file.path, file.error = path, error
                self._delete_if_read(file)
                self._changed.notify_all()

    def _next(self) -> _File | None:
        """The next file to fetch, once there is room for it or somebody waits for it."""
        with self._changed:
            while not self._stopped:
                needed = [file for file in self._files.values() if file.users]
                queue = [file for file in needed if file.queued]
                if not queue:
                    return None
                awaited = [file for file in queue if file.awaited]
                there = len(needed) - len(queue)
                for file in (*awaited, *(queue if there < MOST_FILES else ())):
                    file.queued = False
                    return file
                self._changed.wait()
        return None


def room_for_fetched(unfinished: Place, worker: tuple[int, int]) -> AbstractContextManager[Path]:
    """A worker's folder for `Source.staged`: among what is unfinished, unless that is in the cloud.

    There it is temporary, and after an interruption what was fetched is fetched again.
    """
    return (unfinished / f"fetched-{worker[0]}-of-{worker[1]}").on_this_machine()

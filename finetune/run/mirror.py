"""A run that is kept in a bucket: copies of its small files on this machine, to be appended to.

Nothing can be appended to an object. So logs, settings and pictures are written to a temporary
folder and sent from there: whole, where they have changed.
"""

import time
from pathlib import Path

import numpy as np

from mtp_model.files.place import Place

_PIECE_BYTES = 4 << 20


class Mirror:
    """`here` has what `there` has of some files; `send` brings `there` what was written here."""

    def __init__(self, here: Path, there: Place):
        self.here, self.there = here, there
        self._sent: dict[Path, tuple[int, int]] = {}
        self._sent_s = 0.0

    def fetch(self, *names: str) -> None:
        """Files as they are there; those that are not there are none here either."""
        for name in names:
            file = self.here / name
            try:
                with file.open("wb") as out:
                    out.writelines((self.there / name).pieces())
            except FileNotFoundError:
                file.unlink()
            else:
                self._sent[file] = _state(file)

    def send(self, every_s: float = 0.0) -> None:
        """What was written here since, each file whole; nothing within `every_s` of the last."""
        if time.monotonic() - self._sent_s < every_s:
            return
        for file in sorted(path for path in self.here.rglob("*") if path.is_file()):
            state = _state(file)  # before it is read: what is appended meanwhile is sent next time
            if self._sent.get(file) != state:
                self._send(file)
                self._sent[file] = state
        self._sent_s = time.monotonic()

    def _send(self, file: Path) -> None:
        target = self.there
        for part in file.relative_to(self.here).parts:
            target = target / part
        out = target.appended()
        with file.open("rb") as content:
            while piece := content.read(_PIECE_BYTES):
                out.append(np.frombuffer(piece, np.uint8))
        out.finish()


def _state(file: Path) -> tuple[int, int]:
    """What changes whenever a file is written."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns

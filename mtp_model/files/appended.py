"""Something that is written from start to end, and not there until it is whole."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from mtp_model.files.objects import CloudPath

Place = TypeVar("Place", Path, CloudPath)


class Appended(ABC, Generic[Place]):
    """Gathers bytes in memory of a fixed size, which is flushed whenever it is full."""

    def __init__(self, path: Place, memory: np.ndarray):
        self.path = path
        self._memory = memory
        self._filled = 0

    def append(self, view: np.ndarray) -> None:
        """Add bytes (uint8, 1-D)."""
        while len(view):
            piece = view[: len(self._memory) - self._filled]
            self._memory[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == len(self._memory):
                self._flush()

    @abstractmethod
    def finish(self) -> None:
        """Make it durable and visible."""

    @abstractmethod
    def discard(self) -> None:
        """Give it up. Does nothing after finish() or a second time."""

    @abstractmethod
    def _flush(self) -> None:
        """Pass on what was gathered; nothing is gathered then."""

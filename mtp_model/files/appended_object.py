"""An object in the cloud, written from start to end in bounded memory; knows no format.

An object is written at once, so what is large is sent in parts, objects of their own, several at a
time; the service joins them, and its checksum of the result has to be ours.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import google_crc32c
import numpy as np

from mtp_model.files.appended import Appended
from mtp_model.files.cloud_objects import join, state
from mtp_model.files.objects import CloudError, CloudPath

_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 8


class AppendedObject(Appended[CloudPath]):
    """Appears at `path` only when it is whole. `scratch`: a folder for its parts alone."""

    def __init__(self, path: CloudPath, scratch: CloudPath):
        super().__init__(path, np.empty(_PART_BYTES, np.uint8))
        self._scratch = scratch
        self._size = 0
        self._crc32c = google_crc32c.Checksum()
        self._pool = ThreadPoolExecutor(_PARTS_AT_ONCE)
        self._sent: list[Future[None]] = []

    def finish(self) -> None:
        """Make it visible; CloudError, and no object, if the service has stored other bytes."""
        with self._pool:
            if self._sent:
                self._flush()
                for sent in self._sent:
                    sent.result()
                parts = [self._part_path(number) for number in range(len(self._sent))]
                join(parts, self.path, self._scratch)
                self._scratch.delete_tree()
            else:
                self.path.write_bytes(self._taken())
        self._raise_if_damaged()

    def discard(self) -> None:
        """Stop. Parts that were sent stay in the scratch folder. Nothing to do after finish()."""
        self._pool.shutdown(cancel_futures=True)

    def _flush(self) -> None:
        if len(self._sent) >= _PARTS_AT_ONCE:
            self._sent[-_PARTS_AT_ONCE].result()  # no more than these in memory
        if self._filled:
            path = self._part_path(len(self._sent))
            self._sent.append(self._pool.submit(path.write_bytes, self._taken()))

    def _part_path(self, number: int) -> CloudPath:
        return self._scratch / f"part-{number:05}"

    def _taken(self) -> bytes:
        data = self._memory[: self._filled].tobytes()
        self._crc32c.update(data)
        self._size += len(data)
        self._filled = 0
        return data

    def _raise_if_damaged(self) -> None:
        found = state(self.path)
        ours = int.from_bytes(self._crc32c.digest(), "big")
        if found is None or (found.size, found.crc32c) != (self._size, ours):
            self.path.unlink()
            stored = f"{found.size} bytes, CRC32C {found.crc32c:08x}" if found else "nothing"
            sent = f"{self._size} bytes, CRC32C {ours:08x}"
            advice = "it was deleted; run the same command again"
            raise CloudError(f"{self.path}: {sent} were sent, {stored} are stored; {advice}")

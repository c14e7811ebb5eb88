"""Where a worker keeps what its source fetches ahead."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from mtp_model.files.objects import AnyPath, CloudPath


@contextlib.contextmanager
def room_for_fetched(unfinished: AnyPath, worker: tuple[int, int]) -> Iterator[Path]:
    """A worker's folder for `Source.staged`: among what is unfinished, unless that is in the cloud.

    There it is temporary, and after an interruption what was fetched is fetched again.
    """
    if isinstance(unfinished, CloudPath):
        with TemporaryDirectory(prefix="convert-deepseek-") as folder:
            yield Path(folder)
    else:
        yield unfinished / f"fetched-{worker[0]}-of-{worker[1]}"

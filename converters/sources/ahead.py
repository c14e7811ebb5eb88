"""Where a worker keeps what its source fetches ahead."""

from contextlib import AbstractContextManager
from pathlib import Path

from mtp_model.files.place import Place


def room_for_fetched(unfinished: Place, worker: tuple[int, int]) -> AbstractContextManager[Path]:
    """A worker's folder for `Source.staged`: among what is unfinished, unless that is in the cloud.

    There it is temporary, and after an interruption what was fetched is fetched again.
    """
    return (unfinished / f"fetched-{worker[0]}-of-{worker[1]}").on_this_machine()

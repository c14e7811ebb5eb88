"""How a command ends: its exit status, and one message for what its user can mend."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mtp_model.problems import UserError

FAILED, INTERRUPTED = 1, 130


def exit_status(
    run: Callable[[], int],
    *,
    tell: Callable[[UserError], None],
    interrupted: str,
) -> int:
    """The exit status of a command: what `run` returns, or 1 for what `tell` is told.

    A UserError or an OSError (a full disk, a folder that may not be written) is told in one
    message. A reader of our stdout that has had enough (`| head`) ends the command in silence,
    Ctrl-C with the line `interrupted`. Every other exception is a bug of ours: it keeps its
    traceback.
    """
    _open_stderr()
    try:
        status = run()
        sys.stdout.flush()  # here, where a reader that has gone is no traceback
    except BrokenPipeError:
        silence(sys.stdout.fileno())
        return FAILED
    except UserError as error:
        tell(error)
        return FAILED
    except OSError as error:
        tell(_in_words(error))
        return FAILED
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    return status


def _open_stderr() -> None:
    """A stderr that is closed (`2>&-`) is none to Python: what goes there goes nowhere.

    It failed the command, and the next file that is opened would have its number, and what
    libraries say there.
    """
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def silence(descriptor: int) -> None:
    """What is written to it from now on goes nowhere."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)


def _in_words(error: OSError) -> UserError:
    """What the system refused, for whoever named the place."""
    named = error.filename is not None and error.strerror is not None
    said = f"{error.filename}: {error.strerror}" if named else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{said}; make room and run the same command again")
    if named and error.errno == errno.ENOENT:
        needed = "a path that is there, or a folder that files can be made in"
    elif named and error.errno == errno.EISDIR:
        needed = "a file"
    elif named and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        needed = "a place that this user may read, and write where something is written"
    else:
        return UserError(said)
    return UserError(f"{said}; needed {needed}; name another place")

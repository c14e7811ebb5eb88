"""How a command ends: its exit status, and one message for what its user can mend."""

import errno
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
    _open_streams()
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


def repeated(options: Iterable[str], argv: Sequence[str]) -> list[str]:
    """What is wrong with options of several values that come twice: the first would be lost."""
    given = Counter(word.partition("=")[0].replace("_", "-") for word in argv)
    return [
        f"{name} is given {given[name]} times, needed once, with all values behind it"
        for name in sorted(options)
        if given[name] > 1
    ]


def _open_streams() -> None:
    """Results and messages can be written, whatever their characters are and wherever they go.

    A stream that is closed (`>&-`, `2>&-`) is none to Python, and the next file that is opened
    would have its number, and what libraries say there. What the encoding of a locale lacks is
    escaped on stdout, as it is on stderr, instead of ending a command whose work is done.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w")))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


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
    if error.errno == errno.EFBIG:
        found = "a limit (`ulimit -f`) or its disk allows no file of this size"
        return UserError(f"{said}: {found}; raise the limit or name another place")
    if named and error.errno == errno.ENOENT:
        needed = "a path that is there, or a folder that files can be made in"
    elif named and error.errno == errno.EISDIR:
        needed = "a file"
    elif named and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        needed = "a place that this user may read, and write where something is written"
    else:
        return UserError(said)
    return UserError(f"{said}; needed {needed}; name another place")

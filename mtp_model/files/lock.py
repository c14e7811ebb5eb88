"""Locks for folders in an object store: an object that only one process can have created.

Nothing there ends with its process. So the lock of one that was killed on this machine is taken
over; of a process elsewhere nobody can tell, and a person decides: the error says what to delete.
"""

import contextlib
import json
import os
import platform
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from mtp_model.files.objects import StoredObject
from mtp_model.problems import UserError

_POLL_S = 1.0
_PATIENCE_S = 900.0  # what is done under a lock that others wait for takes minutes


@contextlib.contextmanager
def object_locked(lock: StoredObject, *, shared: bool, wait: bool) -> Iterator[bool]:
    """Hold a lock until the end; False: not got. Shared ones are objects beside it.

    Everybody first creates the own object and then looks for those that exclude it, so that of two
    at the same moment none may get it, but never both.
    """
    me = _myself()
    mine = lock.parent / f"{lock.name}.{me['token']}" if shared else lock
    deadline = time.monotonic() + _PATIENCE_S
    while not (held := _taken(lock, mine, me)):
        if not wait:
            yield False
            return
        if time.monotonic() > deadline:
            raise UserError(f"gave up waiting for {lock}: {holder(lock)}")
        time.sleep(_POLL_S)
    try:
        yield True
    finally:
        mine.write_if(None, held)


def holder(lock: StoredObject) -> str:
    """Who holds a lock, for a message, and what to do when that process is gone."""
    held = [record for path in (lock, *_shared(lock)) if (record := _read(path))]
    who = [f"pid {r.get('pid')} on {r.get('host')} since {r.get('since')}" for r in held]
    advice = f"if it is gone: gcloud storage rm '{lock.parent}/*lock*'"
    return f"{', '.join(who) or 'nobody any more'}; {advice}"


def _taken(lock: StoredObject, mine: StoredObject, me: dict[str, Any]) -> bytes | None:
    """The generation of our object, now that we hold the lock; None when others do."""
    held = _created(mine, me)
    rivals = [lock] if mine != lock else _shared(lock)
    if held and any((record := _read(path)) and not _is_dead(record) for path in rivals):
        mine.write_if(None, held)
        return None
    return held


def _created(mine: StoredObject, me: dict[str, Any]) -> bytes | None:
    data = json.dumps(me).encode()
    if held := mine.write_if(data, None):
        return held
    seen, record = mine.generation(), _read(mine)
    if seen is None or record is None:
        return None
    if record.get("token") == me["token"]:  # our request got through, only its answer did not
        return seen
    return mine.write_if(data, seen) if _is_dead(record) else None


def _shared(lock: StoredObject) -> list[StoredObject]:
    return [lock.parent / name for name in lock.parent.names(f"{lock.name}.")]


def _read(path: StoredObject) -> dict[str, Any] | None:
    """Who created an object; empty for what is none of ours, None when there is none."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _is_dead(record: dict[str, Any]) -> bool:
    """Whether the process was on this very machine and is there no longer."""
    me = _myself()
    if any(record.get(key) != me[key] for key in ("host", "namespace")):
        return False
    try:
        os.kill(int(record["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, ValueError, TypeError, OverflowError):
        return False
    return False


def _myself() -> dict[str, Any]:
    # Containers may have a host name in common, but then not their process ids.
    namespace = "/proc/self/ns/pid"
    return {
        "host": platform.node(),
        "namespace": os.readlink(namespace) if os.path.exists(namespace) else "",  # noqa: PTH115, PTH110
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
    }

"""Locks for folders in an object store: an object that only one process can have created.

Nothing there ends with its process. So who holds a lock writes it anew every few seconds, and one
that stays as it is for half a minute, or whose process was killed on this very machine, is taken
over. Nobody's clock is compared. Who finds the own lock taken over ends at once.
"""

import contextlib
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from mtp_model.files.objects import CloudError, StoredObject
from mtp_model.problems import UserError

_POLL_S = 1.0
_PATIENCE_S = 900.0  # what is done under a lock that others wait for takes minutes
_RENEWED_S = 5.0
_SILENT_S = 30.0


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
    renewed = _Renewed(mine, me, held)
    try:
        yield True
    finally:
        mine.write_if(None, renewed.end())


def holder(lock: StoredObject) -> str:
    """Who holds a lock, for a message, and what to do when that process is gone."""
    held = [record for path in (lock, *_shared(lock)) if (record := _read(path))]
    who = [f"pid {r.get('pid')} on {r.get('host')} since {r.get('since')}" for r in held]
    advice = f"if it is gone: gcloud storage rm '{lock}*'"
    return f"{', '.join(who) or 'nobody any more'}; {advice}"


def _taken(lock: StoredObject, mine: StoredObject, me: dict[str, Any]) -> bytes | None:
    """The generation of our object, now that we hold the lock; None when others do."""
    held = _created(mine, me)
    rivals = [lock] if mine != lock else _shared(lock)
    if held and any((record := _read(path)) and not _is_gone(path, record) for path in rivals):
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
    return mine.write_if(data, seen) if _is_gone(mine, record) else None


class _Renewed:
    """A lock that we hold and write anew, in a thread, so that others see that we are there."""

    def __init__(self, mine: StoredObject, me: dict[str, Any], held: bytes):
        self._mine, self._me, self._held = mine, me, held
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()

    def end(self) -> bytes:
        """Write no more; the generation that is ours."""
        self._ended.set()
        self._thread.join()
        return self._held

    def _renew(self) -> None:
        while not self._ended.wait(_RENEWED_S):
            with contextlib.suppress(CloudError):  # the next time will do
                if not self._is_renewed():
                    print(
                        f"error: {self._mine} was deleted or taken over, as of a process that is "
                        "gone: stopped, so that two do not write at one place",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)

    def _is_renewed(self) -> bool:
        """Whether it is ours still, and written anew."""
        held = self._mine.write_if(json.dumps(self._me).encode(), self._held)
        if held is None:
            seen, record = self._mine.generation(), _read(self._mine)
            # Our request may have got through, and only its answer not.
            held = seen if record and record.get("token") == self._me["token"] else None
        self._held = held or self._held
        return held is not None


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


def _is_gone(path: StoredObject, record: dict[str, Any]) -> bool:
    """Whether the process that created a lock was here and is no longer, or elsewhere and silent.

    Locks of earlier versions are not written anew: of those a person decides.
    """
    me = _myself()
    if any(record.get(key) != me[key] for key in ("host", "namespace")):
        return bool(record.get("renewed_s")) and _is_silent(path)
    try:
        os.kill(int(record["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, ValueError, TypeError, OverflowError):
        return False
    return False


def _is_silent(path: StoredObject) -> bool:
    """Whether nobody writes a lock for a time."""
    seen, deadline = path.generation(), time.monotonic() + _SILENT_S
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        if path.generation() != seen:
            return False
    return True


def _myself() -> dict[str, Any]:
    # Containers may have a host name in common, but then not their process ids.
    namespace = "/proc/self/ns/pid"
    return {
        "host": platform.node(),
        "namespace": os.readlink(namespace) if os.path.exists(namespace) else "",  # noqa: PTH115, PTH110
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
        "renewed_s": _RENEWED_S,
    }

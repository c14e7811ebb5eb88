"""Locks for folders in an object store: an object that only one process can have created.

Nothing there ends with its process. So who holds a lock, or looks whether it may, writes its object
anew every few seconds, and one that stays as it is for half a minute, or whose process was killed
on this very machine, is taken over. Nobody's clock is compared. Who finds the own lock taken over
ends at once.
"""

import contextlib
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

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
    while not (renewed := _taken(lock, mine, me)):
        if not wait:
            yield False
            return
        if time.monotonic() > deadline:
            raise UserError(f"gave up waiting for {lock}: {holder(lock)}")
        time.sleep(_POLL_S)
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


def _taken(lock: StoredObject, mine: StoredObject, me: dict[str, Any]) -> "_Renewed | None":
    """Our object, written anew from now on, now that we hold the lock; None when others do."""
    if not (held := _created(mine, me)):
        return None
    renewed = _Renewed(mine, me, held)
    taken = False
    try:
        taken = _all_gone(lambda: [lock] if mine != lock else _shared(lock))
    finally:
        if not taken:
            mine.write_if(None, renewed.end())
    return renewed if taken else None


def _created(mine: StoredObject, me: dict[str, Any]) -> bytes | None:
    data = json.dumps(me).encode()
    if held := mine.write_if(data, None):
        return held
    seen, record = mine.generation(), _read(mine)
    if seen is None or record is None:
        return None
    if record.get("token") == me["token"]:  # our request got through, only its answer did not
        return seen
    return mine.write_if(data, seen) if _all_gone(lambda: [mine], delete=False) else None


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


def _all_gone(rivals: Callable[[], list[StoredObject]], *, delete: bool = True) -> bool:
    """Whether the processes of all locks are gone: known to be, or silent, all watched at once.

    Those that are gone are deleted, so that nobody watches them again.
    """
    watched = {path: seen for path in rivals() if (seen := path.generation())}
    states = {path: _state(r) for path in watched if (r := _read(path)) is not None}
    if not watched or "there" in states.values():
        return not watched
    unsure = [path for path, state in states.items() if state == "unknown"]
    deadline = time.monotonic() + _SILENT_S
    while unsure and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        if any(path.generation() not in (watched[path], None) for path in unsure):
            return False
    if not delete:
        return True
    for path, seen in watched.items():
        path.write_if(None, seen)
    deadline = time.monotonic() + _RENEWED_S
    while any(path.generation() for path in rivals()):  # newcomers, who see ours and leave
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _state(record: dict[str, Any]) -> Literal["gone", "there", "unknown"]:
    """What is known of the process that created a lock.

    Earlier versions do not write their locks anew, so that silence says nothing: of those a person
    decides, where the process is not known to be gone.
    """
    unsure = "unknown" if record.get("renewed_s") else "there"
    me = _myself()
    if any(record.get(key) != me[key] for key in ("host", "namespace")):
        return unsure
    pid = record.get("pid")
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        return unsure
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:  # another user's
        pass
    if not (began := record.get("began")):
        return unsure
    return "there" if began == _began(pid) else "gone"


def _began(pid: int) -> str | None:
    """Tells a process from later ones of its number, also after a restart of the machine; None
    where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
    return f"{boot} {ticks}"


def _myself() -> dict[str, Any]:
    # Containers may have a host name in common, but then not their process ids.
    namespace = Path("/proc/self/ns/pid")
    return {
        "host": platform.node(),
        "namespace": str(namespace.readlink()) if namespace.exists() else "",
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
        "renewed_s": _RENEWED_S,
    }

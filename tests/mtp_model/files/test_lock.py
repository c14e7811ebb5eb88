"""Locks in a bucket: of two never both, whoever was there before and is gone."""

import json
import os
import threading
import time

import pytest
from gcs_server import BUCKET, GcsServer

from mtp_model.files import lock as lock_module
from mtp_model.files.object_place import ObjectPlace


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lock_module, "_POLL_S", 0.05)
    monkeypatch.setattr(lock_module, "_RENEWED_S", 0.2)
    monkeypatch.setattr(lock_module, "_SILENT_S", 1.0)


@pytest.fixture
def lock(url: str) -> ObjectPlace:
    return ObjectPlace(BUCKET, f"{url.removeprefix(f'gs://{BUCKET}/')}/lock")


def another(lock: ObjectPlace, gcs: GcsServer, name: str, **changes: object) -> None:
    """Put a lock of another process, made from one of ours."""
    record = lock_module._myself() | {"token": name} | changes
    gcs.put(f"{lock.key}{name}", json.dumps(record).encode())


def test_who_watches_silent_locks_is_not_taken_for_silent(lock: ObjectPlace, gcs: GcsServer):
    """Shared holders died elsewhere; while one waits for them, nobody else gets the lock."""
    for name in (".a", ".b", ".c", ".d", ".e"):
        another(lock, gcs, name, host="elsewhere")
    inside: list[str] = []
    ended = threading.Event()

    def exclusive() -> None:
        began = time.monotonic()
        with lock.locked(wait=True) as got:
            assert got
            assert time.monotonic() - began < 4.5  # watched at once, not one after the other
            inside.append("exclusive")
            ended.wait(20)
            inside.remove("exclusive")

    thread = threading.Thread(target=exclusive)
    thread.start()
    deadline = time.monotonic() + 20
    while not lock.exists():
        assert time.monotonic() < deadline
    tried = 0
    while "exclusive" not in inside or tried < 3:
        with lock.locked(shared=True) as got:
            assert not got
        time.sleep(0.1)  # as who waits does: ours is seen by the other one while we ask
        tried += 1
        assert time.monotonic() < deadline
    ended.set()
    thread.join()
    assert gcs.keys(lock.key) == [], "those that are gone are deleted"
    with lock.locked(shared=True) as got:
        assert got


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({"began": "another start"}, True),  # its number is that of a later process
        ({}, False),
        ({"began": None, "renewed_s": None}, False),  # an earlier version's
        ({"began": None}, True),  # a system that does not say: silence decides
    ],
)
def test_a_number_that_lives_again_is_no_holder(
    lock: ObjectPlace, gcs: GcsServer, changes: dict, taken: bool
):
    assert lock_module._began(os.getpid()) not in (None, lock_module._began(1))
    another(lock, gcs, "", **changes)
    with lock.locked() as got:
        assert got == taken

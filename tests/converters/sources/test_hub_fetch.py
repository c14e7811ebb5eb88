"""Files of the Hub fetched ahead of those who read them, whole and proved."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import BYTES, REPO, fetched_bytes, lone_hub, problem
from hub_server import Fault, HubServer, git_blob, sha256
from huggingface_hub import constants, file_download

from converters.sources import ahead, hub, hub_errors
from converters.sources.hub import HubSource
from mtp_model.problems import ProblemsError

NAMES = [f"model-{number}.safetensors" for number in range(6)]
GET = "^GET /[0-9a-f]{64}$"


@pytest.fixture(name="server")
def a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with lone_hub(tmp_path, monkeypatch) as server:
        at_most(2, monkeypatch)
        yield server


def at_most(files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ahead, hub):
        monkeypatch.setattr(module, "MOST_FILES", files)


def many_files(server: HubServer) -> HubSource:
    files = {name: BYTES[number:] for number, name in enumerate(NAMES)}
    if REPO not in server.models:
        server.add(REPO, files)
    return HubSource(REPO)


def whole(source: HubSource, name: str) -> tuple[str, int, int]:
    return name, 0, source.files()[name]


def each_whole(source: HubSource) -> dict[str, list[tuple[str, int, int]]]:
    return {f"step of {name}": [whole(source, name)] for name in NAMES}


def on_disk(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def until(condition: Callable[[], Any]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("did not happen in 5 s")


def test_files_are_fetched_in_order_ahead_of_the_reader_and_deleted_behind_it(server, tmp_path):
    source, folder = many_files(server), tmp_path / "fetched"
    with source.staged(each_whole(source), folder) as finish:
        until(lambda: fetched_bytes(server) == len(BYTES) + len(BYTES) - 1)
        for number, name in enumerate(NAMES):
            assert len(server.requests("^HEAD")) <= number + 2, "fetched too far ahead"
            assert source.read(name, 0, source.files()[name]) == BYTES[number:]
            assert len(on_disk(folder)) <= 2
            finish(f"step of {name}")
    assert not folder.exists()
    assert fetched_bytes(server) == sum(source.files().values())
    assert sorted(seen.path.rsplit("/")[-1] for seen in server.requests("^HEAD")) == NAMES


def test_a_reader_that_needs_more_files_than_the_limit_gets_them(server, tmp_path, monkeypatch):
    at_most(1, monkeypatch)
    source = many_files(server)
    steps = {"all": [whole(source, name) for name in NAMES], "last": [whole(source, NAMES[-1])]}
    with source.staged(steps, tmp_path / "fetched") as finish:
        for name in reversed(NAMES):
            assert len(source.read(name, 1, 500)) == 500
        finish("all")
        assert on_disk(tmp_path / "fetched") == [NAMES[-1]]
    assert fetched_bytes(server) == sum(source.files().values())


def test_whole_files_are_fetched_and_what_is_not_planned_is_read_by_ranges(server, tmp_path):
    source = many_files(server)
    steps = {"a": [(NAMES[0], 100, 50), (NAMES[0], 900, 10)], "b": [(NAMES[0], 200, 100)]}
    with source.staged(steps, tmp_path / "fetched") as finish:
        assert source.read(NAMES[0], 120, 100) == BYTES[120:220]
        finish("a")
        assert source.read(NAMES[0], 210, 80) == BYTES[210:290]
        assert source.read(NAMES[1], 0, 8) == BYTES[1:9], "what is not among the reads is read too"
        finish("b")
        assert source.read(NAMES[0], 210, 80) == BYTES[210:290], "and what is finished"
    assert fetched_bytes(server) == len(BYTES) + 8 + 80


def test_a_file_whose_connection_dropped_goes_on_where_it_ended(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    source = many_files(server)
    server.fail(GET, Fault(keep_bytes=500))
    server.fail(GET, Fault(drop=True))
    with source.staged({"one": [whole(source, NAMES[0])]}, tmp_path / "fetched"):
        assert source.read(NAMES[0], 0, len(BYTES)) == BYTES
    asked = [seen.headers.get("range") for seen in server.requests(GET)]
    assert asked == [None, "bytes=500-", "bytes=500-"]


PASSING = {
    "503": Fault(status=503),
    "429": Fault(status=429, headers={"Retry-After": "1"}),
    "expired": Fault(status=403),
    "short": Fault(short=True),
}


@pytest.mark.parametrize(
    ("request_", "name"), [*((GET, name) for name in PASSING), ("^HEAD", "503"), ("^HEAD", "429")]
)
def test_failures_that_pass_leave_no_trace(server, tmp_path, name, request_):
    source = many_files(server)
    server.fail(request_, Fault(**{**vars(PASSING[name]), "times": 3}))
    with source.staged({"one": [whole(source, NAMES[0])]}, tmp_path / "fetched"):
        assert source.read(NAMES[0], 0, len(BYTES)) == BYTES


def test_addresses_that_expire_are_asked_for_again(server, tmp_path):
    source = many_files(server)
    server.signature += 1
    stale = {"Location": f"{server.storage_url}/{sha256(BYTES)}?signature=0"}
    linked = {"X-Linked-Size": str(len(BYTES)), "X-Linked-Etag": f'"{sha256(BYTES)}"'}
    commit = {"X-Repo-Commit": source.name.split("@")[1]}
    server.fail("^HEAD", Fault(status=302, headers=stale | linked | commit))
    with source.staged({"one": [whole(source, NAMES[0])]}, tmp_path / "fetched"):
        assert source.read(NAMES[0], 0, len(BYTES)) == BYTES
    assert [seen.status for seen in server.requests(GET)] == [403, 200]


@pytest.mark.parametrize(
    ("fault", "request_", "told"),
    [
        (Fault(status=500), GET, "the Hub answered 500; tried 4 times; run the same command again"),
        (Fault(drop=True), GET, "the connection failed (RemoteProtocolError); tried 4 times"),
        (Fault(short=True), GET, "the transfer failed (OSError); tried 4 times"),
        (Fault(status=503), "^HEAD", "the Hub answered 503; tried 4 times"),
        (Fault(status=200), "^HEAD", "got an answer that is no place of a file; tried 4 times"),
        (Fault(status=404), "^HEAD", "is not there, or needs access (404)"),
    ],
)
def test_a_failure_that_stays_is_told_to_the_reader(server, tmp_path, fault, request_, told):
    source = many_files(server)
    server.fail(request_, Fault(**{**vars(fault), "times": 999}))
    with (
        pytest.raises(ProblemsError) as error,
        source.staged({"one": [whole(source, NAMES[0])]}, tmp_path / "fetched"),
    ):
        source.read(NAMES[0], 0, 10)
    assert problem(error).startswith(f"hub       {NAMES[0]} {told}")
    assert not (tmp_path / "fetched").exists(), "nothing is left of a file in part"


def test_files_that_were_fetched_and_not_read_are_proved_and_not_fetched_again(server, tmp_path):
    source, folder = many_files(server), tmp_path / "fetched"
    with source.staged(each_whole(source), folder):
        source.read(NAMES[0], 0, 10)
        source.read(NAMES[1], 0, 10)
    assert on_disk(folder) == NAMES[:2]
    damaged = (folder / NAMES[1]).read_bytes()[:-1] + b"?"
    (folder / NAMES[1]).write_bytes(damaged)  # by a power cut
    server.seen.clear()
    again = many_files(server)
    with again.staged(each_whole(again), folder) as finish:
        for number, name in enumerate(NAMES[:2]):
            assert again.read(name, 0, len(BYTES) - number) == BYTES[number:]
            finish(f"step of {name}")
    assert not [seen for seen in server.requests("^HEAD") if seen.path.endswith(NAMES[0])]
    assert [seen for seen in server.requests("^HEAD") if seen.path.endswith(NAMES[1])]


KILLED = """
import sys, time
from pathlib import Path
from huggingface_hub import file_download
from converters.sources.hub import HubSource
source = HubSource("{repo}")
reads = {{name: [(name, 0, size)] for name, size in source.files().items()}}
with source.staged(reads, Path("{folder}")):
    source.read("{first}", 0, 10)
    print("read", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_left_in_part_is_deleted_and_whole_files_are_used(server, tmp_path):
    source, folder = many_files(server), tmp_path / "fetched"
    server.fail(f"^GET /{sha256(BYTES[1:])}", Fault(keep_bytes=500, hang=True))
    code = KILLED.format(repo=REPO, folder=folder, first=NAMES[0])
    env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, **env}
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"read\n"
        until(lambda: list(folder.rglob("*.incomplete")))
        process.send_signal(signal.SIGKILL)
    assert on_disk(folder)[0] == NAMES[0]
    server.clear_faults()
    server.seen.clear()
    with source.staged({"one": [whole(source, NAMES[0])]}, folder) as finish:
        assert not list(folder.rglob("*.incomplete"))
        assert source.read(NAMES[0], 0, len(BYTES)) == BYTES
        finish("one")
    assert fetched_bytes(server) == 0
    assert not folder.exists()


def test_what_an_earlier_plan_left_is_deleted(server, tmp_path):
    (tmp_path / "fetched" / "sub").mkdir(parents=True)
    old = tmp_path / "fetched" / "sub" / NAMES[0]
    old.write_bytes(bytes(10))
    source = many_files(server)
    with source.staged({"one": [whole(source, NAMES[0])]}, tmp_path / "fetched") as finish:
        assert not old.exists()
        finish("one")
    assert not (tmp_path / "fetched").exists()


def test_a_file_with_another_digest_is_fetched_once_more(server, tmp_path):
    source = many_files(server)
    server.fail(f"^GET /{sha256(BYTES)}", Fault(corrupt=True))
    with source.staged({"one": [whole(source, NAMES[0])]}, tmp_path / "fetched"):
        assert source.read(NAMES[0], 0, len(BYTES)) == BYTES
    assert fetched_bytes(server) == 2 * len(BYTES)


def test_a_file_whose_digest_stays_another_is_refused_and_not_kept(server, tmp_path):
    source, folder = many_files(server), tmp_path / "fetched"
    server.fail(f"^GET /{sha256(BYTES)}", Fault(corrupt=True, times=999))
    with pytest.raises(ProblemsError) as error, source.staged(each_whole(source), folder):
        source.read(NAMES[0], 0, 10)
    assert re.search(r"was fetched twice and has digest \w{64}, the Hub lists", problem(error))
    assert sha256(BYTES) in problem(error)
    assert NAMES[0] not in on_disk(folder)


def test_a_file_that_is_not_in_large_storage_is_proved_too(server, tmp_path):
    server.add(REPO, {"weights.bin": BYTES, "more.bin": BYTES[1:]})
    source = HubSource(REPO)
    server.fail("^GET .*/more.bin", Fault(corrupt=True, times=9))
    reads = {name: [(name, 0, 9)] for name in ("weights.bin", "more.bin")}
    with source.staged(reads, tmp_path / "fetched"):
        assert source.read("weights.bin", 1, 3) == BYTES[1:4]
        with pytest.raises(ProblemsError, match=f"the Hub lists {git_blob(BYTES[1:])}"):
            source.read("more.bin", 1, 3)


def test_a_full_disk_is_named(server, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    source, folder = many_files(server), tmp_path / "fetched"
    with pytest.raises(ProblemsError) as error, source.staged(each_whole(source), folder):
        source.read(NAMES[0], 0, 10)
    told = f"cannot be stored in {folder}: No space left on device; make room there"
    assert told in problem(error)


def test_what_xet_raises_is_tried_again_and_told(server, tmp_path, monkeypatch):
    tries = []

    def failing(**_: Any) -> None:
        tries.append(1)
        raise RuntimeError("Task error: https://storage?signature=secret")

    monkeypatch.setattr(file_download, "xet_get", failing)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    source = many_files(server)
    xet = {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{server.url}/token"}
    about = {"X-Repo-Commit": source.name.split("@")[1], "ETag": sha256(BYTES)}
    size = {"X-Linked-Size": str(len(BYTES))}
    server.fail("^HEAD", Fault(status=200, headers=xet | about | size, times=99))
    with (
        pytest.raises(ProblemsError) as error,
        source.staged({"one": [whole(source, NAMES[0])]}, tmp_path / "fetched"),
    ):
        source.read(NAMES[0], 0, 10)
    assert "the transfer failed (RuntimeError); tried 4 times" in problem(error)
    assert len(tries) == 4


def test_whoever_stops_does_not_wait_for_another_try(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_errors, "FIRST_WAIT_S", 60)
    monkeypatch.setattr(hub_errors, "LONGEST_WAIT_S", 60)
    source = many_files(server)
    server.fail(GET, Fault(status=503, times=999))
    began = time.monotonic()
    with source.staged(each_whole(source), tmp_path / "fetched"):
        until(lambda: len(server.requests(GET)) >= 2)
    assert time.monotonic() - began < 5


def test_whoever_stops_does_not_wait_for_what_is_on_the_way(server, tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "_END_S", 0.1)
    source = many_files(server)
    server.fail(GET, Fault(keep_bytes=500, hang=True, times=999))
    began = time.monotonic()
    with source.staged(each_whole(source), tmp_path / "fetched"):
        until(lambda: len(server.requests(GET)) >= 2)
    assert time.monotonic() - began < 5
    assert not (tmp_path / "fetched").exists()


def test_files_in_the_users_cache_are_read_there_and_stay(server, tmp_path):
    source = many_files(server)
    snapshot = Path(constants.HF_HUB_CACHE, "models--org--Model-V3.1", "snapshots")
    kept = snapshot / source.name.split("@")[1]
    kept.mkdir(parents=True)
    for number in (2, 3):
        (kept / NAMES[number]).write_bytes(BYTES[number:])
    (kept / NAMES[4]).write_bytes(b"not whole")
    assert source.room_needed(each_whole(source), tmp_path / "fetched") == {
        tmp_path / "fetched": len(BYTES) + len(BYTES) - 1
    }
    with source.staged(each_whole(source), tmp_path / "fetched") as finish:
        for number, name in enumerate(NAMES):
            assert source.read(name, 0, len(BYTES) - number) == BYTES[number:]
            finish(f"step of {name}")
    assert {seen.path.rsplit("/")[-1] for seen in server.requests("^HEAD")} == {
        NAMES[number] for number in (0, 1, 4, 5)
    }
    assert source.read(NAMES[2], 0, 99) == BYTES[2:101]
    assert sorted(path.name for path in kept.iterdir()) == NAMES[2:5], "not this tool's to delete"

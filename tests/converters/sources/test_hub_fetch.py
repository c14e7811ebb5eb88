"""Files of the Hub fetched ahead of those who read them."""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import BYTES, REPO, fetched_bytes, lone_hub, problem, source_of
from hub_server import Fault, HubServer, sha256
from huggingface_hub import try_to_load_from_cache

from converters.sources.hub import HubSource
from converters.sources.hub_downloads import Limits
from converters.sources.hub_errors import Patience
from converters.sources.local import LocalSource
from converters.sources.partial_file import covers, cut, merged, without
from mtp_model.problems import ProblemsError

NAMES = [f"model-{number}.safetensors" for number in range(6)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with lone_hub(tmp_path, monkeypatch) as server:
        yield server


def many_files(hub: HubServer, **options: Any) -> HubSource:
    files = {name: BYTES[number:] for number, name in enumerate(NAMES)}
    if REPO not in hub.models:
        hub.add(REPO, files)
    limits = Limits(most_files=2, piece_bytes=1000)
    return source_of(hub, **{"limits": limits} | options)


def whole(source: HubSource, name: str) -> tuple[str, int, int]:
    return name, 0, source.files()[name]


def each_whole(source: HubSource) -> dict[str, list[tuple[str, int, int]]]:
    return {f"step of {name}": [whole(source, name)] for name in NAMES}


def until(condition: Callable[[], Any]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("did not happen in 5 s")


def test_files_are_fetched_in_order_ahead_of_the_reader_and_deleted_behind_it(hub, tmp_path):
    source, folder = many_files(hub), tmp_path / "fetched"
    with source.staged(each_whole(source), folder) as finish:
        until(lambda: fetched_bytes(hub) == len(BYTES) + len(BYTES) - 1)
        for number, name in enumerate(NAMES):
            assert len(hub.requests("^HEAD")) <= number + 2, "fetched too far ahead"
            assert source.read(name, 0, source.files()[name]) == BYTES[number:]
            assert len(list(folder.glob("*.part"))) <= 2
            finish(f"step of {name}")
    assert not folder.exists()
    assert fetched_bytes(hub) == sum(source.files().values())
    assert sorted(seen.path.rsplit("/")[-1] for seen in hub.requests("^HEAD")) == NAMES


def test_a_reader_that_needs_more_files_than_the_limit_gets_them(hub, tmp_path):
    source = many_files(hub, limits=Limits(most_files=1))
    steps = {"all": [whole(source, name) for name in NAMES], "last": [whole(source, NAMES[-1])]}
    with source.staged(steps, tmp_path / "fetched") as finish:
        for name in reversed(NAMES):
            assert len(source.read(name, 1, 500)) == 500
        finish("all")
        assert len(list((tmp_path / "fetched").glob("*.part"))) == 1
    assert fetched_bytes(hub) == sum(source.files().values())


def test_only_the_ranges_that_are_read_are_fetched_and_neighbours_together(hub, tmp_path):
    source = many_files(hub, limits=Limits())
    steps = {
        "a": [(NAMES[0], 100, 50), (NAMES[0], 150, 50), (NAMES[0], 900, 10)],
        "b": [(NAMES[0], 200, 100), (NAMES[0], 120, 10), (NAMES[1], 7, 0)],
    }
    with source.staged(steps, tmp_path / "fetched") as finish:
        assert source.read(NAMES[0], 120, 100) == BYTES[120:220]
        assert source.read(NAMES[0], 900, 10) == BYTES[900:910]
        asked = {seen.headers["range"] for seen in hub.requests("^GET /[0-9a-f]{64}$")}
        assert asked == {"bytes=100-299", "bytes=900-909"}
        assert source.read(NAMES[0], 0, 8) == BYTES[:8], "what is not among the reads is read too"
        finish("a")
        assert source.read(NAMES[0], 210, 80) == BYTES[210:290]
        finish("b")
        assert source.read(NAMES[0], 210, 80) == BYTES[210:290], "and what is finished"
    assert fetched_bytes(hub) == 200 + 10 + 8 + 80


@pytest.mark.parametrize("fault", [Fault(keep_bytes=50), Fault(status=500), Fault(drop=True)])
def test_a_file_that_was_fetched_in_part_is_continued(hub, tmp_path, fault):
    source, folder = many_files(hub), tmp_path / "fetched"
    steps = {"one": [whole(source, NAMES[0])]}
    hub.fail(f"^GET /{sha256(BYTES)}", Fault(times=5))  # the first five pieces arrive
    hub.fail(f"^GET /{sha256(BYTES)}", Fault(**{**vars(fault), "times": 999}))
    with pytest.raises(ProblemsError) as error, source.staged(steps, folder):
        source.read(NAMES[0], 0, 10)
    assert "model-0.safetensors the" in problem(error)
    (part,), (lines,) = folder.glob("*.part"), folder.glob("*.ranges")
    kept = len(lines.read_text().splitlines())
    assert kept == 5
    hub.clear_faults()
    hub.seen.clear()
    lines.write_text(lines.read_text() + "10000 10")  # torn by a power cut
    again = many_files(hub)
    with again.staged(steps, folder) as finish:
        assert again.read(NAMES[0], 0, len(BYTES)) == BYTES == part.read_bytes()
        finish("one")
    assert fetched_bytes(hub) == len(BYTES) - 5 * 1000


def test_what_an_earlier_plan_left_is_deleted(hub, tmp_path):
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "0123.part").write_bytes(bytes(10))
    source = many_files(hub)
    with source.staged({"one": [whole(source, NAMES[0])]}, tmp_path / "fetched") as finish:
        assert not (tmp_path / "fetched" / "0123.part").exists()
        finish("one")
    assert not (tmp_path / "fetched").exists()


def test_a_file_with_another_digest_is_fetched_once_more(hub, tmp_path):
    source = many_files(hub)
    hub.fail(f"^GET /{sha256(BYTES)}", Fault(corrupt=True))
    with source.staged({"one": [whole(source, NAMES[0])]}, tmp_path / "fetched"):
        assert source.read(NAMES[0], 0, len(BYTES)) == BYTES
    assert fetched_bytes(hub) == 2 * len(BYTES)


def test_a_file_whose_digest_stays_another_is_refused_and_not_kept(hub, tmp_path):
    source, folder = many_files(hub), tmp_path / "fetched"
    hub.fail(f"^GET /{sha256(BYTES)}", Fault(corrupt=True, times=999))
    with pytest.raises(ProblemsError) as error, source.staged(each_whole(source), folder):
        source.read(NAMES[0], 0, 10)
    assert re.search(r"was fetched twice and has digest \w{64}, the Hub lists", problem(error))
    assert sha256(BYTES) in problem(error)


def test_a_full_disk_is_named(hub, tmp_path, monkeypatch):
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    source, folder = many_files(hub), tmp_path / "fetched"
    with pytest.raises(ProblemsError) as error, source.staged(each_whole(source), folder):
        source.read(NAMES[0], 0, 10)
    told = f"cannot be stored in {folder}: No space left on device; make room there"
    assert told in problem(error)


def test_whoever_stops_does_not_wait_for_what_is_on_the_way(hub, tmp_path):
    source = many_files(hub, patience=Patience(first_wait_s=60))
    hub.fail("^GET /[0-9a-f]{64}$", Fault(status=503, times=999))
    began = time.monotonic()
    with source.staged(each_whole(source), tmp_path / "fetched"):
        until(lambda: len(hub.requests("^GET /[0-9a-f]{64}$")) >= 2)
    assert time.monotonic() - began < 5


def test_kept_downloads_are_found_by_this_and_other_tools(hub, tmp_path):
    source = many_files(hub, keep_downloads=True)
    with source.staged(each_whole(source), tmp_path / "fetched") as finish:
        for number, name in enumerate(NAMES):
            assert source.read(name, 0, 99) == BYTES[number : number + 99]
            finish(f"step of {name}")
    assert not (tmp_path / "fetched").exists()
    commit = source.name.split("@")[1]
    paths = [try_to_load_from_cache(REPO, name, revision=commit) for name in NAMES]
    assert [Path(str(path)).read_bytes() for path in paths] == [BYTES[n:] for n in range(6)]
    local = LocalSource(str(Path(str(paths[0])).parent))
    assert local.files() == source.files()
    hub.seen.clear()
    again = many_files(hub)
    with again.staged(each_whole(again), tmp_path / "fetched") as finish:
        assert again.read(NAMES[3], 0, 99) == BYTES[3:102]
        for step in each_whole(again):
            finish(step)
    assert again.read(NAMES[2], 0, 99) == BYTES[2:101]
    assert fetched_bytes(hub) == 0
    assert local.files() == source.files(), "what is in the cache is not this tool's to delete"


def test_ranges():
    assert merged([(5, 7), (0, 2), (2, 3), (6, 9), (4, 4)]) == [(0, 3), (5, 9)]
    assert without([(0, 10), (20, 30)], [(2, 3), (5, 22), (30, 40)]) == [(0, 2), (3, 5), (22, 30)]
    assert without([(0, 10)], [(0, 10)]) == without([], [(0, 3)]) == []
    assert without([(3, 5)], [(0, 3), (5, 9)]) == [(3, 5)]
    assert [covers([(0, 3), (5, 9)], *span) for span in ((5, 9), (2, 4), (9, 9), (9, 10))] == [
        True,
        False,
        True,
        False,
    ]
    assert list(cut([(0, 5), (9, 10)], 2)) == [(0, 2), (2, 4), (4, 5), (9, 10)]

"""Checkpoints read from the Hub: which bytes, what happens when they don't come, what is kept."""

import errno
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, HubServer, git_blob, sha256
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import close_session
from roundtrip import SMALL_CHUNKS, make_source, run_import, tree_bytes

from converters.hub import HubSource
from converters.hub_downloads import Limits
from converters.hub_errors import Patience
from converters.importer import ImportSummary, import_checkpoint
from converters.listing import list_checkpoint
from converters.partial_file import covers, cut, merged, without
from converters.problems import ProblemsError
from converters.source import LocalSource, open_source
from mtp_model.config import ModelConfig
from mtp_model.store import UNFINISHED, open_checkpoint

REPO = "org/Model-V3.1"
TOKEN = "hf_MARKER0123456789"
QUICK = Patience(tries=4, first_wait_s=0.001, longest_wait_s=0.05)
BYTES = bytes(range(256)) * 40  # of the one file in most tests below


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of this machine's user, nothing left of the test before, no waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield
    close_session()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(token=TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "fp8", num_mtp=2)


def source_of(hub: HubServer, src: str = REPO, **options: Any) -> HubSource:
    return HubSource(src, endpoint=hub.url, **{"patience": QUICK} | options)


def one_file(hub: HubServer, **options: Any) -> HubSource:
    hub.add(REPO, {"model.safetensors": BYTES, "config.json": b'{"a": 1}'})
    return source_of(hub, **options)


def problem(error: pytest.ExceptionInfo[ProblemsError]) -> str:
    (found,) = error.value.problems
    return str(found)


# What is read


def test_an_id_is_a_folder_when_there_is_one_and_else_a_model(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    hub.add("org/model", {"config.json": b"{}"})
    found = open_source("org/model")
    assert isinstance(found, HubSource)
    assert found.name == f"org/model@{hub.models['org/model'].branches['main']}"
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert isinstance(open_source("org/model"), LocalSource)
    for folder in ("./org/other", "a/b/c", "Model", "/org/model"):
        with pytest.raises(ProblemsError, match="does not exist; needed the folder that holds"):
            open_source(folder)


def test_reads_are_exact_and_fingerprints_are_of_the_content(hub):
    source = one_file(hub)
    assert source.files() == {"config.json": 8, "model.safetensors": len(BYTES)}
    assert source.read("model.safetensors", 10, 300) == BYTES[10:310]
    assert source.read("model.safetensors", 0, len(BYTES)) == BYTES
    assert source.read("model.safetensors", 5, 0) == b""
    assert source.read("config.json", 2, 3) == b'a": '[:3]
    out = bytearray(7)
    source.read_into("model.safetensors", 1, out)
    assert out == BYTES[1:8]
    size = {"size": len(BYTES)}
    assert source.fingerprint("model.safetensors") == {**size, "sha256": sha256(BYTES)}
    assert source.fingerprint("config.json") == {"size": 8, "git_blob": git_blob(b'{"a": 1}')}


def test_bytes_that_the_file_lacks_and_files_that_the_model_lacks_are_refused(hub):
    source = one_file(hub)
    needed = f"is {len(BYTES)} bytes, needed bytes 10200 to {10200 + 2**40}"
    with pytest.raises(ProblemsError, match=needed):
        source.read("model.safetensors", 10200, 2**40)
    with pytest.raises(ProblemsError, match=r"other\.safetensors is not in the repository"):
        source.fingerprint("other.safetensors")


def test_a_revision_stays_at_its_commit_when_the_branch_moves(hub):
    model = hub.add(REPO, {"config.json": b"{}"})
    old = model.branches["main"]
    source = source_of(hub, f"{REPO}@main")
    new = model.commit({"config.json": b"[1]"})
    assert source.name == f"{REPO}@{old}"
    assert source.read("config.json", 0, 2) == b"{}"
    assert source_of(hub).name == f"{REPO}@{new}"
    assert source_of(hub, f"{REPO}@{old}").read("config.json", 0, 2) == b"{}"
    model.commit({"config.json": b"{}"}, "refs/pr/1")
    assert source_of(hub, f"{REPO}@refs/pr/1").files() == {"config.json": 2}


def test_listing_a_model_reads_headers_config_and_index_and_nothing_else(hub, checkpoint):
    files = tree_bytes(checkpoint)
    hub.add(REPO, files)
    listing = list_checkpoint(source_of(hub))
    assert listing.tensors == list_checkpoint(LocalSource(str(checkpoint))).tensors
    large = hub.requests(r"^GET /[0-9a-f]{64}$")
    headers = sum(8 + len(header.raw) for header in listing.headers.values())
    peeked = len(b"version https://git-lfs") - 8  # with the length: whether it is a pointer
    assert sum(seen.body_bytes for seen in large) == headers + peeked * len(listing.headers)
    assert all("range" in seen.headers for seen in large)
    small = hub.requests(r"^GET .*/resolve/")
    assert [seen.path.rsplit("/")[-1] for seen in small] == ["model.safetensors.index.json"]
    assert len(hub.requests("^HEAD")) == len(listing.headers) + 1


# What may go wrong on the way

PASSING = {
    "429": Fault(status=429, headers={"Retry-After": "1"}),
    "429 with a date": Fault(status=429, headers={"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}),
    "429 with a limit": Fault(status=429, headers={"RateLimit": '"resolvers";r=0;t=55'}),
    "500": Fault(status=500),
    "503": Fault(status=503, headers={"Retry-After": "soon"}),
    "dropped": Fault(drop=True),
    "truncated": Fault(keep_bytes=500),
    "shorter in good order": Fault(short=True),
    "whole file for a range": Fault(ignore_range=True),
    "another range": Fault(shift_range=3),
    "compressed": Fault(headers={"Content-Encoding": "gzip"}, status=206),
    "signature expired": Fault(status=403),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_failure_of_storage_that_passes_leaves_no_trace(hub, name):
    source = one_file(hub)
    hub.fail("^GET /[0-9a-f]{64}$", Fault(**{**vars(PASSING[name]), "times": 3}))
    assert source.read("model.safetensors", 100, 5000) == BYTES[100:5100]
    assert len(hub.requests("^GET /[0-9a-f]{64}$")) == 4


@pytest.mark.parametrize("name", ["429", "500", "503", "dropped"])
@pytest.mark.parametrize("request_", ["^GET /api", "^HEAD", "^GET .*config.json"])
def test_a_failure_of_the_hub_that_passes_leaves_no_trace(hub, name, request_):
    hub.fail(request_, Fault(**{**vars(PASSING[name]), "times": 3}))
    assert one_file(hub).read("config.json", 0, 8) == b'{"a": 1}'


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("429", "the Hub answered 429"),
        ("500", "the Hub answered 500"),
        ("truncated", "the connection failed (RemoteProtocolError)"),
        ("shorter in good order", "got an answer of 2500 bytes, needed 5000"),
        ("whole file for a range", "got the whole file (200) in answer to a range request"),
        ("another range", "got the range bytes 103-5102/10240, needed bytes 100-5099/10240"),
        ("signature expired", "the Hub answered 403"),
    ],
)
def test_a_failure_that_stays_names_file_and_status(hub, name, found):
    source = one_file(hub)
    hub.fail("^GET /[0-9a-f]{64}$", Fault(**{**vars(PASSING[name]), "times": 99}))
    with pytest.raises(ProblemsError) as error:
        source.read("model.safetensors", 100, 5000)
    assert problem(error).startswith(f"hub       model.safetensors {found}")
    assert problem(error).endswith("; tried 4 times; run the same command again later")
    assert error.value.where == source.name


def test_what_arrived_before_the_connection_dropped_is_not_asked_for_again(hub):
    source = one_file(hub)
    hub.fail("^GET /[0-9a-f]{64}$", Fault(keep_bytes=500, times=2))
    assert source.read("model.safetensors", 100, 5000) == BYTES[100:5100]
    asked = [seen.headers["range"] for seen in hub.requests("^GET /[0-9a-f]{64}$")]
    assert asked == ["bytes=100-5099", "bytes=600-5099", "bytes=1100-5099"]


def test_addresses_that_expire_are_asked_for_again(hub):
    source = one_file(hub)
    source.read("model.safetensors", 0, 8)
    hub.signature += 1
    assert source.read("model.safetensors", 8, 8) == BYTES[8:16]
    assert len(hub.requests("^HEAD")) == 2


def test_waits_double_and_are_as_long_as_asked_for_up_to_a_limit():
    patience = Patience(first_wait_s=1, longest_wait_s=60)
    assert [patience.wait_s(failures, None) for failures in (1, 2, 3, 7, 99)] == [1, 2, 4, 60, 60]
    assert patience.wait_s(1, 30.0) == 30
    assert patience.wait_s(1, 1e9) == 60


def test_small_files_with_other_bytes_than_listed_are_refused(hub):
    source = one_file(hub)
    hub.fail("^GET .*config.json", Fault(corrupt=True, times=99))
    with pytest.raises(ProblemsError, match=r"config\.json has digest [0-9a-f]{40}, the Hub lists"):
        source.read("config.json", 0, 8)


# What is fetched ahead

NAMES = [f"model-{number}.safetensors" for number in range(6)]


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


def fetched_bytes(hub: HubServer) -> int:
    return sum(seen.body_bytes for seen in hub.requests("^GET /[0-9a-f]{64}$"))


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


# Imports


def import_from(
    source: HubSource, dst: Path, progress: Callable[[int, int], None] | None = None, **options: Any
) -> ImportSummary:
    listing = list_checkpoint(source)
    raw = source.read("config.json", 0, source.files()["config.json"])
    config = ModelConfig.from_dict(json.loads(raw))
    options = {"policy": SMALL_CHUNKS, "workers": 2} | options
    return import_checkpoint(listing, config, dst, progress=progress, **options)


def test_an_import_from_the_hub_is_the_same_as_from_a_folder(hub, checkpoint, tmp_path):
    hub.add(REPO, tree_bytes(checkpoint))
    most = []

    def watch(_done: int, _total: int) -> None:
        most.append(len(list((tmp_path / "hub" / UNFINISHED).glob("*/*.part"))))

    source = source_of(hub, limits=Limits(most_files=2, piece_bytes=5000))
    import_from(source, tmp_path / "hub", watch)
    run_import(checkpoint, tmp_path / "local")
    found, wanted = tree_bytes(tmp_path / "hub"), tree_bytes(tmp_path / "local")
    differing = {name for name in wanted if found[name] != wanted[name]}
    assert found.keys() == wanted.keys()
    assert differing <= {"provenance.json", "COMPLETE"}
    provenance = open_checkpoint(tmp_path / "hub").provenance
    assert provenance["source"]["name"] == source.name
    local = open_checkpoint(tmp_path / "local").provenance
    assert provenance["source"]["files"] == local["source"]["files"]
    assert 1 <= max(most) <= 4
    sizes = source.files()
    shards = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    assert fetched_bytes(hub) < 1.2 * shards, "headers are read twice, all else once"


def test_an_import_of_the_mtp_module_fetches_its_byte_ranges_only(hub, checkpoint, tmp_path):
    hub.add(REPO, tree_bytes(checkpoint))
    source = source_of(hub)
    list_checkpoint(source)
    headers = fetched_bytes(hub)
    summary = import_from(source, tmp_path / "mtp", scope="mtp")
    # Headers once more for the import, and once with a file that is wanted nearly whole.
    assert fetched_bytes(hub) <= 3 * headers + summary.source_bytes
    assert summary.source_bytes < 0.7 * sum(source.files().values())


def test_an_interrupted_import_fetches_no_file_twice(hub, checkpoint, tmp_path):
    hub.add(REPO, tree_bytes(checkpoint))

    def interrupt(done: int, total: int) -> None:
        if done > 0.5 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_from(source_of(hub), tmp_path / "hub", interrupt)
    first = fetched_bytes(hub)
    hub.seen.clear()
    summary = import_from(source_of(hub), tmp_path / "hub")
    assert summary.finished
    assert summary.resumed_units > 0
    shards = sum(s for name, s in source_of(hub).files().items() if name.endswith("safetensors"))
    assert first + fetched_bytes(hub) < 1.5 * shards
    run_import(checkpoint, tmp_path / "local")
    assert tree_bytes(tmp_path / "hub" / "params") == tree_bytes(tmp_path / "local" / "params")


def test_an_import_that_is_continued_after_the_branch_moved_is_refused(hub, checkpoint, tmp_path):
    files = tree_bytes(checkpoint)
    model = hub.add(REPO, files)
    old = model.branches["main"]

    def interrupt(done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_from(source_of(hub), tmp_path / "hub", interrupt)
    model.commit(files | {"figures/model.svg": b"<svg></svg>"})
    with pytest.raises(ProblemsError, match=r"changed +figures/model\.svg was size 6000, git_blob"):
        import_from(source_of(hub), tmp_path / "hub")
    assert import_from(source_of(hub, f"{REPO}@{old}"), tmp_path / "hub").finished


# What the user is told


def test_a_server_that_is_not_there_is_told_apart_from_a_missing_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProblemsError) as error:
        HubSource("my/folder", endpoint="http://127.0.0.1:9", patience=QUICK)
    assert error.value.where == "the Hub, since there is no folder my/folder"
    assert problem(error).startswith("hub       my/folder the connection failed (ConnectError)")


@pytest.mark.parametrize(
    ("src", "settings", "token", "told"),
    [
        ("org/none", {}, None, "is not there, or needs access (401); check the name; for access"),
        ("org/none", {}, TOKEN, "(404); check the name; for access use a token that has it"),
        (REPO, {"private": True}, None, "(401); check the name; for access run `hf auth login`"),
        (f"{REPO}@nope", {}, None, "has no such revision (404); name a branch, a tag or a commit"),
    ],
)
def test_what_cannot_be_opened_says_what_to_do(hub, src, settings, token, told):
    hub.add(REPO, {"config.json": b"{}"}, **settings)
    with pytest.raises(ProblemsError) as error:
        source_of(hub, src, token=token)
    assert told in problem(error)


def test_a_gated_model_says_where_to_ask(hub):
    hub.add(REPO, {"config.json": b"{}"}, gated=True)
    with pytest.raises(ProblemsError) as error:
        source_of(hub).read("config.json", 0, 2)
    assert "config.json is gated (403): ask for access on its page" in problem(error)
    assert source_of(hub, token=TOKEN).read("config.json", 0, 2) == b"{}"


def test_a_file_that_is_listed_and_not_there_is_said_so(hub):
    source = one_file(hub)
    hub.models[REPO].commits[source.name.split("@")[1]].clear()
    with pytest.raises(ProblemsError, match=r"model\.safetensors is not there \(404\) though"):
        source.read("model.safetensors", 0, 8)


def test_offline_mode_is_named(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ProblemsError, match="HF_HUB_OFFLINE is set; unset it, or use a folder"):
        one_file(hub)


@pytest.mark.parametrize(
    ("listed", "fault"),
    [
        ({"rfilename": "../config.json"}, r"\.\./config.json leaves the checkpoint's folder"),
        ({"rfilename": "/etc/passwd"}, "is an absolute path"),
        ({"rfilename": "a//b"}, "is not a plain relative path"),
        ({"rfilename": "a\nb"}, "has a name that cannot be printed"),
        ({"rfilename": "\ud800"}, "has a name that cannot be printed"),
        ({"rfilename": 7}, "7 is no file name"),
        ({"rfilename": "config.json"}, "config.json is listed twice"),
        ({"size": -1}, "is listed with -1 bytes"),
        ({"size": None}, "is listed with None bytes"),
        ({"size": True}, "is listed with True bytes"),
        ({"blobId": "../../x"}, "is listed with git blob"),
        ({"lfs": {"size": 5, "sha256": "../x", "pointerSize": 1}}, "is listed with sha256"),
        ({"lfs": {"size": 5, "sha256": "a" * 64, "pointerSize": 1}}, "with 2 and with 5 bytes"),
        ({"lfs": {}}, "got an answer that is no model"),
    ],
)
def test_a_list_of_files_that_no_honest_hub_gives_is_refused(hub, listed, fault):
    if listed.get("lfs") == {}:
        listed = {"lfs": {"size": 5}}
    hub.add(REPO, {"config.json": b"{}", "x.json": b"[]"}, listed={"x.json": listed})
    with pytest.raises(ProblemsError, match=fault):
        source_of(hub)


@pytest.mark.parametrize(
    "listed", [{"size": 9, "lfs": None}, {"blobId": "a" * 40}, {"size": 1, "lfs": None}]
)
def test_a_file_that_is_not_as_listed_is_refused(hub, listed):
    hub.add(REPO, {"config.json": b"{}"}, listed={"config.json": listed})
    with pytest.raises(ProblemsError, match=r"is served with 2 bytes and tag .* the Hub lists"):
        source_of(hub).read("config.json", 0, 1)


def test_an_answer_that_is_no_model_is_refused(hub):
    hub.add(REPO, {})
    for answer in (b"[]", b"{", b'{"id": "x"}', b'{"id": "x", "sha": "main"}'):
        hub.fail("^GET /api", Fault(body=answer))
        with pytest.raises(ProblemsError, match=r"no model|is at commit .*, needed 40"):
            source_of(hub)


def test_places_that_are_none_are_refused(hub):
    source = one_file(hub)
    for place in ("file:///etc/passwd", "http://[::1", "//\u00ff\u00fe:x/"):
        found = {"Location": place, "X-Linked-Size": str(len(BYTES))}
        hub.fail("^HEAD .*model", Fault(status=302, headers=found, times=4))
        with pytest.raises(ProblemsError, match=r"needed http or https|no place|failed \("):
            source.read("model.safetensors", 0, 8)


# Secrets


def test_the_token_goes_to_the_hub_only_and_appears_nowhere(hub, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    hub.add(REPO, {"model.safetensors": BYTES, "config.json": b"{}"}, private=True)
    source = source_of(hub, token=TOKEN)
    assert source.read("model.safetensors", 0, 8) == BYTES[:8]
    assert source.read("config.json", 0, 2) == b"{}"
    for seen in hub.seen:
        stored = re.fullmatch("/[0-9a-f]{64}", seen.path)
        assert ("authorization" in seen.headers) is not bool(stored), seen
    texts = [source.name]
    for place, request in ((source, "."), (source, "^GET /[0-9a-f]{64}$"), (None, "^GET /api")):
        for status in (401, 403, 404, 429, 500, 503):
            hub.fail(request, Fault(status=status, times=4))
            with pytest.raises(ProblemsError) as error:
                (place or source_of(hub, token=TOKEN)).read("model.safetensors", 0, 9)
            hub.clear_faults()
            texts += [str(error.value), repr(error.value), str(error.getrepr(style="long"))]
    assert len(texts) == 1 + 3 * 3 * 6
    out, err = capfd.readouterr()
    for text in (*texts, caplog.text, out, err):
        assert TOKEN not in text

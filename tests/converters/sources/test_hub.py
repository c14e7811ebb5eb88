"""A model on the Hub as a source: what is asked for, and what happens when it doesn't come."""

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_client import BYTES, REPO, TOKEN, lone_hub, problem
from hub_server import Fault, HubServer, git_blob, sha256
from huggingface_hub import constants
from roundtrip import make_source, tree_bytes

from converters.format.listing import list_checkpoint
from converters.sources import hub_errors
from converters.sources.hub import HubSource
from converters.sources.local import LocalSource
from converters.sources.open import open_source
from mtp_model.problems import ProblemsError


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with lone_hub(tmp_path, monkeypatch) as server:
        yield server


def one_file(hub: HubServer) -> HubSource:
    hub.add(REPO, {"model.safetensors": BYTES, "config.json": b'{"a": 1}'})
    return HubSource(REPO)


# What is read


def test_an_id_is_a_folder_when_there_is_one_and_else_a_model(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
    source = HubSource(f"{REPO}@main")
    new = model.commit({"config.json": b"[1]"})
    assert source.name == f"{REPO}@{old}"
    assert source.read("config.json", 0, 2) == b"{}"
    assert HubSource(REPO).name == f"{REPO}@{new}"
    assert HubSource(f"{REPO}@{old}").read("config.json", 0, 2) == b"{}"
    model.commit({"config.json": b"{}"}, "refs/pr/1")
    assert HubSource(f"{REPO}@refs/pr/1").files() == {"config.json": 2}


def test_listing_a_model_reads_headers_config_and_index_and_nothing_else(hub, tmp_path):
    checkpoint = make_source(tmp_path / "fp8", num_mtp=2)
    files = tree_bytes(checkpoint)
    hub.add(REPO, files)
    listing = list_checkpoint(HubSource(REPO))
    assert listing.tensors == list_checkpoint(LocalSource(str(checkpoint))).tensors
    large = hub.requests(r"^GET /[0-9a-f]{64}$")
    headers = sum(8 + len(header.raw) for header in listing.headers.values())
    peeked = len(b"version https://git-lfs") - 8  # with the length: whether it is a pointer
    assert sum(seen.body_bytes for seen in large) == headers + peeked * len(listing.headers)
    assert all("range" in seen.headers for seen in large)
    small = [seen for seen in hub.requests(r"^GET .*/resolve/") if seen.status == 200]
    assert [seen.path.rsplit("/")[-1] for seen in small] == ["model.safetensors.index.json"]
    assert len(hub.seen) == 1 + 1 + 2 * 2 * len(listing.headers), "two ranges, each redirected"


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
@pytest.mark.parametrize("request_", ["^GET /api", "^GET .*config.json"])
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


def test_waits_double_and_are_as_long_as_asked_for_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(hub_errors, "FIRST_WAIT_S", 1)
    monkeypatch.setattr(hub_errors, "LONGEST_WAIT_S", 60)
    waits = [hub_errors.wait_s(failures, 0.0) for failures in (1, 2, 3, 7, 99)]
    assert waits == [1, 2, 4, 60, 60]
    assert hub_errors.wait_s(1, 30.0) == 30
    assert hub_errors.wait_s(1, 1e9) == 60


def test_small_files_with_other_bytes_than_listed_are_refused(hub):
    source = one_file(hub)
    hub.fail("^GET .*config.json", Fault(corrupt=True, times=99))
    with pytest.raises(ProblemsError, match=r"config\.json has digest [0-9a-f]{40}, the Hub lists"):
        source.read("config.json", 0, 8)


# What the user is told


@pytest.mark.usefixtures("hub")
def test_a_server_that_is_not_there_is_told_apart_from_a_missing_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ProblemsError) as error:
        HubSource("my/folder")
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
def test_what_cannot_be_opened_says_what_to_do(hub, src, settings, token, told, monkeypatch):
    hub.add(REPO, {"config.json": b"{}"}, **settings)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ProblemsError) as error:
        HubSource(src)
    assert told in problem(error)


def test_a_gated_model_says_where_to_ask(hub, monkeypatch):
    hub.add(REPO, {"config.json": b"{}"}, gated=True)
    with pytest.raises(ProblemsError) as error:
        HubSource(REPO).read("config.json", 0, 2)
    assert "config.json is gated (403): ask for access on its page" in problem(error)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert HubSource(REPO).read("config.json", 0, 2) == b"{}"


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
        HubSource(REPO)


@pytest.mark.parametrize(
    ("file", "listed", "fault"),
    [
        ("config.json", {"size": 9}, "got an answer of 2 bytes, needed 9"),
        ("config.json", {"blobId": "a" * 40}, "the Hub lists a{40}"),
        ("a.safetensors", {"size": 9, "lfs": {"size": 9}}, "got the range .*/2, needed .*/9"),
    ],
)
def test_a_file_that_is_not_as_listed_is_refused(hub, file, listed, fault):
    lfs = {"lfs": {"size": 2, "sha256": sha256(b"{}"), "pointerSize": 9} | listed.get("lfs", {})}
    listed = listed | (lfs if file.endswith("safetensors") else {})
    hub.add(REPO, {file: b"{}"}, listed={file: listed})
    with pytest.raises(ProblemsError, match=fault):
        HubSource(REPO).read(file, 0, 1)


def test_an_answer_that_is_no_model_is_refused(hub):
    hub.add(REPO, {})
    for answer in (b"[]", b"{", b'{"id": "x"}', b'{"id": "x", "sha": "main"}'):
        hub.fail("^GET /api", Fault(body=answer))
        with pytest.raises(ProblemsError, match=r"no model|is at commit .*, needed 40"):
            HubSource(REPO)


@pytest.mark.parametrize("place", ["file:///etc/passwd", "http://[::1", "//\u00ff\u00fe:x/"])
def test_places_that_are_none_are_refused(hub, place):
    source = one_file(hub)
    hub.fail("^GET .*model", Fault(status=302, headers={"Location": place}, times=4))
    with pytest.raises(ProblemsError, match=r"model\.safetensors the connection failed \("):
        source.read("model.safetensors", 0, 8)


# Secrets


def test_the_token_goes_to_the_hub_only_and_appears_nowhere(
    hub, tmp_path, caplog, capfd, monkeypatch
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add(REPO, {"model.safetensors": BYTES, "config.json": b"{}"}, private=True)
    source = HubSource(REPO)
    assert source.read("model.safetensors", 0, 8) == BYTES[:8]
    assert source.read("config.json", 0, 2) == b"{}"
    reads = {"step": [("model.safetensors", 0, 9)]}
    with source.staged(reads, tmp_path / "fetched"):
        assert source.read("model.safetensors", 0, 9) == BYTES[:9]
    shutil.rmtree(tmp_path / "fetched")
    for seen in hub.seen:
        stored = re.fullmatch("/[0-9a-f]{64}", seen.path)
        assert ("authorization" in seen.headers) is not bool(stored), seen
    texts = [source.name]

    def fails(request: str, status: int, read: Callable[[], bytes]) -> None:
        hub.fail(request, Fault(status=status, times=99))
        with pytest.raises(ProblemsError) as error:
            read()
        hub.clear_faults()
        texts.extend([str(error.value), repr(error.value), str(error.getrepr(style="long"))])

    def read() -> bytes:
        return source.read("model.safetensors", 0, 9)

    def fetch() -> bytes:
        with source.staged(reads, tmp_path / "fetched"):
            return read()

    for status in (401, 403, 404, 429, 500, 503):
        fails(".", status, read)
        fails("^GET /[0-9a-f]{64}$", status, read)
        fails("^HEAD", status, fetch)
        fails("^GET /[0-9a-f]{64}$", status, fetch)
        fails("^GET /api", status, lambda: HubSource(REPO).read("config.json", 0, 1))
    assert len(texts) == 1 + 5 * 3 * 6
    out, err = capfd.readouterr()
    for text in (*texts, caplog.text, out, err):
        assert TOKEN not in text
    assert "signature=" not in out + err, "signed addresses are not shown either"

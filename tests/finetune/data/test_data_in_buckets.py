"""Training data in a bucket: the same documents as in a folder, from a copy that nobody sees."""

import gzip
import io
import json
import shutil
import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from gcs_server import GcsServer, key_of

from finetune.data.corpus import scan
from finetune.data.files import stored
from finetune.data.records import DataError
from mtp_model import progress
from mtp_model.files.object_place import ObjectPlace
from mtp_model.files.open import as_place
from mtp_model.problems import UserError

pytestmark = pytest.mark.usefixtures("temporary")

VOCAB = 384
TEXTS = ["one", 'two, "quoted"\n', "émigré 日本語", "four"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
IDS = struct.pack("<3H", 5, 6, 7)
FILES = {
    "a.jsonl": LINES,
    "b.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "c/d.csv": b'text\none\n"two, ""quoted"""\n',
    "c/e.jsonl.gz": gzip.compress(LINES),
    "f.txt": b"long prose " * 9_000,
    "g.uint16.bin": IDS,
    "h/i.bin": IDS,  # with an index of Megatron: two documents
    "h/i.idx": struct.pack("<9sQBQQ2i2q3q", b"MMIDIDX\0\0", 1, 8, 2, 3, 1, 2, 0, 2, 0, 1, 2),
}
NO_DATA = {
    "picture.png": b"",
    "README.md": b"about",
    "dataset_info.json": b'{"builder": 1}',
    ".hidden.jsonl": b"{",
    ".git/x.jsonl": b"{",
}


def put(gcs: GcsServer, url: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        gcs.put(f"{key_of(url)}/{name}", content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same files here."""
    for name, content in (FILES | NO_DATA).items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "text"


def read_all(corpus) -> list:
    return [corpus.read(number) for number in range(len(corpus))]


def test_a_folder_of_objects_is_the_corpus_of_a_folder(gcs: GcsServer, url: str, folder: Path):
    put(gcs, url, FILES | NO_DATA)
    gcs.put(f"{key_of(url)}/c/", b"")  # what consoles leave for a folder
    gcs.put(f"{key_of(url)}2/other.jsonl", LINES)  # its name begins alike
    here, there = scan([folder], VOCAB), scan([Path(url)], VOCAB)
    assert there.digest == here.digest
    assert read_all(there) == read_all(here)
    for name in ("number_N", "begin_N", "nbytes_N", "file_N", "idle_N"):
        assert (getattr(there, name) == getattr(here, name)).all()
    names = [str(file.path).removeprefix(f"{url}/") for file in there.files]
    assert names == [str(file.path.relative_to(folder)) for file in here.files]
    assert [path.name for path in there.left_out] == [path.name for path in here.left_out]
    assert there.where(0) == f"{url}/a.jsonl:1"
    assert there.files[0].day == here.files[0].day
    with there.files[0].stored.open() as file:
        assert isinstance(file, io.BufferedRandom), "a copy, open for as long as it is needed"


def test_single_objects_and_a_changed_one(gcs: GcsServer, url: str, folder: Path):
    put(gcs, url, FILES)
    names = ("f.txt", "c/e.jsonl.gz")
    before = scan([Path(f"{url}/{name}") for name in names], VOCAB)
    assert before.digest == scan([folder / name for name in names], VOCAB).digest
    gcs.put(f"{key_of(url)}/f.txt", FILES["f.txt"])  # written again, with another generation
    assert scan([Path(f"{url}/{name}") for name in names], VOCAB).digest == before.digest
    gcs.put(f"{key_of(url)}/f.txt", FILES["f.txt"] + b".")
    assert scan([Path(f"{url}/{name}") for name in names], VOCAB).digest != before.digest
    assert before.content(0) == FILES["f.txt"], "what is trained on does not change"


def test_names_of_objects_lead_nowhere_else(
    gcs: GcsServer, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """They are names in the bucket, below the folder, and never paths of this machine."""
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"text": "secret"}\n')
    put(gcs, url, {"a.jsonl": LINES})
    gcs.put(f"{key_of(url)}2/other.jsonl", LINES)
    up = (f"../{key_of(url)}2/other.jsonl", f"./../../{secret.name}", ".", "..", "")
    listed = {"a.jsonl": len(LINES), **dict.fromkeys(up, 0)}
    monkeypatch.setattr(ObjectPlace, "sizes", lambda _: listed)  # the emulator has no such names
    assert [str(file.path) for file in scan([Path(url)], VOCAB).files] == [f"{url}/a.jsonl"]
    listed[str(secret)] = 0
    with pytest.raises(DataError, match=f"{url}/{secret} cannot be read: No such file"):
        scan([Path(url)], VOCAB)


def test_what_is_wrong_is_said_together_by_address(gcs: GcsServer, url: str, folder: Path):
    put(gcs, url, {"a.jsonl": b'{"text": 1}\n', "b.jsonl.gz": b"no gzip", "c.png": b""})
    wrong = [Path(url), Path(f"{url}/absent.jsonl"), Path(f"{url}/c.png"), folder / "absent.txt"]
    with pytest.raises(DataError) as caught:
        scan(wrong, VOCAB)
    faults = str(caught.value)
    for words in (
        f"{url}/a.jsonl:1 ",
        f"{url}/b.jsonl.gz is not a whole gzip file",
        f"{url}/absent.jsonl cannot be read: No such file",
        f"{url}/c.png is of no kind that is read",
        f"{folder}/absent.txt cannot be read",
    ):
        assert words in faults, faults
    put(gcs, url, {"nothing/README.md": b""})
    with pytest.raises(DataError, match=f"no document in {url}/nothing; left out: {url}/no"):
        scan([Path(f"{url}/nothing")], VOCAB)


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    gcs: GcsServer, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By the sum of all that is data; and with another TMPDIR it goes on."""
    put(gcs, url, {"a.jsonl": LINES, "b.jsonl": LINES, "large.dat": bytes(1 << 20)})
    free = {"": 2 * len(LINES) - 1}
    real = shutil.disk_usage

    def usage(folder: Path) -> object:
        return real(folder) if "other" in str(folder) else SimpleNamespace(free=free[""])

    monkeypatch.setattr(shutil, "disk_usage", usage)
    gcs.log.clear()
    with pytest.raises(UserError, match=r"needs 0\.0 MB more.*or set TMPDIR to another folder"):
        scan([Path(url)], VOCAB)
    assert [key for method, key in gcs.log if method == "GET" and key.endswith(".jsonl")] == []
    (tmp_path / "other").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "other"))
        assert len(scan([Path(url)], VOCAB)) == 2 * len(TEXTS)
    free[""] += 1
    assert len(scan([Path(url)], VOCAB)) == 2 * len(TEXTS)


def test_how_much_is_fetched_is_said(
    gcs: GcsServer, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    put(gcs, url, {"a.txt": b"prose " * 1_000_000})
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0001)
    scan([Path(url)], VOCAB)
    assert "fetching a.txt, " in (said := capsys.readouterr().err)
    assert " of 6.00 MB" in said


def test_more_objects_than_a_process_has_files_at_first(
    gcs: GcsServer, url: str, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(stored.resource, "getrlimit", lambda _: (10, 1000))
    monkeypatch.setattr(stored.resource, "setrlimit", lambda _, limits: asked.append(limits))
    put(gcs, url, {"a.jsonl": LINES})
    assert len(scan([Path(url)], VOCAB)) == len(TEXTS)
    assert asked == [(1000, 1000)]
    assert as_place(Path(url)) == as_place(url)

"""Verify and files: all of a source besides its tensors is compared; far ones take few requests."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_client import REPO, lone_hub
from hub_server import HubServer
from imported import import_folder, import_tiny
from roundtrip import tree_bytes
from verified import Pair, opened, storage

from converters.exporting.exporter import export_checkpoint
from converters.format.listing import open_safetensors
from converters.sources import ahead
from converters.sources.hub import HubSource
from converters.sources.source import Source
from converters.verifying.verify import StorageCheck, check_storage
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.problems import UserError
from tools.make_tiny_checkpoint import make_tiny_checkpoint


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """An FP8 source and its import; tests copy what they change."""
    folder = tmp_path_factory.mktemp("kept")
    return folder / "source", import_tiny(folder, dtype="fp8")


def told_files(found: StorageCheck) -> list[str]:
    assert found.holds == (not found.files)
    return [" ".join(str(problem).split()) for problem in found.files]


def rewritten(file: Path, change: Callable[[dict], dict], padding: int = 0) -> None:
    """Give a safetensors file another header text, with all tensors where they were."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    text = json.dumps(change(json.loads(raw[8:end]))).encode() + b" " * padding
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def reversed_order(header: dict) -> dict:
    return dict(reversed(header.items()))


@pytest.mark.parametrize(
    ("change", "padding"),
    [(dict, 0), (dict, 8), (reversed_order, 0), (lambda h: h | {"__metadata__": {"a": "b"}}, 0)],
    ids=["spaces", "padding", "order", "metadata"],
)
def test_a_source_with_another_header_text_is_another(
    kept: Pair, tmp_path: Path, change: Callable[[dict], dict], padding: int
):
    source = tmp_path / "source"
    shutil.copytree(kept[0], source)
    file = next(iter(opened(source).headers))
    rewritten(source / file, change, padding)
    found = storage(source, kept[1])
    assert not found.differences
    detail = "has another header: tensors in another order or place, or other metadata"
    assert told_files(found) == [f"header {file} {detail}"]


@pytest.mark.parametrize("scope", ["all", "mtp"])
def test_every_side_file_that_differs_is_named(kept: Pair, tmp_path: Path, scope: str):
    source = tmp_path / "source"
    shutil.copytree(kept[0], source)
    import_folder(source, tmp_path / "checkpoint", scope=scope)
    assert not told_files(storage(source, tmp_path / "checkpoint"))
    (source / "added.txt").write_text("more")
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").unlink()
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text() + " ")
    assert told_files(storage(source, tmp_path / "checkpoint")) == [
        "file added.txt is in the source alone: export does not write it",
        "file model.safetensors.index.json has other bytes",
        "file tokenizer.json has other bytes",
        "file tokenizer_config.json is not in the source: export writes it",
    ]


def test_the_hub_s_own_files_may_be_others(kept: Pair, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(kept[0], source)
    (source / "README.md").write_text("a model card")
    (source / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert not told_files(storage(source, kept[1]))
    (source / "README.txt").write_text("not that one")
    assert len(told_files(storage(source, kept[1]))) == 1


def test_a_source_cut_into_other_files_is_another(kept: Pair, tmp_path: Path):
    make_tiny_checkpoint(tmp_path / "one", num_files=1)
    found = storage(tmp_path / "one", kept[1])
    assert not found.differences
    in_one = {problem.subject: problem.detail.split(":")[0] for problem in found.files}
    assert in_one.pop("model.safetensors") == "is in the source alone"
    assert set(in_one.values()) == {"is not in the source"}


def test_a_changed_bf16_export_is_told(kept: Pair, tmp_path: Path):
    export_checkpoint(open_checkpoint(kept[1]), tmp_path / "exported", dtype="bf16")
    file = next(iter(opened(tmp_path / "exported").headers))
    rewritten(tmp_path / "exported" / file, reversed_order)
    config = tmp_path / "exported" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert [line.split()[1] for line in told_files(storage(tmp_path / "exported", kept[1]))] == [
        file,
        "config.json",
    ]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with lone_hub(tmp_path, monkeypatch) as server:
        yield server


class Untold(HubSource):
    """A model on the Hub that is not told what will be read."""

    room_needed = Source.room_needed
    staged = Source.staged


@pytest.mark.parametrize("changed", [False, True])
def test_a_model_of_the_hub_is_fetched_file_by_file(
    kept: Pair, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ahead, "MOST_FILES", 2)
    files = tree_bytes(kept[0])
    if changed:
        files["model-00002-of-000007.safetensors"] = files["model-00002-of-000007.safetensors"][
            :-40
        ] + bytes(40)
    hub.add(REPO, files)
    on_disk: list[int] = []

    def requests(source: Source) -> int:
        checkpoint = open_safetensors(source)
        hub.seen.clear()
        found = check_storage(
            checkpoint,
            open_checkpoint(kept[1]),
            progress=lambda *_: on_disk.append(len([*tmp_path.glob("convert-*/*.safetensors")])),
        )
        assert found.holds == (not changed)
        assert not found.files
        return len(hub.requests("^GET /[0-9a-f]{64}$"))

    shards = len(opened(kept[0]).headers)
    assert requests(HubSource(REPO)) == shards
    assert 1 <= max(on_disk) <= 4
    assert not [*tmp_path.glob("convert-*")]
    assert requests(Untold(REPO)) > 300


def test_a_full_disk_is_noticed_before_anything_is_fetched(
    kept: Pair, hub: HubServer, monkeypatch: pytest.MonkeyPatch
):
    hub.add(REPO, tree_bytes(kept[0]))
    source = HubSource(REPO)
    checkpoint = open_safetensors(source)
    hub.seen.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(UserError, match=r"needs .* more, .* or set TMPDIR to a folder on"):
        check_storage(checkpoint, open_checkpoint(kept[1]))
    assert not hub.seen

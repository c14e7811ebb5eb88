"""Imports from the Hub: what they fetch, what they need on disk, and that they give the same."""

import contextlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import REPO, fetched_bytes, lone_hub
from hub_server import HubServer, sha256
from roundtrip import SMALL_CHUNKS, make_source, run_import, tree_bytes

from converters.cli.main import main as cli
from converters.exporting.reuse import check_base
from converters.format.listing import list_checkpoint, open_safetensors
from converters.importing.importer import ImportSummary, import_checkpoint
from converters.importing.plan import ImportPlan
from converters.sources import ahead
from converters.sources import hub as hub_module
from converters.sources.hub import HubSource
from converters.sources.local import LocalSource
from mtp_model.checkpoint.directory import UNFINISHED, open_checkpoint
from mtp_model.problems import ProblemsError, UserError


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with lone_hub(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "fp8", num_mtp=2)


def shards_in(folder: Path) -> list[Path]:
    """What is fetched into a checkpoint directory that is being made."""
    return list((folder / UNFINISHED).glob("fetched-*/*.safetensors"))


def at_most(files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ahead, hub_module):
        monkeypatch.setattr(module, "MOST_FILES", files)


def import_from(
    source: HubSource, dst: Path, progress: Callable[[int, int], None] | None = None, **options: Any
) -> ImportSummary:
    options = {"policy": SMALL_CHUNKS, "workers": 2} | options
    return import_checkpoint(open_safetensors(source), dst, progress=progress, **options)


def test_an_import_from_the_hub_is_the_same_as_from_a_folder(
    hub, checkpoint, tmp_path, monkeypatch
):
    at_most(2, monkeypatch)
    hub.add(REPO, tree_bytes(checkpoint))
    most = []

    def watch(_done: int, _total: int) -> None:
        most.append(len(shards_in(tmp_path / "hub")))

    source = HubSource(REPO)
    import_from(source, tmp_path / "hub", watch)
    run_import(checkpoint, tmp_path / "local")
    found, wanted = tree_bytes(tmp_path / "hub"), tree_bytes(tmp_path / "local")
    differing = {name for name in wanted if found[name] != wanted[name]}
    assert found.keys() == wanted.keys()
    assert differing <= {"provenance.json", "COMPLETE"}
    provenance = open_checkpoint(tmp_path / "hub").provenance
    assert provenance["source"]["name"] == source.name
    local = open_checkpoint(tmp_path / "local").provenance
    records = local["source"]["files"]
    digests = {file: {"sha256": sha256((checkpoint / file).read_bytes())} for file in records}
    assert provenance["source"]["files"] == {f: records[f] | digests[f] for f in records}
    assert 1 <= max(most) <= 4
    sizes = source.files()
    shards = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    assert fetched_bytes(hub) < 1.2 * shards, "headers are read twice, all else once"


def by_turns(plan: ImportPlan, worker: tuple[int, int]) -> list:
    """A split that is no stretch of the source: the negative control."""
    return plan.units[worker[0] :: worker[1]]


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_workers_together_fetch_each_file_about_once(hub, checkpoint, tmp_path, monkeypatch, dtype):
    hub.add(REPO, tree_bytes(checkpoint))

    def import_by_two(dst: Path) -> int:
        """How many whole files were fetched."""
        hub.seen.clear()
        for index in range(2):
            summary = import_from(HubSource(REPO), dst, dtype=dtype, worker=(index, 2))
            assert summary.finished == (index == 1)
        return len(hub.requests("^HEAD .*safetensors$"))

    num_files = len(list(checkpoint.glob("*.safetensors")))
    of_layers = defaultdict(set)
    for tensor in list_checkpoint(HubSource(REPO)).tensors.values():
        of_layers[tuple(tensor.name.split(".")[:3])].add(tensor.file)
    border = max(map(len, of_layers.values()))  # both workers may have a part of one layer
    assert num_files <= import_by_two(tmp_path / "two") <= num_files + border
    run_import(checkpoint, tmp_path / "local", dtype=dtype)
    assert tree_bytes(tmp_path / "two" / "params") == tree_bytes(tmp_path / "local" / "params")
    monkeypatch.setattr(ImportPlan, "share", by_turns)
    assert import_by_two(tmp_path / "by turns") == 2 * num_files


def test_an_import_of_the_mtp_module_fetches_the_files_that_hold_it(hub, checkpoint, tmp_path):
    hub.add(REPO, tree_bytes(checkpoint))
    source = HubSource(REPO)
    listing = list_checkpoint(source)
    import_from(source, tmp_path / "mtp", scope="mtp")
    held = open_checkpoint(tmp_path / "mtp").provenance["source"]["files"]
    needed = {file for file, record in held.items() if any(record["tensors"])}
    fetched = {seen.path.rsplit("/")[-1] for seen in hub.requests("^HEAD")}
    assert fetched == needed < listing.headers.keys()


def test_an_interrupted_import_fetches_no_file_twice(hub, checkpoint, tmp_path):
    hub.add(REPO, tree_bytes(checkpoint))

    def interrupt(done: int, total: int) -> None:
        if done > 0.5 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_from(HubSource(REPO), tmp_path / "hub", interrupt)
    first = fetched_bytes(hub)
    assert shards_in(tmp_path / "hub"), "what was not yet read is kept"
    hub.seen.clear()
    summary = import_from(HubSource(REPO), tmp_path / "hub")
    assert summary.finished
    assert summary.resumed_units > 0
    shards = sum(s for name, s in HubSource(REPO).files().items() if name.endswith("safetensors"))
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
        import_from(HubSource(REPO), tmp_path / "hub", interrupt)
    model.commit(files | {"figures/model.svg": b"<svg></svg>"})
    with pytest.raises(ProblemsError, match=r"changed +figures/model\.svg was size 6000, git_blob"):
        import_from(HubSource(REPO), tmp_path / "hub")
    assert import_from(HubSource(f"{REPO}@{old}"), tmp_path / "hub").finished


def test_the_commands_take_a_model_of_the_hub(hub, checkpoint, tmp_path, capsys):
    hub.add(REPO, tree_bytes(checkpoint))
    pinned = f"{REPO}@{hub.models[REPO].branches['main']}"
    assert cli(["inspect", REPO, "--json"]) == 0
    sent = sum(seen.body_bytes for seen in hub.requests("^GET /[0-9a-f]{64}$"))
    assert sent < 0.2 * sum(map(len, tree_bytes(checkpoint).values())), "headers, not weights"
    assert cli(["import", REPO, str(tmp_path / "ckpt")]) == 0
    assert cli(["verify", REPO, str(tmp_path / "ckpt")]) == 0
    assert pinned in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "ckpt").provenance["source"]["name"] == pinned
    assert cli(["import", f"{REPO}@nope", str(tmp_path / "other")]) == 1
    assert "has no such revision (404)" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_base_on_the_hub_is_told_by_digests_that_it_lists(hub, checkpoint, tmp_path):
    files = tree_bytes(checkpoint)
    hub.add(REPO, files)
    import_from(HubSource(REPO), tmp_path / "mtp", scope="mtp")
    mtp = open_checkpoint(tmp_path / "mtp")
    records = mtp.provenance["source"]["files"]
    unread = next(file for file, record in records.items() if not any(record["tensors"]))
    check_base(list_checkpoint(HubSource(REPO)), mtp)
    hub.add(REPO, files | {unread: files[unread][:-1] + b"?"})
    with pytest.raises(ProblemsError, match=rf"base +{unread} is listed with sha256 \w+, what was"):
        check_base(list_checkpoint(HubSource(REPO)), mtp)
    check_base(list_checkpoint(LocalSource(str(checkpoint))), mtp)  # a folder lists no digests


def free_of(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    class Usage:
        free = nbytes

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)


def test_the_room_that_fetched_files_need_is_foreseen(hub, checkpoint, tmp_path, monkeypatch):
    at_most(2, monkeypatch)
    hub.add(REPO, tree_bytes(checkpoint))
    stored = run_import(checkpoint, tmp_path / "local").stored_bytes
    sizes = HubSource(REPO).files()
    shards = sorted(size for name, size in sizes.items() if name.endswith(".safetensors"))
    hub.seen.clear()
    free_of(monkeypatch, stored + shards[-1])
    with pytest.raises(UserError, match=r"ckpt needs .* and .*fetched-0-of-1 needs .* their"):
        import_from(HubSource(REPO), tmp_path / "ckpt")
    assert fetched_bytes(hub) < 0.1 * sum(shards), "headers only"
    free_of(monkeypatch, stored + sum(shards))
    assert import_from(HubSource(REPO), tmp_path / "ckpt").finished


def test_room_needed_is_what_is_there_at_once(hub, checkpoint, tmp_path):
    hub.add(REPO, tree_bytes(checkpoint))
    dst, taken = tmp_path / "ckpt", []

    def watch(_done: int, _total: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # deleted behind the reader
            taken.append(sum(path.stat().st_size for path in shards_in(dst)))

    needed = []

    class Watched(HubSource):
        def room_needed(self, reads: Any, folder: Path) -> Any:
            needed.append(super().room_needed(reads, folder))
            return needed[-1]

    source = Watched(REPO)
    import_from(source, dst, watch, workers=1)
    (room,) = needed[0].values()
    assert 0 < max(taken) <= room < sum(source.files().values())


def test_what_was_fetched_already_needs_no_room_again(hub, checkpoint, tmp_path):
    hub.add(REPO, tree_bytes(checkpoint))
    source = HubSource(REPO)
    name = next(name for name in source.files() if name.endswith(".safetensors"))
    reads = {"one": [(name, 0, source.files()[name])]}
    assert source.room_needed(reads, tmp_path / "fetched") == {
        tmp_path / "fetched": source.files()[name]
    }
    with source.staged(reads, tmp_path / "fetched"):
        source.read(name, 0, 10)
    assert source.room_needed(reads, tmp_path / "fetched") == {tmp_path / "fetched": 0}

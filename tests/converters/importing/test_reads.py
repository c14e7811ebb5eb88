"""What an import reads of its sources, counted: nothing twice, and no more than is needed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gcs_server import GcsServer, key_of
from hub_client import REPO, lone_hub
from modules import run, without_module
from roundtrip import tree_bytes

from converters.exporting.as_source import DirectorySource
from converters.format import fit as fit_module
from converters.format.joined import MadeFile, TakenTensor
from converters.format.listing import list_checkpoint, open_safetensors
from converters.format.mtp_from import find_module, open_joined
from converters.sources.hub import HubSource
from converters.sources.local import LocalSource
from converters.sources.open import open_source
from mtp_model.checkpoint.directory import open_checkpoint
from tools.make_tiny_checkpoint import make_tiny_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lost`, without its MTP module; `other`, whole and of other values."""
    folder = tmp_path_factory.mktemp("made")
    make_tiny_checkpoint(folder / "whole")
    make_tiny_checkpoint(folder / "other", seed=1)
    without_module(folder / "whole", folder / "lost", num_nextn_predict_layers=0)
    return folder


def calls_of(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple]:
    """The arguments of all calls from now on."""
    real, calls = getattr(owner, name), []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    patch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("taken", [False, True])
def test_an_import_compares_headers_and_config_once(made, tmp_path, monkeypatch, taken):
    compared = calls_of(monkeypatch, fit_module, "_compare")
    run("import", made / "lost", tmp_path / "ckpt", *["--mtp-from", made / "other"] * taken)
    assert len(compared) == 1


def test_of_both_checkpoints_no_byte_is_read_twice(made, monkeypatch):
    reads = calls_of(monkeypatch, LocalSource, "read")
    module = find_module(open_source(str(made / "other")))
    open_joined(open_source(str(made / "lost")), module)
    times = Counter((source.name, *which) for source, *which in reads)
    files = {(Path(name).name, file) for name, file, *_ in times}
    assert {("lost", "config.json"), ("other", "config.json")} <= files
    assert {*times.values()} == {1}, times.most_common(3)


def test_the_hub_is_asked_as_often_as_without_a_module(made, tmp_path, monkeypatch):
    with lone_hub(tmp_path, monkeypatch) as hub:
        hub.add(REPO, tree_bytes(made / "lost"))
        module = find_module(open_source(str(made / "other")))
        asked = []
        for open_it in (open_safetensors, lambda source: open_joined(source, module)):
            hub.seen.clear()
            open_it(HubSource(REPO))
            asked.append(Counter(map(str, hub.seen)))
    assert asked[0] == asked[1]
    assert max(asked[0].values()) <= 2  # of a header, its length comes first


def test_a_bucket_is_asked_as_often_as_without_a_module(made, gcs: GcsServer, url: str):
    for name, content in tree_bytes(made / "lost").items():
        gcs.put(f"{key_of(url)}/{name}", content)
    module = find_module(open_source(str(made / "other")))
    asked = []
    for open_it in (open_safetensors, lambda source: open_joined(source, module)):
        gcs.log.clear()
        open_it(open_source(url))
        of_files = [entry for entry in gcs.log if entry[1].startswith(key_of(url))]
        asked.append(Counter(of_files))
    assert asked[0] == asked[1]
    assert len(asked[0]) > len(list((made / "lost").glob("*.safetensors")))


class Counted(tuple):
    """A tuple that counts how many of its members were taken, by all that were made."""

    taken = 0

    def __getitem__(self, at: Any) -> Any:
        Counted.taken += len(range(len(self))[at]) if isinstance(at, slice) else 1
        return super().__getitem__(at)

    def __iter__(self) -> Any:
        Counted.taken += len(self)
        return super().__iter__()


def test_a_read_of_a_directory_looks_at_the_tensors_that_it_needs(made, tmp_path):
    run("import", made / "other", tmp_path / "ckpt")
    source = DirectorySource(open_checkpoint(tmp_path / "ckpt"))
    for header in source._headers.values():
        object.__setattr__(header, "tensors", Counted(header.tensors))
    file, header = max(source._headers.items(), key=lambda item: len(item[1].tensors))
    middle = header.tensors[len(header.tensors) // 2]
    Counted.taken = 0
    found = source.read(file, middle.begin, middle.nbytes)
    assert 0 < Counted.taken < 4 < len(header.tensors)
    assert found == open_source(str(made / "other")).read(file, middle.begin, middle.nbytes)


def test_a_read_of_a_made_file_looks_at_the_tensors_that_it_needs(made):
    listing = list_checkpoint(open_source(str(made / "other")))
    taken = [
        TakenTensor(name=t.name, source=listing.source, tensor=t) for t in listing.tensors.values()
    ]
    file = MadeFile.of(taken, {})
    counted = replace(file, tensors=Counted(file.tensors), begins=Counted(file.begins))
    begin = file.begins[len(taken) // 2]
    Counted.taken = 0
    [(tensor, first, nbytes, place)] = counted.parts(begin, 2)
    assert 0 < Counted.taken < 40 < len(taken)  # a search looks at some
    assert (tensor, first, nbytes, place) == (file.tensors[len(taken) // 2], 0, 2, 0)

"""A checkpoint directory's JSON files with keys deleted or of other types are refused by name."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imported import import_folder
from roundtrip import make_source

from converters.cli.main import main
from mtp_model.checkpoint.derived import write_derived
from mtp_model.checkpoint.directory import (
    COMPLETE,
    LAYOUT,
    PROVENANCE,
    CheckpointError,
    open_checkpoint,
)
from mtp_model.files.place import digest
from mtp_model.files.untrusted_json import Each, Maybe, faults

FILES = (PROVENANCE, LAYOUT, COMPLETE)
OTHERS = [None, True, -1, 7, 1.5, "text", [], [7], {}, {"a": 1}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"n_routed_experts": 8, "num_hidden_layers": 2, "first_k_dense_replace": 1}
    import_folder(make_source(folder / "src", sizes=sizes), folder / "ckpt")
    write_derived(open_checkpoint(folder / "ckpt"), folder / "final", {}, {"by": "test"})
    return folder / "final"


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key within a JSON value."""
    keys = range(len(value)) if isinstance(value, list) else value
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    checkpoint.layout()
    checkpoint.side_files()
    checkpoint.damaged_files()
    for piece in checkpoint.pieces():
        assert checkpoint.leaves[piece.path].chunk_bytes


def is_refused(path: Path, name: str) -> bool:
    try:
        read_all(path)
    except CheckpointError as error:
        told = str(error)
    else:
        return False
    # Where two files contradict each other, both are named.
    words = " cannot be read (", " has other bytes than COMPLETE records"
    is_told = f"{path}/" in told and any(map(told.__contains__, words)) and name in told
    assert is_told or "format version" in told or "was not written by this toolkit" in told
    return True


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_other_keys_and_types_are_refused(checkpoint: Path, data: st.DataObject):
    name = data.draw(st.sampled_from(FILES))
    file = checkpoint / name
    before = file.read_bytes()
    value = json.loads(before)
    found = list(places(value))
    container, key = found[data.draw(st.integers(0, len(found) - 1))]
    if data.draw(st.booleans()):
        del container[key]
    else:
        container[key] = data.draw(st.sampled_from(OTHERS))
    try:
        file.write_text(json.dumps(value))
        refused = is_refused(checkpoint, name)
        status = main(["verify", str(checkpoint)])
    finally:
        file.write_bytes(before)
    assert status in (0, 1)
    if name != COMPLETE and value != json.loads(before):
        assert refused
    if refused:
        assert status == 1
    assert not is_refused(checkpoint, name)


@pytest.mark.parametrize(
    ("name", "keys", "fault"),
    [
        (PROVENANCE, ("pieces",), "pieces is missing"),
        (PROVENANCE, ("source", "files"), "source > files is missing"),
        (PROVENANCE, ("scope",), "scope is missing"),
        (PROVENANCE, ("pieces", "norm.weight", "0"), "pieces > norm.weight has 0 pieces, not"),
        (PROVENANCE, ("leaves", "norm.weight"), "pieces > norm.weight has 1 pieces, not the 0"),
        (LAYOUT, ("headers",), "headers is missing"),
        (LAYOUT, ("headers", "model-00001-of-000007.safetensors"), "differ by 'model-00001-of"),
        (COMPLETE, ("side_files",), "side_files is missing"),
        (COMPLETE, ("files", LAYOUT), "files > layout.json is missing"),
        (COMPLETE, ("format_version",), "format version None"),
    ],
)
def test_the_key_is_named(checkpoint: Path, name: str, keys: tuple[str, ...], fault: str):
    file = checkpoint / name
    before = file.read_bytes()
    value = container = json.loads(before)
    for key in keys[:-1]:
        container = container[key]
    del container[keys[-1]]
    try:
        file.write_text(json.dumps(value))
        with pytest.raises(CheckpointError) as error:
            read_all(checkpoint)
    finally:
        file.write_bytes(before)
    assert fault in str(error.value)


@pytest.mark.parametrize("text", ["[]", "7", "null", "[" * 100_000, "{", "\ud800"])
def test_what_is_no_object_is_refused(checkpoint: Path, text: str):
    for name in (*FILES, "config.json"):
        file = checkpoint / name
        before = file.read_bytes()
        try:
            file.write_bytes(text.encode(errors="surrogatepass"))
            assert is_refused(checkpoint, name)
            assert main(["verify", str(checkpoint)]) == 1
        finally:
            file.write_bytes(before)


def changed_sizes(text: str) -> str:
    return text.replace('"routed_scaling_factor": 2.5', '"routed_scaling_factor": 9.0')


def changed_headers(text: str) -> str:
    return text.replace("pt", "ps", 1)


def changed_convention(text: str) -> str:
    return text.replace('"mtp_hidden_state": "post_norm"', '"mtp_hidden_state": "pre_norm"')


@pytest.mark.parametrize(
    ("name", "changed"),
    [("config.json", changed_sizes), (LAYOUT, changed_headers), (PROVENANCE, changed_convention)],
)
def test_another_value_of_the_right_type_is_refused(
    checkpoint: Path, name: str, changed: Callable[[str], str]
):
    """A run would train another network, and its `final/` would pass for sound."""
    file = checkpoint / name
    before = file.read_text()
    try:
        file.write_text(changed(before))
        assert file.read_text() != before
        with pytest.raises(CheckpointError, match=f"{name} has other bytes than COMPLETE records"):
            read_all(checkpoint)
        with pytest.raises(CheckpointError, match=name):
            write_derived(open_checkpoint(checkpoint), checkpoint.parent / "next", {}, {})
    finally:
        file.write_text(before)
    read_all(checkpoint)


OUTSIDE = ("../evil", "/tmp/evil", "a/../../evil")


@pytest.mark.parametrize("evil", OUTSIDE)
@pytest.mark.parametrize("keys", [("headers", "files"), ("side_files",), ("leaves", "pieces")])
def test_no_name_leaves_the_folder(
    checkpoint: Path, keys: tuple[str, ...], evil: str, tmp_path: Path
):
    """Export would write there; whoever made the directory made the digests of its records too."""
    ckpt = Path(shutil.copytree(checkpoint, tmp_path / "ckpt"))
    records = {name: json.loads((ckpt / name).read_bytes()) for name in (LAYOUT, PROVENANCE)}
    complete = json.loads((ckpt / COMPLETE).read_bytes())
    source = records[PROVENANCE]["source"]
    for record in (records[LAYOUT], records[PROVENANCE], source, complete):
        for key in keys:
            if key in record and not (record is complete and key == "files"):
                first = min(record[key])
                record[key] = {evil if k == first else k: v for k, v in record[key].items()}
    for name, record in records.items():
        (ckpt / name).write_text(json.dumps(record))
        complete["files"][name] = digest((ckpt / name).read_bytes())
    (ckpt / COMPLETE).write_text(json.dumps(complete))
    with pytest.raises(CheckpointError, match=f"cannot be read .{re.escape(evil)} (leaves|is an)"):
        read_all(ckpt)


def test_faults_name_every_place():
    shape = {"a": [int], "b": Each(str), "c": Maybe(dict), "d": Maybe([int])}
    assert list(faults({"a": [1], "b": {"x": "y"}, "d": None, "more": 1}, shape)) == []
    assert list(faults({"a": [1, True, "2"], "b": {"x": 3}, "c": []}, shape)) == [
        "a > 1 is True, needed a whole number",
        "a > 2 is '2', needed a whole number",
        "b > x is 3, needed text",
        "c is [], needed an object",
    ]
    assert list(faults([], shape)) == ["it is [], needed an object"]
    assert list(faults({}, shape)) == ["a is missing", "b is missing"]

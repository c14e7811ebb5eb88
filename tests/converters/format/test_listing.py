"""The listing of a folder: index and headers agree, or one report says everything that differs."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from converters.format.listing import INDEX_FILE, Listing, list_checkpoint
from converters.sources.open import open_source
from mtp_model.problems import ProblemsError

FILES = {
    "model-1.safetensors": {"a": [1, 2], "b": [3]},
    "model-2.safetensors": {"c": [4], "d": []},
}
WEIGHT_MAP = {name: file for file, tensors in FILES.items() for name in tensors}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkpoint of two files; a secret one lies next to its folder."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file, tensors in FILES.items():
        store(folder / file, tensors)
    store(tmp_path / "secret.safetensors", {"secret": [1]})
    write_index(folder, WEIGHT_MAP)
    (folder / "config.json").write_text("{}")
    return folder


def store(path: Path, tensors: dict[str, Any]) -> None:
    arrays = {name: np.array(values, np.float32) for name, values in tensors.items()}
    safetensors.numpy.save_file(arrays, path)


def write_index(folder: Path, weight_map: Any) -> None:
    index = {"metadata": {"total_size": -1}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))


def listing(folder: Path) -> Listing:
    return list_checkpoint(open_source(str(folder)))


def reports(folder: Path) -> list[str]:
    with pytest.raises(ProblemsError) as caught:
        listing(folder)
    assert caught.value.where == str(folder)
    return [re.sub(" +", " ", str(problem)) for problem in caught.value.problems]


def test_an_indexed_checkpoint(root):
    found = listing(root)
    assert {name: tensor.file for name, tensor in found.tensors.items()} == WEIGHT_MAP
    assert list(found.headers) == list(FILES)
    assert found.side_files == ("config.json",)
    assert found.index == (root / INDEX_FILE).read_bytes()
    tensor = found.tensors["b"]
    assert found.source.read(tensor.file, tensor.begin, 4) == np.float32(3).tobytes()


def test_a_single_file(root):
    (root / INDEX_FILE).unlink()
    for file in FILES:
        (root / file).unlink()
    store(root / "model.safetensors", {"a": [1]})
    found = listing(root)
    assert found.index is None
    assert list(found.tensors) == ["a"]
    store(root / "other.safetensors", {"z": [1]})
    assert reports(root) == [
        "index other.safetensors is in the folder and not part of it, model.safetensors is all; "
        "if it belongs to the checkpoint, give model.safetensors another name, without one of that "
        "name all files are read; if not, move it out of the folder"
    ]


def test_shards_need_no_index(root):
    with_index = listing(root)
    (root / INDEX_FILE).unlink()
    found = listing(root)
    assert found.index is None
    assert found.tensors == with_index.tensors


def test_no_index_and_no_file(root):
    for path in (root / INDEX_FILE, *root.glob("*.safetensors")):
        path.unlink()
    assert reports(root) == [f"missing {INDEX_FILE} and there is no .safetensors file"]


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "is not JSON: Expecting value at character 0 of 0"),
        (b"\xff{}", "is not UTF-8: byte 0xff at 0"),
        (b'{"weight_map":' * 100_000, "is nested too deeply"),
        (b'{"weight_map":{"a":"x","a":"x"}}', "has the key a twice"),
        (b"[]", 'needs an object "weight_map" from tensor names to file names'),
        (b"{}", 'needs an object "weight_map" from tensor names to file names'),
        (b'{"weight_map":[]}', 'needs an object "weight_map" from tensor names to file names'),
        (b'{"weight_map":{"a":1}}', 'needs an object "weight_map" from tensor names to file names'),
    ],
    ids=range(8),
)
def test_an_index_that_is_no_weight_map(root, data, fault):
    (root / INDEX_FILE).write_bytes(data)
    assert reports(root) == [f"index {INDEX_FILE} {fault}"]


def test_an_index_of_absurd_size_is_not_read(root):
    with (root / INDEX_FILE).open("wb") as file:
        file.truncate(2**40)
    assert reports(root) == [f"index {INDEX_FILE} is {2**40} bytes, more than 100000000"]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (
            "{root}/../secret.safetensors",
            "is an absolute path; file names are relative to the checkpoint's folder",
        ),
        ("../secret.safetensors", "leaves the checkpoint's folder"),
        ("x/../../secret.safetensors", "leaves the checkpoint's folder"),
        ("", "is not a plain relative path"),
        ("config.json", "is named by the index, and there is no such .safetensors file"),
        ("model-3.safetensors", "is named by the index, and there is no such .safetensors file"),
    ],
)
def test_file_names_of_the_index_stay_in_the_folder(root, name, fault):
    name = name.format(root=root)
    write_index(root, {**WEIGHT_MAP, "secret": name})
    assert reports(root) == [f"index {name or repr(name)} {fault}"]


def test_a_linked_file_outside_is_refused_and_a_blob_of_the_hub_cache_is_not(root, tmp_path):
    file = "model-1.safetensors"
    (root / file).rename(tmp_path / "blob")
    (root / file).symlink_to("../blob")
    assert len(reports(root)) == 1
    cached = tmp_path / "models--a--b"
    (cached / "blobs").mkdir(parents=True)
    (tmp_path / "blob").rename(cached / "blobs/hash")
    (cached / "snapshots").mkdir()
    root = root.rename(cached / "snapshots/0123")
    (root / file).unlink()
    (root / file).symlink_to("../../blobs/hash")
    assert listing(root).tensors.keys() == WEIGHT_MAP.keys()


def test_everything_that_differs_is_one_report(root):
    write_index(
        root,
        {
            "a": "model-2.safetensors",  # is in the first
            "gone": "model-2.safetensors",  # in neither
            "c": "model-2.safetensors",
            "d": "model-2.safetensors",
            "e": "absent.safetensors",
            "f": "broken.safetensors",
            "b": "again.safetensors",
        },
    )
    store(root / "again.safetensors", {"b": [3]})
    (root / "broken.safetensors").write_bytes(b"short")
    outside = "is in the folder and not named by the index; move it out of the folder"
    assert reports(root) == [
        "index absent.safetensors is named by the index, and there is no such .safetensors file",
        "file broken.safetensors is 5 bytes; a safetensors file begins with the 8 bytes of its "
        "header length",
        f"index model-1.safetensors {outside}",
        "missing a in model-2.safetensors, where the index puts it",
        "missing gone in model-2.safetensors, where the index puts it",
    ]


def test_a_tensor_in_another_file_than_the_index_says_or_in_two_or_unlisted(root):
    store(root / "model-1.safetensors", {"a": [1, 2], "c": [3], "extra": [1]})
    assert sorted(reports(root)) == [
        "index c is in model-1.safetensors and in model-2.safetensors; needed once",
        "index c is in model-1.safetensors, the index says model-2.safetensors",
        "index extra of model-1.safetensors is not in the index",
        "missing b in model-1.safetensors, where the index puts it",
    ]

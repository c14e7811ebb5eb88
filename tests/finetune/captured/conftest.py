"""A capture that nothing disturbed, and the checkpoint without a main model that learns from it."""

import json

import pytest
from captures import capture_of
from imported import import_folder


@pytest.fixture(scope="session")
def mtp_only(checkpoint, tmp_path_factory):
    """The same source, imported without the main model's layers."""
    folder = tmp_path_factory.mktemp("mtp") / "checkpoint"
    import_folder(checkpoint.with_name("source"), folder, scope="mtp")
    return folder


@pytest.fixture(scope="session")
def records(data, tmp_path_factory):
    """A few documents, one of them longer than a row, with answers that alone are learnt."""
    file = tmp_path_factory.mktemp("few") / "few.jsonl"
    lines = data.read_text().splitlines()[:6]
    answer = {"prompt": "Say it: ", "completion": "it is said, and so it is."}
    file.write_text("\n".join([*lines, json.dumps(answer)]) + "\n")
    return file


@pytest.fixture(scope="session")
def states(checkpoint, records, tmp_path_factory):
    return capture_of(checkpoint, records, tmp_path_factory.mktemp("captured") / "states")

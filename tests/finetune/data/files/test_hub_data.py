"""Data sets on the Hub, from a server on loopback: what is chosen, and what is refused."""

import json
from pathlib import Path

import pytest
from hub_client import TOKEN, lone_hub
from hub_server import Fault, HubServer

from finetune.data.corpus import scan
from finetune.data.records import DataError
from finetune.data.run_text import open_run_text
from finetune.settings import EvaluationSettings
from finetune.weights import resolve
from mtp_model.checkpoint.directory import open_checkpoint

VOCAB = 384
SET = "hf://datasets/org/texts"


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with lone_hub(tmp_path, monkeypatch) as server:
        yield server


def add(hub: HubServer, *names: str, **settings):
    """A data set of files that each hold their own name."""
    files = {name: lines(name) for name in names} | {"README.md": b"words", "run.py": b"raise"}
    return hub.add("datasets/org/texts", files, **settings)


def texts(path: str) -> list[str]:
    corpus = scan([Path(path)], VOCAB)
    return [corpus.read(number).text for number in range(len(corpus))]


def fault(path: str) -> str:
    with pytest.raises(DataError) as caught:
        scan([Path(path)], VOCAB)
    return str(caught.value)


def test_files_with_data_are_downloaded_once_and_nothing_else(hub):
    add(hub, "data/train-0.jsonl", "data/train-1.jsonl")
    for _ in range(2):
        assert texts(SET) == ["data/train-0.jsonl", "data/train-1.jsonl"]
    fetched = [str(seen) for seen in hub.requests("^GET .*resolve")]
    assert len(fetched) == 2
    assert not any("README" in each or "run.py" in each for each in fetched)


@pytest.mark.parametrize(
    ("inner", "wanted"),
    [
        ("/en", ["en/test.jsonl", "en/train.jsonl"]),
        ("/en/train.jsonl", ["en/train.jsonl"]),
        ("/*/train*", ["de/train.jsonl", "en/train.jsonl"]),
        ("/*", ["de/train.jsonl", "en/test.jsonl", "en/train.jsonl"]),
    ],
)
def test_a_file_a_folder_or_a_pattern_may_be_named(hub, inner, wanted):
    add(hub, "en/train.jsonl", "en/test.jsonl", "de/train.jsonl")
    assert texts(SET + inner) == wanted


@pytest.mark.parametrize(
    ("names", "parts", "advice", "helped"),
    [
        (
            ["data/train-00000.jsonl", "data/validation-00000.jsonl"],
            "data train, data validation",
            "/data/train*",
            ["data/train-00000.jsonl"],
        ),
        (["dev.jsonl", "training.jsonl"], "validation, train", "/dev*", ["dev.jsonl"]),
        (["de/a.jsonl", "en/a.jsonl"], "de, en", "/de/*", ["de/a.jsonl"]),
        (["test/a.jsonl", "train/a.jsonl"], "test, train", "/train*", ["train/a.jsonl"]),
    ],
)
def test_where_there_is_a_choice_the_user_makes_it(hub, names, parts, advice, helped):
    add(hub, *names)
    said = fault(SET)
    assert f"{SET} has several parts ({parts}): name what to read, as " in said
    assert f"{SET}{advice}" in said
    assert texts(SET + advice) == helped
    assert len(texts(f"{SET}/*")) == 2


def test_a_revision_is_read_as_it_was_and_said(hub, checkpoint, settings, tmp_path):
    first = add(hub, "a.jsonl").commit({"a.jsonl": lines("new", "newer")})
    second = hub.models["datasets/org/texts"].commit({"a.jsonl": lines("newest", "b", "c")})
    assert texts(SET) == ["newest", "b", "c"]
    assert texts(f"{SET}@{first}") == ["new", "newer"]
    run = settings.__class__(
        checkpoint=str(checkpoint),
        data=(Path(SET),),
        out=tmp_path,
        evaluation=EvaluationSettings(holdout_every=0),
    )
    text = open_run_text(resolve(run), open_checkpoint(checkpoint).config)
    assert f"read: 1 .jsonl, of {SET}@{second}" in text.description


def test_what_cannot_be_read_says_what_to_do(hub, monkeypatch):
    assert "is no data set on the Hub, needed hf://datasets/ORG/NAME" in fault("hf://datasets/a")
    assert f"{SET} is not there, or needs access (401): check name and revision" in fault(SET)
    add(hub, "a.jsonl", private=True)
    assert "or set HF_TOKEN" in fault(SET)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert texts(SET) == ["a.jsonl"]
    assert "needs access (404)" in fault(f"{SET}@elsewhere")
    told = fault(f"{SET}/b.jsonl")
    assert "names no file with data; there are a.jsonl" in told
    hub.add("datasets/org/texts", {"a.pickle": b"", "../b.jsonl": lines("b")})
    assert "has no file that is read: .jsonl" in fault(SET)


def test_a_download_that_breaks_is_said_and_done_again_helps(hub):
    add(hub, "a.jsonl")
    hub.fail("^GET .*resolve.*a.jsonl", Fault(status=418, times=9))
    assert "got the answer 418 from the Hub: run the same command again later" in fault(SET)
    hub.fail("^GET .*api/datasets", Fault(drop=True, times=99))
    hub._faults = [each for each in hub._faults if "resolve" not in each[0].pattern]
    assert "cannot be read from the Hub (" in fault(SET)
    hub._faults.clear()
    assert texts(SET) == ["a.jsonl"]


def test_offline_is_said(hub, monkeypatch):
    add(hub, "a.jsonl")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it, or give a folder" in fault(SET)

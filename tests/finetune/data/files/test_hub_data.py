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
    assert len(fetched) == 3
    assert sum("README" in each for each in fetched) == 1  # which names no configuration
    assert not any("run.py" in each for each in fetched)


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


# --- configurations


def with_card(hub: HubServer, card: str, *names: str) -> None:
    """A data set of files that each hold their own name, with YAML in its card."""
    files = {name: lines(name) for name in names}
    hub.add("datasets/org/texts", files | {"README.md": f"---\n{card}\n---\nwords\n".encode()})


FILES = (
    *("en/train-0.jsonl", "en/train-1.jsonl", "en/deep/train-2.jsonl", "en/test-0.jsonl"),
    *("odd/x.jsonl", "extra.jsonl"),
)
TWO = """
license: mit
configs:
- config_name: english
  data_files:
  - split: train
    path: "en/train-*"
  - split: test
    path: ["en/test-0.jsonl"]
- config_name: odd one
  default: true
  data_files: odd
"""


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (":english/train", ["en/train-0.jsonl", "en/train-1.jsonl"]),
        (":english/test", ["en/test-0.jsonl"]),
        (":odd one", ["odd/x.jsonl"]),
        (":odd%20one/train", ["odd/x.jsonl"]),
        ("/en/train*", ["en/train-0.jsonl", "en/train-1.jsonl"]),  # paths know of no card
    ],
)
def test_a_configuration_of_the_card_is_chosen_by_name(hub, asked, wanted):
    with_card(hub, TWO, *FILES)
    assert texts(SET + asked) == wanted


def test_of_several_configurations_and_splits_the_user_chooses(hub):
    with_card(hub, TWO, *FILES)
    told = fault(SET)
    assert f"{SET} has the configurations english, odd one (default): name one, as " in told
    assert f"{SET}:english; {SET}/* is all files" in told
    told = fault(f"{SET}:english")
    assert f"has the splits train, test in its configuration english: name one, as {SET}:" in told
    assert f"{SET}:english/train" in told
    assert "has no configuration none in its card; there are english, odd" in fault(f"{SET}:none")
    assert "has no split dev in its configuration english; there are train, test" in fault(
        f"{SET}:english/dev"
    )
    assert "names no configuration, needed hf://datasets/ORG/NAME:CONFIG[" in fault(f"{SET}:")
    assert len(texts(f"{SET}/*")) == len(FILES)


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ("data_files: en/**/train-*", ["en/deep/train-2.jsonl", "en/train-0.jsonl"]),
        ("data_files: ['en/train-?.jsonl', ./extra.jsonl]", ["en/train-0.jsonl", "extra.jsonl"]),
        ("data_files: [{split: dev, path: odd/}]", ["odd/x.jsonl"]),
        ("data_files: en/*", ["en/test-0.jsonl", "en/train-0.jsonl"]),
        ("data_files: '**/**/x.[j]sonl'", ["odd/x.jsonl"]),
        ("{data_dir: odd}", ["odd/x.jsonl"]),
        ("{data_dir: en, data_files: 'test*'}", ["en/test-0.jsonl"]),
    ],
)
def test_the_only_configuration_is_read_whatever_else_is_there(hub, entry, wanted):
    """Paths of every form that cards have; without a card all of these files are a choice."""
    names = [name for name in FILES if name != "en/train-1.jsonl"]
    inner = entry.strip("{}")
    with_card(hub, f"configs: [{{config_name: one, {inner}}}]", *names)
    assert texts(SET) == wanted
    add(hub, *names)
    assert "has several parts" in fault(SET)


def test_a_run_says_which_configuration_it_read(hub):
    with_card(hub, TWO, *FILES)
    files = {name: lines(name) for name in ("odd/x.jsonl", "odd/y.jsonl")}
    card = f"---{TWO}---\n".encode()
    commit = hub.models["datasets/org/texts"].commit(files | {"README.md": card})
    corpus = scan([Path(f"{SET}:odd one")], VOCAB)
    assert corpus.from_hub == (f"{SET}@{commit}:odd one/train",)
    assert len(texts(f"{SET}@{commit}:odd one")) == 2


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ("configs: [", "has a card whose YAML cannot be read"),
        ("configs: words", "has a card whose configs are no list"),
        ("configs: [{data_files: a}]", "a configuration without config_name"),
        ("configs: [{config_name: a}, {config_name: a}]", "two configurations a"),
        ("configs: [{config_name: a, data_files: 7}]", "data_files is int, needed paths"),
        ("configs: [{config_name: a, data_files: [{path: x}]}]", "needed paths; name its files"),
        ("configs: [{config_name: a, data_dir: [x]}]", "data_dir is list, needed paths"),
        ("configs: [{config_name: a, data_files: ../b}]", "needed files of the data set itself"),
        ("configs: [{config_name: a, data_files: 'https://x/y'}]", "needed files of the data set"),
        ("configs: [{config_name: a, data_files: none-*}]", "has no file that is read in split"),
        ("configs: " + "[" * 5000, "has a card whose YAML cannot be read"),
    ],
)
def test_a_card_that_cannot_be_understood_is_said_and_a_path_helps(hub, card, told):
    with_card(hub, card, "a.jsonl", "b.jsonl")
    assert told in fault(SET)
    assert texts(f"{SET}/b.jsonl") == ["b.jsonl"]


@pytest.mark.parametrize("card", ["license: mit", "configs: []", "- words"])
def test_a_card_without_configurations_changes_nothing(hub, card):
    with_card(hub, card, "a.jsonl", "b.jsonl")
    assert texts(SET) == ["a.jsonl", "b.jsonl"]
    assert "names no configurations in its card: name a file" in fault(f"{SET}:a")

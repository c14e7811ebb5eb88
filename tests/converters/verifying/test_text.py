"""`verify --logits --text`: on the tokens that the source's own tokenizer makes of a text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from advice import done, follows, told
from imported import import_tiny
from verified import Pair, opened

pytest.importorskip("torch")


from converters.cli.main import main
from converters.verifying.logits.check import check_logits, text_batch
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.files.untrusted_json import parse

TEXT = "return items or\n  default  # naïve 数"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("text")
    return folder / "source", import_tiny(folder, dtype="fp8")


def tokens_of(source: Path, text: str) -> list[int]:
    config = open_checkpoint(source.parent / "checkpoint").config
    tokens, segments = text_batch(text, opened(source), config)
    assert segments.tolist() == [[1] * tokens.shape[1]]
    return tokens[0].tolist()


def test_tokens_are_what_transformers_makes(pair: Pair):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(pair[0] / "tokenizer.json"))
    assert tokens_of(pair[0], TEXT) == tokenizer(TEXT)["input_ids"]
    assert tokens_of(pair[0], TEXT) != tokens_of(pair[0], TEXT.upper())


def test_a_text_is_compared_and_reported(pair: Pair, tmp_path: Path, capsys):
    command = ["verify", *map(str, pair), "--logits", "--text", TEXT, "--report", str(tmp_path)]
    assert main(command) == 0
    said = capsys.readouterr().out
    count = len(tokens_of(pair[0], TEXT))
    assert f"text of {count} tokens: " in said
    report = json.loads((tmp_path / "report.json").read_text())["logits"]
    assert (report["text"], report["tokens"]) == (TEXT, count)
    assert [depth["rows"] for depth in report["depths"]] == [count, count - 1]


def test_a_wrong_weight_shows_on_a_text(pair: Pair, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(pair[0], source)
    tensor = opened(source).tensors["model.layers.4.enorm.weight"]
    content = np.fromfile(source / tensor.file, np.uint8)
    content[tensor.begin : tensor.begin + 2] = content[tensor.begin + 2 : tensor.begin + 4]
    content.tofile(source / tensor.file)
    found = check_logits(opened(source), open_checkpoint(pair[1]), text=TEXT)
    assert found.first_wrong == "model.layers.4"


@follows(
    " needs it; put the model's there",
    "give --text as much as makes ",
    "; it is another model's, put this one's there",
)
def test_what_is_said_of_a_text_helps(pair: Pair, tmp_path: Path, capsys):
    source = tmp_path / "source"
    shutil.copytree(pair[0], source)
    (kept := source / "tokenizer.json").rename(tmp_path / "kept.json")
    command = ["verify", source, pair[1], "--logits"]
    assert "tokenizer.json is missing" in told(capsys, *command, "--text", TEXT)

    content = parse((tmp_path / "kept.json").read_bytes())
    assert isinstance(content, dict)
    content["added_tokens"].append(
        {**content["added_tokens"][0], "id": 4000, "content": "return", "special": False}
    )
    content["model"]["vocab"]["return"] = 4000
    kept.write_text(json.dumps(content))
    said = told(capsys, *command, "--text", TEXT)
    assert "gives token 4000, the vocabulary is 0 to 383; it is another model's" in said

    kept.write_text("{}")
    assert "makes no tokens of the text" in told(capsys, *command, "--text", TEXT)

    shutil.copyfile(tmp_path / "kept.json", kept)
    assert "give --text as much as makes 3 to 512" in told(capsys, *command, "--text", "")
    assert "tokens of the text; give" in told(capsys, *command, "--text", TEXT * 60)
    done(*command, "--text", TEXT)

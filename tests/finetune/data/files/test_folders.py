"""Folders that Hugging Face's `datasets` saved: their rows, and no cache beside them."""

import json
from pathlib import Path

import pytest

from finetune.data.corpus import scan
from finetune.data.records import DataError, Text
from mtp_model.report_folder import Findings, write_report

arrow = pytest.importorskip("pyarrow")

VOCAB = 384


def save(folder: Path, *shards: list[str], **state) -> Path:
    """As `save_to_disk` writes texts, in so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{n:05d}-of-{len(shards):05d}.arrow" for n in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        table = arrow.table({"text": texts})
        with arrow.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table)
    known = {"_data_files": [{"filename": name} for name in names], "_format_columns": None}
    (folder / "state.json").write_text(json.dumps(known | state))
    (folder / "dataset_info.json").write_text('{"features": {}, "splits": {}}')
    return folder


def texts(path: Path) -> list[str]:
    corpus = scan([path], VOCAB)
    records = [corpus.read(number) for number in range(len(corpus))]
    assert all(isinstance(record, Text) for record in records)
    return [record.text for record in records]


def faults(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        scan([path], VOCAB)
    return str(caught.value)


def test_a_saved_data_set_is_read_without_its_caches(tmp_path):
    folder = save(tmp_path / "set", ["a", "b"], ["c"])
    (folder / "cache-0123.arrow").write_bytes((folder / "data-00000-of-00002.arrow").read_bytes())
    assert texts(folder) == ["a", "b", "c"]
    left_out = [path.name for path in scan([folder], VOCAB).left_out]
    assert left_out == ["cache-0123.arrow"]
    (folder / "state.json").unlink()
    assert texts(folder) == ["a", "b", "a", "b", "c"], "a folder of Arrow files is read whole"


def test_a_run_whose_folder_is_in_that_of_its_data_reads_the_same_when_it_goes_on(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    run = tmp_path / "runs" / "first"
    (run / "final").mkdir(parents=True)
    (run / "config.yaml").write_text("steps: 6\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (run / "final" / "merges.txt").write_text("a b")
    assert "metrics.jsonl:1 has the keys loss, step" in faults(tmp_path), "no run: config.yaml only"
    (run / "resolved.yaml").write_text("compute_dtype: float32\n")
    corpus = scan([tmp_path], VOCAB)
    assert texts(tmp_path) == ["a"]
    assert "metrics.jsonl" in [path.name for path in corpus.left_out]
    assert corpus.digest == scan([tmp_path / "a.jsonl"], VOCAB).digest
    assert "metrics.jsonl:1 has the keys loss, step" in faults(run / "metrics.jsonl"), "named"


def test_a_report_that_was_left_beside_data_is_none(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    write_report(tmp_path / "b", Findings(title="found", plain={}, sections=()))
    assert texts(tmp_path) == ["a"]
    left_out = [path.name for path in scan([tmp_path], VOCAB).left_out]
    assert left_out == ["report.html", "report.json", "report.md"]
    (tmp_path / "b" / "report.json").unlink()
    assert texts(tmp_path)[0] == "a"
    assert len(texts(tmp_path)) == 2, "a report.md of the user's is text"


def test_a_data_set_that_is_not_whole_is_an_error(tmp_path):
    folder = save(tmp_path, ["a"], ["b"])
    (folder / "data-00001-of-00002.arrow").unlink()
    assert "is not whole: it lacks data-00001-of-00002.arrow" in faults(folder)
    (folder / "state.json").write_text("{}")
    assert "is not whole: it names no file of rows" in faults(folder)
    (folder / "state.json").write_text("{")
    assert "state.json cannot be read" in faults(folder)


def test_files_elsewhere_are_never_read_for_a_data_set(tmp_path):
    (tmp_path / "other.arrow").write_bytes(b"")
    files = [{"filename": "../other.arrow"}, {"filename": "/etc/passwd"}]
    folder = save(tmp_path / "set", ["a"], _data_files=files)
    assert "it lacks ../other.arrow, /etc/passwd" in faults(folder)


def test_a_choice_of_rows_is_refused(tmp_path):
    folder = save(tmp_path, ["a"], _indices_data_files=[{"filename": "indices.arrow"}])
    assert "is a choice of rows: save it again after `flatten_indices()`" in faults(folder)


def test_of_several_splits_one_is_named(tmp_path):
    """Text to test on is not trained on by chance; doing what is said helps."""
    for split in ("train", "test"):
        save(tmp_path / split, [split])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    told = f"has the splits train, test: name those to read, as {tmp_path}/train"
    assert told.replace("has", "is a data set with", 1) in faults(tmp_path)
    assert texts(tmp_path / "train") == ["train"]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert sorted(texts(tmp_path)) == ["test", "train"]

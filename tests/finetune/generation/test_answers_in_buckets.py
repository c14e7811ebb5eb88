"""Answers in a bucket: whole or visibly unfinished, and gone on with from the bucket alone."""

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from advice import follows
from gcs_server import GcsServer, key_of
from trained import run_until

from finetune import cli, generate
from finetune.evaluate import EvaluateSettings, evaluate
from finetune.generate import GenerateSettings
from finetune.generation import answers as files
from finetune.generation.answers import AnswersError, Counts, opened

MADE_BY = {"by": "a test"}


def written(path: Path, count: int, *, until: int = 0, **how) -> Counts:
    """Answers up to a number, two at a time, each to a prompt of one token."""
    with opened(path, MADE_BY, **how) as answers:
        while answers.counts.documents < count:
            first = answers.counts.documents
            texts = [(np.arange(first, first + 3), 1), (np.arange(first, first + 9), 1)]
            answers.add(texts, answers.counts.plus(2, 10, 0, ()))
            if answers.counts.documents == until:
                raise KeyboardInterrupt
        answers.finish()
        return answers.counts


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """What eight answers are on a disk."""
    written(tmp_path / "a.jsonl", 8)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.jsonl", "a.jsonl.about", "a.jsonl.lock"}
    return {name: (tmp_path / name).read_bytes() for name in ("a.jsonl", "a.jsonl.about")}


def test_generate_that_is_killed_goes_on_from_the_bucket_alone(
    settings: GenerateSettings, gcs: GcsServer, url: str, capsys: pytest.CaptureFixture[str]
):
    """Before a part is sent, before it is counted, and before the parts of the whole go."""
    generate.generate(settings)
    out = f"{url}/answers.jsonl"
    words = ["--prompt-tokens", "6", "--rows", "2", "--compute-dtype", "float32"]
    argv = ["generate", "--checkpoint", settings.checkpoint, "--data", str(settings.data[0])]
    argv += ["--out", out, "--max-new-tokens", "12", *words]
    partial = f"{key_of(url)}/answers.jsonl.partial"
    for point, count, ends in (
        ("answers", 2, [2]),
        ("answers counted", 2, [2, 4, 6]),  # the last of them will be written again
        ("answers joined", 1, [2, 4, 6, 7]),
    ):
        killed = run_until(point, count, "KILL", argv, settings.out)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        parts = [key.rpartition("-")[2] for key in gcs.keys(f"{partial}/0")]
        assert list(map(int, parts)) == ends
        is_whole = "answers.jsonl" in gcs.contents(key_of(url))
        assert is_whole == (point == "answers joined")
    assert cli.run(argv) == 1  # all was done
    assert f"{out} is there already; give another --out, or --over" in capsys.readouterr().err
    names = ("answers.jsonl", "answers.jsonl.about")
    assert gcs.contents(key_of(url)) == {
        name: settings.out.with_name(name).read_bytes() for name in names
    }
    measured = [
        evaluate(EvaluateSettings(checkpoint=settings.checkpoint, data=(path,), row_tokens=64))
        for path in (settings.out, Path(out))
    ]
    assert measured[0] == measured[1]
    assert measured[0].summary.reached[0] > 0


def test_answers_are_gathered_and_none_are_lost_at_an_end(
    gcs: GcsServer, url: str, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    out, partial = Path(f"{url}/a.jsonl"), f"{key_of(url)}/a.jsonl.partial"
    with pytest.raises(KeyboardInterrupt):
        written(out, 8, until=4)
    assert gcs.keys(partial) == [f"{partial}/{'0' * 12}-{4:012}", f"{partial}/begun"]
    monkeypatch.setattr(files, "SENT_BYTES", 10)
    with pytest.raises(KeyboardInterrupt):
        written(out, 8, until=6)
    assert len(gcs.keys(partial)) == 3
    gcs.put(f"{partial}/{6:012}-{8:012}", b"of a process that was killed before it counted\n")
    assert written(out, 8).documents == 8
    assert gcs.contents(key_of(url)) == whole


@pytest.mark.parametrize("far", [False, True], ids=["here", "in a bucket"])
def test_nothing_is_overwritten_unless_that_is_asked(far: bool, url: str, tmp_path: Path):
    """A finished file, one of other settings, and one that another process writes."""
    out = Path(f"{url}/b.jsonl") if far else tmp_path / "b.jsonl"
    with pytest.raises(KeyboardInterrupt):
        written(out, 8, until=2)
    with pytest.raises(AnswersError, match=r"b.jsonl.partial was begun with other settings"):
        opened(out, {"by": "another"}).__enter__()
    written(out, 8)
    with pytest.raises(AnswersError, match="is there already"):
        written(out, 8)
    assert written(out, 4, overwrite=True).documents == 4


@follows("another --out", "; wait for it, end it, or give ")
@pytest.mark.parametrize("far", [False, True], ids=["here", "in a bucket"])
def test_a_second_process_is_refused(
    far: bool, gcs: GcsServer, url: str, tmp_path: Path, whole: dict[str, bytes]
):
    """With --overwrite too; the first one's file is what it would be, and another --out works."""
    folder = url if far else str(tmp_path / "folder")
    out = Path(f"{folder}/a.jsonl")
    with opened(out, MADE_BY) as first:
        first.add([(np.arange(3), 1), (np.arange(9), 1)], Counts(documents=2, tokens=10))
        for overwrite in (False, True):
            with pytest.raises(AnswersError) as told:
                written(out, 8, overwrite=overwrite)
            assert str(told.value).startswith(f"another process writes {folder}/a.jsonl")
            assert ("pid" in str(told.value)) == far
        written(Path(f"{folder}/other.jsonl"), 8)
    assert written(out, 8).documents == 8
    found = gcs.content(f"{key_of(url)}/a.jsonl") if far else out.read_bytes()
    assert found == whole["a.jsonl"]


@follows("; give another --out, or --overwrite")
def test_a_part_that_is_gone_is_said(gcs: GcsServer, url: str, monkeypatch: pytest.MonkeyPatch):
    out, partial = Path(f"{url}/a.jsonl"), f"{key_of(url)}/a.jsonl.partial"
    monkeypatch.setattr(files, "SENT_BYTES", 10)
    with pytest.raises(KeyboardInterrupt):
        written(out, 8, until=6)
    gcs.delete(f"{partial}/{2:012}-{4:012}")
    with pytest.raises(AnswersError, match=r"a.jsonl.partial has 2 of 6 answers; give another"):
        written(out, 8)
    assert written(out, 8, overwrite=True).documents == 8
    assert json.loads(gcs.content(f"{key_of(url)}/a.jsonl.about"))["counts"]["documents"] == 8


def test_a_file_beside_an_unfinished_one_of_its_name_deletes_nothing(gcs: GcsServer, url: str):
    """Put there by somebody else: what was generated stays to be gone on with elsewhere."""
    out = Path(f"{url}/a.jsonl")
    with pytest.raises(KeyboardInterrupt):
        written(out, 8, until=2)
    gcs.put(f"{key_of(url)}/a.jsonl", b"mine\n")
    before = gcs.contents(key_of(url))
    with pytest.raises(AnswersError, match="is there already"):
        written(out, 8)
    assert gcs.contents(key_of(url)) == before


def test_in_json_the_address_and_digest_are_told(url: str, settings: GenerateSettings):
    far = dataclasses.replace(settings, out=Path(f"{url}/answers.jsonl"), max_documents=1)
    said = [
        generate.as_json(each, generate.generate(each))
        for each in (far, dataclasses.replace(settings, max_documents=1))
    ]
    assert said[0].pop("out") == f"{url}/answers.jsonl"
    assert said[1].pop("out") == str(settings.out)
    assert said[0] == said[1]

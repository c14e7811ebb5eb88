"""A checkpoint directory and a run that an earlier version made are read by this one.

`fixtures/before.tar.xz` was made by the last version in which `converters/` was one flat folder: a
tiny FP8 source, its import, a run of 4 steps that was killed after step 2 and what the whole run
gave.
"""

import json
import tarfile
from pathlib import Path

import pytest
from roundtrip import tree_bytes

from converters.cli.main import main as convert
from finetune.cli import run as finetune
from finetune.run.metrics import read_rows

FIXTURE = Path(__file__).parents[1] / "fixtures" / "before.tar.xz"


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_earlier_import_exports_to_its_source(before: Path):
    assert convert(["verify", "source", "checkpoint"]) == 0
    assert convert(["export", "checkpoint", "exported"]) == 0
    assert tree_bytes(before / "exported") == tree_bytes(before / "source")


def test_an_earlier_run_goes_on(before: Path):
    run, config = before / "unfinished", before / "unfinished" / "config.yaml"
    absolute = config.read_text()
    for name in ("checkpoint", "data.jsonl", "unfinished"):
        absolute = absolute.replace(f" {name}\n", f" {before / name}\n")
    config.write_text(absolute)
    assert finetune(["train", "--config", str(config)]) == 0
    whole = [json.loads(line) for line in Path("finished-metrics.jsonl").read_text().splitlines()]
    found = list(read_rows(run / "metrics.jsonl"))
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for ours, theirs in zip(found, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["tokens"] == theirs["tokens"]
    assert convert(["export", "unfinished/final", "tuned"]) == 0
    assert convert(["verify", "tuned", "unfinished/final"]) == 0

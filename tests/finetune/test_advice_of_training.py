"""What is wrong with what training is given, and that doing what the message says helps."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from advice import done, follows
from modules import without_module

from finetune import cli
from mtp_model import make_mesh
from mtp_model.load import load
from tools.make_tiny_checkpoint import make_tiny_checkpoint

SIZES = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
FEW = ("--steps", "2", "--batch.rows", "1", "--batch.row-tokens", "32", "--evaluation.rows", "1")


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "src"
    make_tiny_checkpoint(folder, dtype="bf16", sizes=SIZES, num_files=2)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "code.jsonl"
    texts = Path(cli.__file__).read_text().split("\n\n")
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def train(capsys: pytest.CaptureFixture[str], ckpt: Path, data: Path, *options: str) -> str | None:
    """What a short run says as it fails; None where it succeeds."""
    out = ckpt.parent / "run"
    capsys.readouterr()
    args = ["train", "--checkpoint", ckpt, "--data", data, "--out", out, *FEW, *options]
    status = cli.run([str(arg) for arg in args])
    said = "".join(capsys.readouterr())
    assert "Traceback" not in said
    return " ".join(said.split()) if status else None


@follows("needed; import it again with --scope all --overwrite, or to another place")
@pytest.mark.parametrize("place", ["same", "another"])
def test_a_part_of_a_model(src, data, tmp_path, capsys, place):
    ckpt = tmp_path / "ckpt"
    done("import", src, ckpt, "--scope", "mtp")
    message = train(capsys, ckpt, data)
    assert message
    assert "import it again with --scope all --overwrite, or to another place" in message
    if place == "same":
        done("import", src, ckpt, "--scope", "all", "--overwrite")
    else:
        ckpt = tmp_path / "another"
        done("import", src, ckpt, "--scope", "all")
    assert train(capsys, ckpt, data) is None


@follows("measure; import it again with --overwrite and --mtp-from, naming a checkpoint that ")
def test_a_model_without_a_module(src, data, tmp_path, capsys):
    lost = without_module(src, tmp_path / "lost", num_nextn_predict_layers=0)
    done("import", lost, tmp_path / "ckpt")
    message = train(capsys, tmp_path / "ckpt", data)
    assert message
    assert "import it again with --overwrite and --mtp-from, naming a checkpoint" in message
    done("import", lost, tmp_path / "ckpt", "--overwrite", "--mtp-from", src)
    assert train(capsys, tmp_path / "ckpt", data) is None
    done("export", tmp_path / "run/final", tmp_path / "out")  # and what was trained is one too
    done("verify", tmp_path / "out", tmp_path / "run/final")


@follows(" changed since it began; restore what it was, or start anew with --overwrite")
@pytest.mark.parametrize("way", ["restore", "overwrite"])
def test_data_that_changed_before_a_run_continued(src, data, tmp_path, capsys, way):
    ckpt = tmp_path / "ckpt"
    done("import", src, ckpt)
    assert train(capsys, ckpt, data, "--checkpoints.every", "1") is None
    shutil.rmtree(tmp_path / "run/final")  # it goes on from its newest checkpoint
    before = data.read_text()
    data.write_text(before + json.dumps({"text": "one more"}) + "\n")
    message = train(capsys, ckpt, data, "--checkpoints.every", "1")
    assert message
    assert f"or start anew with --overwrite; written since then: {data}" in message
    options = ["--checkpoints.every", "1"]
    if way == "restore":
        data.write_text(before)
    else:
        options.append("--overwrite")
    assert train(capsys, ckpt, data, *options) is None


@follows(": make it with mtp_model.make_mesh")
def test_a_mesh_of_other_axes(src, tmp_path):
    done("import", src, tmp_path / "ckpt")
    wrong = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1), ("x",))
    with pytest.raises(ValueError, match=re.escape("make it with mtp_model.make_mesh")):
        load(tmp_path / "ckpt", mesh=wrong)
    load(tmp_path / "ckpt", mesh=make_mesh(devices=jax.devices()[:1]))

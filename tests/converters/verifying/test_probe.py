"""`probe`: modules that were trained here under one convention each, and which it says it was."""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from advice import done, follows, told
from gcs_server import GcsServer, key_of
from hub_client import fetched_bytes, lone_hub
from imported import TOLERANCE, import_folder, load_float32
from roundtrip import tree_bytes

pytest.importorskip("torch")

import torch

from converters.cli.main import main
from converters.format.listing import open_safetensors
from converters.sources.open import open_source
from converters.verifying import probe as probe_module
from converters.verifying.logits.torch_probe import (
    HEADS,
    NORMS,
    ORDERS,
    RECYCLED,
    STATES,
    weights_of_source,
)
from converters.verifying.logits.torch_reference import TorchReference
from converters.verifying.logits.torch_weights import weights_of
from tools.make_tiny_checkpoint import make_tiny_checkpoint
from tools.train_conventions import TEXT, Taught, Trainer, wrongly_told
from tools.train_conventions import told as probed

USUAL = {
    "concatenation": ORDERS[0],
    "state fed": STATES[0],
    "label of row i": "token i + 2",
    "norm before the head": NORMS[0],
    "head": HEADS[0],
    "recycled state": RECYCLED[0],
}
OTHERS = {
    "concatenation": Taught(order=ORDERS[1]),
    "state fed": Taught(state=STATES[1]),
    "label of row i": Taught(label=3),
    "norm before the head": Taught(norm="model.norm"),
    "head": Taught(head=HEADS[1]),
    "recycled state": Taught(recycled=RECYCLED[1]),
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("probe") / "tokenizer")


@pytest.fixture(scope="module")
def usual(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As released modules were trained, and fed in turn."""
    folder = tmp_path_factory.mktemp("probe") / "usual"
    trainer.write(folder, Taught(recycled=RECYCLED[0]))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("probe") / "text.txt"
    file.write_text(TEXT)
    return file


def test_a_module_as_released_is_told(usual: Path):
    found = probed(usual)
    assert found.is_trained
    assert found.main_reads_the_text
    assert found.differing == ()
    assert {c.what: c.found for c in found.choices} == USUAL
    unsure = {choice.what for choice in found.choices if not choice.sure}
    assert unsure == {"head"}  # there is no other
    assert len(found.conventions) == 36


@pytest.mark.parametrize("what", OTHERS)
def test_another_convention_is_told(trainer: Trainer, tmp_path: Path, what: str):
    taught = OTHERS[what]
    trainer.write(tmp_path / "other", taught)
    found = probed(tmp_path / "other")
    assert found.is_trained
    assert not wrongly_told(found, taught)
    differing = {choice.what for choice in found.differing}
    # One module alone says nothing of how a second is fed.
    assert (differing if taught.recycled else differing - {"recycled state"}) == {what}


def test_a_module_that_repeats_its_token_tells_no_more(trainer: Trainer, tmp_path: Path):
    taught = Taught(label=1, order=ORDERS[1])
    trainer.write(tmp_path / "repeating", taught)
    found = probed(tmp_path / "repeating")
    assert [choice.what for choice in found.differing] == ["label of row i"]
    assert [choice.what for choice in found.choices if choice.sure] == ["label of row i"]


def test_the_losses_are_those_of_the_network(usual: Path, tmp_path: Path):
    """Of our JAX network, all depths; the control: every other convention's is another one."""
    source = open_safetensors(open_source(str(usual)))
    rows = probe_module._rows(TEXT, source, 384)
    import_folder(usual, tmp_path / "ckpt")
    with jax.default_matmul_precision("highest"):
        whole = jax.jit(lambda model: model(jnp.asarray(rows, jnp.int32)))
        out = whole(load_float32(tmp_path / "ckpt"))
    found = probed(usual)
    length = rows.shape[1]

    def loss(logits: jax.Array, ahead: int, last: int) -> float:
        wanted = rows[:, ahead : ahead + length - last]
        log_p = jax.nn.log_softmax(logits[:, : length - last])
        return float(-np.take_along_axis(np.asarray(log_p), wanted[..., None], -1).mean())

    assert found.main_loss == pytest.approx(loss(out.logits_BTV, 1, 1), rel=TOLERANCE)
    first, second = out.mtp_logits
    assert found.conventions[0].loss == pytest.approx(loss(first, 2, 3), rel=TOLERANCE)
    assert found.choices[-1].loss == pytest.approx(loss(second, 3, 4), rel=TOLERANCE)
    assert all(c.loss > (1 + 100 * TOLERANCE) * loss(first, 2, 3) for c in found.conventions[1:])


def test_an_untrained_module_is_told(trainer: Trainer, text: Path, tmp_path: Path, capsys):
    trainer.write(tmp_path / "untrained", None)
    assert main(["probe", str(tmp_path / "untrained"), "--data", str(text)]) == 1
    out = capsys.readouterr().out
    assert "UNTRAINED" in out
    assert "little" not in out  # the main model was trained
    assert "by chance?" not in out


@follows("import with --mtp-hidden-state ")
def test_following_what_is_said_of_the_state(
    trainer: Trainer, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Of the directory that was imported so, nothing differs."""
    source, checkpoint = tmp_path / "before", tmp_path / "ckpt"
    trainer.write(source, OTHERS["state fed"])
    done("probe", source, "--data", text)
    said = " ".join(capsys.readouterr().out.split())
    assert "state fed: before model.norm, which is not what" in said
    assert "import with --mtp-hidden-state pre_norm" in said
    done("import", source, checkpoint, "--mtp-hidden-state", "pre_norm")
    capsys.readouterr()
    done("probe", checkpoint, "--data", text, "--json")
    found = json.loads(capsys.readouterr().out)
    assert [what for what in found["differing"] if what != "recycled state"] == []
    assert found["choices"][1]["expected"] == found["choices"][1]["found"] == STATES[1]


@follows("give --data a longer text", "; give --data a plain text")
def test_what_cannot_be_probed_is_told(usual: Path, text: Path, tmp_path: Path, capsys):
    (tmp_path / "short.txt").write_text("a few words")
    assert "needed 32; give --data a longer text" in told(
        capsys, "probe", usual, "--data", tmp_path / "short.txt"
    )
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 100)
    assert "is no UTF-8 text" in told(capsys, "probe", usual, "--data", tmp_path / "binary")
    assert "No such file" in told(capsys, "probe", usual, "--data", tmp_path / "nothing")
    make_tiny_checkpoint(tmp_path / "alone", num_mtp=0)
    assert "there is no MTP module" in told(capsys, "probe", tmp_path / "alone", "--data", text)
    done("probe", usual, "--data", text)


def test_weights_are_those_of_the_reference(tmp_path: Path):
    """FP8 with its scales; the control: a scale left out."""
    make_tiny_checkpoint(tmp_path / "fp8")
    source = open_safetensors(open_source(str(tmp_path / "fp8")))
    ours, theirs = weights_of_source(source), weights_of(tmp_path / "fp8", source.config)
    names = [name for name in source.tensors if not name.endswith("_scale_inv")]
    assert any(source.tensors[name].dtype == "F8_E4M3" for name in names)
    for name in names:
        assert torch.equal(ours(name), theirs(name)), name
    quantised = "model.layers.4.self_attn.o_proj.weight"
    del source.tensors[quantised + "_scale_inv"]
    with pytest.raises(KeyError):
        ours(quantised)


def test_a_source_that_is_far_is_probed(
    usual: Path, text: Path, tmp_path: Path, capsys, gcs: GcsServer, url: str
):
    """Of the Hub and of a bucket, as where it is on this disk."""
    for name, content in tree_bytes(usual).items():
        gcs.put(f"{key_of(url)}/{name}", content)
    found = []
    (tmp_path / "fetched").mkdir()
    with pytest.MonkeyPatch.context() as patch, lone_hub(tmp_path, patch) as hub:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "fetched"))
        hub.add("org/far", tree_bytes(usual))
        for src in (usual, "org/far", url):
            done("probe", src, "--data", text, "--json")
            found.append(json.loads(capsys.readouterr().out))
            assert found[-1].pop("source").startswith(str(src))
        assert fetched_bytes(hub) >= sum(
            file.stat().st_size for file in usual.glob("*.safetensors")
        )
    assert found[0] == found[1] == found[2]
    assert not [*(tmp_path / "fetched").iterdir()]


def test_a_stopped_probe_goes_on_and_says_the_same(
    usual: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Layers that were run are not run again; of another text it begins anew."""
    ran: list[int] = []
    layer = TorchReference.layer

    stop = [True]

    def noted(self: TorchReference, index: int, *rest: Any) -> torch.Tensor:
        if stop and ran == [0]:
            raise KeyboardInterrupt
        ran.append(index)
        return layer(self, index, *rest)

    report = tmp_path / "report"
    command = ("probe", usual, "--data", text)
    with monkeypatch.context() as patch:
        patch.setattr(TorchReference, "layer", noted)
        assert main([*map(str, command), "--report", str(report)]) == 130
        assert [file.name for file in report.iterdir()] == ["probe.unfinished.npz"]
        stop.clear()
        done(*command, "--report", report)
    layers = json.loads((usual / "config.json").read_text())["num_hidden_layers"]
    assert ran == [*range(layers)]
    assert {file.name for file in report.iterdir()} == {
        *("report.json", "report.md", "report.html")
    }
    capsys.readouterr()
    done(*command, "--json")
    wanted = {"report_version": 1, **json.loads(capsys.readouterr().out)}
    assert json.loads((report / "report.json").read_text()) == wanted
    assert "the MTP module is trained" in (report / "report.md").read_text()

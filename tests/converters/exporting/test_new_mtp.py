"""Fresh MTP modules: a draft that import takes, that computes what it should, and is trained."""

import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from advice import done, follows, told
from rich.console import Console
from safetensors import deserialize

from finetune.settings import ObjectiveSettings, RunSettings
from finetune.train import train
from finetune.weights import resolve
from mtp_model import DeepSeekV3, make_context
from mtp_model.block import DecoderLayer, take_layer
from mtp_model.checkpoint.derived import write_derived
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.load import load
from tools.make_tiny_checkpoint import make_tiny_checkpoint

SIZES = {"num_hidden_layers": 3, "first_k_dense_replace": 1}


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor in the folder's files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        for name, tensor in deserialize(content):
            found[name] = bytes(tensor["data"])
    return found


def made(folder: Path, num_mtp: int = 0, dtype="fp8", **sizes) -> Path:
    make_tiny_checkpoint(folder, dtype=dtype, num_mtp=num_mtp, sizes=SIZES | sizes, num_files=2)
    return folder


@follows("is of two sources, and --logits reads one folder; export CKPT, and verify that")
@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_a_checkpoint_gets_the_module_that_it_lacks(tmp_path, dtype, capsys):
    """From its last layer; imported, verified, and exported as released ones are."""
    source, draft, checkpoint = made(tmp_path / "src", dtype=dtype), tmp_path / "d", tmp_path / "c"
    done("new-mtp", source, draft)
    assert sorted(path.name for path in draft.iterdir()) == ["config.json", "mtp.safetensors"]
    done("import", source, checkpoint, "--mtp-from", draft)
    assert open_checkpoint(checkpoint).provenance["mtp_new_layers"] == [3]
    done("verify", source, checkpoint, "--mtp-from", draft)
    joined = ("verify", source, checkpoint, "--mtp-from", draft, "--logits")
    assert "export CKPT, and verify that" in told(capsys, *joined)
    done("export", checkpoint, tmp_path / "out")
    done("verify", tmp_path / "out", checkpoint, "--logits")
    exported = tmp_path / "out"
    for file in source.glob("*.safetensors"):
        assert (exported / file.name).read_bytes() == file.read_bytes()
    assert (exported / "mtp.safetensors").read_bytes() == (draft / "mtp.safetensors").read_bytes()
    assert json.loads((exported / "config.json").read_text())["num_nextn_predict_layers"] == 1
    index = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["model.layers.3.eh_proj.weight"] == "mtp.safetensors"


def test_a_new_module_is_the_last_layer_on_the_sum_of_its_inputs(tmp_path):
    source = made(tmp_path / "src", dtype="f32")
    done("new-mtp", source, tmp_path / "d")
    done("import", source, tmp_path / "c", "--mtp-from", tmp_path / "d")
    model = load(tmp_path / "c")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 384, (1, 12)), jnp.int32)
    context = make_context(jnp.ones_like(tokens))

    @jax.jit
    def computed(model: DeepSeekV3):
        state_BTD = model.main(tokens, context).state_BTD
        drafted = model.draft(state_BTD, tokens, context).hidden[0]
        return state_BTD, model.embed(jnp.roll(tokens, -1, axis=1)), drafted

    @jax.jit
    def after_layer(model: DeepSeekV3, layer: DecoderLayer, x_BTD):
        return model.norm(layer(x_BTD, context).x_BTD)

    def normed(x):
        return x / np.sqrt(
            np.mean(np.square(x), axis=-1, keepdims=True) + model.config.rms_norm_eps
        )

    state, following, found = computed(model)
    x = jnp.asarray(normed(np.asarray(state)) + normed(np.asarray(following)))
    expected = after_layer(model, take_layer(model.moe_layers, 1), x)
    np.testing.assert_allclose(found[:, :-1], expected[:, :-1], rtol=2e-4, atol=2e-5)
    other = after_layer(model, take_layer(model.moe_layers, 0), x)
    assert float(jnp.abs(found - other)[:, :-1].max()) > 0.1  # negative control


def test_new_modules_begin_as_the_first(tmp_path):
    """The one that is there stays as it is, byte for byte."""
    source, draft = made(tmp_path / "src", num_mtp=1), tmp_path / "d"
    done("new-mtp", source, draft, "--modules", 3)
    tensors = bytes_of(draft)
    there = bytes_of(source)
    first = {name for name in there if ".layers.3." in name}
    assert {f".{n}." for name in tensors for n in "345" if f"layers.{n}." in name} == {
        ".3.", ".4.", ".5.",
    }  # fmt: skip
    for name in first:
        for layer in (3, 4, 5):
            copy = tensors[name.replace(".3.", f".{layer}.", 1)]
            assert copy == there[name]
    done("import", source, tmp_path / "c", "--mtp-from", draft)
    checkpoint = open_checkpoint(tmp_path / "c")
    assert checkpoint.config.num_nextn_predict_layers == 3
    assert checkpoint.provenance["mtp_new_layers"] == [4, 5]


@pytest.mark.parametrize("said", [[9], 3, ["3"]])
def test_a_draft_says_no_nonsense_of_new_layers(said, tmp_path, capsys):
    source, draft = made(tmp_path / "src"), tmp_path / "d"
    done("new-mtp", source, draft)
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | {"mtp_new_layers": said}))
    told_of = told(capsys, "import", source, tmp_path / "c", "--mtp-from", draft)
    assert f"mtp_new_layers is {said}, needed layers of its MTP modules" in told_of


def test_new_modules_learn_by_their_own_objective_until_they_are_trained(tmp_path, monkeypatch):
    """And a run says so, where the objective is not given."""
    source, checkpoint = made(tmp_path / "src"), tmp_path / "c"
    done("new-mtp", source, tmp_path / "d")
    done("import", source, checkpoint, "--mtp-from", tmp_path / "d")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two three"}\n' * 3)

    def asked(base: Path, **more) -> RunSettings:
        return RunSettings(checkpoint=str(base), data=(text,), out=tmp_path / "out", **more)

    def objective(base: Path, **more) -> dict[str, float]:
        return resolve(asked(base, **more)).objective.weights()

    def said(**more) -> str:
        out = io.StringIO()
        monkeypatch.setattr("finetune.train._loop", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(asked(checkpoint, **more), Console(file=out), overwrite=True)
        return " ".join(out.getvalue().split())

    assert "the MTP modules are new: they learn by lk" in said()
    assert "are new" not in said(objective=ObjectiveSettings(lk=2.0))

    assert objective(checkpoint) == {"lk": 1.0}
    assert objective(checkpoint, train="all") == {"ce": 1.0}
    assert objective(checkpoint, objective=ObjectiveSettings(kl=2.0)) == {"kl": 2.0}
    by_others = {"by": "another tool"}
    write_derived(open_checkpoint(checkpoint), tmp_path / "rewritten", {}, by_others)
    assert objective(tmp_path / "rewritten") == {"lk": 1.0}
    by_training = {"by": "finetune-deepseek train", "settings": {}}
    write_derived(open_checkpoint(checkpoint), tmp_path / "trained", {}, by_training)
    assert objective(tmp_path / "trained") == {"e2e_tv": 1.0}


@follows(
    "; ask for more, or use those it has",
    " holds a module; name another place or --overwrite it",
    "place, or empty it",
)
def test_what_cannot_be_made_is_said(tmp_path, capsys):
    source, draft = made(tmp_path / "src", num_mtp=1), tmp_path / "a draft"
    said = told(capsys, "new-mtp", source, draft)
    assert "has 1 already, asked for 1 in all; ask for more, or use those it has" in said
    assert not draft.exists()
    done("new-mtp", source, draft, "--modules", 2)
    assert f"--mtp-from '{draft}'" in " ".join(capsys.readouterr().out.split())
    before = (draft / "mtp.safetensors").read_bytes()
    assert "--overwrite it" in told(capsys, "new-mtp", source, draft, "--modules", 3)
    assert (draft / "mtp.safetensors").read_bytes() == before
    done("new-mtp", source, draft, "--modules", 3, "--overwrite")
    assert (draft / "mtp.safetensors").stat().st_size > len(before)
    (draft / "notes.txt").write_text("mine")
    refused = told(capsys, "new-mtp", source, draft, "--modules", 2, "--overwrite")
    assert "holds other files (as notes.txt); nothing in it was touched" in refused
    (draft / "notes.txt").unlink()
    done("new-mtp", source, draft, "--modules", 2, "--overwrite")
    assert (draft / "mtp.safetensors").read_bytes() == before

    dense = made(tmp_path / "dense", num_hidden_layers=2, first_k_dense_replace=2)
    assert "is dense" in told(capsys, "new-mtp", dense, tmp_path / "e")
    with pytest.raises(SystemExit):
        done("new-mtp", source, draft, "--modules", 0)

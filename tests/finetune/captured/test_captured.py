"""Training without the main model: the same losses and gradients as beside it."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from advice import follows
from captures import SIZE, capture_of, run_settings
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file
from trained import QUIET, read_rows

from finetune import cli
from finetune.captured.capture import Captured, CaptureError
from finetune.captured.documents import open_states
from finetune.captured.folder import PROGRESS_FILE, SamplesThere
from finetune.captured.sample import Content, open_sample, write_sample
from finetune.data.packing import Packer, PostNorm, PreNorm
from finetune.data.records import DataError
from finetune.objective.head import Asked
from finetune.objective.losses import main_states, measure
from finetune.objective.objectives import objective
from finetune.run.directory import RunError
from finetune.settings import (
    BatchSettings,
    EvaluationSettings,
    MeshSettings,
    ObjectiveSettings,
    RunSettings,
)
from finetune.train import train
from finetune.weights import load_for_training, open_trainable
from mtp_model import cluster, make_context, progress
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.files.open import as_place
from mtp_model.load import load

TOLERANCE = 2e-6  # of sums in another order: documents are packed into other rows
CONTROL = 100 * TOLERANCE
ROUNDED = {"bfloat16": 2e-3, "float8": 2e-2}  # what a loss differs by


def batches_of(checkpoint: Path, states: Path):
    settings = run_settings(checkpoint, states, evaluation=EvaluationSettings(holdout_every=0))
    base = open_trainable(str(checkpoint), captured=True)[0]
    text = open_states(settings, base, "float32", lambda _: None)
    return [batch for batch, _ in Packer(text.train, **SIZE, seed=3, epochs=1)]


def learnt(
    checkpoint: Path, batches, scope, mode="mtp"
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Losses of batches, and the gradient of their sum."""
    split = load_for_training(str(checkpoint), mode, "float32", scope=scope)
    if mode == "lora":  # no matrix of which is zeros, as the second of each is at first
        split = split._replace(trainable=jax.tree.map(lambda x: x + 0.05, split.trainable))
    mixture = ObjectiveSettings(ce=0.5, e2e_tv=0.5)

    @jax.jit
    @jax.value_and_grad
    def learnt_of(trainable, batch):
        model = nnx.merge(split.graphdef, trainable, split.biases, split.frozen)
        main = jax.lax.stop_gradient(main_states(model, batch))
        measured, *_ = measure(model, batch, main, Asked(2, True))
        return objective(measured, "mtp", mixture, jnp.float32(0), None)

    found = [learnt_of(split.trainable, batch) for batch in batches]
    total = jax.tree.map(lambda *each: sum(each), *(grad for _, grad in found))
    leaves = jax.tree_util.tree_leaves_with_path(total)
    grads = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    return np.array([float(loss) for loss, _ in found]), grads


def difference(got, want) -> float:
    of_losses = np.abs(got[0] / want[0] - 1).max()
    of_grads = [np.abs(got[1][name] - x).max() / np.abs(x).max() for name, x in want[1].items()]
    return float(max(of_losses, *of_grads))


@pytest.fixture(scope="module")
def beside_the_main_model(checkpoint, mtp_only, states):
    """Batches of captured states, and what is learnt from them where the main model is run."""
    batches = batches_of(mtp_only, states)
    return batches, learnt(checkpoint, [b._replace(states=None) for b in batches], "all")


def test_losses_and_gradients_are_those_beside_the_main_model(mtp_only, beside_the_main_model):
    batches, want = beside_the_main_model
    assert any(batch.segment_ids_BT.max() > 1 for batch in batches)  # documents share rows
    assert difference(learnt(mtp_only, batches, "mtp"), want) < TOLERANCE


def test_adapters_learn_the_same_beside_the_main_model(checkpoint, mtp_only, beside_the_main_model):
    batches, _ = beside_the_main_model
    want = learnt(checkpoint, [b._replace(states=None) for b in batches], "all", "lora")
    assert difference(learnt(mtp_only, batches, "mtp", "lora"), want) < TOLERANCE
    assert all("lora_" in name for name in want[1])
    wrong = [b._replace(states=PreNorm(np.roll(b.states.x_BTD, 1, axis=1))) for b in batches]
    assert difference(learnt(mtp_only, wrong, "mtp", "lora"), want) > CONTROL


MISTAKES = {
    "states of the token before": lambda x: PreNorm(np.roll(x, 1, axis=1)),
    "not normed": PostNorm,
    "of another document": lambda x: PreNorm(np.roll(x, 1, axis=0)),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_far_off(mistake, mtp_only, beside_the_main_model):
    batches, want = beside_the_main_model
    wrong = [batch._replace(states=mistake(batch.states.x_BTD)) for batch in batches]
    assert difference(learnt(mtp_only, wrong, "mtp"), want) > CONTROL


@pytest.mark.parametrize("stored", ROUNDED)
def test_what_is_stored_shorter_is_rounded(
    stored, checkpoint, mtp_only, records, beside_the_main_model, tmp_path
):
    want = beside_the_main_model[1]
    folder = capture_of(checkpoint, records, tmp_path / stored, stored=stored)
    losses, _ = learnt(mtp_only, batches_of(mtp_only, folder), "mtp")
    error = np.abs(losses / want[0] - 1).max()
    assert TOLERANCE < error < ROUNDED[stored]


def test_states_after_the_norm_are_the_same(
    checkpoint, mtp_only, records, beside_the_main_model, tmp_path
):
    folder = capture_of(checkpoint, records, tmp_path / "post", state="post_norm")
    batches = batches_of(mtp_only, folder)
    assert isinstance(batches[0].states, PostNorm)
    assert difference(learnt(mtp_only, batches, "mtp"), beside_the_main_model[1]) < TOLERANCE


@pytest.fixture(scope="module")
def begun(mtp_only, states, tmp_path_factory) -> tuple[RunSettings, Path]:
    """Two steps, and a copy of them."""
    folder = tmp_path_factory.mktemp("begun")
    batch = BatchSettings(rows=4, row_tokens=32)
    run = run_settings(mtp_only, states, folder / "run", steps=2, batch=batch)
    train(run, QUIET)
    shutil.copytree(run.out, folder / "copy")
    return run, folder / "copy"


def test_a_run_from_states_on_a_mesh_and_in_parts(begun, tmp_path):
    """Rows and their states over two devices, heads over two, two parts one after the other."""
    run, copy = begun
    mesh = MeshSettings(data=1, fsdp=1, expert=2, tensor=2)
    batch = dataclasses.replace(run.batch, accumulation=2)
    train(dataclasses.replace(run, out=tmp_path / "mesh", mesh=mesh, batch=batch), QUIET)
    rows = [read_rows(out / "metrics.jsonl") for out in (tmp_path / "mesh", copy)]
    for name in ("loss", "grad_norm"):
        got, want = ([row[name] for row in each] for each in rows)
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)
        assert abs(want[1] / want[0] - 1) > 1e-3  # another batch would be noticed


def test_a_run_from_states_goes_on(begun, mtp_only, states, tmp_path):
    """Only MTP leaves move, and other samples are another run."""
    run = begun[0]
    result = train(dataclasses.replace(run, steps=3), QUIET)
    assert result.after
    assert result.after.overlap[0]
    assert [row["step"] for row in read_rows(result.run.metrics)] == [1, 2, 3]
    before, after = (
        dict(nnx.to_flat_state(nnx.state(load(path, dtype=np.float32, scope="mtp"))))
        for path in (mtp_only, result.run.final)
    )
    moved = {path for path, leaf in after.items() if (leaf[...] != before[path][...]).any()}
    assert {path[0] for path in moved} == {"mtp"}
    fewer = tmp_path / "fewer"
    shutil.copytree(states, fewer)
    (fewer / PROGRESS_FILE).unlink()
    next(fewer.glob("*.safetensors")).unlink()
    with pytest.raises(RunError, match="data changed since it began"):
        train(dataclasses.replace(run, states=(fewer,), steps=4), QUIET)


# --- the files


def test_the_files_are_what_safetensors_reads(checkpoint, states):
    """Tokens, masks, and states that the whole model computes from the tokens alone."""
    model = load(checkpoint, compute_dtype=jnp.float32)
    masked = 0
    files = sorted(states.glob("*.safetensors"))
    for path in files[:4] + files[-1:]:
        with safe_open(path, "numpy") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert file.metadata()["state"] == "pre_norm"
        tokens = found["token_ids"]
        assert tokens.dtype == np.int64
        assert found["hidden_states"].shape == (len(tokens), model.config.hidden_size)
        masked += int((found["loss_mask"] == 0).sum())
        batch = jnp.asarray(tokens[None], jnp.int32)
        want, _ = model.residual(batch, make_context(jnp.ones_like(batch)))
        np.testing.assert_allclose(found["hidden_states"], want[0], atol=2e-5, rtol=1e-4)
    mask = np.concatenate([open_sample(path).loss_mask() for path in files])
    assert 0 < mask.sum() < mask.size  # the prompt is not learnt


def test_fp8_keeps_a_scale_for_each_token(tmp_path):
    values = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    values *= np.float32(10.0) ** np.arange(-6, 4, 2)[:, None]
    values[2] = 0
    content = Content(np.arange(5), np.ones(5), values)
    write_sample(tmp_path / "a.safetensors", content, "pre_norm", "m", "float8")
    got = open_sample(tmp_path / "a.safetensors").states(1, 5)
    largest = np.abs(values[1:]).max(axis=1, keepdims=True)
    assert (np.abs(got - values[1:]) <= largest / 16).all()
    assert (got[1] == 0).all()


def test_a_folder_that_hosts_do_not_share_is_refused(checkpoint, records, tmp_path, monkeypatch):
    """As a process finds it that does not see what the first one made."""
    none = [dataclasses.asdict(each) for each in (Captured(inputs={}), SamplesThere([]))]
    monkeypatch.setattr(cluster, "by_first", lambda _: none)
    with pytest.raises(CaptureError, match="needed a folder that all hosts share"):
        capture_of(checkpoint, records, tmp_path / "elsewhere")


@follows("is not finished: run the same `capture` again to go on")
def test_a_stopped_capture_goes_on(checkpoint, records, states, tmp_path, monkeypatch):
    out = tmp_path / "out"

    class KilledError(Exception):
        pass

    def stop_after_two(done, *_):
        if done == 2:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(progress, "_nothing", stop_after_two)
        patch.setattr(progress, "_hushed", True)
        with pytest.raises(KilledError):
            capture_of(checkpoint, records, out)
    written = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    with pytest.raises(DataError, match="not finished: run the same `capture` again"):
        batches_of(checkpoint, out)
    capture_of(checkpoint, records, out)
    assert written
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    one, other = ({p.name: p.read_bytes() for p in f.glob("*.saf*")} for f in (out, states))
    assert one == other
    assert len(one) > len(written)
    with pytest.raises(CaptureError, match="stored was float32, is now bfloat16"):
        capture_of(checkpoint, records, out, stored="bfloat16")
    with pytest.raises(CaptureError, match="no capture; give --out another place"):
        capture_of(checkpoint, records, checkpoint)


@follows(
    "; wait or end it",
    "is a capture of something else; give --out another place",
    "is not empty and no capture; give --out another place",
    "); give --out another place",
)
def test_a_folder_that_cannot_be_gone_on_with_is_told(checkpoint, records, states, tmp_path):
    """And nothing in it is touched; another place, or the same one later, takes the capture."""
    other, damaged, busy = (tmp_path / name for name in ("other", "damaged", "busy"))
    shutil.copytree(states, damaged)
    (damaged / PROGRESS_FILE).write_text("{}")
    other.mkdir()
    (other / "mine").touch()
    busy.mkdir()
    for folder, said in (
        (states, "is a capture of something else"),
        (other, "is not empty and no capture"),
        (damaged, "is damaged"),
    ):
        before = sorted(folder.iterdir())
        with pytest.raises(CaptureError, match=said):
            capture_of(checkpoint, records, folder, stored="float8")
        assert set(folder.iterdir()) - set(before) <= {folder / "lock"}
    with as_place(busy / "lock").locked() as got:
        assert got
        with pytest.raises(CaptureError, match="another process captures to"):
            capture_of(checkpoint, records, busy)
    capture_of(checkpoint, records, busy)
    assert len(list(busy.glob("*.safetensors"))) == len(list(states.glob("*.safetensors")))


@follows("NaN or infinity in the main model's states; verify the checkpoint, or try ")
def test_states_that_are_not_finite_are_no_samples(checkpoint, records, tmp_path):
    """The checkpoint's own digests, which `verify` compares, say what is damaged."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    (first, *_) = (p for p in open_checkpoint(copy).pieces() if p.path == "embed_tokens.weight")
    file = copy / str(first.file).removeprefix(f"{copy}/")
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(CaptureError, match="NaN or infinity in the main model's states"):
        capture_of(copy, records, tmp_path / "out")
    wrong = [p.path for p in open_checkpoint(copy).pieces() if p.file.digest() != p.digest]
    assert wrong == ["embed_tokens.weight"]


# --- what cannot be used


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def bit_flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 1
    path.write_bytes(raw)


def states_of(path: Path) -> np.ndarray:
    return open_sample(path).states(0, open_sample(path).num_tokens)


def rewritten(path: Path, metadata=None, **changes) -> None:
    tensors = {"token_ids": open_sample(path).token_ids(), "hidden_states": states_of(path)}
    save_file(tensors | changes, path, metadata)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("nothing of the kind" * 9)


FAULTS = {
    "cut short": (cut_short, "was cut short: "),
    "a bit flipped": (bit_flipped, "is damaged: its bytes give"),
    "empty": (empty, "is no safetensors file"),
    "text": (text, "is no safetensors file"),
    "wider": (
        lambda p: rewritten(p, hidden_states=np.zeros((open_sample(p).num_tokens, 8), np.float32)),
        "has states 8 wide, the model's are",
    ),
    "other model": (lambda p: rewritten(p, {"main_model": "abc"}), "from another main model"),
    "other tokens": (
        lambda p: rewritten(p, token_ids=np.full(open_sample(p).num_tokens, 10**6)),
        "has token 1000000, the model's vocabulary",
    ),
    "fewer tokens": (lambda p: rewritten(p, token_ids=np.arange(1)), "for 1 tokens"),
    "no tokens": (lambda p: save_file({"x": np.zeros(2)}, p), "needed token_ids and hidden_states"),
    "NaN": (
        lambda p: rewritten(p, hidden_states=states_of(p) * np.float32(np.nan)),
        "NaN or infinity in hidden_states",
    ),
    "half": (
        lambda p: rewritten(p, hidden_states=np.zeros((open_sample(p).num_tokens, 64), np.float16)),
        "has hidden_states in F16, needed BF16 or F32 or F8_E4M3",
    ),
    "other state": (lambda p: rewritten(p, {"state": "none"}), "needed pre_norm or post_norm"),
}


@pytest.mark.parametrize(("break_it", "said"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_used_is_named_and_refused_or_left_out(
    break_it, said, mtp_only, states, tmp_path
):
    copy = tmp_path / "states"
    shutil.copytree(states, copy)
    broken = sorted(copy.glob("*.safetensors"))[1]
    break_it(broken)
    settings = run_settings(mtp_only, copy, evaluation=EvaluationSettings(holdout_every=0))
    base, lines = open_trainable(str(mtp_only), captured=True)[0], []

    def read(settings):
        documents = open_states(settings, base, "float32", lines.append).train
        packer = Packer(documents, **SIZE, seed=0, epochs=1)
        return sum((batch.segment_ids_BT != 0).sum() for batch, _ in packer)

    with pytest.raises(DataError) as caught:
        read(settings)
    assert str(broken) in str(caught.value)
    assert said in str(caught.value)
    assert "--skip-unusable" in str(caught.value)
    left = read(dataclasses.replace(settings, skip_unusable=True))
    assert [line for line in lines if str(broken) in line and said in line and "left out" in line]
    others = [p for p in states.glob("*.safetensors") if p.name != broken.name]
    assert left == sum(open_sample(path).num_tokens for path in others)


def test_files_of_vllm_are_read_as_they_are(checkpoint, mtp_only, states, tmp_path):
    """[T, layers, D] in bfloat16, in folders, nothing said of it: the last layer, not normed."""
    theirs = tmp_path / "theirs"
    for number, path in enumerate(sorted(states.glob("*.safetensors"))):
        sample = open_sample(path)
        last = sample.states(0, sample.num_tokens).astype(ml_dtypes.bfloat16)
        other = np.negative(last.astype(np.float32)).astype(last.dtype)
        layers = np.stack([other, last], axis=1)
        folder = theirs / f"{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"token_ids": sample.token_ids(), "hidden_states": layers}
        save_file(tensors, folder / f"req-{number}.safetensors")
    batches = batches_of(mtp_only, theirs)
    want = learnt(checkpoint, [b._replace(states=None) for b in batches], "all")
    error = np.abs(learnt(mtp_only, batches, "mtp")[0] / want[0] - 1).max()
    assert error < ROUNDED["bfloat16"]
    first = [b._replace(states=jax.tree.map(np.negative, b.states)) for b in batches]
    assert np.abs(learnt(mtp_only, first, "mtp")[0] / want[0] - 1).max() > 10 * error


def test_the_commands(checkpoint, mtp_only, records, tmp_path, capsys):
    out = tmp_path / "states"
    words = ["--checkpoint", str(checkpoint), "--data", str(records), "--out", str(out)]
    size = ["--rows", "2", "--row-tokens", "32"]
    assert cli.run(["capture", *words, *size, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["finished"]
    assert told["samples"] == len(list(out.glob("*.safetensors")))
    assert cli.run(["capture", *words, *size]) == 0  # nothing is left to do
    assert "samples of" in capsys.readouterr().out
    words = ["train", "--checkpoint", str(mtp_only), "--states", str(out), "--out", "run"]
    assert cli.run([*words, "--train", "all"]) == 2
    assert "--train is all, needed mtp with --states" in capsys.readouterr().err
    assert cli.run([*words, "--data", str(records)]) == 2
    assert "--states is given with --data" in capsys.readouterr().err
    other = ["--checkpoint", str(mtp_only), "--data", str(records), "--out", str(tmp_path / "b")]
    assert cli.run(["capture", *other]) == 1
    assert "has no main model: it is of --scope mtp" in capsys.readouterr().err

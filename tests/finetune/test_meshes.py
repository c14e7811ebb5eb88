"""Training on a mesh equals training on one device: 8 simulated devices, every axis."""

import dataclasses
import io
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import clustered_steps
import clusters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from jax.sharding import Mesh
from rich.console import Console
from stepping import KINDS, SMOOTH, TOLERANCE, make_batches, sent, store, three_steps, worst
from trained import read_rows, unfinished_copy

from finetune import cli, state
from finetune.captured.sample import open_sample
from finetune.data.packing import Batch
from finetune.devices import Trained, Workload, choose_shape, on_mesh, stored_bytes
from finetune.evaluate import EvaluateSettings, evaluate
from finetune.objective import head
from finetune.optimizer import make_optimizer
from finetune.settings import (
    BatchSettings,
    LoraSettings,
    MeshSettings,
    OptimizerSettings,
    SettingsError,
    TrainMode,
)
from finetune.state import start
from finetune.train import train
from finetune.weights import load_for_training
from mtp_model import ModelConfig, dispatch, make_mesh, moe
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.layers import Embedding, Head
from mtp_model.model import abstract_model, leaves_by_name

CASES = [
    ("mtp, FP8", {"data": 8}),
    ("mtp, FP8", {"fsdp": 8}),
    ("mtp, FP8", {"expert": 4}),
    ("mtp, FP8", {"tensor": 2}),
    ("all, bf16", {"data": 2, "expert": 2, "tensor": 2}),
    ("all, bf16", {"fsdp": 2, "expert": 4}),
]
# Of the float32 logits of a row: the main model's, a depth's, and two distributions, of 384 tokens.
ONE_POSITION = 4 * 4 * 384


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, Path]:
    return store(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return make_batches()


@pytest.fixture(scope="module")
def on_one_device(settings, stored, batches):
    """By kind; the same settings, and what three steps give without a mesh."""
    found = {}
    for name, (mode, dtype) in KINDS.items():
        run = dataclasses.replace(settings, train=mode, **SMOOTH)
        found[name] = (run, stored[dtype], three_steps(run, stored[dtype], batches))
    return found


def mesh_of(axes: dict[str, int]) -> Mesh:
    return make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])


@pytest.mark.parametrize(("kind", "axes"), CASES, ids=str)
def test_three_steps_on_a_mesh_equal_three_on_one_device(
    kind, axes, on_one_device, batches, monkeypatch
):
    """With so few slots a round that several rounds are needed, and several chunks of the
    sequence; of one kind, rows in two parts."""
    monkeypatch.setattr(dispatch, "FIRST_ROUND", 0.1)
    monkeypatch.setattr(head, "LOGITS_BYTES", 5 * ONE_POSITION)
    run, checkpoint, want = on_one_device[kind]
    if kind == "all, bf16" and "tensor" in axes:
        run = dataclasses.replace(run, batch=BatchSettings(rows=8, accumulation=2))
    assert worst(three_steps(run, checkpoint, batches, mesh_of(axes)), want) <= TOLERANCE


def test_a_frozen_head_is_gathered_once_however_many_chunks(on_one_device, batches, monkeypatch):
    """Negative control: a head that each product gathers, where a pass back computes logits again
    (out of a loop forward XLA for CPU takes it by itself)."""
    run, checkpoint, _ = on_one_device["mtp, FP8"]

    def gathered(length: int) -> int:
        monkeypatch.setattr(head, "LOGITS_BYTES", length * ONE_POSITION)
        return sent(run, checkpoint, batches[0], mesh_of({"fsdp": 2, "expert": 4}))[
            "all-gather"
        ].count

    two, six = gathered(6), gathered(2)
    assert six == two
    monkeypatch.setattr(state, "sums_of", lambda _: ())
    monkeypatch.setattr(Embedding, "ready", lambda stored, _dtype: stored)
    monkeypatch.setattr(
        Embedding, "logits", lambda stored, h: Head(stored.dense(h.dtype)).logits(h)
    )
    assert gathered(2) >= six + 6 - 1


@pytest.fixture(scope="module")
def of_two_processes(stored, tmp_path_factory) -> Path:
    """A folder of what two processes with 4 devices each came to: 8 in all, over axes that cross
    from one process to the other. In the end the first one was killed."""
    folder = tmp_path_factory.mktemp("clustered")
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(3, 300, n).tolist()} for n in (9, 3, 30, 12, 5, 7, 2, 11, 6)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script, out = Path(clustered_steps.__file__), folder / "found.npz"
    paths = json.dumps({dtype: str(path) for dtype, path in stored.items()})
    processes = clusters.start(
        2, 4, lambda where, n: [str(script), where, "2", str(n), str(out), paths], folder
    )
    assert clusters.end(processes, 400) == [-9, 1], (folder / "0.log").read_text()
    return folder


def test_three_steps_of_two_processes_equal_three_on_one_device(on_one_device, of_two_processes):
    found = np.load(of_two_processes / "found.npz")
    for kind, (_, _, want) in on_one_device.items():
        leaves = {name: found[f"{kind}/{name}"] for name in want[1]}
        assert worst((found[f"{kind}/losses"], leaves), want) <= TOLERANCE, kind


def test_two_processes_write_the_answers_and_states_of_one(stored, of_two_processes, tmp_path):
    """Answers byte for byte; of samples the tokens, and states up to rounding. The first process
    says what was done."""
    there = of_two_processes
    shutil.copyfile(there / "data.jsonl", tmp_path / "data.jsonl")
    for argv in clustered_steps.commands(stored["fp8"], tmp_path):
        assert cli.run(argv) == 0
    answers = (there / "answers.jsonl").read_bytes()
    assert answers == (tmp_path / "answers.jsonl").read_bytes()
    assert len({*answers.splitlines()}) == 9
    one, other = (sorted((folder / "states").glob("*.safetensors")) for folder in (tmp_path, there))
    assert [path.name for path in one] == [path.name for path in other]
    assert len(one) > 9  # one of the documents is longer than a row
    held = [[open_sample(path) for path in paths] for paths in (one, other)]
    for ours, theirs in zip(*held, strict=True):
        assert (ours.token_ids() == theirs.token_ids()).all()
        got, want = (sample.states(0, sample.num_tokens) for sample in (theirs, ours))
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)
    far = [np.abs(x.states(0, 1) - y.states(0, 1)).max() for x, y in itertools.pairwise(held[0])]
    assert min(far) > 1e-3  # states of other samples would be noticed
    assert "samples of" in (there / "0.log").read_text()
    assert "samples of" not in (there / "1.log").read_text()


def test_where_the_first_process_dies_the_others_say_so(of_two_processes):
    """As their last line, and with the status of a command that failed."""
    said = (of_two_processes / "1.log").read_text().splitlines()[-1]
    assert said.startswith("error: process 1 of 2 lost process 0 at 127.0.0.1:")
    assert said.endswith(
        "Run the same command on every host: it goes on from where it was last saved"
    )


def test_nothing_is_said_after_the_last_words():
    """Whatever another thread writes until the end, as JAX's do that heard of a lost process."""
    script = (
        "import os; from mtp_model import cluster\n"
        "end = os._exit\n"
        "def talk(): os.write(2, b'...\\n')\n"
        "os._exit = lambda status: (talk(), end(status))\n"
        "talk()\n"
        "cluster._end_with(b'error: it is lost\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [b"...", b"error: it is lost"]


def test_what_would_be_noticed(on_one_device, batches, monkeypatch):
    """Negative controls: a batch less, and experts whose parts by tensor are not added up."""
    run, checkpoint, want = on_one_device["mtp, FP8"]
    fewer = three_steps(run, checkpoint, [*batches[:2], batches[0]])
    assert worst(fewer, want) > 100 * TOLERANCE
    monkeypatch.setattr(moe.jax.lax, "psum", lambda x, _: x)
    wrong = three_steps(run, checkpoint, batches, mesh_of({"tensor": 2}))
    assert worst(wrong, want) > 100 * TOLERANCE


def test_a_run_goes_on_upon_a_mesh(finished_and_log, settings, tmp_path):
    """From the first checkpoint of a run on one device: as that went on, up to rounding."""
    finished, _ = finished_and_log
    copy = unfinished_copy(finished, settings, tmp_path / "run")
    first, *later = sorted(int(path.name) for path in (copy.out / "checkpoints").iterdir())
    for step in later:
        shutil.rmtree(copy.out / "checkpoints" / str(step))
    said = io.StringIO()
    mesh = MeshSettings(data=1, fsdp=1, expert=2, tensor=2)
    again = train(dataclasses.replace(copy, mesh=mesh), Console(file=said, width=200))
    assert f"continuing after step {first}" in said.getvalue()
    assert "computed in float32 on 4 devices (cpu): expert 2, tensor 2" in said.getvalue()
    rows, expected = (read_rows(run.metrics) for run in (again.run, finished.run))
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for name in ("loss", "grad_norm", "main_loss"):
        found, wanted = ([row[name] for row in each] for each in (rows, expected))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=name)
    assert open_checkpoint(again.run.final).leaves == open_checkpoint(finished.run.final).leaves
    measured = [
        evaluate(
            EvaluateSettings(
                checkpoint=str(again.run.final),
                data=settings.data,
                rows=2,
                row_tokens=32,
                max_rows=4,
                mesh=chosen,
            )
        ).summary
        for chosen in (mesh, MeshSettings())
    ]
    of_texts = [[each.main_loss, *each.mtp_loss] for each in measured]
    np.testing.assert_allclose(*of_texts, rtol=1e-5)
    assert measured[0].reached == measured[1].reached


def v3(rows: int, optimizer: OptimizerSettings | None = None) -> Workload:
    """The MTP module of DeepSeek-V3 is trained beside an FP8 main model."""
    config = ModelConfig.from_dict(released.CONFIG)
    leaves = leaves_by_name(abstract_model(config))
    dtypes = dict.fromkeys(leaves, np.float32) | {
        name: jnp.float8_e4m3fn for name in leaves if name.endswith("_proj.weight")
    }
    return Workload(config, dtypes, learning(optimizer or OptimizerSettings()), rows)


def learning(optimizer: OptimizerSettings, mode: TrainMode = "mtp") -> Trained:
    return Trained(mode, optimizer, LoraSettings())


@pytest.mark.parametrize(
    ("devices", "gigabytes", "asked", "chosen"),
    [
        (16, 103, {}, (1, 1, 16, 1)),
        (64, 103, {}, (4, 1, 16, 1)),
        (8, 103, {}, (1, 1, 8, 1)),  # fits by arithmetic nowhere: as little a device as can be
        (64, 103, {"fsdp": 2}, (4, 2, 8, 1)),
        (4, None, {}, (4, 1, 1, 1)),
    ],
)
def test_the_mesh_that_is_chosen(devices, gigabytes, asked, chosen):
    memory = gigabytes and gigabytes * 10**9
    shape = choose_shape(MeshSettings(**asked), v3(rows=64), devices, memory)
    assert tuple(shape.values()) == chosen


KEPT = {
    "adamw": OptimizerSettings(),
    "a mean": OptimizerSettings(ema=0.999),
    "short moments": OptimizerSettings(moments="bfloat16"),
    "halves": OptimizerSettings(parameters="halves"),
    "bfloat16": OptimizerSettings(parameters="bfloat16", moments="bfloat16"),
    "muon": OptimizerSettings(name="muon"),
    "adafactor": OptimizerSettings(name="adafactor"),
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(("mode", "dtype"), KINDS.values())
def test_what_is_stored_is_what_a_run_stores(stored, kept: str, mode: TrainMode, dtype: str):
    """On each device of a mesh: weights and the optimizer's state as a run begins with them."""
    optimizer, mesh = KEPT[kept], make_mesh(fsdp=2, expert=2, tensor=2)
    with on_mesh(mesh):
        split = load_for_training(str(stored[dtype]), mode, "float32", mesh=mesh)
        state = start(split, make_optimizer(optimizer, 10, lambda _: True), optimizer.parameters)
    held = (state, split.frozen, state.trainable)  # and gradients, as large as the parameters
    first = mesh.devices.flat[0]
    here = [
        next(shard.data.nbytes for shard in array.addressable_shards if shard.device == first)
        for array in jax.tree.leaves(held)
    ]
    work = Workload.of(open_checkpoint(stored[dtype]), learning(optimizer, mode), 8)
    assert stored_bytes(work, [dict(mesh.shape)]) == [sum(here)]


@pytest.mark.parametrize(
    ("gigabytes", "kept", "experts"),
    [
        (165, "adamw", 16),
        (165, "short moments", 16),
        (165, "bfloat16", 8),
        (165, "adafactor", 8),
        (183, "adamw", 8),
        (183, "a mean", 16),
    ],
)
def test_the_mesh_follows_the_optimizer(gigabytes: int, kept: str, experts: int):
    """As few parts as what is kept of a parameter has room for: of devices with the same memory,
    another one than for AdamW in float32."""
    shape = choose_shape(MeshSettings(), v3(64, KEPT[kept]), 64, gigabytes * 10**9)
    assert tuple(shape.values()) == (64 // experts, 1, experts, 1)


@pytest.mark.parametrize(
    ("asked", "rows", "said"),
    [
        ({"expert": 3}, 6, "--mesh.expert 3 makes 3 devices, needed a divisor of the 8"),
        ({"expert": 8, "data": 1}, 12, "a batch has 12 rows, needed a multiple of 8"),
        ({"tensor": 8, "expert": 2}, 8, "--mesh.expert 2 --mesh.tensor 8 makes 16 devices"),
        ({"data": 4, "fsdp": 1, "expert": 4, "tensor": 1}, 8, "needed at most the 8"),
    ],
)
def test_meshes_that_cannot_be_are_refused(asked, rows, said):
    with pytest.raises(SettingsError, match=said):
        choose_shape(MeshSettings(**asked), v3(rows), 8, None)


def test_what_nobody_gave_is_not_blamed(checkpoint):
    work = Workload.of(open_checkpoint(checkpoint), learning(OptimizerSettings()), 3)
    with pytest.raises(SettingsError, match=r"a batch has 3 rows, needed a multiple of ") as caught:
        choose_shape(MeshSettings(), work, 4, None)
    assert "--mesh" not in str(caught.value)


def test_a_mesh_that_splits_an_expert_model_unevenly_is_refused(checkpoint):
    work = Workload.of(open_checkpoint(checkpoint), learning(OptimizerSettings()), 8)
    with pytest.raises(SettingsError, match=r"--mesh.expert is 8, needed a divisor of the 12"):
        choose_shape(MeshSettings(expert=8), work, 8, None)

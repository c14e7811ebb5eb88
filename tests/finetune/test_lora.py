"""Adapters: what they add, what they learn, what is left of them, and that nothing else moves."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from advice import done, follows
from flax import nnx
from imported import TOLERANCE, assert_close, assert_far
from jax.sharding import Mesh
from safetensors import deserialize
from safetensors.numpy import load_file
from test_train import leaf_bytes
from trained import QUIET, assert_same_result, read_rows, unfinished_copy

from converters.exporting.exporter import export_checkpoint
from finetune import cli
from finetune.adapters import add_adapters
from finetune.devices import Trained, Workload, choose_shape, on_mesh, stored_bytes
from finetune.planning.flops import adapted_flops, model_flops
from finetune.settings import (
    BatchSettings,
    CheckpointSettings,
    EvaluationSettings,
    LoraSettings,
    MeshSettings,
    OptimizerSettings,
    RunSettings,
    SettingsError,
)
from finetune.state import Split, TrainState
from finetune.train import Result, train
from finetune.weights import load_for_training, write_final
from mtp_model import DeepSeekV3, load, make_context, make_mesh
from mtp_model.checkpoint.directory import CheckpointError, open_checkpoint
from mtp_model.lora import Make, projections
from mtp_model.model import Scope, leaf_name
from mtp_model.sharding import MESH_AXES, placement

EVERYWHERE = LoraSettings(part="all", rank=3, alpha=6.0)
SCALE = 2.0
COUNTS = 8  # bytes of AdamW's two counts of steps
TOKENS = np.random.default_rng(0).integers(3, 300, (4, 8)).astype(np.int32)


def learnt(mesh: Mesh | None = None) -> Make:
    """Matrices as training leaves them: none is zeros."""

    def make(name: str, shape: tuple[int, ...], axes: Any) -> jax.Array:
        values = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.1, shape)
        where = placement(axes, shape, mesh) if mesh is not None else None
        return jnp.asarray(values.astype(np.float32), device=where)

    return make


def adapted(checkpoint: Path, scope: Scope = "all", mesh: Mesh | None = None) -> DeepSeekV3:
    """The stored weights, FP8 and bfloat16, with adapters that have learnt something."""
    model = load(checkpoint, mesh, scope=scope, compute_dtype=jnp.float32)
    add_adapters(model, EVERYWHERE, learnt(mesh))
    return model


all_logits = jax.jit(lambda model: model(TOKENS))


def logits_of(model: DeepSeekV3) -> list[jax.Array]:
    return jax.tree.leaves(all_logits(model))


def scalar(model: DeepSeekV3) -> jax.Array:
    """Of an MTP module, something whose gradient is not the same for any two of its numbers."""
    rng = np.random.default_rng(1)
    shape = (*TOKENS.shape, model.config.hidden_size)
    state, weights = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    (hidden,) = model.draft(jnp.asarray(state), TOKENS, make_context(np.ones_like(TOKENS))).hidden
    return jnp.mean(hidden * weights)


def by_name(state: nnx.State) -> dict[str, Any]:
    return {leaf_name(path): leaf for path, leaf in nnx.to_flat_state(state)}


def gradients(model: DeepSeekV3, only: Any) -> dict[tuple, np.ndarray]:
    graph, moved, rest = nnx.split(model, only, ...)
    of = jax.jit(jax.grad(lambda moved: scalar(nnx.merge(graph, moved, rest))))
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(of(moved))}


def test_a_new_adapter_changes_no_logit(checkpoint):
    """Bit for bit; as every projection has one, it would show in any."""
    split = load_for_training(str(checkpoint), "lora", "float32", lora=EVERYWHERE)
    model = nnx.merge(*split)
    names = {name.rpartition(".")[0] for name in by_name(split.trainable)}
    assert names == projections(model).keys()
    assert not jax.tree.leaves(split.biases)
    for got, want in zip(
        logits_of(model), logits_of(load(checkpoint, compute_dtype=jnp.float32)), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    assert_far(logits_of(adapted(checkpoint))[0], logits_of(model)[0], "learnt adapters")


def test_merged_weights_give_the_logits_of_the_adapters(checkpoint, tmp_path):
    """Over FP8 and bfloat16; not with another alpha. In the form that decoding takes, too."""
    model = adapted(checkpoint)
    want = logits_of(model)
    state = TrainState(Split.of(model, "lora").trainable, nnx.State({}), ())
    found = {}
    for name, lora in (("same", EVERYWHERE), ("other", dataclasses.replace(EVERYWHERE, alpha=5))):
        base = open_checkpoint(checkpoint)
        write_final(base, tmp_path / name, state, {"by": "a test"}, lora)
        found[name] = load(tmp_path / name, compute_dtype=jnp.float32)
    for got, expected in zip(logits_of(found["same"]), want, strict=True):
        assert_close(got, expected, "merged")
    assert_far(logits_of(found["other"])[0], want[0], "another alpha")
    kept, merged = projections(model), projections(found["same"])
    for name, projection in kept.items():
        if "experts" not in name.split("."):
            assert_close(projection.dense(jnp.dtype("float32")), merged[name].weight[...], name)


@pytest.fixture(scope="module")
def found(checkpoint) -> dict[tuple, np.ndarray]:
    """Gradients of a module's adapters, which stand beside every kind of projection."""
    return gradients(adapted(checkpoint, "mtp"), nnx.LoRAParam)


def test_gradients_are_those_of_the_dense_weights(checkpoint, found):
    """dA = s B^T dW and dB = s dW A^T, each expert's too; dW of the merged model."""
    model, dense = adapted(checkpoint, "mtp"), load(checkpoint, scope="mtp", dtype=jnp.float32)
    kept, whole = projections(model), projections(dense)
    pairs = {}
    for name, projection in kept.items():
        assert projection.lora_A is not None
        assert projection.lora_B is not None
        a, b = np.asarray(projection.lora_A[...]), np.asarray(projection.lora_B[...])
        pairs[name] = (a, b)
        whole[name].weight.set_value(whole[name].weight[...] + SCALE * b @ a)
    d_weights = gradients(dense, nnx.Param)
    worst = 0.0
    for name, (a, b) in pairs.items():
        path = tuple(name.split("."))
        d_weight = d_weights[*path, "weight"]
        wanted = SCALE * b.swapaxes(-1, -2) @ d_weight, SCALE * d_weight @ a.swapaxes(-1, -2)
        for matrix, want in zip(("lora_A", "lora_B"), wanted, strict=True):
            got = found[*path, matrix]
            assert np.abs(want).max() > 0
            worst = max(worst, np.abs(got - want).max() / np.abs(want).max())
            assert_far(got, want / SCALE, f"{name}.{matrix} without its scale")
    assert worst <= 5 * TOLERANCE  # gradients add up in another order


def test_on_a_mesh_the_gradients_are_the_same(checkpoint, found):
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    with on_mesh(mesh):
        model = adapted(checkpoint, "mtp", mesh)
        got = gradients(model, nnx.LoRAParam)
    spread = [leaf for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))]
    assert any(not leaf[...].is_fully_replicated for leaf in spread)
    for path, want in found.items():
        assert np.abs(got[path] - want).max() <= 5 * TOLERANCE * np.abs(want).max(), path


def test_the_mesh_is_chosen_for_the_adapters_too(checkpoint):
    """Their parameters, moments and gradients: where only the frozen model fits on each device, not
    `data`."""
    lora = LoraSettings(part="all", rank=64)
    trained = Trained("lora", OptimizerSettings(), lora)
    work = Workload.of(open_checkpoint(checkpoint), trained, 2)
    frozen, one = work._replace(trained=None), dict.fromkeys(MESH_AXES, 1)
    split = load_for_training(str(checkpoint), "lora", "float32", lora=lora)
    size = sum(leaf.size for leaf in jax.tree.leaves(split.trainable))
    (alone,), (both,) = (stored_bytes(each, [one]) for each in (frozen, work))
    assert both - alone == 16 * size + COUNTS
    memory = int(alone / 0.5)
    shapes = [choose_shape(MeshSettings(), each, 2, memory) for each in (frozen, work)]
    assert [shape["data"] for shape in shapes] == [2, 1]


@pytest.fixture(scope="module")
def run(settings: RunSettings) -> RunSettings:
    return dataclasses.replace(
        settings,
        out=settings.out.with_name("lora"),
        train="lora",
        lora=LoraSettings(
            rank=2, alpha=3.0, projections=("o_proj", "experts.gate_proj", "eh_proj")
        ),
        steps=3,
        batch=BatchSettings(rows=2, row_tokens=16),
        checkpoints=CheckpointSettings(every=2),
        evaluation=EvaluationSettings(holdout_every=0),
    )


MOVED = {
    "mtp.block.self_attn.o_proj.weight",
    "mtp.block.mlp.experts.gate_proj.weight",
    "mtp.eh_proj.weight",
}


def stored(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a safetensors checkpoint."""
    files = (file.read_bytes() for file in folder.glob("*.safetensors"))
    return {name: bytes(tensor["data"]) for file in files for name, tensor in deserialize(file)}


@pytest.fixture(scope="module")
def finished(run) -> Result:
    return train(run, QUIET)


def test_a_run_moves_what_was_asked_and_goes_on_with_the_same_bits(
    run, finished, checkpoint, tmp_path
):
    """Frozen weights and router biases keep their bytes, exported too; a checkpoint holds adapters
    alone."""
    result = finished
    before, after = leaf_bytes(checkpoint), leaf_bytes(result.run.final)
    assert {name for name in before if before[name] != after[name]} == MOVED
    assert {after[name][0] for name in MOVED} == {"float32"}
    record = result.run.checkpoints / "3" / "progress" / "metadata"
    held = json.loads(record.read_text())["state"]
    assert all("lora_" in name or name.endswith("count") for name in held)
    assert len(held) == 3 * 2 * len(MOVED) + 2  # each with two moments
    copy = unfinished_copy(result, run, tmp_path / "copy")
    (copy.out / "checkpoints" / "3").rename(tmp_path / "3")
    keeping = dataclasses.replace(copy, lora=dataclasses.replace(copy.lora, keep=True))
    gone_on = train(keeping, QUIET)
    assert_same_result(copy.out, run.out)
    assert not result.run.adapters.exists()

    export_checkpoint(open_checkpoint(result.run.final), tmp_path / "exported")
    old, new = stored(checkpoint.with_name("source")), stored(tmp_path / "exported")
    assert old.keys() == new.keys()
    weights = {name.removesuffix("_scale_inv") for name in old if old[name] != new[name]}
    kinds = {".".join(name.split(".")[-2:]) for name in weights}
    assert kinds == {"o_proj.weight", "gate_proj.weight", "eh_proj.weight"}
    assert_kept_adapters_are_what_was_added(gone_on, checkpoint, tmp_path / "peft")
    experts = [name for name in weights if ".mlp.experts." in name]
    assert len(weights) == 2 + len(experts)
    assert experts
    assert all(".layers.2." in name and "shared" not in name for name in weights)


def test_a_run_on_a_mesh_is_that_of_one_device(run, finished, tmp_path):
    """Losses, and what is left of the adapters, merged into the weights beside them."""
    mesh = MeshSettings(data=1, fsdp=1, expert=2, tensor=2)
    again = train(dataclasses.replace(run, out=tmp_path / "mesh", mesh=mesh), QUIET).run
    rows = [read_rows(each.metrics) for each in (again, finished.run)]
    for name in ("loss", "grad_norm"):
        got, want = ([row[name] for row in each] for each in rows)
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)
        assert np.ptp(want) > 1e-3 * max(want)  # other steps would be noticed
    one, got, want = map(open_checkpoint, (run.checkpoint, again.final, finished.run.final))
    for name in MOVED:
        leaf = want.leaves[name]
        for index in np.ndindex(*leaf.shape[: leaf.num_stack_dims]):
            a, b = (c.read_rows(name, index, 0, leaf.tensor_shape[0]) for c in (got, want))
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), (name, index)
    assert one.digest != want.digest


@follows("name another, or --overwrite it")
def assert_kept_adapters_are_what_was_added(result: Result, checkpoint: Path, out: Path) -> None:
    """In PEFT's layout, and by its formula: the difference of the weights, tensor by tensor."""
    done("export", result.run.adapters, out)
    done("export", result.run.adapters, out, "--overwrite")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 3.0)
    assert config["target_modules"] == ["eh_proj", "gate_proj", "o_proj"]
    kept = load_file(out / "adapter_model.safetensors")
    before, after = (
        load(checkpoint, scope="mtp", dtype=np.float32),
        open_checkpoint(result.run.final),
    )
    weights = by_name(nnx.state(before))

    def added(name: str, index: tuple[int, ...]) -> np.ndarray:
        old = np.asarray(weights[name][...])[index]
        return after.read_rows(name, index, 0, len(old)) - old

    module = "base_model.model.model.layers.2."
    names = {"self_attn.o_proj": ("block.self_attn.o_proj", (0,)), "eh_proj": ("eh_proj", (0,))}
    names |= {
        f"mlp.experts.{e}.gate_proj": ("block.mlp.experts.gate_proj", (0, e)) for e in range(12)
    }
    assert len(kept) == 2 * len(names)
    largest = []
    for name, (path, index) in names.items():
        a, b = (kept[f"{module}{name}.lora_{matrix}.weight"] for matrix in "AB")
        want = added(f"mtp.{path}.weight", index)
        np.testing.assert_allclose(1.5 * b @ a, want, atol=1e-6, err_msg=name)
        largest.append(np.abs(want).max())
    assert min(largest[:2]) > 1e-5
    assert max(largest[2:]) > 1e-5
    with pytest.raises(CheckpointError, match=r"leaf .* is needed, nothing is stored"):
        load(result.run.adapters)


def test_what_the_model_lacks_is_refused_by_name(run, tmp_path):
    unknown = LoraSettings(projections=("q_proj", "o_proj", "oproj"))
    with pytest.raises(SettingsError) as refused:
        train(dataclasses.replace(run, out=tmp_path / "out", lora=unknown), QUIET)
    first, second = refused.value.faults
    assert first.startswith("--lora.projections is q_proj, its MTP modules have ")
    assert all(name in first for name in ("q_a_proj", "o_proj", "eh_proj", "down_proj"))
    assert second.startswith("--lora.projections is oproj, ")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_uncompiled")
def test_a_plan_counts_adapters(checkpoint, capsys):
    """The step of `train` with them, uncompiled; a frozen weight costs no gradient of its own."""
    words = ("plan", "--checkpoint", str(checkpoint), "--row-tokens", "16", "--rows", "4")
    words = (*words, "--compute-dtype", "float32")
    one = (f"--mesh.{axis}=1" for axis in ("data", "fsdp", "expert", "tensor"))
    assert cli.run([*words, *one, "--json", "--train", "lora", "--lora.rank", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    split = load_for_training(str(checkpoint), "lora", "float32", lora=LoraSettings(rank=2))
    trained = sum(leaf.size for leaf in jax.tree.leaves(split.trainable))
    assert found["parameters_trained"] == trained
    assert found["checkpoint_bytes"] == 12 * trained + 2 * 4
    assert found["flops_formula"] < found["flops_compiled"] < 4 * found["flops_formula"]
    config = open_checkpoint(checkpoint).config
    assert found["flops_formula"] < model_flops(config, "mtp", 4, 16, 1)
    sizes = {name: leaf.size for name, leaf in by_name(split.trainable).items()}
    layers = model_flops(config, "all", 4, 16, 1) / 3  # one forward pass, its logits too
    of_adapters = adapted_flops(config, "all", sizes, 4, 16, 1) - 2 * layers
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    met = config.num_experts_per_tok / config.n_routed_experts
    assert of_adapters == pytest.approx(6 * 4 * 16 * (trained - experts * (1 - met)))

"""Logits layer by layer: those of the whole model, the wrong layer named, stopped and continued."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from advice import follows
from imported import TOLERANCE, assert_close, assert_far, import_tiny, load_float32
from verified import Pair, opened

pytest.importorskip("torch")

import torch

from converters.cli.main import main
from converters.exporting.encode import Encoder, held_slots
from converters.verifying.logits import devices, jax_parts
from converters.verifying.logits.check import LogitsCheck, check_logits, seeded_batch
from converters.verifying.logits.devices import Devices, by_layer, chosen_shape, devices_for
from converters.verifying.logits.jax_parts import ExportedLeaves, JaxParts
from converters.verifying.logits.layers import UNFINISHED, walk
from converters.verifying.logits.torch_reference import TorchParts, open_reference
from mtp_model.checkpoint.directory import Checkpoint, open_checkpoint
from mtp_model.config import ModelConfig
from mtp_model.model import abstract_model, leaves_by_name
from mtp_model.problems import UserError

PARTS = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm"]
PARTS += ["model.layers.4", "model.layers.5", "lm_head"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two MTP modules, FP8 kept."""
    folder = tmp_path_factory.mktemp("layers")
    return folder / "source", import_tiny(folder, dtype="fp8", num_mtp=2)


def compared(source: Path, checkpoint: Path, **options) -> LogitsCheck:
    return check_logits(opened(source), open_checkpoint(checkpoint), **options)


def parts_of(checkpoint: Checkpoint) -> JaxParts:
    encoder = Encoder(checkpoint, held_slots(checkpoint), {})
    tokens, segments = seeded_batch(checkpoint.config.vocab_size)
    return JaxParts(checkpoint, ExportedLeaves(encoder, frozenset()), tokens, segments)


@pytest.mark.parametrize("fed", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("experts_bytes", [1, jax_parts.EXPERTS_BYTES])
def test_layers_give_the_logits_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fed: str, experts_bytes: int
):
    """An expert at a time, and all at once. The control: the other state for depth 1."""
    options = {"mtp_hidden_state": fed}
    path = import_tiny(tmp_path, dtype="fp8", num_mtp=2, import_options=options)
    monkeypatch.setattr(jax_parts, "EXPERTS_BYTES", experts_bytes)
    checkpoint = open_checkpoint(path)
    tokens, segments = seeded_batch(checkpoint.config.vocab_size)
    theirs = TorchParts(open_reference(tmp_path / "source"), tokens, segments)
    ours = parts_of(checkpoint)
    walked = walk(ours, theirs, checkpoint.config, "all", segments)
    whole = jax.jit(lambda model: model(jnp.asarray(tokens), jnp.asarray(segments)))
    with jax.default_matmul_precision("highest"):
        out = whole(load_float32(path))
    valid = segments != 0
    for (hidden, _), want in zip(walked.hidden, [out.logits_BTV, *out.mtp_logits], strict=True):
        assert hidden is not None
        assert_close(ours.logits(hidden)[valid], np.asarray(want)[valid], "logits")
    other = {"post_norm": "pre_norm", "pre_norm": "post_norm"}[fed]
    import_tiny(tmp_path / "other", "fp8", num_mtp=2, import_options={"mtp_hidden_state": other})
    other_checkpoint = open_checkpoint(tmp_path / "other" / "checkpoint")
    walked = walk(ours, theirs, other_checkpoint.config, "all", segments)
    hidden, want = walked.hidden[1][0], out.mtp_logits[0]
    assert hidden is not None
    assert_far(ours.logits(hidden)[valid], np.asarray(want)[valid], "logits of depth 1")


def damaged(checkpoint: Path, tmp_path: Path, leaf: str, index: tuple[int, ...]) -> Path:
    """A copy in which one value of one tensor of a leaf is 30 times as large."""
    path = tmp_path / "damaged"
    for file in checkpoint.rglob("*"):
        target = path / file.relative_to(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            target.write_bytes(file.read_bytes())
    opened_copy = open_checkpoint(path)
    stored = opened_copy.leaves[leaf]
    row = stored.tensor_shape[0] // 2
    [(coord, offset, nbytes)] = stored.row_spans(index, row, row + 1)
    file = path / "params" / leaf / ".".join(map(str, coord))
    content = bytearray(file.read_bytes())
    values = np.frombuffer(
        content, stored.dtype, count=nbytes // stored.dtype.itemsize, offset=offset
    )
    values[0] = (30 * values[:1].astype(np.float32)).astype(stored.dtype)[0]
    file.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("leaf", "index", "named"),
    [
        ("dense_layers.self_attn.o_proj.weight_scale_inv", (1,), "model.layers.1"),
        ("dense_layers.input_layernorm.weight", (0,), "model.layers.0"),
        ("moe_layers.mlp.experts.up_proj.weight_scale_inv", (1, 7), "model.layers.3"),
        ("moe_layers.mlp.gate.weight", (0,), "model.layers.2"),
        ("norm.weight", (), "model.norm"),
        ("mtp.eh_proj.weight", (0,), "model.layers.4"),
        ("mtp.block.mlp.shared_experts.down_proj.weight_scale_inv", (1,), "model.layers.5"),
        ("lm_head.weight", (), "lm_head"),
    ],
)
def test_the_first_wrong_layer_is_named(
    pair: Pair, tmp_path: Path, leaf: str, index: tuple[int, ...], named: str
):
    """One value of the checkpoint directory; only that layer is wrong alone, those after it too
    once they are given its state."""
    found = compared(pair[0], damaged(pair[1], tmp_path, leaf, index))
    assert not found.holds
    assert found.first_wrong == named
    assert [layer.name for layer in found.layers if layer.alone > TOLERANCE] == [named]
    before = PARTS[: PARTS.index(named)]
    assert all(layer.after <= TOLERANCE for layer in found.layers if layer.name in before)


def test_no_layer_of_an_import_is_wrong(pair: Pair):
    found = compared(*pair)
    assert found.holds
    assert found.first_wrong is None
    assert [layer.name for layer in found.layers] == PARTS
    assert [layer.depth for layer in found.layers] == [0] * 6 + [1, 2, 0]


MESH = {"fsdp": 2, "expert": 2, "tensor": 2}
LARGE = 1 << 40  # bytes of a device


def on_devices(checkpoint: Path, asked: dict[str, int]) -> Devices:
    return devices_for(open_checkpoint(checkpoint), asked)


@pytest.fixture(scope="module")
def on_one_device(pair: Pair) -> LogitsCheck:
    return compared(*pair)


@pytest.mark.parametrize("asked", [MESH, {}], ids=["asked", "chosen"])
def test_a_model_on_a_mesh_has_the_figures_of_one_device(
    pair: Pair,
    on_one_device: LogitsCheck,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, int],
):
    """With experts, heads and stored weights split, or as is chosen for devices that have hardly
    more room than they need. The control: one expert's scale is damaged."""
    least = chosen_shape(open_checkpoint(pair[1]), 8, 1)[1]
    monkeypatch.setattr(devices, "memory_of", lambda _: least)
    where, one = on_devices(pair[1], asked), on_one_device
    assert where.mesh is not None
    assert where.mesh.size == 8 > where.mesh.shape["data"]
    found = compared(*pair, devices=where)
    assert found.holds
    assert found.devices == where.said
    assert [layer.name for layer in found.layers] == PARTS
    for got, want in zip(found.depths, one.depths, strict=True):
        assert (got.rows, got.argmax_agreement) == (want.rows, want.argmax_agreement)
        assert abs(got.relative_difference - want.relative_difference) <= TOLERANCE
        assert got.kl_largest <= TOLERANCE
    leaf = "moe_layers.mlp.experts.up_proj.weight_scale_inv"
    found = compared(pair[0], damaged(pair[1], tmp_path, leaf, (1, 7)), devices=where)
    assert not found.holds
    assert found.first_wrong == "model.layers.3"


def test_meshes_that_cannot_hold_the_model_are_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command = ["verify", *map(str, pair), "--logits"]
    assert main([*command, "--mesh.expert", "8"]) == 1
    assert "--mesh.expert is 8, needed a divisor of the 12 routed" in capsys.readouterr().err
    assert main([*command, "--mesh.data", "16"]) == 1
    assert "16 devices are asked for, 8 are here" in capsys.readouterr().err
    monkeypatch.setattr(devices, "memory_of", lambda _: 1000)
    assert main([*command, "--mesh.fsdp", "2"]) == 1
    assert "of it and has 1.00 kB; needed more, or none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (LARGE, "8 devices (cpu): data 8, chosen for this model"),
        (1000, "a layer at a time: the whole model does not fit on all 8 (each would need "),
        (None, "1 device (cpu), a layer at a time"),
    ],
)
def test_it_is_said_where_the_model_runs(
    pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    memory: int | None,
    said: str,
):
    """Before it runs, and in the result: a mesh that is chosen, or why there is none."""
    monkeypatch.setattr(devices, "memory_of", lambda _: memory)
    assert main(["verify", *map(str, pair), "--logits", "--json"]) == 0
    printed = capsys.readouterr()
    ran_on = json.loads(printed.out)["logits"]["devices"]
    assert said in ran_on
    assert f"logits on {ran_on}\n" in printed.err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"expert": 4}, "4 devices (cpu): expert 4"),
        ({"expert": 4, "tensor": 2}, "8 devices (cpu): expert 4, tensor 2"),
        ({"data": 1}, "1 device (cpu), a layer at a time"),
    ],
)
def test_axes_that_are_given_win(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, asked: dict[str, int], said: str
):
    """The control: without them another mesh is chosen."""
    monkeypatch.setattr(devices, "memory_of", lambda _: LARGE)
    assert on_devices(pair[1], asked).said == said
    assert on_devices(pair[1], {}).said == "8 devices (cpu): data 8, chosen for this model"


def test_no_mesh_is_chosen_for_one_device(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "memory_of", lambda _: LARGE)
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    assert on_devices(pair[1], {}) == by_layer()


@pytest.mark.parametrize(
    ("scope", "num_devices", "gigabytes", "shape"),
    [
        ("all", 8, 106, (1, 1, 8, 1)),  # eight H200, of which JAX takes three quarters
        ("all", 8, 60, None),
        ("all", 16, 60, (1, 1, 16, 1)),
        ("all", 32, 60, (2, 1, 16, 1)),
        ("mtp", 2, 200, (2, 1, 1, 1)),
        ("mtp", 4, 60, (1, 1, 4, 1)),  # all of it is stored in 15 GB: what is used takes more
    ],
)
def test_the_mesh_that_is_chosen_for_v3(
    scope: str, num_devices: int, gigabytes: int, shape: tuple[int, ...] | None
):
    """FP8 as it was released: all that is stored, and a layer in float32."""
    config = ModelConfig.from_dict(released.CONFIG)
    leaves = leaves_by_name(abstract_model(config))
    dtypes = {name: jnp.bfloat16 for name in leaves if name.endswith("weight")} | {
        name: jnp.float8_e4m3fn for name, leaf in leaves.items() if name.endswith("_proj.weight")
    }
    checkpoint: Any = SimpleNamespace(config=config, dtypes=dtypes, provenance={"scope": scope})
    found = chosen_shape(checkpoint, num_devices, gigabytes * 10**9)[0]
    assert (found and tuple(found.values())) == shape


def test_metrics_of_logits_are_what_torch_says(pair: Pair, tmp_path: Path):
    """On a damaged module, where they are not those of two equal sides."""
    path = damaged(pair[1], tmp_path, "mtp.eh_proj.weight", (0,))
    tokens, segments = seeded_batch(384)
    theirs = TorchParts(open_reference(pair[0]), tokens, segments)
    checkpoint = open_checkpoint(path)
    ours = parts_of(checkpoint)
    own, reference = walk(ours, theirs, checkpoint.config, "all", segments).hidden[1]
    assert own is not None
    valid = torch.zeros(2, 48, dtype=torch.bool)
    for row, first, last in ((0, 0, 47), (1, 0, 18), (1, 19, 25), (1, 26, 41)):
        valid[row, first:last] = True
    a, b = (
        torch.tensor(side)[valid].double() for side in (ours.logits(own), theirs.logits(reference))
    )
    check = compared(pair[0], path).depths[1]
    kl = torch.nn.functional.kl_div(
        a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    top = (
        [{*row} for row in a.topk(5).indices.tolist()],
        [{*row} for row in b.topk(5).indices.tolist()],
    )
    shared = [len(x & y) / 5 for x, y in zip(*top, strict=True)]
    wanted = {
        "relative_difference": ((a - b).abs().max() / b.abs().max()).item(),
        "rms_relative_difference": ((a - b).square().mean() / b.square().mean()).sqrt().item(),
        "cosine": torch.cosine_similarity(a, b).min().item(),
        "kl": kl.mean().item(),
        "kl_largest": kl.max().item(),
        "argmax_agreement": (a.argmax(-1) == b.argmax(-1)).double().mean().item(),
        "top5_agreement": sum(shared) / len(shared),
    }
    for name, value in wanted.items():
        assert getattr(check, name) == pytest.approx(value, rel=1e-3), name
    assert check.rows == len(a)
    assert check.cosine < 0.999
    assert check.top5_agreement < 1


def test_a_stopped_comparison_goes_on_and_says_the_same(pair: Pair, tmp_path: Path):
    saved = tmp_path / "saved.npz"
    whole = compared(*pair)

    def stop_before(last: int):
        def told(done: int, _total: int) -> None:
            if done == last:
                raise KeyboardInterrupt

        return told

    for last in (3, 7):
        with pytest.raises(KeyboardInterrupt):
            compared(*pair, saved=saved, progress=stop_before(last))
        assert saved.exists()
    seen: list[tuple[int, int]] = []
    found = compared(*pair, saved=saved, progress=lambda *amount: seen.append(amount))
    assert seen == [(7, 8), (8, 8)]
    assert found.depths == whole.depths
    assert [layer.alone for layer in found.layers] == [layer.alone for layer in whole.layers]
    assert not saved.exists()


def test_what_was_saved_of_another_checkpoint_begins_anew(pair: Pair, tmp_path: Path):
    saved = tmp_path / "saved.npz"
    seen: list[int] = []

    def stop_at_5(done: int, _total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(*pair, saved=saved, progress=stop_at_5)
    other = import_tiny(tmp_path, dtype="fp8", num_mtp=2, seed=1)
    found = compared(tmp_path / "source", other, saved=saved, progress=lambda d, _: seen.append(d))
    assert seen[0] == 0
    assert found.holds


def stop() -> None:
    raise KeyboardInterrupt


@follows("delete it and run it again")
def test_what_was_saved_and_is_broken_says_what_to_do(pair: Pair, tmp_path: Path):
    saved = tmp_path / "saved.npz"
    saved.write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=r"cannot be read .*; delete it and run it again"):
        compared(*pair, saved=saved)
    saved.unlink()
    assert compared(*pair, saved=saved).holds


def test_a_stopped_report_does_not_look_finished(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command = ["verify", *map(str, pair), "--logits", "--report", str(tmp_path / "report")]
    assert main(command) == 0
    norm = JaxParts.norm
    monkeypatch.setattr(JaxParts, "norm", lambda *_: stop())
    assert main(command) == 130
    assert [file.name for file in (tmp_path / "report").iterdir()] == [UNFINISHED]
    monkeypatch.setattr(JaxParts, "norm", norm)
    monkeypatch.setattr(JaxParts, "layer", lambda *_: pytest.fail("a layer that was done"))
    assert main(command) == 0
    assert not (tmp_path / "report" / UNFINISHED).exists()
    assert "logits agree" in capsys.readouterr().out


def test_the_message_names_the_layer(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As a user sees it: of the source, for digests tell first what is wrong with the directory."""
    other = tmp_path / "other"
    import_tiny(other, dtype="fp8", num_mtp=2)
    file = next(f for f in sorted((other / "source").glob("*.safetensors")) if _has_norm(f))
    tensor = opened(other / "source").tensors["model.layers.2.input_layernorm.weight"]
    content = bytearray(file.read_bytes())
    content[tensor.begin : tensor.begin + 8] = content[tensor.begin + 8 : tensor.begin + 16]
    file.write_bytes(content)
    assert main(["verify", str(other / "source"), str(pair[1]), "--logits"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: first wrong layer model.layers.2: given the reference's state" in out
    assert out.count("WRONG") == 1


def _has_norm(file: Path) -> bool:
    return b'"model.layers.2.input_layernorm.weight"' in file.read_bytes()


def test_experts_are_read_a_few_at_a_time(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """No read of the walk holds more than what EXPERTS_BYTES allows, and no layer its experts."""
    counts: list[int] = []
    load_experts, load_layer = jax_parts.load_experts, jax_parts.load_layer

    def counted(checkpoint, stack, index, experts):
        counts.append(len(experts))
        return load_experts(checkpoint, stack, index, experts)

    def without(*args, experts):
        assert not experts
        return load_layer(*args, experts=experts)

    c = open_checkpoint(pair[1]).config
    monkeypatch.setattr(
        jax_parts, "EXPERTS_BYTES", 5 * 3 * 4 * c.hidden_size * c.moe_intermediate_size
    )
    monkeypatch.setattr(jax_parts, "load_experts", counted)
    monkeypatch.setattr(jax_parts, "load_layer", without)
    assert compared(*pair).holds
    assert max(counts) == 5
    assert len(counts) <= 4 * math.ceil(c.n_routed_experts / 5)  # what no token chooses is not read

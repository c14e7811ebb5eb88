"""Layouts of other tools: fused experts, stored buffers, router biases in BF16; and back."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from changed import leaf_of_rows
from gcs_server import GcsServer
from imported import CONTROL, TOLERANCE, import_folder, load_float32, relative_error
from layouts import (
    Edit,
    Tensors,
    assert_a_bucket_gives_the_same,
    assert_killed_imports_go_on,
    assert_the_hub_gives_the_same,
    fused,
    in_bf16,
    make_edited,
    round_trip,
)
from roundtrip import assert_same_files, read_tensors, run_import
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers_pair import load_transformers, random_tokens
from verified import opened

from converters.cli.main import main as convert
from converters.exporting.exporter import export_checkpoint
from converters.format.fit import fit
from converters.verifying.logits.check import check_logits
from mtp_model.checkpoint.derived import write_derived
from mtp_model.checkpoint.directory import open_checkpoint
from tools.make_tiny_checkpoint import TINY_CONFIG, make_tiny_checkpoint

LAYERS, MTP = 4, 4
BIAS = "mlp.gate.e_score_correction_bias"
BF16 = np.dtype(ml_dtypes.bfloat16)
# An expert's rows are whole blocks of scales: only then FP8 experts can be fused.
WHOLE_BLOCKS = {"moe_intermediate_size": 32}


def with_frequencies(tensors: Tensors, layers: Iterable[int], dtype: np.dtype) -> None:
    """What DeepSeek's rotary embedding registers, as Transformers computes it."""
    frequencies = DeepseekV3RotaryEmbedding(
        DeepseekV3Config(**copy.deepcopy(TINY_CONFIG))
    ).inv_freq.numpy()
    for layer in layers:
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.astype(dtype)


def fuse_all(tensors: Tensors, _: Tensors) -> None:
    fused(tensors)


def fuse_mtp(tensors: Tensors, _: Tensors) -> None:
    fused(tensors, (MTP,))


def fuse_bf16_experts(tensors: Tensors, plain: Tensors) -> None:
    in_bf16("mlp.experts.", layers=(2, 4))(tensors, plain)
    fused(tensors, (2, 4))


def buffers_everywhere(tensors: Tensors, _: Tensors) -> None:
    with_frequencies(tensors, range(LAYERS + 1), np.dtype(np.float32))
    tensors["model.rotary_emb.inv_freq"] = np.ones(4, np.float32)


def buffers_somewhere(tensors: Tensors, _: Tensors) -> None:
    with_frequencies(tensors, (1, 3, MTP), BF16)


def bias_in_bf16(tensors: Tensors, _: Tensors) -> None:
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = tensors[name].astype(BF16)


def all_at_once(tensors: Tensors, plain: Tensors) -> None:
    for edit in (fuse_bf16_experts, buffers_somewhere, bias_in_bf16):
        edit(tensors, plain)


CASES: dict[str, tuple[str, Edit, dict[str, int]]] = {
    "fused": ("bf16", fuse_all, {}),
    "fused float32": ("f32", fuse_all, {}),
    "fused in the MTP module only": ("bf16", fuse_mtp, {}),
    "fused FP8": ("fp8", fuse_all, WHOLE_BLOCKS),
    "fused bf16 beside FP8": ("fp8", fuse_bf16_experts, {}),
    "buffers everywhere": ("bf16", buffers_everywhere, {}),
    "buffers somewhere, in bf16": ("fp8", buffers_somewhere, {}),
    "router bias in bf16": ("bf16", bias_in_bf16, {}),
    "all at once": ("fp8", all_at_once, {}),
}


def make_case(folder: Path, case: str, num_files: int = 7) -> Path:
    dtype, edit, sizes = CASES[case]
    return make_edited(folder, edit, dtype=dtype, sizes=sizes, num_files=num_files)


@pytest.mark.parametrize("case", CASES)
def test_every_layout_comes_back_byte_for_byte_with_the_logits_of_the_reference(
    tmp_path: Path, case: str
):
    source = make_case(tmp_path / "source", case)
    finer = ("f32",) if CASES[case][0] == "f32" else ("bf16", "f32")
    for dtype in ("keep", *finer):
        round_trip(source, tmp_path / dtype, dtype=dtype)
    assert check_logits(opened(source), open_checkpoint(tmp_path / "keep" / "ckpt")).holds
    for scope in ("main", "mtp"):
        run_import(source, tmp_path / scope, scope=scope)
        based = tmp_path / f"{scope}-out"
        export_checkpoint(open_checkpoint(tmp_path / scope), based, base=opened(source))
        assert_same_files(based, source)
    kept = open_checkpoint(tmp_path / "keep" / "ckpt")
    export_checkpoint(kept, tmp_path / "rounded", dtype="bf16")
    rounded, stored = read_tensors(tmp_path / "rounded"), read_tensors(source)
    assert rounded.keys() == {name for name in stored if not name.endswith("_scale_inv")}
    for name, tensor in rounded.items():
        others = name.endswith(("inv_freq", "e_score_correction_bias"))
        assert tensor.dtype == (stored[name].dtype if others else BF16)
    round_trip(tmp_path / "rounded", tmp_path / "again")


def test_an_import_that_was_killed_goes_on(tmp_path: Path):
    source = make_case(tmp_path / "source", "all at once")
    assert_killed_imports_go_on(source, tmp_path, ("chunk", 60), ("journal", 3), ("side file", 1))


def test_from_the_hub_the_same_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make_case(tmp_path / "source", "all at once")
    assert_the_hub_gives_the_same(source, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", ["fused FP8", "all at once"])
def test_from_a_bucket_the_same_comes(tmp_path: Path, gcs: GcsServer, url: str, case: str):
    assert_a_bucket_gives_the_same(make_case(tmp_path / "source", case), tmp_path, gcs, url)


def our_logits(folder: Path, into: Path, tokens: torch.Tensor) -> tuple[np.ndarray, ...]:
    import_folder(folder, into)
    out = load_float32(into)(tokens.numpy().astype(np.int32))
    return (np.asarray(out.logits_BTV), *map(np.asarray, out.mtp_logits))


@torch.no_grad()
def test_fused_experts_compute_what_transformers_computes(tmp_path: Path):
    source = make_case(tmp_path / "source", "fused float32")
    main, mtp = load_transformers(source, LAYERS, 1)
    tokens = random_tokens(384)
    hidden = main.model(tokens).last_hidden_state
    ahead = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    positions = torch.arange(tokens.shape[1])[None] + 1
    drafted = mtp.forward_layer(0, hidden, positions, None, input_ids=ahead)
    theirs = [main.lm_head(hidden).numpy(), main.lm_head(drafted).numpy()[:, :-1]]
    ours = our_logits(source, tmp_path / "ckpt", tokens)
    assert relative_error(ours[0], theirs[0]) <= TOLERANCE
    assert relative_error(ours[1][:, :-1], theirs[1]) <= TOLERANCE

    def swapped(tensors: Tensors, plain: Tensors) -> None:
        fuse_all(tensors, plain)
        for name in [name for name in tensors if name.endswith("gate_up_proj")]:
            tensors[name] = np.concatenate(np.split(tensors[name], 2, axis=1)[::-1], axis=1)

    wrong = make_edited(tmp_path / "wrong", swapped, dtype="f32")
    mistaken = our_logits(wrong, tmp_path / "wrong-ckpt", tokens)
    assert relative_error(mistaken[0], theirs[0]) >= CONTROL


@torch.no_grad()
def test_what_transformers_saves_is_read(tmp_path: Path):
    """A main model alone: Transformers saves no MTP module."""
    make_tiny_checkpoint(tmp_path / "source", dtype="f32", num_mtp=0)
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "source", attn_implementation="eager")
    model.save_pretrained(tmp_path / "saved", save_original_format=False)
    saved = read_tensors(tmp_path / "saved")
    assert saved["model.layers.2.mlp.experts.gate_up_proj"].shape == (12, 56, 40)
    round_trip(tmp_path / "saved", tmp_path)
    tokens = random_tokens(384)
    theirs = model(tokens).logits.numpy()
    assert relative_error(our_logits(tmp_path / "saved", tmp_path / "x", tokens)[0], theirs) <= 1e-5


def test_buffers_that_config_json_does_not_give_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = make_case(tmp_path / "source", "buffers everywhere")
    assert convert(["import", str(source), str(tmp_path / "ckpt"), "--json"]) == 0
    [note] = json.loads(capsys.readouterr().out)["notes"]
    assert note.startswith("model.rotary_emb.inv_freq is not what config.json gives")
    assert convert(["inspect", str(source), "--json"]) == 0
    network = json.loads(capsys.readouterr().out)["network"]
    assert network["groups"]["buffers"] == {"tensors": 6, "bytes": 96, "parameters": 0}
    whole = make_case(tmp_path / "plain", "router bias in bf16")
    assert convert(["inspect", str(whole), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["network"]["parameters"] == network["parameters"]


def test_a_trained_router_bias_keeps_the_kind_that_it_had(tmp_path: Path):
    source = make_case(tmp_path / "source", "router bias in bf16")
    checkpoint = round_trip(source, tmp_path)
    leaf = f"mtp.block.{BIAS}"
    assert checkpoint.leaves[leaf].dtype == np.float32
    moved = checkpoint.read_rows(leaf, (0,), 0, 12) + np.float32(0.3337)
    new = leaf_of_rows(np.dtype(np.float32), lambda _, start, stop: moved[start:stop])
    trained = write_derived(checkpoint, tmp_path / "trained", {leaf: new}, {})
    summary = export_checkpoint(trained, tmp_path / "tuned")
    name = f"model.layers.{MTP}.{BIAS}"
    assert summary.changed == (name,)
    found = read_tensors(tmp_path / "tuned")[name]
    assert found.dtype == BF16
    assert np.array_equal(found, moved.astype(BF16))
    assert check_logits(opened(tmp_path / "tuned"), trained).holds


def problems(folder: Path) -> list[str]:
    source = opened(folder)
    found = fit(source, source.config).problems
    return [f"{problem.kind} {problem.subject} {problem.detail}" for problem in found]


def test_fused_experts_that_cannot_be_divided_are_named(tmp_path: Path):
    straddling = make_case_of_blocks(tmp_path / "blocks")
    name = "model.layers.2.mlp.experts.gate_up_proj_scale_inv"
    told = "is (12, 7, 3), needed [experts, 2 x rows, columns], of each expert"
    weights = "gate_proj.weight_scale_inv and up_proj.weight_scale_inv"
    assert f"shape {name} {told} {weights}" in problems(straddling)

    def fewer(tensors: Tensors, plain: Tensors) -> None:
        fuse_all(tensors, plain)
        name = "model.layers.3.mlp.experts.down_proj"
        tensors[name] = tensors[name][:-1]

    missing = "missing model.layers.3.mlp.experts.11.down_proj.weight "
    assert problems(make_edited(tmp_path / "fewer", fewer, dtype="bf16")) == [missing]


def make_case_of_blocks(folder: Path) -> Path:
    """FP8 experts of 28 rows in blocks of 8: a block of the fused ones lies on gate and up."""

    def edit(tensors: Tensors, _: Tensors) -> None:
        for name in tensors:  # 7 rows of blocks for the 56 rows of both
            if name.endswith("gate_proj.weight_scale_inv") and ".layers.2." in name:
                tensors[name] = tensors[name][:3]
        prefix = "model.layers.2.mlp.experts."
        scales = {n: tensors.pop(n) for n in list(tensors) if n.startswith(prefix) and "scale" in n}
        fused(tensors, (2,))
        pairs = [
            np.concatenate(
                [scales[f"{prefix}{e}.{p}_proj.weight_scale_inv"] for p in ("gate", "up")]
            )
            for e in range(12)
        ]
        tensors[f"{prefix}gate_up_proj_scale_inv"] = np.stack(pairs)
        downs = [scales[f"{prefix}{e}.down_proj.weight_scale_inv"] for e in range(12)]
        tensors[f"{prefix}down_proj_scale_inv"] = np.stack(downs)

    return make_edited(folder, edit)

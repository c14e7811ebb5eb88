"""Values that no weight, scale or copy may have: found on import, alike wherever the source is."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gcs_server import BUCKET, GcsServer
from hub_client import REPO, lone_hub
from roundtrip import make_source, patch_tensor, read_tensors, run_import, tree_bytes

from converters.cli.main import main
from converters.format.mapping import slots
from converters.format.values import all_finite
from mtp_model.checkpoint.directory import CheckpointError, open_checkpoint

LAYER, MTP = "model.layers.2.", "model.layers.4."
SCALE = f"{LAYER}self_attn.q_b_proj.weight_scale_inv"
EXPERT = "model.layers.3.mlp.experts.7.down_proj.weight"
BIAS = f"{LAYER}mlp.gate.e_score_correction_bias"


def bf16(value: float) -> bytes:
    return np.array(value, ml_dtypes.bfloat16).tobytes()


def f32(value: float) -> bytes:
    return np.float32(value).tobytes()


DAMAGED: dict[str, tuple[str, dict[tuple[int, ...], bytes], str]] = {
    "zero scale": (SCALE, {(1, 1): f32(0)}, "1 of .* not finite and above 0; the first is 0.0 at"),
    "negative scale": (SCALE, {(0, 1): f32(-1)}, r"above 0; the first is -1.0 at \(0, 1\)"),
    "NaN scale": (SCALE, {(1, 0): f32(np.nan)}, r"the first is nan at \(1, 0\)"),
    "infinite scale": (SCALE, {(1, 1): f32(np.inf)}, "the first is inf at"),
    "scale of infinite weights": (
        SCALE,
        {(0, 0): f32(1e37)},
        r"infinite .* first is 9.99\d*e\+36 at",
    ),
    # the last element: not in a whole word of eight
    "NaN code": (EXPERT, {(39, 27): b"\x7f"}, r"holds NaN at \(39, 27\)"),
    "negative NaN code": (EXPERT, {(0, 0): b"\xff"}, r"holds NaN at \(0, 0\)"),
    "NaN in bfloat16": (f"{MTP}eh_proj.weight", {(3, 5): bf16(np.nan)}, r"holds NaN at \(3, 5\)"),
    "infinity in bfloat16": (f"{MTP}enorm.weight", {(7,): bf16(-np.inf)}, r"infinity at \(7,\)"),
    "infinite bias": (BIAS, {(2,): f32(np.inf)}, r"holds infinity at \(2,\)"),
    "stale copy": (f"{MTP}embed_tokens.weight", {(9, 1): bf16(3)}, "in 1 of 384 rows, .* row 9"),
}


def import_it(source: str, dst: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    """The problems of an import that fails, without the name of its source."""
    assert main(["import", source, str(dst), "--json", *more]) == 1
    found = json.loads(capsys.readouterr().out)
    return [f"{p['kind']} {p['subject']} {p['detail']}" for p in found["problems"]]


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_value_is_the_same_problem_everywhere(
    case: str,
    dtype: str,
    gcs: GcsServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    name, values, told = DAMAGED[case]
    folder = make_source(tmp_path / "source")
    patch_tensor(folder, name, values)
    address = f"gs://{BUCKET}/values-{abs(hash((case, dtype)))}"
    for file, content in tree_bytes(folder).items():
        gcs.put(f"{address.removeprefix(f'gs://{BUCKET}/')}/{file}", content)
    with lone_hub(tmp_path, monkeypatch) as hub:
        hub.add(REPO, tree_bytes(folder))
        problems = [
            import_it(source, tmp_path / f"ckpt{number}", capsys, "--dtype", dtype)
            for number, source in enumerate((str(folder), REPO, address))
        ]
    assert problems[0] == problems[1] == problems[2]
    [problem] = problems[0]
    assert name in problem
    assert re.search(told, problem), problem
    with pytest.raises(CheckpointError, match="is unfinished"):
        open_checkpoint(tmp_path / "ckpt0")


def test_all_damaged_values_are_one_report_and_a_sound_source_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = make_source(tmp_path / "source")
    assert main(["import", str(folder), str(tmp_path / "sound")]) == 0
    capsys.readouterr()
    weights = [case for case in DAMAGED if "scale" not in case and case != "stale copy"]
    for case in weights:
        name, values, _ = DAMAGED[case]
        patch_tensor(folder, name, values)
    problems = import_it(str(folder), tmp_path / "ckpt", capsys)
    assert len(problems) == len({DAMAGED[case][0] for case in weights}), problems


def test_scales_and_copies_are_known_before_the_rest_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Of a folder on this machine; what comes over a network is read in its own order."""
    folder = make_source(tmp_path / "source")
    for case in ("zero scale", "NaN code"):
        name, values, _ = DAMAGED[case]
        patch_tensor(folder, name, values)
    [problem] = import_it(str(folder), tmp_path / "ckpt", capsys)
    assert SCALE in problem
    written = [path.parent.name for path in (tmp_path / "ckpt/params").rglob("*.*.*")]
    assert written
    assert not [leaf for leaf in written if leaf.endswith("experts.down_proj.weight")]


@pytest.mark.parametrize(("dtype", "kind"), [("BF16", ml_dtypes.bfloat16), ("F32", np.float32)])
def test_all_finite_agrees_with_numpy(dtype: str, kind: type):
    rng = np.random.default_rng(0)
    for size in (1, 3, 4, 5, 8, 4096, 40_001):
        values = rng.normal(size=size).astype(kind)
        assert all_finite(values.view(np.uint8), dtype)
        for bad in (np.nan, np.inf, -np.inf):
            damaged = values.copy()
            damaged[rng.integers(size)] = bad
            assert not all_finite(damaged.view(np.uint8), dtype)


def test_all_finite_knows_every_fp8_code():
    for code in range(256):
        raw = np.full(13, 0x7E, np.uint8)
        for position in (0, 7, 12):
            found = raw.copy()
            found[position] = code
            assert all_finite(found, "F8_E4M3") == (code & 0x7F != 0x7F)


def test_the_largest_finite_numbers_pass(tmp_path: Path):
    folder = make_source(tmp_path / "source")
    name = f"{MTP}enorm.weight"
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    patch_tensor(folder, name, {(0,): bf16(largest), (1,): bf16(-largest)})
    patch_tensor(folder, EXPERT, {(0, 0): b"\x7e", (0, 1): b"\xfe"})
    patch_tensor(folder, f"{EXPERT}_scale_inv", {(0, 0): f32(largest / 448)})
    assert main(["import", str(folder), str(tmp_path / "ckpt")]) == 0
    assert float(read_tensors(folder)[name][0]) == largest
    run_import(folder, tmp_path / "wide", dtype="bf16")
    slot = slots(open_checkpoint(tmp_path / "wide").config)[EXPERT]
    row = open_checkpoint(tmp_path / "wide").read_rows(slot.path, slot.index, 0, 1)[0]
    assert row[:2].tolist() == [largest, -largest]


def test_a_float32_weight_that_bfloat16_cannot_hold_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """It is finite where it is, and would be infinite in what is written."""
    folder = make_source(tmp_path / "source", dtype="f32")
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    patch_tensor(folder, EXPERT, {(5, 3): f32(largest)})
    assert main(["import", str(folder), str(tmp_path / "sound"), "--dtype", "bf16"]) == 0
    patch_tensor(folder, EXPERT, {(5, 3): f32(3.4e38)})
    assert main(["import", str(folder), str(tmp_path / "kept")]) == 0
    capsys.readouterr()
    told = rf"{EXPERT} holds 3.3999\d*e\+38 at \(5, 3\), which is infinite as bfloat16"
    [problem] = import_it(str(folder), tmp_path / "ckpt", capsys, "--dtype", "bf16")
    assert re.search(told, problem), problem
    kept = str(tmp_path / "kept")
    assert main(["export", kept, str(tmp_path / "out"), "--dtype", "bf16"]) == 1
    assert re.search(told, capsys.readouterr().err)

"""`verify A B` of any two checkpoints: nothing where nothing differs, else what does, by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from advice import done, follows, told
from changed import leaf_of_rows
from gcs_server import GcsServer
from hub_client import REPO, lone_hub
from layouts import fused, make_edited
from modules import draft_of, set_config, without_module
from roundtrip import dequantised, patch_tensor, read_tensors, run_import, tree_bytes

from converters.cli.main import main
from converters.sources.local import LocalSource
from converters.verifying import tensors as tensors_module
from mtp_model.checkpoint.derived import write_derived
from mtp_model.checkpoint.directory import open_checkpoint
from tools.make_tiny_checkpoint import make_tiny_checkpoint

BLOCK = (8, 16)
EXPERT = "model.layers.3.mlp.experts.5.up_proj.weight"
SAME = "MTP module changed: no; main model changed: no"
COPIES = ["model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fp8` and what was made of it; `tuned`: a directory whose MTP module was changed."""
    folder = tmp_path_factory.mktemp("made")
    src = folder / "fp8"
    make_tiny_checkpoint(src)
    draft_of(src, folder / "draft", copies=False)
    make_edited(folder / "fused", lambda tensors, _: fused(tensors), num_files=1)
    for name, options in (("ckpt", {}), ("in_bf16", {"dtype": "bf16"}), ("mtp", {"scope": "mtp"})):
        run_import(src, folder / name, **options)
    run_import(src, folder / "main", scope="main")
    done("export", folder / "ckpt", folder / "bf16", "--dtype", "bf16")
    checkpoint = open_checkpoint(folder / "ckpt")

    def rows(index: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        values = checkpoint.read_rows("mtp.enorm.weight", index, start, stop)
        return (values.astype(np.float32) + 1).astype(values.dtype)

    changed = leaf_of_rows(np.dtype(ml_dtypes.bfloat16), rows)
    write_derived(checkpoint, folder / "tuned", {"mtp.enorm.weight": changed}, {})
    return folder


def compared(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    capsys.readouterr()
    status = main(["verify", *map(str, args), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == (0 if found["holds"] else 1)
    return found


def said(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["verify", *map(str, args)])
    return status, capsys.readouterr().out


def copied(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("a", "b", "result"),
    [
        ("fp8", "fp8", SAME),
        ("ckpt", "fp8", SAME),
        ("in_bf16", "ckpt", SAME),
        ("ckpt", "in_bf16", SAME),
        ("fp8", "fused", SAME),
        ("fp8", "bf16", SAME),
        ("in_bf16", "bf16", SAME),
        ("draft", "fp8", "MTP module changed: no; main model not compared: DRAFT holds none"),
        ("ckpt", "draft", "MTP module changed: no; main model not compared: DRAFT holds none"),
        ("main", "fp8", "MTP module not compared: MAIN holds none; main model changed: no"),
        ("mtp", "draft", "MTP module changed: no; main model not compared: MTP holds none"),
    ],
)
def test_what_is_the_same_holds(made: Path, capsys, a: str, b: str, result: str):
    status, out = said(capsys, made / a, made / b)
    for name in ("draft", "main", "mtp"):
        result = result.replace(name.upper() + " holds", f"{made / name} holds")
    assert status == 0
    assert out.endswith(f"result  {result}\n")


@pytest.mark.parametrize("b", ["fp8", "ckpt", "draft", "fused"])
def test_a_tuned_module_is_all_that_changed(made: Path, capsys, b: str):
    found = compared(capsys, made / "tuned", made / b)
    assert [tensor["name"] for tensor in found["differences"]] == ["model.layers.4.enorm.weight"]
    assert (found["mtp_changed"], found["main_changed"]) == (True, None if b == "draft" else False)
    if b == "draft":
        assert found["differences"][0]["in_b"] == "model.layers.0.enorm.weight"
    else:
        assert said(capsys, made / "tuned", made / b, "--scope", "main")[0] == 0
        assert (
            "module changed: yes; main model changed: no"
            in said(capsys, made / "tuned", made / b)[1]
        )


def test_the_storage_check_says_what_changed_too(made: Path, capsys):
    status, out = said(capsys, made / "fp8", made / "tuned")
    assert status == 1
    assert "MTP module changed: yes; main model changed: no" in out


def _numbers(folder: Path, name: str) -> np.ndarray:
    """Of an FP8 weight, by other means."""
    tensors = read_tensors(folder)
    return dequantised(tensors[name], tensors[name + "_scale_inv"], BLOCK).astype(np.float64)


@pytest.mark.parametrize("other", ["fp8", "ckpt", "in_bf16"])
@pytest.mark.parametrize(
    ("suffix", "at", "changes"), [("", (3, 4), 1), ("_scale_inv", (1, 0), 128)]
)
def test_one_value_in_one_expert_is_found(
    made: Path, tmp_path: Path, capsys, other: str, suffix: str, at: tuple[int, int], changes: int
):
    changed = copied(made / "fp8", tmp_path)
    value = b"\x55" if not suffix else np.float32(3).tobytes()
    patch_tensor(changed, EXPERT + suffix, {at: value})
    found = compared(capsys, made / other, changed)
    [tensor] = found["differences"]
    assert (tensor["name"], tensor["group"], tensor["values"]) == (
        EXPERT,
        "routed experts",
        28 * 40,
    )
    before, after = _numbers(made / "fp8", EXPERT), _numbers(changed, EXPERT)
    assert tensor["changed"] == np.count_nonzero(before != after) <= changes
    assert tensor["changed"] > 0.9 * changes
    errors = np.abs(after - before)
    assert tensor["max_error"] == pytest.approx(errors.max() / np.abs(before).max())
    rms = np.sqrt((errors**2).sum() / (before**2).sum())
    assert tensor["rms_error"] == pytest.approx(rms)
    part = found["parts"]["routed experts"]
    assert (part["differing"], part["identical"]) == (1, part["tensors"] - 1)
    assert (part["max_error"], part["rms_error"]) == (tensor["max_error"], tensor["rms_error"])
    assert (found["mtp_changed"], found["main_changed"]) == (False, True)
    assert compared(capsys, made / other, changed, "--scope", "mtp")["holds"]


def test_a_bit_after_dequantising_is_found(made: Path, tmp_path: Path, capsys):
    """FP8 beside bfloat16: all values are equal but the one that was changed by a bit."""
    changed = copied(made / "bf16", tmp_path)
    value = read_tensors(changed)[EXPERT][2, 7:8].view(np.uint16) ^ 1
    patch_tensor(changed, EXPERT, {(2, 7): value.tobytes()})
    found = compared(capsys, made / "fp8", changed)
    [tensor] = found["differences"]
    assert (tensor["name"], tensor["changed"]) == (EXPERT, 1)
    assert tensor["max_error"] < 2**-8
    part = found["parts"]["routed experts"]
    assert (part["equal"], part["identical"]) == (part["tensors"] - 1, 0)


def test_what_only_one_has_is_named(made: Path, tmp_path: Path, capsys):
    """A lost module; a tensor that no network has."""
    lost = without_module(made / "fp8", tmp_path / "lost")
    status, out = said(capsys, made / "fp8", lost)
    assert status == 1
    assert "only in A:\n  model.layers.4." in out
    assert out.endswith("MTP module changed: yes; main model changed: no\n")
    found = compared(capsys, made / "fp8", lost)
    assert "model.layers.4.eh_proj.weight" in found["only_in_a"]
    assert found["only_in_b"] == []
    done("verify", made / "fp8", lost, "--scope", "main")

    more = make_edited(
        tmp_path / "more",
        lambda tensors, _: tensors.update({"model.x": tensors["lm_head.weight"]}),
    )
    found = compared(capsys, made / "fp8", more)
    assert (found["only_in_a"], found["only_in_b"]) == ([], ["model.x"])
    assert found["parts"]["others"]["only_in_b"] == 1
    assert found["main_changed"]


def test_copies_may_be_left_out_and_are_named(made: Path, capsys):
    found = compared(capsys, made / "draft", made / "fp8")
    assert found["holds"]
    assert found["only_in_b"] == COPIES


def test_another_shape_and_another_config_differ(made: Path, tmp_path: Path, capsys):
    name = "model.layers.0.input_layernorm.weight"
    shorter = make_edited(
        tmp_path / "shorter", lambda tensors, _: tensors.update({name: tensors[name][:-8]})
    )
    [tensor] = compared(capsys, made / "fp8", shorter)["differences"]
    assert (tensor["name"], tensor["a"], tensor["b"]) == (name, "BF16 [40]", "BF16 [32]")
    assert (tensor["changed"], tensor["max_error"]) == (None, None)  # infinite

    changed = copied(made / "fp8", tmp_path)
    set_config(changed, rope_theta=500.0)
    found = compared(capsys, made / "ckpt", changed)
    assert not found["differences"]
    assert found["config"] == ["rope_theta is 1000.0 in A, 500.0 in B"]
    assert not found["holds"]


def test_no_more_than_a_piece_is_read_at_once(made: Path, tmp_path: Path, capsys, monkeypatch):
    changed = copied(made / "bf16", tmp_path)
    patch_tensor(changed, EXPERT, {(20, 7): b"\0\0"})
    whole = compared(capsys, made / "fp8", changed)
    sizes: list[int] = []
    read_into = LocalSource.read_into

    def noted(self, file, begin, out):
        sizes.append(out.nbytes)
        read_into(self, file, begin, out)

    monkeypatch.setattr(LocalSource, "read_into", noted)
    monkeypatch.setattr(tensors_module, "_PIECE_VALUES", 320)
    assert compared(capsys, made / "fp8", changed)["differences"] == whole["differences"]
    # No less than a row of blocks, which is 8 rows; of the widest weight 84 columns.
    assert max(sizes) <= 8 * 84 * 2
    sizes.clear()
    monkeypatch.setattr(tensors_module, "_PIECE_VALUES", 1 << 20)
    compared(capsys, made / "fp8", changed)
    assert max(sizes) > 8 * 84 * 2


def test_a_bucket_and_the_hub(made: Path, tmp_path: Path, capsys, gcs: GcsServer, url, monkeypatch):
    for name, content in tree_bytes(made / "fp8").items():
        gcs.put(f"{url.split('/', 3)[3]}/{name}", content)
    assert said(capsys, url, made / "fp8")[0] == 0
    assert said(capsys, made / "tuned", url)[0] == 1
    (tmp_path / "hub").mkdir()
    with lone_hub(tmp_path / "hub", monkeypatch) as hub:
        hub.add(REPO, tree_bytes(made / "fp8"))
        assert compared(capsys, made / "draft", REPO)["holds"]
        assert compared(capsys, REPO, made / "bf16")["holds"]
        [tensor] = compared(capsys, REPO, made / "tuned", "--scope", "all")["storage"][
            "differences"
        ]
        assert tensor["name"] == "model.layers.4.enorm.weight"


def test_a_report_is_written(made: Path, tmp_path: Path, capsys):
    found = compared(capsys, made / "tuned", made / "ckpt", "--report", tmp_path / "report")
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report == {"report_version": 1, **found}
    text = (tmp_path / "report/report.md").read_text()
    assert "MTP module changed: yes; main model changed: no" in text


@follows("have no tensor in common; name two checkpoints of one network")
def test_what_is_said_of_two_that_cannot_be_compared_helps(made: Path, tmp_path: Path, capsys):
    assert "have no tensor in common" in told(capsys, "verify", made / "main", made / "draft")
    done("verify", made / "main", made / "ckpt")

    advice = "holds none; compare without --scope main"
    assert advice in told(capsys, "verify", made / "mtp", made / "ckpt", "--scope", "main")
    done("verify", made / "mtp", made / "ckpt")

    assert "which --logits and --mtp-from compare: verify SRC CKPT" in told(
        capsys, "verify", made / "fp8", made / "bf16", "--logits"
    )

    changed = copied(made / "fp8", tmp_path)
    set_config(changed, quantization_config=...)
    assert "is F8_E4M3 without float32 scales" in told(capsys, "verify", made / "fp8", changed)

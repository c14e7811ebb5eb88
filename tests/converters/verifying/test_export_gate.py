"""What `export` proves of what it wrote: it holds, and does not hold of what was damaged."""

import dataclasses
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from advice import follows
from changed import leaf_of_rows
from modules import without_module
from roundtrip import read_tensors

import converters.verifying.logits
from converters.cli import export_command
from converters.cli.main import main
from converters.exporting.exporter import export_checkpoint
from converters.exporting.result import ExportSummary
from converters.verifying import export_gate
from converters.verifying.export_gate import ExportCheck, check_export
from converters.verifying.logits import check as logits_check
from converters.verifying.logits.check import LogitsCheck
from mtp_model.checkpoint.derived import ChangedLeaf, write_derived
from mtp_model.checkpoint.directory import Checkpoint, open_checkpoint
from tools.make_tiny_checkpoint import make_tiny_checkpoint

EH_PROJ = "mtp.eh_proj.weight"
F32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate") / "source"
    make_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def kept(source: Path) -> Checkpoint:
    assert main(["import", str(source), str(source.parent / "kept")]) == 0
    return open_checkpoint(source.parent / "kept")


@pytest.fixture
def _logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared, as for users; see conftest.py."""
    pytest.importorskip("torch")
    monkeypatch.setattr(export_gate, "check_logits", logits_check.check_logits)


def trained(base: Checkpoint, path: Path, leaves: dict[str, float], **record: Any) -> Checkpoint:
    """A checkpoint whose leaves are those of `base` plus so much, in float32."""

    def values(leaf: str, added: float) -> ChangedLeaf:
        def rows(index: tuple[int, ...], start: int, stop: int) -> np.ndarray:
            return base.read_rows(leaf, index, start, stop).astype(F32) + F32.type(added)

        return leaf_of_rows(F32, rows)

    changed = {leaf: values(leaf, added) for leaf, added in leaves.items()}
    return write_derived(base, path, changed, record)


def checked(
    checkpoint: Checkpoint, out: Path, damage: Callable[[Path], None] | None = None, **changes: Any
) -> ExportCheck:
    """The check of an export, damaged after it was written; `changes` of its summary."""
    dtype = changes.pop("dtype", "keep")
    summary = export_checkpoint(checkpoint, out, dtype=dtype)
    if damage:
        damage(out)
    summary = dataclasses.replace(summary, **changes)
    return check_export(checkpoint, summary, keeps_dtypes=dtype == "keep")


def set_bytes(folder: Path, name: str, content: bytes) -> None:
    """Overwrite a tensor in the file that the index says."""
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / places[name]
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8:start])[name]["data_offsets"]
    assert end - begin == len(content)
    raw[start + begin : start + end] = content
    file.write_bytes(raw)


def negated(folder: Path, name: str) -> None:
    tensor = read_tensors(folder)[name]
    set_bytes(folder, name, (-tensor).astype(tensor.dtype).tobytes())


@pytest.mark.usefixtures("_logits")
@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_what_export_wrote_holds_on_every_layer(kept: Checkpoint, tmp_path: Path, dtype: str):
    found = checked(kept, tmp_path / "out", dtype=dtype)
    assert found.holds
    assert (found.problems, found.warnings, found.logits_left_out) == ((), (), None)
    assert found.copies == 2
    changed = (found.main_changed, found.mtp_changed)
    assert changed == ((0, 0) if dtype == "keep" else (None, None))
    assert found.logits
    assert found.logits.layers_left_out == 0
    assert len(found.logits.layers) == 8
    assert [depth.depth for depth in found.logits.depths] == [0, 1]


@pytest.mark.usefixtures("_logits")
def test_of_a_large_model_some_layers_are_run(
    kept: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Those hold, a damaged one among them is found, and one that is left out is not."""
    monkeypatch.setattr(export_gate, "SMALL_BYTES", 0)
    run = ["model.embed_tokens", "model.layers.0", "model.norm", "model.layers.4", "lm_head"]
    found = checked(kept, tmp_path / "out")
    assert found.holds
    assert found.logits
    assert [layer.name for layer in found.logits.layers] == run
    assert found.logits.layers_left_out == 3
    in_module = "model.layers.4.enorm.weight"
    found = checked(kept, tmp_path / "module", lambda folder: negated(folder, in_module))
    assert found.logits
    assert (found.holds, found.logits.first_wrong) == (False, "model.layers.4")
    left_out = "model.layers.2.input_layernorm.weight"
    assert checked(kept, tmp_path / "other", lambda folder: negated(folder, left_out)).holds


@pytest.mark.usefixtures("_logits")
def test_a_tuned_module_over_its_base(source: Path, tmp_path: Path, capsys):
    """Of a checkpoint that holds the module alone: the reference gives it its state."""
    mtp, out = tmp_path / "mtp", tmp_path / "out"
    assert main(["import", str(source), str(mtp), "--scope", "mtp"]) == 0
    settings = {"train": "mtp", "draft_tokens": 3}
    trained(open_checkpoint(mtp), tmp_path / "tuned", {EH_PROJ: 0.01}, settings=settings)
    capsys.readouterr()
    command = ["export", str(tmp_path / "tuned"), str(out), "--base", str(source)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    verified = found["verified"]
    assert verified["holds"]
    assert (verified["main_changed"], verified["mtp_changed"]) == (0, 1)
    assert [layer["name"] for layer in verified["logits"]["layers"]] == [
        "model.layers.4",
        "lm_head",
    ]
    assert [depth["depth"] for depth in verified["logits"]["depths"]] == [1]
    vllm, sglang = map(shlex.split, found["serve"])
    config = json.loads(vllm[vllm.index("--speculative-config") + 1])
    assert config == {"method": "mtp", "num_speculative_tokens": 3}
    assert vllm[:3] == ["vllm", "serve", str(out)]
    assert sglang[sglang.index("--speculative-num-draft-tokens") + 1] == "4"


def edited(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def index_names_another_file(folder: Path) -> None:
    edited(
        folder,
        "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"model.norm.weight": "other.safetensors"}),
    )


def config_has_fewer_experts(folder: Path) -> None:
    edited(folder, "config.json", lambda config: config.update(n_routed_experts=8))


def a_file_is_gone(folder: Path) -> None:
    (folder / "model-00003-of-000007.safetensors").unlink()


def a_file_is_longer(folder: Path) -> None:
    with (folder / "model-00003-of-000007.safetensors").open("ab") as file:
        file.write(b"more")


def a_file_has_another_header(folder: Path) -> None:
    file = folder / "model-00003-of-000007.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"format":"pt"', b'"format":"np"', 1))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (index_names_another_file, "other.safetensors"),
        (config_has_fewer_experts, "n_routed_experts|mlp.experts.8"),
        (a_file_is_gone, "model-00003-of-000007.safetensors .*no such"),
        (a_file_is_longer, "something was appended"),
        (a_file_has_another_header, "is not the source's"),
    ],
)
def test_files_that_do_not_agree(
    kept: Checkpoint, tmp_path: Path, damage: Callable[[Path], None], told: str
):
    found = checked(kept, tmp_path / "out", damage)
    assert not found.holds
    assert any(re.search(told, str(problem)) for problem in found.problems)
    assert found.logits_left_out == "storage is wrong already"


@follows("export again, with --overwrite")
def test_copies_follow_what_was_trained(source: Path, kept: Checkpoint, tmp_path: Path):
    """With a new embedding both are written; one that is still the source's is stale."""
    copy = "model.layers.4.embed_tokens.weight"
    old = read_tensors(source)[copy].tobytes()
    tuned = trained(kept, tmp_path / "all", {"embed_tokens.weight": 0.5}, settings={"train": "all"})
    found = checked(tuned, tmp_path / "out")
    assert found.holds
    assert found.main_changed == 1
    found = checked(tuned, tmp_path / "stale", lambda folder: set_bytes(folder, copy, old))
    assert [(p.kind, p.subject) for p in found.problems] == [("copy", copy)]
    summary = export_checkpoint(tuned, tmp_path / "stale", overwrite=True)
    assert check_export(tuned, summary, keeps_dtypes=True).holds


def test_the_main_model_changes_only_where_it_was_trained(kept: Checkpoint, tmp_path: Path):
    norm = "model.norm.weight"
    tuned = trained(kept, tmp_path / "all", {"norm.weight": 0.5}, settings={"train": "all"})
    assert checked(tuned, tmp_path / "out").main_changed == 1
    tuned = trained(kept, tmp_path / "mtp", {"norm.weight": 0.5}, settings={"train": "mtp"})
    [problem] = checked(tuned, tmp_path / "out2").problems
    assert (problem.subject, "--train mtp" in problem.detail) == (norm, True)
    summary = export_checkpoint(kept, tmp_path / "out3")
    files = [dataclasses.replace(file, changed=()) for file in summary.files]
    files[0] = dataclasses.replace(files[0], changed=(norm,))  # a bit that flipped on the way
    [problem] = check_of(kept, summary, tuple(files)).problems
    assert (problem.subject, "nobody trained it" in problem.detail) == (norm, True)


def test_a_trained_weight_gets_new_scales(tmp_path: Path):
    """They belong to it: of an FP8 weight that was trained both have other bytes."""
    make_tiny_checkpoint(tmp_path / "source", dtype="fp8")
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "kept")]) == 0
    leaf = "moe_layers.self_attn.o_proj.weight"
    kept = open_checkpoint(tmp_path / "kept")
    tuned = trained(kept, tmp_path / "all", {leaf: 0.5}, settings={"train": "all"})
    found = checked(tuned, tmp_path / "out")
    assert not found.problems
    layers = kept.config.num_moe_layers
    assert found.main_changed == 2 * layers
    tuned = trained(kept, tmp_path / "mtp", {leaf: 0.5}, settings={"train": "mtp"})
    assert len(checked(tuned, tmp_path / "out2").problems) == 2 * layers


def check_of(checkpoint: Checkpoint, summary: ExportSummary, files: tuple) -> ExportCheck:
    return check_export(checkpoint, dataclasses.replace(summary, files=files), keeps_dtypes=True)


def test_rounding_on_import_is_told_apart(tmp_path: Path):
    make_tiny_checkpoint(tmp_path / "source", dtype="f32")
    imported = ["import", str(tmp_path / "source"), str(tmp_path / "ckpt"), "--dtype", "bf16"]
    assert main(imported) == 0
    found = checked(open_checkpoint(tmp_path / "ckpt"), tmp_path / "out")
    assert found.holds
    assert found.main_changed
    assert found.rounded == found.main_changed


def test_a_module_that_training_left_as_it_was_is_told(
    kept: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Against the source, and against the tuned one that it was trained from."""
    tiny = ml_dtypes.finfo(ml_dtypes.bfloat16).tiny
    same = trained(kept, tmp_path / "same", {EH_PROJ: float(tiny)}, settings={"train": "mtp"})
    assert main(["export", str(same.path), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "WARNING" in told
    assert "every byte of it is the source's" in told
    tuned = trained(kept, tmp_path / "tuned", {EH_PROJ: 0.5})
    assert checked(tuned, tmp_path / "out2").warnings == ()
    again = trained(tuned, tmp_path / "again", {EH_PROJ: 0.0})
    [warning] = checked(again, tmp_path / "out3").warnings
    assert f"is that of {tuned.path}" in warning
    more = trained(tuned, tmp_path / "more", {EH_PROJ: 0.5})
    assert checked(more, tmp_path / "out4").warnings == ()
    shutil.rmtree(tuned.path)  # nobody can tell then
    assert checked(again, tmp_path / "out5").warnings == ()


@pytest.mark.usefixtures("_logits")
def test_what_does_not_hold_is_neither_pushed_nor_served(
    kept: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def damaging(checkpoint: Checkpoint, dst: str, **options: Any) -> ExportSummary:
        summary = export_checkpoint(checkpoint, dst, **options)
        negated(Path(dst), "model.layers.4.hnorm.weight")
        return summary

    monkeypatch.setattr(export_command, "export_checkpoint", damaging)
    out = tmp_path / "out"
    assert main(["export", str(kept.path), str(out), "--push", "org/name"]) == 1
    told = capsys.readouterr().out
    assert "FAILED: first wrong layer model.layers.4" in told
    assert "vllm serve" not in told
    assert main(["export", str(kept.path), str(tmp_path / "off"), "--no-verify"]) == 0
    told = capsys.readouterr().out
    assert "verified  no (--no-verify)" in told
    assert "vllm serve" in told


@pytest.mark.usefixtures("_logits")
@pytest.mark.parametrize("lacking", ["torch", "memory"])
def test_logits_that_cannot_be_compared_are_told(
    kept: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, lacking: str
):
    if lacking == "torch":
        monkeypatch.setitem(sys.modules, "torch", None)
        name = "converters.verifying.logits.torch_reference"
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(converters.verifying.logits, "torch_reference", raising=False)
        told = r"NOT checked: needs torch, safetensors: pip install 'deepseek-mtp[verify]'"
    else:
        monkeypatch.setattr(export_gate, "available_bytes", lambda: 1000)
        told = "NOT checked: they need 537.06 MB of memory, 1.00 kB are free"
    assert main(["export", str(kept.path), str(tmp_path / "out")]) == 0
    assert told in capsys.readouterr().out


def test_how_to_serve_says_what_engines_do_otherwise(source: Path, tmp_path: Path, capsys):
    """A module that was fed the state before the norm, and more drafts than modules."""
    ckpt = tmp_path / "ckpt"
    imported = ["import", str(source), str(ckpt), "--mtp-hidden-state", "pre_norm"]
    assert main(imported) == 0
    tuned = trained(
        open_checkpoint(ckpt), tmp_path / "tuned", {EH_PROJ: 0.5}, settings={"draft_tokens": 5}
    )
    capsys.readouterr()
    assert main(["export", str(tuned.path), str(tmp_path / "out"), "--no-verify"]) == 0
    told = capsys.readouterr().out
    assert '"num_speculative_tokens": 5' in told
    assert "feed the state after it" in told
    assert "from 0.24 on" in told


def test_a_lost_module_is_not_served(source: Path, tmp_path: Path, capsys):
    """config.json still announces it; of such a source the main model alone is imported."""
    lost = without_module(source, tmp_path / "lost")
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    assert main(["import", str(lost), str(ckpt), "--scope", "main"]) == 0
    capsys.readouterr()
    assert main(["export", str(ckpt), str(out), "--base", str(lost)]) == 0
    told = capsys.readouterr().out
    assert "tensors agree" in told
    assert "MTP" not in told
    assert "vllm" not in told


@pytest.mark.parametrize("again", [True, False])
def test_a_layer_that_differs_on_some_tokens_only_is_no_failure(
    kept: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, again: bool
):
    """As where two experts tie; the control: it differs on other tokens too."""
    pytest.importorskip("torch")
    tokens = []

    def compared(*args: Any, seed: int = logits_check.SEED, **options: Any) -> LogitsCheck:
        found = logits_check.check_logits(*args, seed=seed, **options)
        tokens.append(seed)
        if len(tokens) > 1 and not again:
            return found
        layers = [dataclasses.replace(layer) for layer in found.layers]
        layers[3] = dataclasses.replace(layers[3], alone=3e-3)
        return dataclasses.replace(found, layers=tuple(layers), first_wrong=layers[3].name)

    monkeypatch.setattr(export_gate, "check_logits", compared)
    status = main(["export", str(kept.path), str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert len({*tokens}) == 2
    assert status == (1 if again else 0)
    assert ("FAILED: first wrong layer model.layers.2" in told) == again
    assert ("model.layers.2 differed by 3.0e-03, on others nothing does" in told) != again


def test_rounding_that_adds_up_is_no_failure(
    kept: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    pytest.importorskip("torch")

    def deep(*args: Any, **options: Any) -> LogitsCheck:
        found = logits_check.check_logits(*args, **options)
        worse = dataclasses.replace(found.depths[0], relative_difference=2e-5)
        return dataclasses.replace(found, depths=(worse, *found.depths[1:]))

    monkeypatch.setattr(export_gate, "check_logits", deep)
    assert main(["export", str(kept.path), str(tmp_path / "out")]) == 0
    assert "every layer agrees, and rounding adds up to 2.0e-05" in capsys.readouterr().out

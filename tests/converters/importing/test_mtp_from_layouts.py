"""`import --mtp-from` where it is hard: killed in the middle, and with experts that are fused."""

import json
from pathlib import Path

import pytest
from layouts import Edit, Tensors, fused, make_edited
from modules import (
    MTP_FILE,
    assert_module,
    assert_only_the_module_is_new,
    module_of,
    round_trip,
    run,
    weight_map,
    without_module,
)
from roundtrip import assert_same_files, read_tensors
from side_by_side import run_all

from tools.make_tiny_checkpoint import make_tiny_checkpoint

KILLED_AT = [("chunk", 2), ("chunk", 100), ("journal", 60), ("side file", 1), ("marker", 1)]
WHOLE_BLOCKS = {"moe_intermediate_size": 32}


def bf16_module(folder: Path) -> Path:
    """Every weight of it is made FP8 on the way, with new scales."""
    make_tiny_checkpoint(folder, dtype="bf16", seed=1)
    return folder


def trained_directory(folder: Path) -> Path:
    """A checkpoint directory: its tensors are encoded as they are read."""
    make_tiny_checkpoint(folder / "src", seed=1)
    run("import", folder / "src", folder / "ckpt", "--scope", "mtp", "--dtype", "bf16")
    return folder / "ckpt"


def test_killed_anywhere_the_same_command_continues_and_ends_with_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    make_tiny_checkpoint(tmp_path / "src")
    lost = without_module(tmp_path / "src", tmp_path / "lost")
    taken = {
        make.__name__: ("--mtp-from", make(tmp_path / make.__name__))
        for make in (bf16_module, trained_directory)
    }
    killed = [(m, tmp_path / f"{m}-{p}-{n}", p, n) for m in taken for p, n in KILLED_AT]
    run_all([("import", (lost, *taken[m]), dst, *at, (0, 1)) for m, dst, *at in killed])
    for module, options in taken.items():
        run("import", lost, tmp_path / f"{module}-whole", *options)
    for module, dst, point, count in killed:
        capsys.readouterr()
        run("import", lost, dst, *taken[module], "--json")
        resumed = json.loads(capsys.readouterr().out)["resumed_units"]
        assert (resumed > 50) == ((point, count) != ("chunk", 2)), dst
        assert_same_files(dst, tmp_path / f"{module}-whole")


def fuse_main(tensors: Tensors, _: Tensors) -> None:
    fused(tensors, (2, 3))


def fuse_all(tensors: Tensors, _: Tensors) -> None:
    fused(tensors)


def fuse_nothing(_: Tensors, __: Tensors) -> None:
    """As the tensors are released."""


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("of_main", "of_module"),
    [(fuse_main, fuse_nothing), (fuse_nothing, fuse_all), (fuse_main, fuse_all)],
    ids=["main model", "module", "both"],
)
def test_fused_experts_on_either_side(tmp_path: Path, of_main: Edit, of_module: Edit, dtype: str):
    source = make_edited(tmp_path / "src", of_main, dtype=dtype, sizes=WHOLE_BLOCKS)
    lost = without_module(source, tmp_path / "lost", num_nextn_predict_layers=0)
    other = {"dtype": dtype, "sizes": WHOLE_BLOCKS, "seed": 1}
    module = make_edited(tmp_path / "other", of_module, **other)
    out = round_trip(lost, module, tmp_path)
    assert_only_the_module_is_new(out, lost)
    released = make_edited(tmp_path / "released", fuse_nothing, **other)
    assert_module(out, module_of(released))  # as engines know it, whatever it was before


@pytest.mark.parametrize("num_files", [1, 7])
def test_a_module_beside_fused_experts_is_replaced_and_those_stay(tmp_path: Path, num_files: int):
    """Of a file that holds both, what stays has the names, the order and the bytes that it had."""
    options = {"dtype": "fp8", "sizes": WHOLE_BLOCKS, "num_files": num_files}
    source = make_edited(tmp_path / "src", fuse_all, **options)
    module = make_edited(tmp_path / "other", fuse_nothing, **options, seed=1)
    out = round_trip(source, module, tmp_path)
    assert_module(out, module_of(module))
    kept = {n: t for n, t in read_tensors(source).items() if not n.startswith("model.layers.4.")}
    assert "model.layers.2.mlp.experts.gate_up_proj" in kept
    found = {n: t for n, t in read_tensors(out).items() if weight_map(out)[n] != MTP_FILE}
    assert list(found) == list(kept)
    assert all(found[name].tobytes() == kept[name].tobytes() for name in kept)


def test_a_module_of_other_blocks_under_fused_experts_is_made_fp8_anew(tmp_path: Path):
    blocks = {"sizes": WHOLE_BLOCKS | {"weight_block_size": [16, 8]}, "seed": 1}
    source = make_edited(tmp_path / "src", fuse_main, sizes=WHOLE_BLOCKS)
    lost = without_module(source, tmp_path / "lost")
    module = make_edited(tmp_path / "other", fuse_all, **blocks)
    released = make_edited(tmp_path / "released", fuse_nothing, **blocks)
    fused_out = round_trip(lost, module, tmp_path)
    (tmp_path / "plain").mkdir()
    assert_same_files(fused_out, round_trip(lost, released, tmp_path / "plain"))

"""The benchmark's peers: MaxText's converter is found, run, counted; what it lacks is said."""

import re
import sys
from pathlib import Path

import pytest

from tools.bench_maxtext import MODULES, PeerError, converter_module
from tools.bench_peers import Ours, compare_maxtext, num_mtp_tensors
from tools.make_tiny_checkpoint import make_tiny_checkpoint

STAND_IN = """
import argparse, pathlib, shutil
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--input-fp8-hf-path", type=pathlib.Path, required=True)
    parser.add_argument("--output-bf16-hf-path", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    arguments.output_bf16_hf_path.mkdir()
    for file in sorted(arguments.input_fp8_hf_path.glob("*.safetensors"))[:-2]:
        shutil.copy(file, arguments.output_bf16_hf_path)
"""


def install(folder: Path, module: str, text: str) -> None:
    file = folder.joinpath(*module.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True)
    file.write_text(text)


@pytest.mark.parametrize("module", MODULES)
def test_the_converter_is_found_where_it_is(tmp_path: Path, monkeypatch, module: str):
    install(tmp_path, module, STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert converter_module(sys.executable) == module


def test_what_an_environment_lacks_is_said(tmp_path: Path, monkeypatch):
    with pytest.raises(PeerError, match=r"No module named 'maxtext'[^$]*No module named 'MaxText'"):
        converter_module(sys.executable)
    install(tmp_path, MODULES[0], "import torch_of_another_name\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    missing = re.escape(f"{MODULES[0]}: ModuleNotFoundError: No module named 'torch_of_another")
    with pytest.raises(PeerError, match=missing):
        converter_module(sys.executable)
    with pytest.raises(PeerError, match="nowhere/python cannot be run: No such file or directory"):
        converter_module("nowhere/python")


def test_a_comparison_counts_what_each_wrote(tmp_path: Path, monkeypatch, capsys):
    install(tmp_path, MODULES[0], STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    make_tiny_checkpoint(tmp_path / "fp8")
    ours = Ours(folder=tmp_path, rounds=1, workers=1)
    compare_maxtext(ours, tmp_path / "fp8", sys.executable, MODULES[0])
    told, theirs, mine, ratio = capsys.readouterr().out.splitlines()
    everything = num_mtp_tensors(tmp_path / "fp8", tmp_path / "fp8")
    assert everything > 50
    assert told == f"median of 1, of a source with {everything} MTP tensors:"
    found = re.fullmatch(r"MaxText: .* s, .* MiB, .* GB written, (\d+) MTP tensors in it", theirs)
    assert found
    assert int(found[1]) < everything, "the stand-in leaves out the last files"
    assert f" {everything} MTP tensors in it; import alone" in mine
    assert "times the bytes a second" in ratio
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8", "maxtext"]

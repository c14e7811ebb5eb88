"""Logits of a source that is not on this machine: the same, a few of its files on disk at once."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from advice import done, follows, told
from gcs_server import GcsServer, key_of
from hub_client import REPO, fetched_bytes, lone_hub
from hub_server import HubServer
from imported import import_tiny
from layouts import fused, make_edited
from roundtrip import tree_bytes
from verified import Pair, opened

pytest.importorskip("torch")

import torch

from converters.format.listing import open_safetensors
from converters.sources import ahead
from converters.sources import hub as hub_module
from converters.sources.hub import HubSource
from converters.sources.open import open_source
from converters.verifying.logits.check import FETCHED, LogitsCheck, check_logits
from converters.verifying.logits.layers import UNFINISHED
from converters.verifying.logits.torch_weights import far_weights, weights_of
from mtp_model.checkpoint.directory import open_checkpoint

FILES = 7
MOST = 2  # files that are fetched ahead


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("far")
    return folder / "source", import_tiny(folder, dtype="fp8", num_files=FILES)


@pytest.fixture(scope="module")
def local(pair: Pair) -> LogitsCheck:
    return check_logits(opened(pair[0]), open_checkpoint(pair[1]))


@pytest.fixture
def hub(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for module in (ahead, hub_module):
        monkeypatch.setattr(module, "MOST_FILES", MOST)
    with lone_hub(tmp_path, monkeypatch) as server:
        server.add(REPO, tree_bytes(pair[0]))
        yield server


def assert_same(found: LogitsCheck, wanted: LogitsCheck) -> None:
    assert found.depths == wanted.depths
    assert [(c.name, c.alone, c.after) for c in found.layers] == [
        (c.name, c.alone, c.after) for c in wanted.layers
    ]


def test_a_model_on_the_hub_is_compared_a_part_at_a_time(
    pair: Pair, local: LogitsCheck, hub: HubServer, tmp_path: Path
):
    """Interrupted and continued; few files are on disk at once, and those of parts that were run
    are not fetched again."""
    saved = tmp_path / UNFINISHED
    source = open_safetensors(HubSource(REPO))
    there: list[int] = []

    def compare(stop_at: int | None) -> LogitsCheck:
        def told(part: int, _parts: int) -> None:
            there.append(len([*(tmp_path / FETCHED).glob("*.safetensors")]))
            if part == stop_at:
                raise KeyboardInterrupt

        return check_logits(source, open_checkpoint(pair[1]), saved=saved, progress=told)

    with pytest.raises(KeyboardInterrupt):
        compare(5)
    everything = fetched_bytes(hub)
    hub.seen.clear()
    assert_same(compare(None), local)
    assert fetched_bytes(hub) < 0.7 * everything
    assert 1 <= max(there) <= MOST + 2 < FILES
    assert not (tmp_path / FETCHED).exists()


@pytest.mark.usefixtures("hub")
@follows("give --report a folder on another disk")
def test_the_command_takes_a_model_on_the_hub(
    pair: Pair, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """Where the disk of its report has room for the files; without a report TMPDIR's has to."""
    command = ("verify", REPO, pair[1], "--logits", "--report")
    real = shutil.disk_usage
    full = SimpleNamespace(free=1000)

    def usage(path: object) -> object:
        return full if "small" in str(path) else real(tmp_path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert "give --report a folder on another disk" in told(capsys, *command, tmp_path / "small")
    done(*command, tmp_path / "report")
    assert "logits agree" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "report").iterdir()} == {
        *("report.json", "report.md", "report.html", "logits.png")
    }


def test_a_bucket_is_compared(pair: Pair, local: LogitsCheck, gcs: GcsServer, url: str):
    for name, content in tree_bytes(pair[0]).items():
        gcs.put(f"{key_of(url)}/{name}", content)
    source = open_safetensors(open_source(url))
    assert_same(check_logits(source, open_checkpoint(pair[1])), local)


@pytest.mark.parametrize("layout", ["released", "fused"])
def test_far_weights_are_those_of_the_files(tmp_path: Path, layout: str):
    """As the safetensors library reads them, experts of fused tensors too; the control: a byte."""
    folder = make_edited(
        tmp_path / "source", fused if layout == "fused" else lambda *_: None, num_files=3
    )
    source = opened(folder)
    asked: list[int] = []
    flipped = 0

    def read_into(file: str, begin: int, out: np.ndarray) -> None:
        source.source.read_into(file, begin, out)
        asked.append(out.nbytes)
        out[0] ^= flipped

    near = weights_of(folder, source.config)
    files = [file.name for file in folder.glob("*.safetensors")]
    far = far_weights(files, read_into, source.config, "there")
    experts = [
        f"model.layers.4.mlp.experts.5.{kind}_proj.weight" for kind in ("gate", "up", "down")
    ]
    others = ["model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"]
    others += ["model.layers.4.enorm.weight", "model.layers.3.mlp.gate.e_score_correction_bias"]
    for name in (*experts, *others):
        assert torch.equal(far(name), near(name)), name
    asked.clear()
    far(experts[0])
    assert sum(asked) < 2.5 * near(experts[0]).numel(), "bytes of this expert, and its scales"
    flipped = 1
    assert not torch.equal(far(experts[0]), near(experts[0]))
    with pytest.raises(ValueError, match="nothing is in no safetensors file of there"):
        far("nothing")

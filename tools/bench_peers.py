"""Other tools on the same checkpoint, and what they and ours take; knows no way of measuring.

Transformers loads the bf16 checkpoint and saves it; ours imports and exports it. MaxText makes bf16
safetensors of the FP8 checkpoint; ours imports it as bf16 and exports that: the same from and to,
but ours goes through the checkpoint directory, and reads back what it exports. Import alone is told
too: it is what MaxText needs its second step for. Ours and theirs take turns, each from a cold page
cache and until all is on the disk; no time includes starting Python. Medians of the rounds.
"""

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from converters.format.header import read_header
from converters.format.mapping import SCALE_SUFFIX
from converters.sources.local import LocalSource
from tools.bench_copy import drop_from_cache
from tools.bench_maxtext import run_maxtext
from tools.bench_run import Took, run_step, size_of


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Where our conversions run, how often, and with how many workers."""

    folder: Path
    rounds: int
    workers: int

    def import_and_export(self, src: Path, dst: Path, dtype: str) -> tuple[Took, Took]:
        """Both with the same dtype; only what export wrote is left."""
        checkpoint = self.folder / "ckpt"
        there = run_step("import", src, checkpoint, reads=[src], dtype=dtype, workers=self.workers)
        back = run_step(
            "export", checkpoint, dst, reads=[checkpoint], dtype=dtype, workers=self.workers
        )
        shutil.rmtree(checkpoint)
        return there, back


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Rounds of a tool that made safetensors of safetensors."""

    name: str
    took: list[Took]
    bytes_out: int
    num_mtp: int

    def __str__(self) -> str:
        written = f"{self.bytes_out / 1e9:.2f} GB written, {self.num_mtp} MTP tensors in it"
        return f"{self.name}: {self.seconds:.1f} s, {self.peak_mib:.0f} MiB, {written}"

    @property
    def seconds(self) -> float:
        return statistics.median(took["seconds"] for took in self.took)

    @property
    def peak_mib(self) -> float:
        return max(took["peak_mib"] for took in self.took)


def compare_transformers(ours: Ours, src: Path) -> None:
    """On the bf16 checkpoint."""

    def transformers(src: Path, dst: Path) -> Took:
        command = [sys.executable, "-m", "tools.bench_transformers", str(src), str(dst)]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    _compare(ours, src, "keep", "Transformers", transformers)


def compare_maxtext(ours: Ours, src: Path, python: str, module: str) -> None:
    """On the FP8 checkpoint; `module` as bench_maxtext.converter_module finds it."""

    def maxtext(src: Path, dst: Path) -> Took:
        return run_maxtext(python, module, src, dst)

    _compare(ours, src, "bf16", "MaxText", maxtext)


def _compare(
    ours: Ours, src: Path, dtype: str, name: str, convert: Callable[[Path, Path], Took]
) -> None:
    dst = ours.folder / "peer"
    imports: list[Took] = []

    def import_and_export(src: Path, dst: Path) -> Took:
        there, back = ours.import_and_export(src, dst, dtype)
        imports.append(there)
        return _together(there, back)

    runs: dict[str, list[Took]] = {}
    sizes, counts = {}, {}
    for _ in range(ours.rounds):
        for tool, run in (("import and export", import_and_export), (name, convert)):
            drop_from_cache(src)
            runs.setdefault(tool, []).append(run(src, dst))
            sizes[tool], counts[tool] = size_of(dst), num_mtp_tensors(src, dst)
            shutil.rmtree(dst)
    mine, theirs = (
        Peer(name=tool, took=took, bytes_out=sizes[tool], num_mtp=counts[tool])
        for tool, took in runs.items()
    )
    for line in _report(mine, theirs, imports, num_mtp_tensors(src, src)):
        print(line, flush=True)


def _together(first: Took, second: Took) -> Took:
    return Took(
        seconds=first["seconds"] + second["seconds"],
        cpu_seconds=first["cpu_seconds"] + second["cpu_seconds"],
        peak_mib=max(first["peak_mib"], second["peak_mib"]),
    )


def _report(mine: Peer, theirs: Peer, imports: list[Took], num_mtp: int) -> Iterable[str]:
    yield f"median of {len(imports)}, of a source with {num_mtp} MTP tensors:"
    alone = statistics.median(took["seconds"] for took in imports)
    yield str(theirs)
    yield f"{mine}; import alone {alone:.1f} s"
    speed = (mine.bytes_out / mine.seconds) / (theirs.bytes_out / theirs.seconds)
    memory = mine.peak_mib / theirs.peak_mib
    yield f"{speed:.2f} times the bytes a second, {memory:.3f} of the memory"


def num_mtp_tensors(src: Path, folder: Path) -> int:
    """Weights of the MTP modules in the safetensors files of a folder; `src` has the config."""
    config = json.loads((src / "config.json").read_bytes())
    layers = config["num_hidden_layers"]
    modules = range(layers, layers + config["num_nextn_predict_layers"])
    prefixes = tuple(f"model.layers.{layer}." for layer in modules)
    source = LocalSource(str(folder))
    headers = (read_header(source, file) for file in source.files() if file.endswith("tensors"))
    names = (tensor.name for header in headers for tensor in header.tensors)
    return sum(n.startswith(prefixes) and not n.endswith(SCALE_SUFFIX) for n in names)

"""Speed and memory of import and export, against plain copies of as many bytes in and out.

    python -m tools.bench_convert FOLDER --gigabytes 4 --rounds 3 [--peer]

Every conversion runs in a process of its own, in turn with the copies, so that whatever else the
machine does hits all alike. Sources are dropped from the page cache before each run; what is
written is on the disk when the clock stops. Export reads back what it wrote: these bytes count as
bytes in, for its copies too. Medians of all rounds are compared, with the best kind of copy.
The clock starts with the first look at the source: starting Python and importing JAX are left out.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.bench_copy import Ratio, drop_from_cache, timed_copies
from tools.bench_data import Flavour, write_synthetic


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint, the dtype to import it with, and the size of that over the source's."""

    name: str
    flavour: Flavour
    dtype: str
    growth: int = 1


CASES = (
    Case(name="fp8 keep", flavour="fp8", dtype="keep"),
    Case(name="fp8 to bf16", flavour="fp8", dtype="bf16", growth=2),
    Case(name="bf16", flavour="bf16", dtype="keep"),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured conversion, and the seconds of each kind of copy next to it."""

    name: str
    bytes_in: int
    bytes_out: int
    seconds: float
    cpu_seconds: float
    peak_mib: float
    copies: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Result:
    """All rounds of one conversion; seconds are medians, the limit is the best kind of copy's."""

    runs: list[Run]

    def __str__(self) -> str:
        first, seconds, limit = self.runs[0], self.seconds, self.limit
        gigabytes = first.bytes_in / 1e9
        cpu = statistics.median(run.cpu_seconds for run in self.runs) / gigabytes
        sizes = f"{gigabytes:5.2f} GB in {first.bytes_out / 1e9:5.2f} GB out"
        speed = f"{seconds:5.2f} s, copy {limit:5.2f} s, {limit / seconds:4.2f} of its speed"
        cost = f"{gigabytes / seconds:4.2f} GB/s in, {cpu:4.2f} CPU s/GB, {self.peak_mib:.0f} MiB"
        return f"{first.name:<18} {sizes}: {speed}, {cost}"

    @property
    def seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    @property
    def limit(self) -> float:
        kinds = self.runs[0].copies
        return min(statistics.median(run.copies[kind] for run in self.runs) for kind in kinds)

    @property
    def peak_mib(self) -> float:
        return max(run.peak_mib for run in self.runs)


def convert(arguments: argparse.Namespace) -> None:
    """Run one step in this process and print what it took."""
    from converters import fp8_kernels  # noqa: F401  numba and JAX before the clock starts
    from converters.exporter import export_checkpoint
    from converters.importer import import_checkpoint
    from converters.listing import list_checkpoint
    from converters.source import open_source
    from mtp_model.config import ModelConfig
    from mtp_model.store import open_checkpoint

    src, dst, workers = arguments.folder, arguments.to, arguments.workers
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    if arguments.step == "import":
        config = ModelConfig.from_dict(json.loads((src / "config.json").read_bytes()))
        listing = list_checkpoint(open_source(str(src)))
        import_checkpoint(listing, config, dst, dtype=arguments.dtype, workers=workers)
    else:
        export_checkpoint(open_checkpoint(src), dst, workers=workers)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mib": after.ru_maxrss / 1024}))


def imported(case: Case, arguments: argparse.Namespace) -> Run:
    """One import, after its copies."""
    src, dst = arguments.folder / case.flavour, arguments.folder / "ckpt"
    copies = copied([src], Ratio(reads=1, writes=case.growth), arguments)
    took = measured("import", src, dst, case, arguments)
    sizes = {"bytes_in": size_of(src), "bytes_out": size_of(dst)}
    return Run(name=f"import {case.name}", copies=copies, **sizes, **took)


def exported(case: Case, arguments: argparse.Namespace) -> Run:
    """One export, after its copies."""
    src, checkpoint, dst = (arguments.folder / name for name in (case.flavour, "ckpt", "out"))
    copies = copied([checkpoint, src], Ratio(reads=case.growth + 1, writes=1), arguments)
    took = measured("export", checkpoint, dst, case, arguments)
    sizes = {"bytes_in": size_of(checkpoint) + size_of(dst), "bytes_out": size_of(dst)}
    return Run(name=f"export {case.name}", copies=copies, **sizes, **took)


def copied(sources: list[Path], ratio: Ratio, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of the plain copies that read all of the sources."""
    scratch = arguments.folder / "copied"
    scratch.mkdir(exist_ok=True)
    return timed_copies(sources, scratch, ratio)


def measured(
    step: str, src: Path, dst: Path, case: Case, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One step in a process of its own, from a cold page cache."""
    drop_from_cache(src)
    command = [sys.executable, "-m", "tools.bench_convert", str(src), "--step", step]
    command += ["--to", str(dst), "--dtype", case.dtype, "--workers", str(arguments.workers)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def one_round(case: Case, arguments: argparse.Namespace) -> Iterator[Run]:
    """There and back again."""
    yield imported(case, arguments)
    yield exported(case, arguments)
    for name in ("ckpt", "out"):
        shutil.rmtree(arguments.folder / name)


def bench(arguments: argparse.Namespace) -> list[Run]:
    """All rounds of the cases, printed as they come."""
    runs = []
    for number in range(arguments.rounds):
        for case in CASES:
            if case.name not in arguments.cases:
                continue
            src = arguments.folder / case.flavour
            if not src.exists():
                write_synthetic(src, case.flavour, arguments.gigabytes)
            for run in one_round(case, arguments):
                runs.append(run)
                print(f"round {number + 1}: {Result(runs=[run])}", flush=True)
    return runs


def show_peer(results: dict[str, Result], arguments: argparse.Namespace) -> None:
    """Transformers' load and save of the bf16 checkpoint, next to our import and export of it."""
    src, dst = arguments.folder / "bf16", arguments.folder / "peer"
    drop_from_cache(src)
    command = [sys.executable, "-m", "tools.bench_peer", str(src), str(dst)]
    peer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    shutil.rmtree(dst)
    ours = [results[f"{step} bf16"] for step in ("import", "export")]
    seconds, memory = sum(r.seconds for r in ours), max(r.peak_mib for r in ours)
    whole = size_of(src)
    kept = f"{peer['bytes_out'] / 1e9:.2f} of {whole / 1e9:.2f} GB written"
    print(f"Transformers: {peer['seconds']:.1f} s, {peer['peak_mib']:.0f} MiB, {kept}")
    print(f"import and export: {seconds:.1f} s, {memory:.0f} MiB, all written")
    speed = (whole / seconds) / (peer["bytes_out"] / peer["seconds"])
    print(f"{speed:.1f} times the bytes a second, {memory / peer['peak_mib']:.3f} of the memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="scratch folder; needs 5 times the gigabytes")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of each source checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=3)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--peer", action="store_true", help="Transformers on the bf16 checkpoint")
    parser.add_argument("--json", type=Path, help="write every run here too")
    parser.add_argument("--step", choices=["import", "export"], help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="keep", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        convert(arguments)
        return
    runs = bench(arguments)
    names = dict.fromkeys(run.name for run in runs)
    results = {name: Result(runs=[run for run in runs if run.name == name]) for name in names}
    for result in results.values():
        print(f"median of {arguments.rounds}: {result}")
    if arguments.peer:
        show_peer(results, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))


if __name__ == "__main__":
    main()

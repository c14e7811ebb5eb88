"""Speed and memory of import and export, against plain copies of as many bytes in and out.

    python -m tools.bench_convert FOLDER --gigabytes 4 --rounds 3 [--peer]

Every conversion runs in a process of its own, in turn with the copies, so that whatever else the
machine does hits all alike. Sources are dropped from the page cache before each run; what is written
is on the disk when the clock stops. The limit of a run is the fastest of the copies just before it.
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

from tools.bench_copy import Ratio, drop_from_cache, fastest_copy
from tools.bench_data import Flavour, write_synthetic

SAME = Ratio(reads=1, writes=1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint, the dtype to import it with, and how many bytes that writes."""

    name: str
    flavour: Flavour
    dtype: str
    there: Ratio = SAME
    back: Ratio = SAME


CASES = (
    Case(name="fp8 keep", flavour="fp8", dtype="keep"),
    Case(
        name="fp8 to bf16",
        flavour="fp8",
        dtype="bf16",
        there=Ratio(reads=1, writes=2),
        back=Ratio(reads=2, writes=1),
    ),
    Case(name="bf16", flavour="bf16", dtype="keep"),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured conversion. of_limit: its speed over that of the fastest copy."""

    name: str
    bytes_in: int
    bytes_out: int
    seconds: float
    cpu_seconds: float
    peak_mib: float
    limit_seconds: float

    @property
    def of_limit(self) -> float:
        return self.limit_seconds / self.seconds

    @property
    def gigabytes_in(self) -> float:
        return self.bytes_in / 1e9

    def __str__(self) -> str:
        speed = f"{self.gigabytes_in:6.2f} GB in {self.bytes_out / 1e9:6.2f} GB out"
        took = f"{self.seconds:6.2f} s, copy {self.limit_seconds:6.2f} s = {self.of_limit:4.2f}"
        cost = f"{self.gigabytes_in / self.seconds:5.2f} GB/s in"
        cpu = f"{self.cpu_seconds / self.gigabytes_in:5.2f} CPU s/GB, {self.peak_mib:5.0f} MiB"
        return f"{self.name:<20} {speed}: {took}, {cost}, {cpu}"


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


def measured(step: str, src: Path, dst: Path, case: Case, arguments: argparse.Namespace) -> Run:
    """Copy, then run one step in a process of its own; both from a cold page cache."""
    ratio = case.there if step == "import" else case.back
    scratch = arguments.folder / "copied"
    scratch.mkdir(exist_ok=True)
    best = fastest_copy([src], scratch, ratio)
    drop_from_cache(src)
    command = [sys.executable, "-m", "tools.bench_convert", str(src), "--step", step]
    command += ["--to", str(dst), "--dtype", case.dtype, "--workers", str(arguments.workers)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return Run(
        name=f"{step} {case.name}",
        bytes_in=size_of(src),
        bytes_out=size_of(dst),
        limit_seconds=best,
        **json.loads(printed),
    )


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def one_round(case: Case, arguments: argparse.Namespace) -> Iterator[Run]:
    """There and back again."""
    src, checkpoint, out = (arguments.folder / name for name in (case.flavour, "ckpt", "out"))
    yield measured("import", src, checkpoint, case, arguments)
    yield measured("export", checkpoint, out, case, arguments)
    subprocess.run(
        ["cmp", *(str(next(folder.glob("*2-of*"))) for folder in (src, out))], check=True
    )
    shutil.rmtree(checkpoint)
    shutil.rmtree(out)


def bench(arguments: argparse.Namespace) -> list[Run]:
    """All rounds of all cases, printed as they come."""
    runs = []
    for flavour in ("fp8", "bf16"):
        if not (arguments.folder / flavour).exists():
            write_synthetic(arguments.folder / flavour, flavour, arguments.gigabytes)
    for number in range(arguments.rounds):
        for case in CASES:
            for run in one_round(case, arguments):
                runs.append(run)
                print(f"round {number + 1}: {run}", flush=True)
    return runs


def show_medians(runs: list[Run]) -> None:
    """One line a conversion."""
    for name in dict.fromkeys(run.name for run in runs):
        mine = [run for run in runs if run.name == name]
        shares = sorted(run.of_limit for run in mine)
        median = min(mine, key=lambda run: abs(run.of_limit - statistics.median(shares)))
        print(f"median of {len(mine)}: {median}  (of the copy {shares[0]:.2f} to {shares[-1]:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="scratch folder; needs 5 times the gigabytes")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of each source checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every run here too")
    parser.add_argument("--step", choices=["import", "export"], help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="keep", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        convert(arguments)
        return
    runs = bench(arguments)
    show_medians(runs)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))


if __name__ == "__main__":
    main()

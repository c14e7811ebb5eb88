"""What a measured step took, next to plain copies of as many bytes; knows no checkpoint format."""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from tools.bench_copy import drop_from_cache


class Took(TypedDict):
    """Of a process: seconds and CPU seconds of its work, and the most memory it had."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured step, and the seconds of each kind of copy next to it, if there were any."""

    name: str
    bytes_in: int
    bytes_out: int
    seconds: float
    cpu_seconds: float
    peak_mib: float
    copies: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Result:
    """All rounds of one step; seconds are medians, the limit is the best kind of copy's."""

    runs: list[Run]

    def __str__(self) -> str:
        first, seconds, limit = self.runs[0], self.seconds, self.limit
        gigabytes = first.bytes_in / 1e9
        cpu = statistics.median(run.cpu_seconds for run in self.runs) / gigabytes
        sizes = f"{gigabytes:5.2f} GB in {first.bytes_out / 1e9:5.2f} GB out"
        speed = f"{seconds:5.2f} s"
        if limit is not None:
            speed += f", copy {limit:5.2f} s, {limit / seconds:4.2f} of its speed"
        cost = f"{gigabytes / seconds:4.2f} GB/s in, {cpu:4.2f} CPU s/GB, {self.peak_mib:.0f} MiB"
        return f"{first.name:<19} {sizes}: {speed}, {cost}"

    @property
    def seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    @property
    def limit(self) -> float | None:
        kinds = self.runs[0].copies
        medians = (statistics.median(run.copies[kind] for run in self.runs) for kind in kinds)
        return min(medians, default=None)

    @property
    def peak_mib(self) -> float:
        return max(run.peak_mib for run in self.runs)


def run_step(
    step: str, src: Path, dst: Path, *, reads: Sequence[Path], dtype: str, workers: int
) -> Took:
    """One step in a process of its own; what it reads comes from the disk."""
    for folder in reads:
        drop_from_cache(folder)
    command = [sys.executable, "-m", "tools.bench_conversion_step", step, str(src), str(dst)]
    command += ["--dtype", dtype, "--workers", str(workers)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

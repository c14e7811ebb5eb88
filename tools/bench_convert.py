"""Speed and memory of import, verify and export, against plain copies of as many bytes.

    python -m tools.bench_convert FOLDER --gigabytes 4 --rounds 3 --transformers --maxtext PYTHON

Every step runs in a process of its own, in turn with the copies, so that whatever else the machine
does hits all alike. Sources are dropped from the page cache before each run; what is written is on
the disk when the clock stops. Export reads back what it wrote: these bytes count as bytes in, for
its copies too. Verify writes nothing, and is compared with plain reads of what it reads: source and
checkpoint, or the checkpoint alone for its digests. Medians of all rounds are compared, with the
best kind of copy. Peers convert the same checkpoints; bench_peers.py says how they are compared.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.bench_copy import Ratio, timed_copies
from tools.bench_data import Flavour, write_synthetic
from tools.bench_maxtext import PeerError, converter_module
from tools.bench_peers import Ours, compare_maxtext, compare_transformers
from tools.bench_run import Result, Run, run_step, size_of


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


def one_round(case: Case, arguments: argparse.Namespace) -> Iterator[Run]:
    """There, a look at it, and back again."""
    src, checkpoint, out = (arguments.folder / name for name in (case.flavour, "ckpt", "out"))
    workers, nothing = arguments.workers, Ratio(reads=1, writes=0)

    def measured(
        step: str, of: Path, to: Path, reads: list[Path], ratio: Ratio, dtype: str = "keep"
    ) -> Run:
        scratch = arguments.folder / "copied"
        copies = timed_copies(reads, scratch, ratio) if arguments.copies else {}
        bytes_in = sum(map(size_of, reads))
        took = run_step(step, of, to, reads=reads, dtype=dtype, workers=workers)
        bytes_out = size_of(to) if ratio.writes else 0
        sizes = {"bytes_in": bytes_in, "bytes_out": bytes_out}
        return Run(name=f"{step} {case.name}", copies=copies, **sizes, **took)

    there, back = Ratio(reads=1, writes=case.growth), Ratio(reads=case.growth + 1, writes=1)
    yield measured("import", src, checkpoint, [src], there, case.dtype)
    yield measured("verify", src, checkpoint, [checkpoint, src], nothing)
    yield measured("digests", checkpoint, checkpoint, [checkpoint], nothing)
    # It reads back as much as the source has.
    yield measured("export", checkpoint, out, [checkpoint, src], back)
    shutil.rmtree(checkpoint)
    shutil.rmtree(out)


def bench(arguments: argparse.Namespace) -> list[Run]:
    """All rounds of the cases, printed as they come."""
    runs = []
    for number in range(arguments.rounds):
        for case in CASES:
            if case.name in arguments.cases:
                source(case.flavour, arguments)
                for run in one_round(case, arguments):
                    runs.append(run)
                    print(f"round {number + 1}: {Result(runs=[run])}", flush=True)
    return runs


def source(flavour: Flavour, arguments: argparse.Namespace) -> Path:
    """The checkpoint to convert, made when it is not there."""
    folder = arguments.folder / flavour
    if not folder.exists():
        write_synthetic(folder, flavour, arguments.gigabytes)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="scratch folder; needs 5 times the gigabytes")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of each source checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=3)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--no-copies", dest="copies", action="store_false", help="where memory alone is of interest"
    )
    parser.add_argument("--transformers", action="store_true", help="on the bf16 checkpoint")
    parser.add_argument(
        "--maxtext", metavar="PYTHON", help="of an environment with MaxText; on the fp8 checkpoint"
    )
    parser.add_argument("--json", type=Path, help="write every run here too")
    arguments = parser.parse_args()
    try:  # now, not after an hour
        module = converter_module(arguments.maxtext) if arguments.maxtext else None
    except PeerError as err:
        parser.error(str(err))
    runs = bench(arguments)
    for name in dict.fromkeys(run.name for run in runs):
        result = Result(runs=[run for run in runs if run.name == name])
        print(f"median of {arguments.rounds}: {result}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))
    ours = Ours(folder=arguments.folder, rounds=arguments.rounds, workers=arguments.workers)
    if arguments.transformers:
        compare_transformers(ours, source("bf16", arguments))
    if module:
        compare_maxtext(ours, source("fp8", arguments), arguments.maxtext, module)


if __name__ == "__main__":
    main()

"""One step of a conversion in a process of its own; knows no other step and no comparison.

    python -m tools.bench_conversion_step STEP SRC DST --dtype keep --workers 3

STEP: import, export, verify or digests. Prints seconds, CPU seconds and peak memory as JSON. The
clock starts with the first look at the source: starting Python and importing JAX and numba are left
out.
"""

import argparse
import json
import resource
import time
from pathlib import Path

from converters.exporting.exporter import export_checkpoint
from converters.format import fp8_kernels  # noqa: F401  numba before the clock starts
from converters.format.listing import open_safetensors
from converters.importing.importer import import_checkpoint
from converters.sources.open import open_source
from converters.verifying.digests import check_digests
from converters.verifying.verify import check_storage
from mtp_model.checkpoint.directory import open_checkpoint


def run_import(src: Path, dst: Path, arguments: argparse.Namespace) -> None:
    """A safetensors checkpoint to a checkpoint directory."""
    checkpoint = open_safetensors(open_source(str(src)))
    import_checkpoint(checkpoint, dst, dtype=arguments.dtype, workers=arguments.workers)


def run_export(src: Path, dst: Path, arguments: argparse.Namespace) -> None:
    """And back."""
    checkpoint = open_checkpoint(src)
    export_checkpoint(checkpoint, dst, dtype=arguments.dtype, workers=arguments.workers)


def run_verify(src: Path, dst: Path, arguments: argparse.Namespace) -> None:
    """A safetensors checkpoint against a checkpoint directory."""
    source = open_safetensors(open_source(str(src)))
    found = check_storage(source, open_checkpoint(dst), workers=arguments.workers)
    assert found.holds, found.total


def run_digests(src: Path, _dst: Path, arguments: argparse.Namespace) -> None:
    """A checkpoint directory against its own digests."""
    assert check_digests(open_checkpoint(src), workers=arguments.workers).holds


STEPS = {"import": run_import, "export": run_export, "verify": run_verify, "digests": run_digests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path)
    parser.add_argument("--dtype", default="keep")
    parser.add_argument("--workers", type=int, default=3)
    arguments = parser.parse_args()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    STEPS[arguments.step](arguments.src, arguments.dst, arguments)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mib": after.ru_maxrss / 1024}))


if __name__ == "__main__":
    main()

"""Several processes of one command on this machine."""

import importlib.metadata
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# XLA's flags by which the small programs of tests are compiled fast: compiling them is most of the
# time of tests. Without emitters by MLIR it takes half the time, and in one piece a little less;
# jaxlib 0.12 has these emitters only, and ends at a flag that it does not know.
_RELEASE = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
FAST = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        *(["--xla_cpu_use_fusion_emitters=false"] if _RELEASE < (0, 11) else []),
    )
)


def free_address() -> str:
    """Where the first process can listen."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def start(
    count: int,
    devices: int,
    command: Callable[[str, int], list[str]],
    logs: Path,
    environment: dict[str, str] | None = None,
) -> list[subprocess.Popen[bytes]]:
    """Start `command(address, process)` so many times, each with so many devices of its own.

    What they say is in `logs`/N.log.
    """
    address, here = free_address(), str(Path(__file__).parents[2])
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST}"}
    flags |= {"PYTHONPATH": here, "JAX_PLATFORMS": "cpu"}
    logs.mkdir(parents=True, exist_ok=True)
    started = []
    for process in range(count):
        with (logs / f"{process}.log").open("wb") as log:
            argv = [sys.executable, *command(address, process)]
            env = os.environ | (environment or {}) | flags
            started.append(subprocess.Popen(argv, env=env, stdout=log, stderr=log))
    return started


def end(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> list[int]:
    """Their exit statuses; those that do not end in time are killed, and fail the test."""
    try:
        return [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()

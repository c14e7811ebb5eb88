"""MaxText's FP8 to bfloat16 step, in the environment that has it; must not know our converter.

MaxText brings a DeepSeek checkpoint to Orbax in two steps. This is the first, from safetensors to
safetensors; the second, convert_deepseek_family_ckpt, takes sizes of released models only.
https://github.com/AI-Hypercomputer/maxtext/tree/main/src/maxtext/checkpoint_conversion
"""

import os
import subprocess
import time
from pathlib import Path

from tools.bench_run import Took

MODULES = (
    "maxtext.checkpoint_conversion.standalone_scripts.deepseek_fp8_to_bf16",
    "MaxText.utils.ckpt_scripts.deepseek_fp8_to_bf16",  # as older releases have it
)


class PeerError(ValueError):
    """A Python that cannot run MaxText's converter: what it lacks."""


def converter_module(python: str) -> str:
    """The module that `python` can run; PeerError says why none."""
    faults = []
    for module in MODULES:
        fault = _import_fault(python, module)
        if not fault:
            return module
        faults.append(f"\n  {module}: {fault}")
    needed = "needed a Python that has MaxText, with torch, safetensors and tqdm"
    raise PeerError(f"{python} cannot run MaxText's converter, {needed}:{''.join(faults)}")


def run_maxtext(python: str, module: str, src: Path, dst: Path) -> Took:
    """Convert, until all is on the disk; the seconds without those of starting and importing."""
    began = time.perf_counter()
    assert not _import_fault(python, module)
    starting = time.perf_counter() - began
    command = [python, "-m", module, "--input-fp8-hf-path", str(src)]
    command += ["--output-bf16-hf-path", str(dst)]
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=quiet) as process:
        _, status, usage = os.wait4(process.pid, 0)  # of this process and of those it waited for
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    os.sync()
    return Took(
        seconds=time.perf_counter() - began - starting,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_mib=usage.ru_maxrss / 1024,
    )


def _import_fault(python: str, module: str) -> str | None:
    """The last line of what Python says when it cannot import a module."""
    command = [python, "-c", f"import {module}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as err:
        return f"{python} cannot be run: {err.strerror}"
    if not found.returncode:
        return None
    return (found.stderr.strip() or f"exit status {found.returncode}").splitlines()[-1]

"""The same job by Transformers: load a checkpoint, save it; must not know our converter.

    python -m tools.bench_transformers SRC DST

Prints seconds, CPU seconds, peak memory and the bytes that it wrote as JSON.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
import transformers


def main() -> None:
    src, dst = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(src, dtype=torch.bfloat16)
    model.save_pretrained(dst)
    os.sync()  # ours is on the disk when it says done
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    written = sum(path.stat().st_size for path in Path(dst).glob("*.safetensors"))
    measured = {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": after.ru_maxrss / 1024}
    print(json.dumps(measured | {"bytes_out": written}))


if __name__ == "__main__":
    main()

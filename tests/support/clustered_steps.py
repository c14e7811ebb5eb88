"""Three steps of each kind in one of several processes; the first one writes what came out.

python clustered_steps.py COORDINATOR PROCESSES PROCESS OUT CHECKPOINT_BY_DTYPE
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from stepping import KINDS, SMOOTH, make_batches, three_steps

from finetune.settings import blank
from mtp_model import cluster, dispatch, make_mesh

MESHES = {"mtp, FP8": {"fsdp": 2, "expert": 4}, "all, bf16": {"data": 2, "expert": 2, "tensor": 2}}

if __name__ == "__main__":
    coordinator, processes, process, out, checkpoints = sys.argv[1:]
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    cluster.join(coordinator, int(processes), int(process))
    dispatch.CAPACITY = 0.1
    found: dict[str, np.ndarray] = {}
    for name, (mode, dtype) in KINDS.items():
        settings = dataclasses.replace(blank(), train=mode, **SMOOTH)
        checkpoint = Path(json.loads(checkpoints)[dtype])
        mesh = make_mesh(**MESHES[name])
        losses, leaves = three_steps(settings, checkpoint, make_batches(), mesh)
        found |= {f"{name}/{leaf}": values for leaf, values in leaves.items()}
        found[f"{name}/losses"] = losses
    if cluster.is_first():
        np.savez(out, **found)
    cluster.leave(0)

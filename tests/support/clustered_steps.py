"""What is done on a mesh, in one of several processes: three steps of each kind, of which the first
one writes what came out; then `generate` and `capture`. In the end the first process is killed.

python clustered_steps.py COORDINATOR PROCESSES PROCESS OUT CHECKPOINT_BY_DTYPE
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from dying import die
from stepping import KINDS, SMOOTH, make_batches, three_steps

from finetune import cli
from finetune.settings import blank
from mtp_model import cluster, dispatch, make_mesh

MESHES = {"mtp, FP8": {"fsdp": 2, "expert": 4}, "all, bf16": {"data": 2, "expert": 2, "tensor": 2}}


def commands(checkpoint: Path, folder: Path) -> list[list[str]]:
    """What one process computes as well, with the checkpoint and `data.jsonl` of a folder."""
    of = ["--checkpoint", str(checkpoint), "--data", str(folder / "data.jsonl"), "--rows", "8"]
    short = ["--max-new-tokens", "6", "--prompt-tokens", "4"]
    row = ["--row-tokens", "12", "--stored", "float32"]
    return [
        ["generate", *of, "--out", str(folder / "answers.jsonl"), *short],
        ["capture", *of, "--out", str(folder / "states"), *row],
    ]


if __name__ == "__main__":
    coordinator, processes, process, out, checkpoints = sys.argv[1:]
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    cluster.join(coordinator, int(processes), int(process))
    dispatch.FIRST_ROUND = 0.1
    checkpoint_of = json.loads(checkpoints)
    found: dict[str, np.ndarray] = {}
    for name, (mode, dtype) in KINDS.items():
        settings = dataclasses.replace(blank(), train=mode, **SMOOTH)
        checkpoint = Path(checkpoint_of[dtype])
        mesh = make_mesh(**MESHES[name])
        losses, leaves = three_steps(settings, checkpoint, make_batches(), mesh)
        found |= {f"{name}/{leaf}": values for leaf, values in leaves.items()}
        found[f"{name}/losses"] = losses
    if cluster.is_first():
        np.savez(out, **found)
    for argv in commands(Path(checkpoint_of["fp8"]), Path(out).parent):
        assert cli.run([*argv, "--mesh.fsdp", "2", "--mesh.expert", "4"]) == 0
    if cluster.is_first():
        die()
    time.sleep(60)

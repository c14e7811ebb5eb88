"""What saving a checkpoint costs the steps of training beside it; knows no format of checkpoints.

    python -m tools.bench_saving SCRATCH --rounds 5

Groups of steps in turn: without a save; with one that begins before them and goes on beside them,
as training does it; with one that they wait for. All with the product's own step and checkpoints,
on a model of some 32 million parameters that are all trained.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from converters.format.listing import open_safetensors
from converters.importing.importer import import_checkpoint
from converters.sources.open import open_source
from finetune.data.packing import Batch
from finetune.optimizer import make_optimizer
from finetune.run.checkpoints import Checkpoints, RunPosition
from finetune.settings import BatchSettings, CheckpointSettings, RunSettings
from finetune.state import TrainState, make_train_step, start
from finetune.weights import load_for_training, matrices
from mtp_model.checkpoint.directory import open_checkpoint
from tools.make_tiny_checkpoint import make_tiny_checkpoint

SIZES = {
    "hidden_size": 512,
    "vocab_size": 8192,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "n_routed_experts": 16,
}
KINDS = "no save", "beside", "waited for"
ROW_TOKENS = 128


class Group(NamedTuple):
    """Seconds of some steps: of each of them, and of the call of `save` before them."""

    step_s: list[float]
    save_s: float

    @property
    def seconds(self) -> float:
        return sum(self.step_s) + self.save_s


class Training:
    """A model in training, and the folder of its checkpoints."""

    def __init__(self, scratch: Path, rows: int):
        source, checkpoint = scratch / "source", scratch / "checkpoint"
        make_tiny_checkpoint(source, dtype="bf16", sizes=SIZES)
        import_checkpoint(open_safetensors(open_source(str(source))), checkpoint)
        settings = RunSettings(
            checkpoint=str(checkpoint),
            data=(),
            out=scratch,
            train="all",
            batch=BatchSettings(rows=rows, row_tokens=ROW_TOKENS),
        )
        split = load_for_training(settings.checkpoint, settings.train, "float32")
        weighed = matrices(open_checkpoint(checkpoint))
        optimizer = make_optimizer(settings.optimizer, settings.steps, weighed)
        self.frozen, self.state = split.frozen, start(split, optimizer)
        self._step = make_train_step(split.graphdef, optimizer, settings)
        tokens = np.random.default_rng(0).integers(2, 256, (rows, ROW_TOKENS)).astype(np.int32)
        ones = np.ones_like(tokens)
        places = np.broadcast_to(np.arange(ROW_TOKENS, dtype=np.int32), tokens.shape)
        self._batch = Batch(tokens, ones, places, ones)
        self.checkpoints = Checkpoints(scratch / "saved", CheckpointSettings(keep=1))
        self._saved = 0

    @property
    def state_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))

    def step(self) -> None:
        state, result = self._step(self.state, self.frozen, self._batch)
        jax.device_get(result)  # waits for the step
        self.state: TrainState = state

    def save(self) -> None:
        """Begin to save; what is saved has another number each time."""
        self._saved += 1
        self.checkpoints.save(self.state, RunPosition(step=self._saved))


def timed(do: Callable[[], Any]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def run_group(training: Training, kind: str, steps: int) -> Group:
    """Some steps, with a save before them or without."""

    def save() -> None:
        if kind != "no save":
            training.save()
        if kind == "waited for":
            training.checkpoints.wait()

    save_s = timed(save)
    group = Group([timed(training.step) for _ in range(steps)], save_s)
    if left_s := round(timed(training.checkpoints.wait), 1):
        print(f"a save went on for {left_s} s after the steps: more --steps hide it")
    return group


def report(groups: dict[str, list[Group]], state_bytes: int) -> str:
    """Medians over the rounds; each round's groups stood next to each other in time."""
    plain = statistics.median(s for group in groups["no save"] for s in group.step_s)
    lines = [f"state {state_bytes / 1e6:,.0f} MB, plain step {plain:.3f} s"]
    for kind, of_kind in groups.items():
        pairs = list(zip(of_kind, groups["no save"], strict=True))
        ratio = statistics.median(group.seconds / other.seconds for group, other in pairs)
        in_step = statistics.median(sum(g.step_s) / sum(other.step_s) for g, other in pairs)
        slowest = statistics.median(max(group.step_s) for group in of_kind) / plain
        call_s = statistics.median(group.save_s for group in of_kind)
        extra = statistics.median(group.seconds - other.seconds for group, other in pairs)
        lines.append(
            f"{kind:<10} steps take {in_step:.2f} times as long, the slowest {slowest:.2f} of a "
            f"plain one; with the call of save ({call_s:.2f} s) {ratio:.2f}; {extra:+.2f} s in all"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("scratch", type=Path, help="folder on the disk to be measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="in a group")
    parser.add_argument("--rows", type=int, default=8, help=f"of {ROW_TOKENS} tokens in a step")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.scratch, ignore_errors=True)
    arguments.scratch.mkdir(parents=True)
    training = Training(arguments.scratch, arguments.rows)
    for _ in range(2):  # compiles
        training.step()
    groups: dict[str, list[Group]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind, of_kind in groups.items():
            of_kind.append(run_group(training, kind, arguments.steps))
    print(report(groups, training.state_bytes))
    training.checkpoints.close()


if __name__ == "__main__":
    main()

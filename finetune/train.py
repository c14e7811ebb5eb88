"""The training loop: `finetune-deepseek train`, from settings to RUN/final.

Read it from top to bottom; loading, packing, the step and the logs have files of their own.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from finetune.data.packing import Batch, Packer, Position
from finetune.data.run_text import RunText, held_out_batches, open_run_text
from finetune.optimizer import learning_rates, make_optimizer
from finetune.run.checkpoints import (
    Checkpoints,
    RunPosition,
    raise_unless_room,
    saved_steps,
)
from finetune.run.directory import RunDirectory, RunError
from finetune.run.metrics import RunLog, Summary, add_up, read_rows, summarise
from finetune.run.plots import draw_curves
from finetune.run.report import evaluation_sentence
from finetune.settings import RunSettings, SettingsError, as_plain, check
from finetune.state import (
    Split,
    StepResult,
    TrainState,
    make_measure_step,
    make_train_step,
    start,
)
from finetune.weights import (
    compute_dtype,
    load_for_training,
    matrices,
    open_trainable,
    write_final,
)
from mtp_model import ModelConfig
from mtp_model.checkpoint.directory import COMPLETE, Checkpoint
from mtp_model.files.open import as_place
from mtp_model.problems import UserError
from mtp_model.progress import above_bars, progress


class StoppedError(UserError):
    """Training that cannot go on: at which step, why, and what is left."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run, with what was measured on held-out text (None without any)."""

    run: RunDirectory
    before: Summary | None
    after: Summary | None


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What the loop works with; none of it changes from step to step."""

    settings: RunSettings
    run: RunDirectory
    base: Checkpoint
    text: RunText
    split: Split
    train_step: Callable[[TrainState, nnx.State, Batch], tuple[TrainState, StepResult]]
    measure_step: Callable[..., Any]
    held_out: list[Batch]
    first_state: TrainState
    console: Console


def train(settings: RunSettings, console: Console, overwrite: bool = False) -> Result:
    """Train, or go on where a killed run stopped. What is done is said on `console`.

    Raises SettingsError, RunError, DataError or CheckpointError before anything is written, and
    StoppedError when the loss is not finite.
    """
    settings = resolve(settings)
    run = RunDirectory(path=settings.out)
    run.raise_unless_usable(settings, overwrite)
    base, config = open_trainable(settings.checkpoint)
    _raise_if_rows_are_short(settings, config)
    text = open_run_text(settings, config)
    console.print(text.description)
    with run.claim(settings, overwrite):
        job = _prepare(settings, run, base, text, console)
        _raise_unless_room(job)
        console.print(_plan(job))
        state = _loop(job)
        rows = read_rows(run.evaluations)
        record = {"by": "finetune-deepseek train", "settings": as_plain(settings)}
        record |= {"held_out": {"before": rows[0], "after": rows[-1]}} if rows else {}
        write_final(base, run.final, state, record)
    return _result(run)


def resolve(settings: RunSettings) -> RunSettings:
    """Checked settings with absolute paths and no `auto`: what RUN/config.yaml says."""
    check(settings)
    return dataclasses.replace(
        settings,
        checkpoint=str(as_place(settings.checkpoint).absolute()),
        data=tuple(path.absolute() for path in settings.data),
        eval_data=tuple(path.absolute() for path in settings.eval_data),
        out=settings.out.absolute(),
        compute_dtype=compute_dtype(settings.compute_dtype),
    )


def _prepare(
    settings: RunSettings, run: RunDirectory, base: Checkpoint, text: RunText, console: Console
) -> _Job:
    split = load_for_training(settings.checkpoint, settings.train, settings.compute_dtype)
    optimizer = make_optimizer(settings.optimizer, settings.steps, matrices(base).__contains__)
    return _Job(
        settings=settings,
        run=run,
        base=base,
        text=text,
        split=split,
        train_step=make_train_step(split.graphdef, optimizer, settings),
        measure_step=make_measure_step(split.graphdef),
        held_out=held_out_batches(text.held_out, settings) if text.held_out else [],
        first_state=start(split, optimizer),
        console=console,
    )


def _loop(job: _Job) -> TrainState:
    """All steps that are still to be done. Long, so that it can be read in one piece."""
    settings, run = job.settings, job.run
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(run.checkpoints, settings.checkpoints.keep)
        stack.callback(checkpoints.close)
        state, at = _resume(job, checkpoints)
        log = RunLog(run.metrics, run.evaluations, run.tensorboard, at.step)
        stack.callback(log.close)
        batches = stack.enter_context(_batches(job, at))
        report = stack.enter_context(progress("train", "steps", at.step, settings.steps))
        rate_of = learning_rates(settings.optimizer, settings.steps)

        if at.step == 0:
            _evaluate(job, log, state, 0)
        for step in range(at.step + 1, settings.steps + 1):
            began = time.perf_counter()
            batch, position = next(batches)
            state, result = job.train_step(state, job.split.frozen, batch)
            result = jax.device_get(result)  # waits for the step
            _raise_unless_finite(step, result, checkpoints, run)

            tokens = at.tokens + int(result.measured.num_tokens)
            at = dataclasses.replace(at, step=step, tokens=tokens, position=position.to_json())
            row = _row(at, result, float(rate_of(step)), time.perf_counter() - began)
            log.step(row)
            measured = f"loss {row['loss']:.3f}, {row['tokens_per_s']:,.0f} tokens/s"
            report(step, settings.steps, measured)

            last = step == settings.steps
            if last or step % settings.evaluation.every == 0:
                _evaluate(job, log, state, step)
            if last or step % settings.checkpoints.every == 0:
                checkpoints.save(state, at)
    return state


def _resume(job: _Job, checkpoints: Checkpoints) -> tuple[TrainState, RunPosition]:
    """The newest checkpoint, or the beginning. RunError when data or weights have changed."""
    inputs = {
        "data": job.text.digest,
        "checkpoint": (job.base.path / COMPLETE).digest(),
    }
    at = checkpoints.latest()
    if at is None:
        return job.first_state, RunPosition(inputs=inputs)
    changed = [name for name, digest in inputs.items() if (at.inputs or {})[name] != digest]
    if changed:
        raise RunError(
            f"{job.run.path} cannot be continued: {' and '.join(changed)} changed since it began; "
            "restore what it was, or start anew with --overwrite"
        )
    job.console.print(f"continuing after step {at.step}")
    return checkpoints.restore(at.step, job.first_state), at


def _raise_unless_room(job: _Job) -> None:
    """UserError unless the disk has room for all that the run will write; said before it trains."""
    settings, folder = job.settings, job.run.checkpoints
    saved = saved_steps(folder)
    left = -(-(settings.steps - max(saved, default=0)) // settings.checkpoints.every)
    more = max(min(left, settings.checkpoints.keep + 1 - len(saved)), 0)
    final = sum(leaf.nbytes for leaf in jax.tree.leaves(job.first_state.trainable))
    raise_unless_room(folder, job.first_state, checkpoints=more, bytes_more=final)


@contextlib.contextmanager
def _batches(job: _Job, at: RunPosition) -> Iterator[Iterator[tuple[Batch, Position]]]:
    """Batches from the run's position on, each packed while the step before it runs."""
    position = Position.from_json(at.position) if at.position else None
    batch = job.settings.batch
    packer = Packer(
        job.text.train,
        rows=batch.rows,
        row_tokens=batch.row_tokens,
        seed=job.settings.seed,
        position=position,
    )

    def ahead() -> Iterator[tuple[Batch, Position]]:
        coming = pool.submit(next, packer)
        while True:
            batch = coming.result()
            coming = pool.submit(next, packer)
            yield batch

    with ThreadPoolExecutor(max_workers=1) as pool:
        yield ahead()


def _evaluate(job: _Job, log: RunLog, state: TrainState, step: int) -> None:
    """Measure on held-out text, log it, say it, and draw the curves anew."""
    run = job.run
    if job.held_out:
        parts = (state.trainable, state.biases, job.split.frozen)
        summary = summarise(add_up(job.measure_step(*parts, batch) for batch in job.held_out))
        log.evaluation({"step": step, **summary.to_json()})
        with above_bars():
            job.console.print(evaluation_sentence(step, summary))
    steps, evaluations = read_rows(run.metrics), read_rows(run.evaluations)
    if steps or evaluations:
        title = f"{run.path.name}: --train {job.settings.train} from {job.base.path.name}"
        draw_curves(run.curves, steps, evaluations, title)


def _row(at: RunPosition, result: StepResult, lr: float, step_s: float) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    summary = summarise(result.measured)
    return {
        "step": at.step,
        "loss": float(result.loss),
        "main_loss": summary.main_loss,
        "mtp_loss": summary.mtp_loss,
        "acceptance": summary.acceptance,
        "agreement": summary.agreement,
        "reached": summary.reached,
        "grad_norm": float(result.grad_norm),
        "lr": lr,
        "tokens": at.tokens,
        "tokens_per_s": summary.tokens / step_s,
        "step_s": step_s,
    }


def _raise_unless_finite(
    step: int, result: StepResult, checkpoints: Checkpoints, run: RunDirectory
) -> None:
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        return
    kept = checkpoints.latest()
    left = f"the checkpoint of step {kept.step} is kept" if kept else "there is no checkpoint yet"
    raise StoppedError(
        f"step {step}: loss {float(result.loss)}, gradient norm {float(result.grad_norm)}; {left} "
        f"in {run.checkpoints}. Try a lower --optimizer.learning-rate or --optimizer.clip-norm "
        "with another --out"
    )


def _raise_if_rows_are_short(settings: RunSettings, config: ModelConfig) -> None:
    least = config.num_nextn_predict_layers + 2
    if settings.batch.row_tokens < least:
        found = f"--batch.row-tokens is {settings.batch.row_tokens}"
        raise SettingsError(
            "settings that cannot be used", [f"{found}, needed {least} or more for this model"]
        )


def _plan(job: _Job) -> str:
    """What will be done, in numbers."""
    settings = job.settings
    trainable, frozen = map(_num_parameters, (job.split.trainable, job.split.frozen))
    what = {"mtp": "the MTP modules, main model frozen", "all": "main model and MTP modules"}
    row_tokens = settings.batch.rows * settings.batch.row_tokens
    return (
        f"training {what[settings.train]}: {trainable:,} parameters of {trainable + frozen:,}; "
        f"{settings.steps} steps of up to {row_tokens:,} tokens, computed in "
        f"{settings.compute_dtype}"
    )


def _num_parameters(state: nnx.State) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.filter_state(state, nnx.Param)))


def _result(run: RunDirectory) -> Result:
    summaries = [Summary.from_json(row) for row in read_rows(run.evaluations)]
    before, after = (summaries[0], summaries[-1]) if summaries else (None, None)
    return Result(run=run, before=before, after=after)

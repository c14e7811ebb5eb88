"""The training loop: `finetune-deepseek train`, from settings to RUN/final.

Read it from top to bottom; loading, packing, the step and the logs have files of their own.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from finetune.captured.documents import open_text
from finetune.data.packing import Batch, Packer, Position
from finetune.data.run_text import RunText, digest_of, held_out_batches
from finetune.devices import Trained, Workload, abstract_batch, devices_for, on_mesh, spread
from finetune.objective.head import Asked
from finetune.objective.objectives import forgets
from finetune.optimizer import make_optimizer
from finetune.run.checkpoints import (
    Checkpoints,
    RunPosition,
    raise_unless_room,
    room_for,
    saved_steps,
)
from finetune.run.directory import RunDirectory, opened
from finetune.run.learning_rate import learning_rates
from finetune.run.metrics import RunLog, Summary, first_and_last, measure_text, summarise
from finetune.run.not_finite import cause, raise_unless_finite
from finetune.run.plots import draw_curves, just_drawn, write_run_report
from finetune.run.report import evaluation_sentence, work_sentence
from finetune.run.resuming import given, inputs_of, resume, say_what_is_done_again
from finetune.run.stopping import NOT_STOPPING, Stopping
from finetune.settings import ComputeDtype, RunSettings
from finetune.settings_file import as_plain
from finetune.state import (
    Split,
    StepResult,
    TrainState,
    as_served,
    asked_by,
    make_measure_step,
    start,
    traced_step,
)
from finetune.weights import (
    abstract_for_training,
    compute_dtype,
    final_bytes,
    keep_adapters,
    load_for_training,
    matrices,
    open_trainable,
    raise_unless_fitting,
    recomputes_layers,
    resolve,
    write_final,
)
from mtp_model import cluster
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.load import give_back_freed
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
    asked: Asked
    computed_in: ComputeDtype  # what `auto` stands for in this run
    mesh: Mesh | None  # None: one device
    run: RunDirectory
    base: Checkpoint
    text: RunText
    split: Split
    compiled: Callable[[], tuple[Callable[..., Any], dict[str, float]]]  # the step; for the log
    measure_step: Callable[..., Any]
    held_out: list[tuple[Batch, list[list[int]]]]
    held_out_digest: str
    first_state: TrainState
    console: Console
    stopping: Stopping


def train(
    settings: RunSettings,
    console: Console,
    overwrite: bool = False,
    stopping: Stopping = NOT_STOPPING,
    profiled: int = 0,
) -> Result:
    """Train, or go on where a stopped run is. What is done is said on `console`.

    stopping: what hears the signals that end the run early, where something does.
    profiled: so many steps, after the first one, leave a trace in RUN/profile.

    Raises SettingsError, RunError, DataError or CheckpointError before anything is written,
    StoppedError when the loss is not finite, and Stopped when a signal asked for it.
    """
    with opened(settings.out) as run:
        return _train(run, settings, console, overwrite, stopping, profiled)


def _train(
    run: RunDirectory,
    settings: RunSettings,
    console: Console,
    overwrite: bool,
    stopping: Stopping,
    profiled: int,
) -> Result:
    asked = run.as_it_began(settings)
    settings = resolve(asked)
    run.raise_unless_usable(settings, overwrite)
    begun_in = None if overwrite else run.computed_in()
    computed_in = begun_in or compute_dtype(settings.compute_dtype)
    base, config = open_trainable(settings.checkpoint, captured=bool(settings.states))
    raise_unless_fitting(settings, config)
    trained = Trained(settings.train, settings.optimizer, settings.lora)
    work = Workload.of(base, trained, settings.batch.rows_at_once, settings.scope)
    mesh = devices_for(settings.mesh, work)
    text = open_text(settings, base, computed_in, console.print)
    console.print(text.description)
    cluster.raise_unless_alike(given(settings, text, base))
    with run.claim(settings, computed_in, overwrite):
        with on_mesh(mesh):
            job = _prepare(settings, computed_in, mesh, run, base, text, console, stopping)
            _raise_unless_room(job)
            console.print(work_sentence(settings, computed_in, job.split, mesh))
            if settings.objective.lk and not asked.objective.weights():
                console.print("the MTP modules are new: they learn by lk (--objective.lk 1)")
            if warning := forgets(settings.objective, base.provenance):
                console.print(warning)
            state = as_served(_loop(job, profiled))
        measured = first_and_last(run.evaluations)
        before, after = map(Summary.from_json, measured) if measured else (None, None)
        record = {"by": "finetune-deepseek train", "settings": as_plain(settings)}
        record |= {"computed_in": computed_in}
        record |= {"held_out": {"before": measured[0], "after": measured[1]}} if measured else {}
        if cluster.is_first():
            write_run_report(run, settings, before, after)
        run.send()
        if settings.train == "lora" and settings.lora.keep:
            keep_adapters(base, run.adapters, state, record, settings.lora)
        write_final(base, run.final, state, record, settings.lora)
    return Result(run=run, before=before, after=after)


def _prepare(
    settings: RunSettings,
    computed_in: ComputeDtype,
    mesh: Mesh | None,
    run: RunDirectory,
    base: Checkpoint,
    text: RunText,
    console: Console,
    stopping: Stopping,
) -> _Job:
    held_out = held_out_batches(text.held_out, settings) if text.held_out else []
    optimizer = make_optimizer(settings.optimizer, settings.steps, matrices(base))
    remat = recomputes_layers(settings, base.config, computed_in)
    how = settings.train, computed_in, remat, mesh, settings.lora

    @functools.cache
    def compiled() -> tuple[Callable[..., Any], dict[str, float]]:
        began, batch = time.perf_counter(), settings.batch
        split = abstract_for_training(base.config, base.dtypes, *how, settings.scope)
        rows = abstract_batch(batch.rows, batch.row_tokens, mesh, text.states)
        with progress("compile the step", "steps"):
            step = traced_step(split, optimizer, settings, rows)[1].lower().compile()
        give_back_freed()
        return step, {"compile_s": time.perf_counter() - began}

    if settings.steps not in saved_steps(run.checkpoints):
        compiled()  # before hours of reading what may not fit, and before memory is full of it
    split = load_for_training(settings.checkpoint, *how, settings.seed, settings.scope)
    raise_unless_finite(split, settings.checkpoint)
    asked = asked_by(settings)
    return _Job(
        settings=settings,
        asked=asked,
        computed_in=computed_in,
        mesh=mesh,
        run=run,
        base=base,
        text=text,
        split=split,
        compiled=compiled,
        measure_step=make_measure_step(split.graphdef, asked),
        held_out=held_out,
        held_out_digest=digest_of(batch for batch, _ in held_out),
        first_state=start(split, optimizer, settings.optimizer.parameters),
        console=console,
        stopping=stopping,
    )


def _loop(job: _Job, profiled: int) -> TrainState:
    """All steps that are still to be done. Long, so that it can be read in one piece."""
    settings, run, stopping = job.settings, job.run, job.stopping
    with contextlib.ExitStack() as stack:
        inputs = inputs_of(job.text, job.base)
        checkpoints = Checkpoints(run.checkpoints, settings.checkpoints)
        stack.callback(checkpoints.close)
        state, at = resume(run, checkpoints, job.first_state, inputs, settings, job.console)
        stack.callback(run.send)  # after the logs are closed
        writes = cluster.is_first()
        log = RunLog(run.metrics, run.evaluations, run.tensorboard, at.step, writes)
        stack.callback(log.close)
        say_what_is_done_again(log, at, job.console)
        batches = stack.enter_context(_batches(job, at))
        report = stack.enter_context(progress("train", "steps", at.step, settings.steps))
        rate_of = learning_rates(settings.optimizer, settings.steps)

        def stop_if_asked() -> None:
            if stopping.is_asked():
                run.send()
                checkpoints.save(state, at)
                checkpoints.wait()
                stopping.stop()

        if _evaluation_is_missing(job, log, at.step):
            _evaluate(job, log, state, at.step, stop_if_asked)
        if at.step == settings.steps:  # only the result is still to be written
            return state
        train_step, compiled = job.compiled()
        stack.enter_context(stopping.after_the_step())
        for step in _traced(range(at.step + 1, settings.steps + 1), profiled, run.profile):
            began = time.perf_counter()
            batch, position = next(batches)
            batch = spread(batch, job.mesh)
            state, result = train_step(state, job.split.frozen, batch)
            result = jax.device_get(result)  # waits for the step
            _raise_unless_finite(job, state, batch, step, result, checkpoints)

            tokens = at.tokens + int(result.measured.num_tokens)
            at = dataclasses.replace(at, step=step, tokens=tokens, position=position.to_json())
            row = _row(job, at, result, float(rate_of(step)), time.perf_counter() - began)
            log.step(row | compiled)
            compiled = {}
            measured = f"loss {row['loss']:.3f}, {row['tokens_per_s']:,.0f} tokens/s"
            report(step, settings.steps, measured)

            if step == settings.steps or step % settings.checkpoints.every == 0:
                run.send()  # the logs are never behind a checkpoint
                checkpoints.save(state, at)
            checkpoints.raise_if_failed()
            stop_if_asked()
            if _evaluation_is_due(settings, step):
                _evaluate(job, log, state, step, stop_if_asked)
        checkpoints.wait()
    return state


def _traced(steps: range, count: int, folder: Path) -> Iterator[int]:
    """The steps. Of so many of them, after the first one, the profiler's trace is written."""
    traced = steps[1 : 1 + count]
    for step in steps:
        if traced and step == traced[0]:
            jax.profiler.start_trace(folder)
        yield step
        if traced and step == traced[-1]:
            jax.profiler.stop_trace()


def _raise_unless_room(job: _Job) -> None:
    """UserError unless the disk has room for all that the run will write; said before it trains."""
    folder = job.run.checkpoints
    more = room_for(saved_steps(folder), job.settings.checkpoints, job.settings.steps)
    final = final_bytes(job.base, job.first_state)
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
        sources=job.text.sources,
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


def _evaluation_is_due(settings: RunSettings, step: int) -> bool:
    return step == settings.steps or step % settings.evaluation.every == 0


def _evaluation_is_missing(job: _Job, log: RunLog, step: int) -> bool:
    """Whether the step that a run goes on from is still to be measured.

    A signal may have come while it was, or it is held-out text that was not measured yet.
    """
    last = log.evaluation_rows.last or {"step": -1}
    other_text = last.get("held_out", job.held_out_digest) != job.held_out_digest
    return other_text or (last["step"] < step and _evaluation_is_due(job.settings, step))


def _evaluate(
    job: _Job, log: RunLog, state: TrainState, step: int, stop_if_asked: Callable[[], None]
) -> None:
    """Measure on held-out text, log it, say it, and draw the curves anew, though not too often."""
    run = job.run

    def batches() -> Iterator[tuple[Batch, list[list[int]]]]:
        for batch_and_documents in job.held_out:
            stop_if_asked()
            yield batch_and_documents

    if job.held_out:
        served = as_served(state)
        parts = (served.trainable, served.biases, job.split.frozen)
        summary = measure_text(
            lambda batch: job.measure_step(*parts, spread(batch, job.mesh)), batches(), job.asked
        )
        log.evaluation({"step": step, **summary.to_json(), "held_out": job.held_out_digest})
        with above_bars():
            job.console.print(evaluation_sentence(step, summary))
    steps = log.step_rows.rows()
    wanted = cluster.is_first() and (step == job.settings.steps or not just_drawn(run.curves))
    if steps and wanted:  # before the first one there is no curve
        title = f"{run.place.name}: --train {job.settings.train} from {job.base.path.name}"
        draw_curves(run.curves, steps, log.evaluation_rows.rows(), title)
    run.send(seldom=True)


def _row(
    job: _Job, at: RunPosition, result: StepResult, lr: float, step_s: float
) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    summary = summarise(result.measured, job.asked)
    compared = {"overlap": summary.overlap, "kl": summary.kl} if job.asked.distributions else {}
    return {
        "step": at.step,
        "loss": float(result.loss),
        "main_loss": summary.main_loss,
        "mtp_loss": summary.mtp_loss,
        "acceptance": summary.acceptance,
        "agreement": summary.agreement,
        "reached": summary.reached,
        "greedy_share": summary.greedy_share,
        **compared,
        "grad_norm": float(result.grad_norm),
        "lr": lr,
        "tokens": at.tokens,
        "tokens_per_s": summary.tokens / step_s,
        "step_s": step_s,
    }


def _raise_unless_finite(
    job: _Job, state: TrainState, batch: Batch, step: int, result: StepResult, kept: Checkpoints
) -> None:
    """StoppedError that says why a loss is not finite; the step left the state as it was."""
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        return
    kept.wait()
    raise StoppedError(
        f"step {step}: loss {float(result.loss)}, gradient norm {float(result.grad_norm)}; "
        f"{kept.newest_said()}. {cause(job.split, state, batch, result, step)}"
    )

"""`finetune-deepseek`: the command line. Results go to stdout, progress and errors to stderr.

Exit status: 0 when all that was asked is done, 1 when it failed, 2 for wrong usage.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

from finetune.captured.capture import CaptureSettings, capture
from finetune.evaluate import EvaluateSettings, Evaluation, evaluate
from finetune.generate import GenerateSettings, as_json, generate
from finetune.inspecting import compare, inspect_data
from finetune.inspecting.compare import CompareSettings
from finetune.inspecting.inspect_data import InspectDataSettings
from finetune.planning.plan import PlanSettings, plan
from finetune.planning.report import plan_json, plan_sections
from finetune.run.directory import RunDirectory
from finetune.run.report import (
    comparison_sections,
    controls_sections,
    evaluation_sections,
    generation_sections,
    number,
    reduced_sections,
    sources_sections,
)
from finetune.run.stopping import Stopped, Stopping
from finetune.settings import ClusterSettings, RunSettings, SettingsError, blank, flat, option
from finetune.settings_file import read_yaml
from finetune.train import Result, train
from mtp_model import cluster
from mtp_model.commands import FAILED, exit_status, repeated
from mtp_model.files.open import absolute, is_address, written
from mtp_model.files.place import Place
from mtp_model.reporting import Section, show, stdout, visible

WRONG_USAGE = 2


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Fine-tune a checkpoint's MTP modules, or all of it, on text.

    The same command continues a run that was interrupted. The result is OUT/final, a checkpoint
    directory that `convert-deepseek export` takes.
    """

    settings: Annotated[RunSettings, tyro.conf.arg(name="")]
    config: Path | None = None
    """YAML file with any of these settings; those given on the command line win over it."""
    overwrite: bool = False
    """Delete the run that is in --out, and start anew."""
    profile: int = 0
    """Write a trace of so many steps, after the first one, to OUT/profile, for XProf."""
    cluster: ClusterSettings = dataclasses.field(default_factory=ClusterSettings)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    status = FAILED
    try:
        status = run(sys.argv[1:] if argv is None else argv)
    finally:
        cluster.leave(status)
    sys.exit(status)


def run(argv: Sequence[str]) -> int:
    """Run one command; returns its exit status."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    return exit_status(
        lambda: _run(argv, errors),
        tell=lambda error: errors.print(f"error: {visible(str(error))}", markup=False),
        interrupted="interrupted; train, generate and capture go on with the same command",
    )


def _run(argv: Sequence[str], errors: Console) -> int:
    try:
        command = parse(argv)
        if where := _cluster_of(command):
            cluster.join(where.coordinator, where.processes, where.process)
        if isinstance(command, TrainCommand):
            return _train(command, argv, errors)
        if isinstance(command, GenerateSettings):
            _generate(command)
        elif isinstance(command, InspectDataSettings):
            _inspect_data(command)
        elif isinstance(command, CompareSettings):
            _compare(command)
        elif isinstance(command, CaptureSettings):
            _capture(command)
        elif isinstance(command, PlanSettings):
            return _plan(command)
        else:
            _evaluate(command)
    except SettingsError as error:
        errors.print(f"error: {error}", markup=False)
        return WRONG_USAGE
    # ValueError where it is dispatched, TimeoutError where Orbax waits for what others write.
    except (jax.errors.JaxRuntimeError, ValueError, TimeoutError) as error:
        if lost := cluster.lost(error):
            raise lost from error
        raise
    return 0


def _cluster_of(command: "Command") -> ClusterSettings | None:
    """Where a command may run in several processes: how they find each other."""
    if isinstance(command, TrainCommand | EvaluateSettings | CaptureSettings):
        return command.cluster
    if isinstance(command, GenerateSettings) and command.server is None:
        return command.cluster
    return None


Command = (
    TrainCommand
    | EvaluateSettings
    | GenerateSettings
    | PlanSettings
    | CaptureSettings
    | InspectDataSettings
    | CompareSettings
)


def parse(argv: Sequence[str]) -> Command:
    """The command line over its YAML file over the defaults; exits with 2 for wrong usage."""
    file = _config_file(argv)
    default = TrainCommand(settings=_settings_in(file) if file else blank())
    command = tyro.cli(
        Annotated[TrainCommand, tyro.conf.subcommand("train", default=default)]
        | Annotated[EvaluateSettings, tyro.conf.subcommand("evaluate")]
        | Annotated[GenerateSettings, tyro.conf.subcommand("generate")]
        | Annotated[PlanSettings, tyro.conf.subcommand("plan")]
        | Annotated[CaptureSettings, tyro.conf.subcommand("capture")]
        | Annotated[InspectDataSettings, tyro.conf.subcommand("inspect-data")]
        | Annotated[CompareSettings, tyro.conf.subcommand("compare")],
        prog="finetune-deepseek",
        description="Fine-tune DeepSeek-V3 checkpoints with their Multi-Token Prediction modules.",
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    _raise_if_repeated(command, argv)
    return command


def _raise_if_repeated(command: "Command", argv: Sequence[str]) -> None:
    """SettingsError for options of several values that come twice: the first would be forgotten."""
    settings = command.settings if isinstance(command, TrainCommand) else command
    names = {option(name) for name, value in flat(settings).items() if isinstance(value, tuple)}
    if faults := repeated(names, argv):
        raise SettingsError("settings that cannot be used", faults)


def _settings_in(file: Path) -> RunSettings:
    """The settings of a YAML file. In a run, which may have been moved, `out` is that run."""
    settings, run = read_yaml(file), RunDirectory(path=absolute(file).parent)
    return dataclasses.replace(settings, out=run.path) if run.is_of(file) else settings


def _config_file(argv: Sequence[str]) -> Path | None:
    """The value of --config, which is needed before the other options can have defaults."""
    if argv[:1] != ["train"] or "--help" in argv or "-h" in argv:
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    try:
        return parser.parse_known_args(argv)[0].config
    except argparse.ArgumentError:  # tyro says it better
        return None


def _train(command: TrainCommand, argv: Sequence[str], errors: Console) -> int:
    again = shlex.join(["finetune-deepseek", *(word for word in argv if word != "--overwrite")])
    stopping = Stopping(f"continue with: {again}")
    console = errors if cluster.is_first() else Console(quiet=True)
    try:
        with stopping.heard():
            result = train(command.settings, console, command.overwrite, stopping, command.profile)
    except Stopped as stopped:
        stopping.say_goodbye()
        return stopped.status
    if cluster.is_first():
        show(stdout(), _result_sections(result))
    return 0


def _result_sections(result: Result) -> Iterator[Section]:
    if result.before and result.after:
        yield from comparison_sections(result.before, result.after)
    run, final = result.run, _shown(result.run.final)
    yield (
        f"report: {_shown(run.place / run.page.name)}\n"
        f"curves: {_shown(run.place / run.curves.name)}\n"
        f"checkpoint: {final}\n"
        f"next: convert-deepseek export {shlex.quote(str(final))} DST"
    )


def _evaluate(settings: EvaluateSettings) -> None:
    found = evaluate(settings)
    if not cluster.is_first():
        return
    if settings.json:
        print(json.dumps({"checkpoint": str(settings.checkpoint), **found.to_json()}))
    else:
        drafts = (
            "greedy drafts" if settings.sampling == "greedy" else f"{settings.sampling} sampling"
        )
        title = f"{settings.checkpoint}, teacher-forced, {drafts}"
        if found.captured:
            title += f"; from captured states ({', '.join(found.captured)})"
        show(stdout(), _evaluation_sections(found, title))


def _evaluation_sections(found: Evaluation, title: str) -> Iterator[Section]:
    summary = found.summary
    yield from evaluation_sections(summary, title)
    if found.sources:
        yield from sources_sections(found.sources, summary)
    if found.controls:
        yield from controls_sections(summary, found.controls)
    if fewer := found.reduced:
        here = fewer.data == found.data
        yield from reduced_sections(
            summary, fewer.summary, fewer.tokens, fewer.coverage, counted_here=here
        )
    if found.draft_cost is not None:
        projected = number(found.speedup(summary.mean_accepted_length))
        yield f"projected speed-up {projected}: a draft takes {found.draft_cost:g} of a main step"


def _generate(settings: GenerateSettings) -> None:
    counts = generate(settings)
    if not cluster.is_first():
        return
    if settings.json:
        print(json.dumps(as_json(settings, counts)))
    else:
        show(stdout(), generation_sections(counts, written(settings.out)))


def _capture(settings: CaptureSettings) -> None:
    done = capture(settings)
    if not cluster.is_first():
        return
    if settings.json:
        print(json.dumps(dataclasses.asdict(done)))
    else:
        states = shlex.quote(_shown(settings.out))
        show(
            stdout(),
            [
                f"{done.samples:,} samples of {done.tokens:,} tokens in {_shown(settings.out)}\n"
                f"next: finetune-deepseek train --states {states} --checkpoint CKPT"
            ],
        )


def _inspect_data(settings: InspectDataSettings) -> None:
    found = inspect_data.inspect_data(settings)
    if settings.json:
        print(json.dumps(inspect_data.as_json(settings, found)))
    else:
        inspect_data.show_rows(stdout(), found, settings.around)


def _compare(settings: CompareSettings) -> None:
    found = compare.compare(settings)
    if settings.json:
        print(json.dumps(compare.as_json(found)))
    else:
        show(stdout(), compare.sections(found))


def _plan(settings: PlanSettings) -> int:
    """1 where the step is known not to fit."""
    plans = plan(settings)
    if settings.json:
        print(json.dumps(plan_json(plans)))
    else:
        show(stdout(), plan_sections(plans))
    return int(plans[-1].fits is False)


def _shown(place: Path | Place) -> str:
    """A path as a person would type it from here."""
    if is_address(place):
        return written(place)
    path, here = Path(str(place)), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else place)

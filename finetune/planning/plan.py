"""`finetune-deepseek plan`: what a training step takes on a slice, before there is one.

The step of `train` itself is compiled ahead of time, with the shapes, dtypes and placements that a
run would have. Memory is what the compiler says; operations are counted in the program; seconds are
an estimate whose terms are shown.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from finetune.data.packing import PostNorm
from finetune.devices import (
    Trained,
    Workload,
    abstract_batch,
    choose_shape,
    on_mesh,
    possible_shapes,
    stored_bytes,
)
from finetune.optimizer import make_optimizer
from finetune.planning.collectives import Sent
from finetune.planning.estimate import terms_of
from finetune.planning.flops import adapted_flops, model_flops, program_flops
from finetune.planning.slices import (
    FAMILIES,
    HERE,
    Slice,
    compile_step,
    family_of,
    open_slice,
)
from finetune.settings import (
    BatchSettings,
    LoraSettings,
    MeshSettings,
    ObjectiveSettings,
    OptimizerSettings,
    Part,
    RunSettings,
    SettingsError,
    TrainMode,
    part_of,
)
from finetune.settings_rules import value_faults
from finetune.state import Split, TrainState, num_parameters, traced_step
from finetune.weights import abstract_for_training, raise_unless_fitting, recomputes_layers
from mtp_model import ModelConfig, make_mesh
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.files.untrusted_json import parse
from mtp_model.layers import FP8
from mtp_model.meshes import MeshShape, axes_in_words
from mtp_model.model import Scope, abstract_model, leaf_name
from mtp_model.problems import UserError
from mtp_model.progress import progress

_MOST_MESHES = 4  # that --search compiles for a slice
_MOST_OF_MEMORY = 0.97  # of a device, for what is stored: more is not worth compiling


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Whether a training step fits on a slice, and what it takes; no TPU is needed.

    The step is the one that `train` would run with the same settings.
    """

    checkpoint: str | None = None
    """Checkpoint directory that would be trained."""
    model_config: Path | None = None
    """config.json of a model instead: nothing has to be converted, or be here."""
    topology: str = HERE
    """Slice that is planned for, v5p:2x2x4 (libtpu compiles for it: extra `tpu`); `here` is this
    machine. A family alone, v5p, with --search."""
    search: bool = False
    """Of a family, find the smallest slice on which the step fits; of a slice, try several meshes
    and show them all."""
    train: TrainMode = "mtp"
    """What is trained, as in `train`."""
    captured: bool = False
    """From hidden states that `capture` wrote, as `train --states`: no main model is loaded."""
    stored: Literal["as-is", "bf16"] = "as-is"
    """Frozen weights as the checkpoint or config.json has them (FP8 where it says so), or bf16."""
    rows: int = 0
    """Rows that are computed at a time; 0: one for each device that the batch is spread over."""
    row_tokens: int = 4096
    """Tokens in a row."""
    draft_tokens: int = 0
    """MTP depths that are trained; 0: as many as there are modules."""
    draft_input: Literal["text", "own"] = "text"
    """As in `train`."""
    detach_main: bool = False
    """As in `train`."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of activations."""
    remat: Literal["auto", "layer", "none"] = "auto"
    """As in `train`; with --search of one slice, auto also tries the other on the best mesh."""
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)
    in_full: bool = False
    """Compile for a TPU with all the optimisations that `train` has, in three times the time.
    Without it that is done where the compiler's first level leaves open whether the step fits."""
    json: bool = False
    """Print one JSON object instead of a table."""

    @property
    def part(self) -> Part:
        """What learns."""
        return part_of(self.train, self.lora)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was found for one mesh; bytes are those of one device unless a name says otherwise."""

    topology: str
    devices: int
    chips: int
    mesh: MeshShape
    train: TrainMode
    captured: bool
    remat: str  # layer, none
    rows: int
    row_tokens: int
    fits: bool | None  # None: nobody knows how much memory a device has
    limit_bytes: int | None
    total_bytes: int | None
    argument_bytes: int | None  # weights, moments, batch; None where it did not compile
    temporary_bytes: int | None
    parameters_trained: int
    parameters_frozen: int
    checkpoint_bytes: int  # of a checkpoint of the run, on the disk
    flops_formula: float  # a step, of all devices
    flops_compiled: float
    collectives: Mapping[str, Sent] | None  # by kind, in a step
    compute_s: float | None
    memory_s: float | None
    interconnect_s: float | None
    step_s: float | None
    tokens_per_s: float | None
    compile_s: float
    compiled_in_full: bool


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step without memory, ready to be compiled."""

    split: Split
    state: TrainState
    traced: Any
    remat: str


def plan(settings: PlanSettings) -> list[Plan]:
    """One plan, or with `search` one for each mesh or slice that was tried, the best one last.

    Raises SettingsError, UserError, ConfigError or CheckpointError for what cannot be planned.
    """
    if faults := value_faults(settings):
        raise SettingsError("settings that cannot be used", faults)
    config, dtypes = _model(settings)
    raise_unless_fitting(_run(settings), config, "--row-tokens")
    if settings.topology in FAMILIES:
        if not settings.search:
            raise SettingsError(
                "settings that cannot be used",
                [f"--topology is {settings.topology}, a family: needed a slice, or --search"],
            )
        return list(_smallest(settings, config, dtypes))
    place = open_slice(settings.topology)
    work = _workload(settings, config, dtypes, place)
    if not settings.search:
        shape = choose_shape(settings.mesh, work, len(place.devices), place.memory)
        return [_compiled(settings, work, place, shape)]
    shapes = possible_shapes(settings.mesh, work, len(place.devices))
    order = np.argsort(stored_bytes(work, shapes), kind="stable")[:_MOST_MESHES]
    found = sorted([_compiled(settings, work, place, shapes[i]) for i in order], key=_worth)
    if settings.remat == "auto":
        other = replace(settings, remat="none" if found[-1].remat == "layer" else "layer")
        found.append(_compiled(other, work, place, found[-1].mesh))
    return sorted(found, key=_worth)


def _smallest(
    settings: PlanSettings, config: ModelConfig, dtypes: Mapping[str, Any]
) -> Iterator[Plan]:
    """Slices of a family from the smallest that may do, until one does."""
    family = family_of(settings.topology)
    for size in FAMILIES[family].sizes:
        place = open_slice(f"{family}:{size}")
        work = _workload(settings, config, dtypes, place)
        shape = choose_shape(settings.mesh, work, len(place.devices), place.memory)
        assert place.memory is not None  # libtpu knows
        if stored_bytes(work, [shape])[0] > place.memory * _MOST_OF_MEMORY:
            continue
        found = _compiled(settings, work, place, shape)
        yield found
        if found.fits:
            return


def _worth(found: Plan) -> tuple[bool, float]:
    """Sorts what fits, and what fits fast, last."""
    return bool(found.fits), -(found.step_s or found.total_bytes or 0)


def _model(settings: PlanSettings) -> tuple[ModelConfig, dict[str, Any]]:
    """The network, and the dtypes that its leaves are stored in."""
    if (settings.checkpoint is None) == (settings.model_config is None):
        raise SettingsError(
            "settings that cannot be used", ["needed --checkpoint or --model-config, one of them"]
        )
    if settings.checkpoint is not None:
        checkpoint = open_checkpoint(settings.checkpoint)
        config, dtypes = checkpoint.config, checkpoint.dtypes
    else:
        assert settings.model_config is not None
        config = ModelConfig.from_dict(_read_config(settings.model_config))
        dtypes = _released_dtypes(config)
    if settings.stored == "bf16":
        dtypes = {n: jnp.bfloat16 if dtype == FP8 else dtype for n, dtype in dtypes.items()}
    if not config.num_nextn_predict_layers:
        raise SettingsError("a model without MTP modules", ["num_nextn_predict_layers is 0"])
    if settings.captured and settings.part != "mtp":
        what = "--lora.part" if settings.train == "lora" else "--train"
        found = f"--captured is given with {what} {settings.part}"
        raise SettingsError("settings that cannot be used", [f"{found}, needed {what} mtp"])
    return config, dtypes


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        values = parse(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, Mapping):
        raise UserError(f"{file} is no config.json: needed an object")
    return values


def _released_dtypes(config: ModelConfig) -> dict[str, Any]:
    """Of every leaf, as a checkpoint of this config has it: FP8 where there are block scales."""
    flat = nnx.to_flat_state(nnx.state(abstract_model(config)))
    paths = {path for path, _ in flat}
    dtypes: dict[str, Any] = {}
    for path, leaf in flat:
        scaled = (*path[:-1], "weight_scale_inv") in paths and path[-1] == "weight"
        plain = jnp.dtype(config.dtype) if type(leaf) is nnx.Param else leaf.dtype
        dtypes[leaf_name(path)] = jnp.dtype(FP8) if scaled else plain
    return dtypes


def _workload(
    settings: PlanSettings, config: ModelConfig, dtypes: Mapping[str, Any], place: Slice
) -> Workload:
    rows = settings.rows or len(place.devices)
    scope: Scope = "mtp" if settings.captured else "all"
    trained = Trained(settings.train, settings.optimizer, settings.lora)
    return Workload(config, dtypes, trained, rows, scope)


def _compiled(settings: PlanSettings, work: Workload, place: Slice, shape: MeshShape) -> Plan:
    """The plan for one mesh."""
    began = time.perf_counter()
    count = math.prod(shape.values())
    mesh = make_mesh(**shape, devices=place.devices[:count])
    rows = settings.rows or count // shape["tensor"]
    with (
        progress(f"plan {place.name}, {axes_in_words(shape)}", "steps") as report,
        on_mesh(mesh),
    ):
        report(0, None, "tracing")
        step = _step(settings, work, mesh, rows)
        report(0, None, "lowering")
        lowered = step.traced.lower()
        report(0, None, "compiling")
        found = compile_step(lowered, place, settings.in_full)
        if found.is_open:
            report(0, None, "compiling in full")
            found = compile_step(lowered, place, in_full=True)
    memory = found.memory
    trainable, frozen = (num_parameters(part) for part in (step.split.trainable, step.split.frozen))
    depths = settings.draft_tokens or work.config.num_nextn_predict_layers
    size = rows, settings.row_tokens, depths
    if settings.train == "lora":
        what = settings.part, _sizes(step)
        formula = adapted_flops(work.config, *what, *size, captured=settings.captured)
    else:
        formula = model_flops(work.config, settings.part, *size, captured=settings.captured)
    of_program = program_flops(step.traced.jaxpr.jaxpr)
    tokens = rows * settings.row_tokens
    terms = terms_of(place, of_program, memory, found.collectives or {})
    step_s = sum(terms.values()) if terms else None
    return Plan(
        topology=place.name,
        devices=count,
        chips=place.chips,
        mesh=shape,
        train=settings.train,
        captured=settings.captured,
        remat=step.remat,
        rows=rows,
        row_tokens=settings.row_tokens,
        fits=None if found.limit is None else memory is not None,
        limit_bytes=found.limit,
        total_bytes=found.needed,
        argument_bytes=memory and memory.argument_size_in_bytes,
        temporary_bytes=memory and memory.temp_size_in_bytes,
        parameters_trained=trainable,
        parameters_frozen=frozen,
        checkpoint_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step.state)),
        flops_formula=formula,
        flops_compiled=of_program,
        collectives=found.collectives,
        compute_s=terms.get("compute"),
        memory_s=terms.get("memory"),
        interconnect_s=terms.get("interconnect"),
        step_s=step_s,
        tokens_per_s=tokens / step_s if step_s else None,
        compile_s=time.perf_counter() - began,
        compiled_in_full=found.in_full,
    )


def _step(settings: PlanSettings, work: Workload, mesh: Mesh, rows: int) -> _Step:
    """The step of a run, traced with arrays that have a place and no memory."""
    run = _run(settings, rows)
    remat = recomputes_layers(run, work.config, settings.compute_dtype)
    how = settings.train, settings.compute_dtype, remat, mesh, settings.lora
    split = abstract_for_training(work.config, work.dtypes, *how, work.scope)
    optimizer = make_optimizer(run.optimizer, run.steps, lambda _: True)
    states = None
    if settings.captured:  # as `capture` keeps them
        states = PostNorm(np.zeros((0, work.config.hidden_size), jnp.bfloat16))
    batch = abstract_batch(rows, settings.row_tokens, mesh, states)
    state, traced = traced_step(split, optimizer, run, batch)
    return _Step(split=split, state=state, traced=traced, remat="layer" if remat else "none")


def _run(settings: PlanSettings, rows: int = BatchSettings.rows) -> RunSettings:
    """The run that is planned; its text and its folder are nobody's."""
    return RunSettings(
        checkpoint="",
        data=(),
        states=(Path(),) if settings.captured else (),
        out=Path(),
        train=settings.train,
        lora=settings.lora,
        draft_tokens=settings.draft_tokens,
        draft_input=settings.draft_input,
        detach_main=settings.detach_main,
        batch=BatchSettings(rows=rows, row_tokens=settings.row_tokens),
        remat=settings.remat,
        objective=settings.objective,
        optimizer=settings.optimizer,
    )


def _sizes(step: _Step) -> dict[str, int]:
    """Parameters of each trained leaf."""
    flat = nnx.to_flat_state(step.split.trainable)
    return {leaf_name(path): math.prod(leaf.shape) for path, leaf in flat}

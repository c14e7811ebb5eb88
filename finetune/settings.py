"""Settings of a run: frozen dataclasses, and the checks on them.

The command line (tyro) fills the same dataclasses: defaults < YAML file < command line.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from finetune.data.files.kinds import NAMES
from mtp_model.problems import UserError

TrainMode = Literal["mtp", "all", "lora"]
Part = Literal["mtp", "all"]
"""What learns: the MTP modules, or they and the main model."""
LambdaSchedule = Literal["constant", "linear", "step"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
Kept = Literal["float32", "halves", "bfloat16"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
DataPaths = Annotated[
    tuple[Path, ...],
    tyro.conf.arg(
        help="Files of text, records or tokens, or folders of them, local or gs://, or "
        f"hf://datasets/ORG/NAME: {NAMES}. "
        'A record is {"text"}, or {"messages"} (loss on the assistant\'s turns), '
        '{"prompt", "completion"} or {"instruction", optional "input", "output"} (loss on the '
        'answer only), or {"input_ids", optional "loss_mask" or "labels" with -100 for what is '
        "not learnt}. All of it: docs/data.md."
    ),
]
"""The data of every command: what is taken is said once."""

_LARGEST = 3.4028234663852886e38  # of float32


class SettingsError(UserError):
    """Settings that cannot be used, with every reason."""

    def __init__(self, where: str, faults: list[str]):
        self.faults = faults
        super().__init__("\n  ".join([f"{where}:", *faults]))


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How documents become batches."""

    rows: int = 8
    """Rows in a batch."""
    row_tokens: int = 1024
    """Tokens in a row; short documents share one, longer documents continue in another."""
    accumulation: int = 1
    """Parts that a batch's rows are computed in, one after another: less memory, the same step (lk
    alone looks at each part's own acceptance)."""

    @property
    def rows_at_once(self) -> int:
        """Rows that are computed at a time."""
        return self.rows // self.accumulation


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """What the MTP modules learn: the weight of each objective in the mixture.

    All 0: e2e_tv where the main model is frozen, lk for modules that `new-mtp` made, ce where the
    main model learns too.
    """

    ce: float = 0.0
    """Cross entropy with the text: hard labels, DeepSeek's own."""
    kl: float = 0.0
    """KL divergence from the main model's distribution."""
    tv: float = 0.0
    """Share of drafts that rejection sampling refuses, draft by draft."""
    lk: float = 0.0
    """kl while hardly anything is accepted, then tv: for modules that are trained from nothing."""
    e2e_tv: float = 0.0
    """Share of whole rounds of drafts that rejection sampling refuses."""
    depth_decay: float = 1.0
    """Weight of a depth relative to the one before it (not for e2e_tv, which joins depths)."""

    def weights(self) -> dict[str, float]:
        """The objectives with a weight."""
        values = {name: getattr(self, name) for name in ("ce", "kl", "tv", "lk", "e2e_tv")}
        return {name: value for name, value in values.items() if value}

    def or_default(self, part: Part, new: bool = False) -> "ObjectiveSettings":
        """Itself, or the default for what learns where no objective has a weight.

        new: the MTP modules learnt nothing yet.
        """
        if self.weights():
            return self
        chosen = {"mtp": "lk" if new else "e2e_tv", "all": "ce"}[part]
        return dataclasses.replace(self, **{chosen: 1.0})

    @property
    def compares_distributions(self) -> bool:
        """Whether the main model's distribution is needed, not only the text."""
        return any(name != "ce" for name in self.weights())

    @property
    def joins_depths(self) -> bool:
        """Whether only places are learnt from where every depth has a target."""
        return {*self.weights()} == {"e2e_tv"}


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """With --train lora: narrow matrices beside frozen projections, which they are merged into in
    the end."""

    part: Part = "mtp"
    """Where adapters are: in the MTP modules, or everywhere."""
    rank: int = 16
    """Columns of the matrix A x is made of; an adapter has rank * (in + out) parameters."""
    alpha: float = 32.0
    """What an adapter adds is multiplied by alpha / rank."""
    projections: tuple[str, ...] = ()
    """Those that get an adapter, by the end of their names: o_proj, gate_proj, eh_proj,
    shared_experts.up_proj; default: all, each routed expert's too."""
    keep: bool = False
    """Keep the adapters by themselves too, in OUT/adapters: `convert-deepseek export` writes them
    as PEFT does."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """An optimizer with linear warm-up, a learning rate that falls, and gradient clipping."""

    name: Literal["adamw", "muon", "adafactor"] = "adamw"
    """adamw; muon for projections, with one mean each, and adamw for all else; adafactor, which
    keeps of a matrix's squared gradient the means of its rows and columns. All with the learning
    rate of adamw."""
    learning_rate: float = 5e-5
    """Highest learning rate, reached after warm-up."""
    schedule: Schedule = "cosine"
    """How it goes from there to that of the last step: by a cosine, by a line, not at all
    (constant), or by a line over the last fifth of the steps after warm-up (wsd: warm-up, stable,
    decay)."""
    warmup_fraction: float = 0.05
    """Part of the steps in which the learning rate rises from 0."""
    final_fraction: float = 0.1
    """Learning rate of the last step, as a part of the highest."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; norms have none."""
    weight_decay_of: tuple[str, ...] = ()
    """Another weight decay for some weights, by the end of their names: embed_tokens=0
    experts.down_proj=0.1"""
    ema: float = 0.0
    """Keep a mean of what is trained, which is measured and is the result: from step to step it
    keeps this part of itself (0.999, say; less in the first steps). 0: the last step's weights."""
    beta1: float = 0.9
    """Decay of the mean of the gradient, a step (of muon too)."""
    beta2: float = 0.95
    """Decay of the mean of the squared gradient, a step."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Gradients longer than this (global norm) are scaled down to it."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the two means are kept between steps; bfloat16 is half the memory."""
    parameters: Kept = "float32"
    """How trained projections are kept: float32; halves, the same numbers as the bfloat16 that a
    step computes with, and what is missing from float32 beside it; bfloat16 alone, in which steps
    that are smaller than its rounding are lost."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Measurements on held-out text: at the start, every N steps, and at the end."""

    every: int = 100
    """Steps between evaluations."""
    rows: int = 64
    """Rows of held-out text in one evaluation, at most (always the same rows)."""
    holdout_every: int = 20
    """Without --eval-data, one document in this many is held out; 0 trains without evaluation."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """What a killed run continues from."""

    every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints of every so many steps are kept for good; 0: of none."""


@dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """Devices along each axis of the mesh. An axis that is 0 is chosen, so that all are used.

    On CPU one device is used unless more are asked for.
    """

    data: int = 0
    """Parts of the batch; each has a copy of what the other axes do not split."""
    fsdp: int = 0
    """Parts of the batch, and of stored weights, which are gathered for use."""
    expert: int = 0
    """Parts of the batch, and of the routed experts; tokens travel to their experts."""
    tensor: int = 0
    """Parts of heads, feed-forward width and vocabulary."""


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """The processes that run this command together, one on each host, all with the same command.

    Found in the environment where there is one: TPU hosts on GCE and GKE, SLURM, Open MPI.
    """

    coordinator: str | None = None
    """Address of the first process, HOST:PORT."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Which this one is, from 0."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything that decides what a run computes; saved as RUN/config.yaml."""

    checkpoint: str
    """Checkpoint directory, as `convert-deepseek import` writes it; local or gs://bucket/folder."""
    data: DataPaths = ()
    data_weights: tuple[float, ...] = ()
    """Share of the tokens that each path of --data, or folder of --states, gives, as `3 1`: a
    number for each. Without it all documents are read equally often."""
    states: tuple[Path, ...] = ()
    """Instead of --data: folders of hidden states that `capture` or vLLM wrote. No main model is
    loaded then, and the checkpoint may be of --scope mtp; --eval-data names such folders too."""
    skip_unusable: bool = False
    """Leave out, and name, captured samples that are damaged, cut short or of another model."""
    out: Path
    """Run directory, local or gs://; an unfinished run in it is continued."""
    train: TrainMode = "mtp"
    """What is trained: the MTP modules with the main model frozen, everything, or adapters of
    frozen weights (lora)."""
    steps: int = 1000
    """Optimizer steps. More than before lengthen a run, also a finished one; the learning rate
    follows the new number from there on."""
    eval_data: tuple[Path, ...] = ()
    """Held-out text, in the same forms as --data."""
    mtp_lambda: float = 0.1
    """Where the main model learns, the loss is main + lambda * what the MTP modules learn."""
    mtp_lambda_schedule: LambdaSchedule = "constant"
    """How lambda goes from --mtp-lambda to --mtp-lambda-end: not at all, linearly, or in one step
    after two thirds of the steps (DeepSeek-V3: 0.3, then 0.1)."""
    mtp_lambda_end: float = 0.1
    """Lambda of the last step, unless it is constant."""
    detach_main: bool = False
    """Where the main model learns, what the MTP modules learn moves them alone: the main model, its
    embedding and its head learn from the main loss only."""
    draft_tokens: int = 0
    """MTP depths that are trained and measured; more than there are modules reuse them as a decoder
    does. 0: as many as there are modules."""
    draft_input: Literal["text", "own"] = "text"
    """Tokens that the depths from 2 on are fed while they learn: the text's, or own: those that the
    depth before them finds likeliest."""
    router_bias_rate: float = 1e-3
    """Router biases of trained layers move by this much a step towards balanced experts."""
    seed: int = 0
    """Decides the order of the documents."""
    compute_dtype: ComputeDtype = "auto"
    """Precision of activations; auto is float32 on CPU and bfloat16 elsewhere."""
    remat: Literal["auto", "layer", "none"] = "auto"
    """What the backward pass computes again instead of keeping it: layer, what is inside each, or
    none; auto is none where a device keeps about 4 GiB or less, if it is a CPU or learns from
    captured states, else layer."""
    batch: BatchSettings = field(default_factory=BatchSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)

    @property
    def scope(self) -> Literal["all", "mtp"]:
        """The part of the model that is loaded."""
        return "mtp" if self.states else "all"

    @property
    def part(self) -> Part:
        """What learns."""
        return part_of(self.train, self.lora)


def part_of(train: TrainMode, lora: LoraSettings) -> Part:
    """What learns in a mode of training."""
    return lora.part if train == "lora" else train


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, in the order of declaration."""
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if dataclasses.is_dataclass(value):
            found |= flat(value, f"{prefix}{entry.name}.")
        else:
            found[prefix + entry.name] = value
    return found


def option(name: str) -> str:
    """The command line option of a setting: optimizer.clip_norm -> --optimizer.clip-norm."""
    return "--" + name.replace("_", "-")


def too_small(settings: Any, least: Mapping[str, float]) -> list[str]:
    """What is wrong with numbers that must be finite, and not less than these; None is none."""
    infinite = not_finite(settings)
    return [*infinite.values()] + [
        f"{option(name)} is {value}, needed {minimum} or more"
        for name, minimum in least.items()
        if name not in infinite
        and (value := getattr(settings, name)) is not None
        and not value >= minimum
    ]


def is_finite(value: float) -> bool:
    """Whether a number is one in float32, which a run computes with: no nan, not infinite."""
    return abs(value) <= _LARGEST


def not_finite(settings: Any) -> dict[str, str]:
    """What is wrong with numbers that are nan or infinite, by dotted name."""
    return {
        name: f"{option(name)} is {value}, needed a finite number (of float32)"
        for name, value in flat(settings).items()
        if isinstance(value, float) and not is_finite(value)
    }


def weight_faults(
    weights: tuple[float, ...], paths: tuple[Path, ...], of: str = "paths of --data"
) -> list[str]:
    """What is wrong with --data-weights beside these paths of --data."""
    faults = []
    if weights and len(weights) != len(paths):
        found = f"--data-weights has {len(weights)} numbers"
        faults.append(f"{found}, needed one for each of the {len(paths)} {of}")
    wrong = [weight for weight in weights if not (weight > 0 and is_finite(weight))]
    if wrong:
        faults.append(f"--data-weights has {wrong[0]}, needed numbers of more than 0")
    return faults


def blank() -> RunSettings:
    """Defaults, with what only the user can say marked as missing (for tyro)."""
    missing: Any = tyro.MISSING
    return RunSettings(checkpoint=missing, out=missing)

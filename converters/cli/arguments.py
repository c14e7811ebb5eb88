"""The commands of `convert-deepseek` and their options, as the command line gives them."""

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg, subcommand

PROG = "convert-deepseek"
_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SHARE = re.compile(r"(\d{1,6})/(\d{1,6})", re.ASCII)

_Src = Annotated[
    Positional[str],
    arg(
        metavar="SRC",
        help="safetensors checkpoint: a local folder, gs://bucket/folder, or org/name[@revision]",
    ),
]
_Dst = Annotated[
    Positional[str], arg(metavar="DST", help="folder to write, local or gs://bucket/folder")
]
_Ckpt = Annotated[
    Positional[str], arg(metavar="CKPT", help="checkpoint directory, local or gs://bucket/folder")
]
_Workers = Annotated[int, arg(metavar="N", help="threads; memory grows with their number")]
_Axis = Annotated[int | None, arg(metavar="N")]
_Json = Annotated[bool, arg(help="print JSON instead of tables")]
_FollowLinks = Annotated[
    bool, arg(help="read what symbolic links of SRC and SRC2 lead to, also out of the folder")
]
_MTP_FROM = (
    "take the MTP module from here, not from SRC: any kind of SRC, or a checkpoint directory. It "
    "becomes mtp.safetensors, in SRC's format, with SRC's embedding and head (--copies main)"
)
_MTP_FROM_AGAIN = "what import took the MTP module from"
_MtpFrom = Annotated[str | None, arg(metavar="SRC2", help=_MTP_FROM_AGAIN)]
_BASE = (
    "what CKPT was imported from, unchanged: only files that hold changed tensors are written, the "
    "others are hard links, reflinks or copies of SRC's (never write into a linked file), within "
    "gs:// copies that move no bytes. SRC also "
    "gives the tensors that CKPT of --scope mtp or main does not hold"
)
_NO_VERIFY = (
    "do not check what was written: headers, config and copies, that only trained weights changed, "
    "and logits on a few layers (on all of a small model)"
)
_PUSH = (
    "then upload DST to this model on the Hub, made private where there is none; the token comes "
    "from HF_TOKEN or `hf auth login`"
)
_ACCEPTANCE = (
    "for the model card of --push: what `finetune-deepseek evaluate --json` printed of CKPT, any "
    "number of files; NAME=FILE names the domain"
)


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what a checkpoint is and whether it can be imported, from its headers and config.json."""

    src: _Src
    follow_links: _FollowLinks = False
    json: _Json = False


@dataclass(frozen=True, kw_only=True)
class Import:
    """Turn a safetensors checkpoint into a checkpoint directory; run again to continue."""

    src: _Src
    dst: _Dst
    scope: Literal["all", "main", "mtp"] = "all"
    """main: without MTP modules; mtp: only these, embedding, norm and head; see export --base"""
    mtp_from: Annotated[str | None, arg(metavar="SRC2", help=_MTP_FROM)] = None
    dtype: Literal["keep", "bf16", "f32"] = "keep"
    """of the weights; keep: as in SRC, FP8 included"""
    copies: Literal["check", "main"] = "check"
    """MTP copies of embedding and head that differ from them; check: an error, main: ignored"""
    mtp_hidden_state: Literal["config", "post_norm", "pre_norm"] = "config"
    """what MTP depth 1 is fed; config: as config.json says, post_norm if it does not"""
    workers: _Workers = 3
    worker: Annotated[str, arg(metavar="I/N")] = "1/1"
    """do the I-th of N shares, for N processes or hosts with one DST; the last finishes it"""
    overwrite: bool = False
    """replace the checkpoint directory that DST holds"""
    follow_links: _FollowLinks = False
    json: _Json = False

    @property
    def share(self) -> tuple[int, int] | None:
        """--worker as (I - 1, N); None where it is no share."""
        match = _SHARE.fullmatch(self.worker)
        number, count = (int(match[1]), int(match[2])) if match else (0, 0)
        return (number - 1, count) if 1 <= number <= count else None


@dataclass(frozen=True, kw_only=True)
class Export:
    """Turn a checkpoint directory into its source's safetensors files; run again to continue."""

    ckpt: _Ckpt
    dst: _Dst
    dtype: Literal["keep", "bf16"] = "keep"
    """of the weights; keep: as in the source, what was trained quantised again; bf16: no FP8"""
    draft: Literal["vllm", "sglang"] | None = None
    """only the MTP module and a config.json, as this engine loads a draft beside the main model"""
    base: Annotated[str | None, arg(metavar="SRC", help=_BASE)] = None
    mtp_from: _MtpFrom = None
    push: Annotated[str | None, arg(metavar="ORG/NAME", help=_PUSH)] = None
    acceptance: Annotated[tuple[str, ...], arg(metavar="FILE", help=_ACCEPTANCE)] = ()
    verify: Annotated[bool, arg(help=_NO_VERIFY)] = True
    workers: _Workers = 3
    overwrite: bool = False
    """replace the safetensors checkpoint that DST holds"""
    follow_links: _FollowLinks = False
    json: _Json = False


@dataclass(frozen=True, kw_only=True)
class Axes:
    """For --logits: devices that hold the whole checkpoint, as in finetune-deepseek. Without any, a
    mesh of all GPUs or TPUs is chosen if the model fits; all 1: one device, a layer at a time."""

    data: _Axis = None
    """parts of the batch"""
    fsdp: _Axis = None
    """parts of the batch, and of stored weights"""
    expert: _Axis = None
    """parts of the batch, and of the routed experts"""
    tensor: _Axis = None
    """parts of heads, feed-forward width and vocabulary"""

    @property
    def asked(self) -> dict[str, int]:
        """The axes that are given."""
        return {name: size for name, size in asdict(self).items() if size is not None}


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Prove that exporting CKPT gives SRC's tensors byte for byte; CKPT alone: its digests.

    Of any two checkpoints (of either kind, or drafts): what differs; 0 if nothing does.
    """

    src: Annotated[
        Positional[str],
        arg(
            metavar="SRC|CKPT", help="any checkpoint to compare with; a checkpoint directory alone"
        ),
    ]
    ckpt: Annotated[
        Positional[str | None], arg(metavar="[CKPT|SRC]", help="the other: of either kind")
    ] = None
    scope: Literal["all", "main", "mtp"] = "all"
    """what is compared, of what both hold"""
    mtp_from: _MtpFrom = None
    logits: bool = False
    """compare float32 logits with a torch reference on SRC, a layer in memory; needs torch"""
    text: Annotated[str | None, arg(metavar="TEXT")] = None
    """for --logits: compare on this text by SRC's tokenizer, instead of built-in tokens"""
    mesh: Axes = field(default_factory=Axes)
    report: Annotated[str | None, arg(metavar="DIR")] = None
    """write report.json, .md and .html there; --logits goes on where it was stopped"""
    workers: _Workers = 3
    follow_links: _FollowLinks = False
    json: _Json = False

    @property
    def needs_source(self) -> bool:
        return self.logits or self.scope != "all" or self.mtp_from is not None


@dataclass(frozen=True, kw_only=True)
class NewMtp:
    """Make MTP modules for a checkpoint that lacks them, to import with --mtp-from and train."""

    src: _Src
    dst: Annotated[
        Positional[str], arg(metavar="DRAFT", help="folder to write: mtp.safetensors, config.json")
    ]
    modules: Annotated[int, arg(metavar="N")] = 1
    """MTP modules in all; new ones begin as copies of the first, else of the last main layer"""
    overwrite: Annotated[bool, arg(help="replace the module that DRAFT holds")] = False
    follow_links: _FollowLinks = False
    json: _Json = False


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Say which convention an MTP module was trained with, by its loss on text; needs torch."""

    src: Annotated[
        Positional[str], arg(metavar="SRC|CKPT", help="safetensors or a checkpoint directory")
    ]
    data: Annotated[str, arg(metavar="PATH")]
    """a UTF-8 text as the model was trained on; its first 1,024 tokens are used"""
    report: Annotated[str | None, arg(metavar="DIR")] = None
    """write report.json, .md and .html there; a probe that was stopped goes on there"""
    follow_links: _FollowLinks = False
    json: _Json = False


Command = Inspect | Import | Export | Verify | NewMtp | Probe


def parse(argv: Sequence[str]) -> Command:
    """The command that the arguments stand for; exits with 2 where they stand for none."""
    command = tyro.cli(
        Annotated[Inspect, subcommand("inspect")]
        | Annotated[Import, subcommand("import")]
        | Annotated[Export, subcommand("export")]
        | Annotated[Verify, subcommand("verify")]
        | Annotated[NewMtp, subcommand("new-mtp")]
        | Annotated[Probe, subcommand("probe")],
        prog=PROG,
        description=f"Convert DeepSeek-V3-family checkpoints. `{PROG} --version`: its version.",
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    from mtp_model.commands import repeated  # which imports jax: --help need not wait for it

    several = (
        "--" + entry.name.replace("_", "-")
        for entry in fields(command)
        if isinstance(getattr(command, entry.name), tuple)
    )
    fault = "; ".join(repeated(several, argv)) or _usage_fault(command)
    if fault:
        print(f"{PROG}: {fault}", file=sys.stderr)
        raise SystemExit(2)
    return command


def _usage_fault(command: Command) -> str | None:
    if getattr(command, "workers", 1) < 1:
        return "--workers needs to be 1 or more"
    if isinstance(command, NewMtp) and command.modules < 1:
        return f"--modules is {command.modules}, needed 1 or more"
    if isinstance(command, Import) and not command.share:
        return f"--worker {command.worker} is no share; needed I/N with I from 1 to N, as 2/4"
    if isinstance(command, Import) and command.mtp_from is not None and command.scope == "main":
        return "--mtp-from gives an MTP module, --scope main leaves it out; leave out one of them"
    if isinstance(command, Export):
        return _export_fault(command)
    if isinstance(command, Verify) and not command.ckpt and command.needs_source:
        return "--logits, --scope and --mtp-from compare with a source: verify SRC CKPT"
    if isinstance(command, Verify) and command.text is not None and not command.logits:
        return "--text is what --logits compares on: needed both, or neither"
    if isinstance(command, Verify) and (fault := _mesh_fault(command)):
        return fault
    return None


def _mesh_fault(command: Verify) -> str | None:
    axes = command.mesh.asked
    if wrong := next((name for name, size in axes.items() if size < 1), None):
        return f"--mesh.{wrong} is {axes[wrong]}, needed 1 or more"
    if axes and not command.logits:
        return "--mesh is what --logits runs on: needed both, or neither"
    return None


def _export_fault(command: Export) -> str | None:
    if command.mtp_from is not None and not command.base:
        return "--mtp-from belongs to --base SRC, as at import; leave it out, or name both"
    if command.base and command.dtype != "keep":
        return f"--base keeps files as they are; with --dtype {command.dtype} none would be"
    if command.draft and command.base:
        return "--base completes a whole checkpoint, --draft writes a module alone; leave out one"
    if command.acceptance and command.push is None:
        return "--acceptance is for the model card of --push; name both, or leave it out"
    if command.push is not None and not _MODEL.fullmatch(command.push):
        return f"--push {command.push} is no model on the Hub; needed ORG/NAME"
    if command.push is not None and command.dst.startswith("gs://"):
        return f"--push uploads a folder of this machine, not {command.dst}"
    return None

"""What `export` proves of the checkpoint that it has just written, before anybody trusts it.

Storage is proved from what export knows (digests of every tensor as it was written and read back)
and from the headers that are there now; tensors are read again only where a copy and its original
both changed. Logits are compared on every layer of a small model, and on a few of a large one.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from converters.exporting.as_source import DirectorySource
from converters.exporting.result import ExportSummary
from converters.format.fit import fit
from converters.format.header import DTYPES
from converters.format.listing import SourceCheckpoint, open_safetensors
from converters.format.mapping import SCALE_SUFFIX, Slot, layer_of, slots
from converters.format.mtp_from import find_module
from converters.sources.open import open_source
from converters.verifying.compare import Side, compare, open_side
from converters.verifying.logits.check import (
    SEED,
    LogitsCheck,
    check_logits,
    memory_needed,
    trained_leaves,
)
from mtp_model.checkpoint.directory import PROVENANCE, Checkpoint, CheckpointError, open_checkpoint
from mtp_model.files.memory import available_bytes
from mtp_model.files.place import digest
from mtp_model.problems import Problem, ProblemsError, UserError
from mtp_model.progress import OnProgress
from mtp_model.reporting import human_bytes

SMALL_BYTES = 2_000_000_000  # of tensors: up to here all layers are run
_PIECE_BYTES = 16 << 20
_MTP = "mtp."
_COPIES = (".embed_tokens.weight", ".shared_head.head.weight")  # in a module


@dataclass(frozen=True, kw_only=True)
class ExportCheck:
    """What was looked at and found.

    values: numbers in all tensors, scales among them. copies: tensors of MTP modules that repeat
    the main model's. main_changed, mtp_changed: how many tensors have other bytes than the source;
    None with another dtype, where all have. rounded: of the main model's, those that only the
    import's --dtype changed. logits_left_out: why they were not compared.
    """

    tensors: int
    values: int
    copies: int
    main_changed: int | None
    mtp_changed: int | None
    mtp_tensors: int
    rounded: int
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]
    logits: LogitsCheck | None = None
    logits_left_out: str | None = None

    @property
    def holds(self) -> bool:
        """Whether storage does, and every layer by itself: rounding adds up over many layers."""
        return not self.problems and (self.logits is None or self.logits.first_wrong is None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {**dataclasses.asdict(self), "holds": self.holds}


def check_export(
    checkpoint: Checkpoint,
    summary: ExportSummary,
    *,
    keeps_dtypes: bool,
    progress: OnProgress | None = None,
) -> ExportCheck:
    """Check what `summary` says was written of `checkpoint`; what is wrong is in the result.

    keeps_dtypes: whether it was written in the source's dtypes. progress: told layers of logits.
    """
    try:
        written = open_safetensors(open_source(str(summary.path)))
    except ProblemsError as error:
        return _unreadable(error)
    storage = _checked_storage(checkpoint, summary, written, keeps_dtypes=keeps_dtypes)
    if storage.problems:
        return dataclasses.replace(storage, logits_left_out="storage is wrong already")
    logits, why_not = _logits(checkpoint, written, progress)
    warnings = storage.warnings
    if logits and logits.first_wrong:
        again, _ = _logits(checkpoint, written, progress, seed=SEED + 1)
        if again and again.first_wrong is None:
            warnings = (*warnings, _of_a_tie(logits))
            logits = again
    return dataclasses.replace(
        storage, logits=logits, logits_left_out=why_not, warnings=tuple(warnings)
    )


def check_draft(
    checkpoint: Checkpoint, summary: ExportSummary, *, keeps_dtypes: bool, workers: int
) -> ExportCheck:
    """Check an MTP module that was written alone, as whoever takes it in would read it.

    keeps_dtypes: then its bytes are compared with those of the whole export; else names, shapes
    and what was read back while it was written have to do.
    """
    try:
        source = open_source(str(summary.path))
        module = find_module(source)
        problems = (
            [*_draft_problems(open_side(source), checkpoint, workers)] if keeps_dtypes else []
        )
    except ProblemsError as error:
        return _unreadable(error)
    copies = [name for name in module.tensors if name.endswith(_COPIES)]
    return ExportCheck(
        tensors=len(module.tensors),
        values=sum(math.prod(tensor.shape) for tensor in module.tensors.values()),
        copies=len(copies),
        main_changed=None,
        mtp_changed=len(summary.changed) if keeps_dtypes else None,
        mtp_tensors=len(module.tensors) - len(copies),
        rounded=0,
        problems=tuple(problems),
        warnings=(),
        logits_left_out="a module alone has none; those of the whole export are",
    )


def _draft_problems(draft: Side, checkpoint: Checkpoint, workers: int) -> Iterator[Problem]:
    """Where it is not what the whole export writes; copies may be left out."""
    found = compare(draft, open_side(DirectorySource(checkpoint)), workers=workers)
    if found.holds:
        return
    for tensor in found.differences:
        yield Problem("draft", tensor.name, "has other values than the whole export writes")
    for name in (*found.only_in_a, *found.only_in_b):
        yield Problem("draft", name, "is in only one of the draft and the whole export")


def _of_a_tie(logits: LogitsCheck) -> str:
    """What is said where a layer differed on some tokens, and none does on others."""
    layer = next(layer for layer in logits.layers if layer.name == logits.first_wrong)
    return (
        f"on the first tokens that were tried {layer.name} differed by {layer.alone:.1e}, on "
        "others nothing does: as where two experts' scores are so close that rounding decides"
    )


def _unreadable(error: ProblemsError) -> ExportCheck:
    return ExportCheck(
        tensors=0,
        values=0,
        copies=0,
        main_changed=None,
        mtp_changed=None,
        mtp_tensors=0,
        rounded=0,
        problems=tuple(error.problems),
        warnings=(),
        logits_left_out="storage is wrong already",
    )


def _checked_storage(
    checkpoint: Checkpoint,
    summary: ExportSummary,
    written: SourceCheckpoint,
    *,
    keeps_dtypes: bool,
) -> ExportCheck:
    table = slots(checkpoint.config)
    changed = [table[name] for name in summary.changed if name in table]
    copies = {n: table[n] for n in written.tensors if n in table and table[n].copy_of}
    end = checkpoint.config.num_hidden_layers
    modules = {n for n in written.tensors if (layer_of(n) or 0) >= end and n not in copies}
    main = [slot for slot in changed if slot.name not in modules and not slot.copy_of]
    trained = trained_leaves(checkpoint)
    rounded = [s for s in main if s.path not in trained and _is_other_dtype(s, checkpoint, written)]
    mtp_changed = sum(slot.name in modules for slot in changed)
    problems = [
        *fit(written, written.config, scope=checkpoint.provenance["scope"]).problems,
        *(_header_problems(checkpoint, written) if keeps_dtypes else ()),
        *_unasked(main, {slot.name for slot in rounded}, checkpoint),
        *_copy_problems(copies, set(summary.changed), checkpoint, written, keeps_dtypes),
    ]
    warnings = _unchanged_module(checkpoint, trained, mtp_changed) if keeps_dtypes else ()
    return ExportCheck(
        tensors=len(written.tensors),
        values=sum(math.prod(tensor.shape) for tensor in written.tensors.values()),
        copies=len(copies),
        main_changed=len(main) if keeps_dtypes else None,
        mtp_changed=mtp_changed if keeps_dtypes else None,
        mtp_tensors=len(modules),
        rounded=len(rounded),
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


def _is_other_dtype(slot: Slot, checkpoint: Checkpoint, written: SourceCheckpoint) -> bool:
    """Whether a weight, or that of these scales, is kept in another dtype than it is written in."""
    leaf = checkpoint.leaves.get(slot.path.removesuffix(SCALE_SUFFIX))
    tensor = written.tensors.get(slot.name.removesuffix(SCALE_SUFFIX))
    return leaf is not None and tensor is not None and leaf.dtype != DTYPES[tensor.dtype]


def _header_problems(checkpoint: Checkpoint, written: SourceCheckpoint) -> Iterator[Problem]:
    """Files that lie there with another header than the source's."""
    records: Mapping[str, Any] = checkpoint.provenance["source"]["files"]
    for file in sorted(records.keys() | written.headers.keys()):
        if file not in written.headers or file not in records:
            detail = "is not there" if file in records else "is no file of the source"
            yield Problem("file", file, detail)
        elif digest(written.headers[file].raw) != records[file]["header"]:
            yield Problem("header", file, "is not the source's; something wrote there meanwhile")


def _unasked(main: list[Slot], rounded: set[str], checkpoint: Checkpoint) -> Iterator[Problem]:
    """Tensors of the main model that have other bytes, and no training is to have changed them."""
    trained = trained_leaves(checkpoint)
    derived = checkpoint.provenance.get("derived", ())
    modes = {record.get("settings", {}).get("train") for record in derived}
    for slot in main:
        is_trained = slot.path.removesuffix(SCALE_SUFFIX) in trained  # a weight with its scales
        if not is_trained and slot.name not in rounded:
            yield Problem(
                "changed", slot.name, "has other bytes than the source; nobody trained it"
            )
        elif is_trained and modes == {"mtp"}:
            detail = "was changed by a run with --train mtp, which leaves the main model as it is"
            yield Problem("changed", slot.name, detail)


def _copy_problems(
    copies: Mapping[str, Slot],
    changed: set[str],
    checkpoint: Checkpoint,
    written: SourceCheckpoint,
    keeps_dtypes: bool,
) -> Iterator[Problem]:
    """Copies that are neither the source's beside an original that is, nor the original's bytes."""
    stale = set(checkpoint.provenance["stale_copies"])
    for name, slot in copies.items():
        assert slot.copy_of
        is_source = keeps_dtypes and not {name, slot.copy_of} & changed
        if (is_source and name not in stale) or _same_bytes(name, slot.copy_of, written):
            continue
        detail = f"is to repeat {slot.copy_of}, and has other bytes"
        yield Problem("copy", name, f"{detail}; export again, with --overwrite")


def _same_bytes(a: str, b: str, written: SourceCheckpoint) -> bool:
    ours, theirs = written.tensors[a], written.tensors[b]
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    for begin in range(0, ours.nbytes, _PIECE_BYTES):
        size = min(_PIECE_BYTES, ours.nbytes - begin)
        pieces = np.empty((2, size), np.uint8)
        for tensor, piece in zip((ours, theirs), pieces, strict=True):
            written.source.read_into(tensor.file, tensor.begin + begin, piece)
        if not np.array_equal(pieces[0], pieces[1]):
            return False
    return True


def _unchanged_module(
    checkpoint: Checkpoint, trained: frozenset[str], mtp_changed: int
) -> Iterator[str]:
    """A warning where MTP modules were trained, and are still those that training began with."""
    of_modules = [path for path in trained if path.startswith(_MTP)]
    if not of_modules:
        return
    why = "the learning rate was 0, or too small for the dtype that the module is stored in"
    if not mtp_changed:
        yield f"the MTP module was trained, and every byte of it is the source's: {why}"
    elif _is_as_its_base(checkpoint, of_modules):
        base = checkpoint.provenance["derived"][-1]["base"]["path"]
        yield f"the MTP module was trained, and every byte of it is that of {base}: {why}"


def _is_as_its_base(checkpoint: Checkpoint, leaves: list[str]) -> bool:
    """Whether the last training left all these leaves as they were, if its base is still there."""
    base = checkpoint.provenance["derived"][-1]["base"]
    try:
        found = open_checkpoint(base["path"])
        if (found.path / PROVENANCE).digest() != base.get("provenance"):
            return False
    except (CheckpointError, OSError, KeyError):
        return False
    ours, theirs = (side.provenance["pieces"] for side in (checkpoint, found))
    return all(ours[path] == theirs.get(path) for path in leaves)


def _logits(
    checkpoint: Checkpoint,
    written: SourceCheckpoint,
    progress: OnProgress | None,
    seed: int = SEED,
) -> tuple[LogitsCheck | None, str | None]:
    """The comparison, on all layers or some; or why there is none."""
    if written.source.is_far:
        detail = "is not on this machine; on one that has a copy run"
        return None, f"{written.source.name} {detail} `convert-deepseek verify COPY CKPT --logits`"
    needed, free = memory_needed(checkpoint.config), available_bytes()
    if free and needed > free:
        return None, f"they need {human_bytes(needed)} of memory, {human_bytes(free)} are free"
    nbytes = sum(tensor.nbytes for tensor in written.tensors.values())
    try:
        spot = nbytes > SMALL_BYTES
        return check_logits(written, checkpoint, spot=spot, seed=seed, progress=progress), None
    except UserError as error:
        return None, str(error)

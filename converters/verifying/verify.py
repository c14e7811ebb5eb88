"""Whether a checkpoint directory would export to a source's bytes; must not print.

It writes nothing but what it fetches from a source that is far: to a temporary folder, which the
TMPDIR of the environment places, at most a few of the source's files at once.

Every tensor of the source is compared with what export writes for it, so this holds for any import
(FP8 kept, bfloat16, float32) and for exports of trained weights that were quantised again.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from converters.exporting.encode import Encoder
from converters.exporting.plan import origin
from converters.format.fit import sound_fit
from converters.format.listing import Listing, SourceCheckpoint
from converters.format.mapping import GROUPS, Slot, group_of
from converters.sources.source import Source
from converters.verifying.digests import DEFAULT_WORKERS, DigestCheck
from converters.verifying.fetched import fetched_ahead
from converters.verifying.files import differing_files, plan_of_source
from converters.verifying.logits.check import LogitsCheck
from converters.verifying.tensors import Difference, TensorComparer
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.config import ModelConfig
from mtp_model.model import Scope
from mtp_model.problems import Problem, raise_if_any
from mtp_model.progress import OnProgress
from mtp_model.threads import in_threads

# What the same network may be stored with in one place and without in the other.
STORAGE_FIELDS = frozenset(
    {"dtype", "weight_block_size", "power_of_two_scales", "mtp_hidden_state"}
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A group of tensors. `differing` leaves out copies that are replaced on purpose."""

    tensors: int
    bytes: int
    differing: int
    differing_bytes: int
    worst: float


@dataclass(frozen=True, kw_only=True)
class StorageCheck:
    """The source's tensors against the checkpoint directory's, group by group; and its files."""

    scope: Scope
    parts: dict[str, Part]
    differences: tuple[Difference, ...]
    """In the source's order."""
    files: tuple[Problem, ...]
    """Headers, side files and whole files that export would write otherwise."""

    @property
    def holds(self) -> bool:
        """Whether export would write every byte of the source, copies that it replaces aside."""
        return not self.files and all(difference.replaced for difference in self.differences)

    @property
    def total(self) -> Part:
        """All parts together."""
        parts = self.parts.values()
        return Part(
            tensors=sum(part.tensors for part in parts),
            bytes=sum(part.bytes for part in parts),
            differing=sum(part.differing for part in parts),
            differing_bytes=sum(part.differing_bytes for part in parts),
            worst=max((part.worst for part in parts), default=0.0),
        )


@dataclass(frozen=True, kw_only=True)
class Verification:
    """All that one `verify` looked at; what was not asked is None."""

    source: str | None
    checkpoint: str
    digests: DigestCheck
    storage: StorageCheck | None
    logits: LogitsCheck | None

    @property
    def holds(self) -> bool:
        """Whether all that was asked holds; nothing more is looked at where digests do not."""
        parts = (self.digests, self.storage, self.logits)
        return all(part is None or part.holds for part in parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json and report.json."""
        return {**dataclasses.asdict(self), "holds": self.holds}


def check_storage(
    source: SourceCheckpoint,
    checkpoint: Checkpoint,
    *,
    scope: Scope = "all",
    workers: int = DEFAULT_WORKERS,
    progress: OnProgress | None = None,
) -> StorageCheck:
    """Compare all files, and tensor by tensor, `workers` at once, a few pieces of rows in memory.

    scope: what is compared, of what the checkpoint holds.
    Raises ProblemsError for a source that is unfit or another network than the checkpoint,
    CheckpointError where the disk of temporary files has no room for what a far source needs.
    """
    config, tensors = _comparable(source, checkpoint, scope)
    plan = plan_of_source(source, checkpoint)
    dtypes = {name: source.tensors[name].dtype for name in tensors}
    encoder = Encoder(checkpoint, plan.slots, dtypes)
    stale = frozenset(checkpoint.provenance["stale_copies"])
    comparer = TensorComparer(source, config, tensors, encoder, stale)
    slots = [slot for slot in tensors.values() if slot.name not in comparer.scales]
    slots.sort(key=lambda slot: comparer.place(slot.name))
    differences = _differences(source.source, comparer, slots, workers, progress)
    return StorageCheck(
        scope=scope,
        parts=_parts(source, tensors, differences),
        differences=tuple(differences),
        files=differing_files(source, checkpoint, plan),
    )


def _differences(
    source: Source,
    comparer: TensorComparer,
    slots: list[Slot],
    workers: int,
    progress: OnProgress | None,
) -> list[Difference]:
    """Of these tensors and their scales, in the source's order."""
    total, done = sum(map(comparer.nbytes, slots)), 0
    found: list[Difference] = []
    with fetched_ahead(source, {slot.name: comparer.reads(slot) for slot in slots}) as finish:

        def compare_one(slot: Slot) -> tuple[int, list[Difference]]:
            differences = comparer.differences(slot)
            finish(slot.name)
            return comparer.nbytes(slot), differences

        with closing(in_threads(compare_one, slots, workers)) as compared:
            for nbytes, differences in compared:
                found += differences
                done += nbytes
                if progress:
                    progress(done, total)
    return sorted(found, key=lambda difference: comparer.place(difference.name))


def _comparable(
    source: SourceCheckpoint, checkpoint: Checkpoint, scope: Scope
) -> tuple[ModelConfig, Mapping[str, Slot]]:
    """The source's side of what both have; ProblemsError where there is nothing to compare."""
    held: Scope = checkpoint.provenance["scope"]
    config, slots, _ = sound_fit(source, held if scope == "all" else scope)
    where = f"{source.source.name} for {checkpoint.path}"
    if "mtp_source" in checkpoint.provenance and source.taken is None:
        where += f", which was imported from {origin(checkpoint)}"
    raise_if_any(where, _other_network(config, checkpoint.config))
    if scope not in ("all", held) and held != "all":
        detail = f"was imported with --scope {held}; it cannot be verified with --scope {scope}"
        raise_if_any(str(checkpoint.path), [Problem("scope", "the checkpoint", detail)])
    return config, slots


def _other_network(source: ModelConfig, checkpoint: ModelConfig) -> Iterator[Problem]:
    theirs, ours = dataclasses.asdict(source), dataclasses.asdict(checkpoint)
    for key in theirs.keys() - STORAGE_FIELDS:
        if theirs[key] != ours[key]:
            yield Problem("config", key, f"is {theirs[key]}, the checkpoint's is {ours[key]}")
    blocks = source.weight_block_size, checkpoint.weight_block_size
    if None not in blocks and blocks[0] != blocks[1]:
        detail = f"is {blocks[0]}, the checkpoint's is {blocks[1]}"
        yield Problem("config", "weight_block_size", detail)


def _parts(
    listing: Listing, slots: Mapping[str, Slot], differences: list[Difference]
) -> dict[str, Part]:
    members: dict[str, list[int]] = {}
    for slot in slots.values():
        members.setdefault(group_of(slot), []).append(listing.tensors[slot.name].nbytes)
    parts = {}
    for group in (group for group in GROUPS if group in members):
        wrong = [d for d in differences if d.group == group and not d.replaced]
        parts[group] = Part(
            tensors=len(members[group]),
            bytes=sum(members[group]),
            differing=len(wrong),
            differing_bytes=sum(difference.bytes for difference in wrong),
            worst=max((difference.worst for difference in wrong), default=0.0),
        )
    return parts

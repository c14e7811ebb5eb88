"""What an import is going to do: leaves, units, and what it all depends on; writes nothing."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from converters.format.fit import sound_fit
from converters.format.header import DTYPES
from converters.format.kinds import PlainWeights
from converters.format.listing import Listing, SourceCheckpoint
from converters.format.mapping import (
    TABLE_VERSION,
    Slot,
    float32_leaves,
    leaf_shapes,
    slots,
)
from converters.importing.convert import Conversion, Unit, make_units, unit_bytes
from mtp_model.checkpoint.chunks import ChunkPolicy, Leaf
from mtp_model.checkpoint.directory import digest_of_json
from mtp_model.config import HiddenState, ModelConfig
from mtp_model.files.journal import Fingerprint
from mtp_model.files.place import digest
from mtp_model.model import Scope

Dtype = Literal["keep", "bf16", "f32"]
Copies = Literal["check", "main"]

_STORED = {"bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user decides about an import, as import_checkpoint explains it."""

    scope: Scope
    dtype: Dtype
    copies: Copies
    mtp_hidden_state: HiddenState


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """An import: how tensors become leaves, cut into units, and what must not change meanwhile."""

    options: Options
    conversion: Conversion
    units: list[Unit]
    plain_weights: tuple[PlainWeights, ...]
    fingerprint: Fingerprint

    @property
    def digest(self) -> str:
        """What tells this plan from every other, and from the same plan for a changed source."""
        return digest_of_json(self.fingerprint)

    def stored_bytes(self, units: Iterable[Unit]) -> int:
        """Bytes of the chunk files that units write."""
        written = [self.conversion.leaves[unit.path] for unit in units if not unit.is_copy]
        return sum(leaf.chunk_bytes * leaf.num_row_chunks for leaf in written)

    def share(self, worker: tuple[int, int]) -> list[Unit]:
        """The i-th of n shares: equal in bytes, each a stretch of the source, so that n hosts
        together fetch a file about once."""
        index, count = worker
        sizes = [unit_bytes(self.conversion, unit) for unit in self.units]
        total = sum(sizes)
        return [
            unit
            for unit, size, end in zip(self.units, sizes, itertools.accumulate(sizes), strict=True)
            if (2 * end - size) * count // (2 * total) == index  # by the middle of its bytes
        ]


def make_plan(
    checkpoint: SourceCheckpoint,
    *,
    scope: Scope,
    dtype: Dtype,
    copies: Copies,
    mtp_hidden_state: HiddenState | None,
    policy: ChunkPolicy,
) -> ImportPlan:
    """The plan; ProblemsError for a source whose headers do not fit its config."""
    config, found, plain_weights = sound_fit(checkpoint, scope)
    options = Options(
        scope=scope,
        dtype=dtype,
        copies=copies,
        mtp_hidden_state=mtp_hidden_state or config.mtp_hidden_state,
    )
    if config.weight_block_size:
        policy = policy.with_block_rows(config.weight_block_size[0])
    conversion = Conversion(
        listing=checkpoint,
        slots=found,
        leaves=_leaves(config, found, options, policy),
        block=config.weight_block_size,
    )
    # A whole import records the digests of whole files, so it reads copies in any case.
    with_copies = scope == "all" or copies == "check"
    return ImportPlan(
        options=options,
        conversion=conversion,
        units=make_units(conversion, with_copies=with_copies),
        plain_weights=plain_weights,
        fingerprint=_fingerprint(checkpoint, options, policy),
    )


def _leaves(
    config: ModelConfig, found: Mapping[str, Slot], options: Options, policy: ChunkPolicy
) -> dict[str, Leaf]:
    """Every leaf of the module tree, then those of buffers.

    A leaf of which some tensors are FP8 and some are not is stored as the others are: its FP8
    tensors are dequantised, and their scales are kept to write the same bytes again.
    """
    table = slots(config, options.scope)
    always_f32 = float32_leaves(table.values())
    kinds: dict[str, set[np.dtype]] = {}
    for slot in found.values():
        if not slot.copy_of:
            kinds.setdefault(slot.path, set()).add(DTYPES[slot.dtype])
    leaves = {}
    for slot in table.values():
        if slot.copy_of or slot.path in leaves:
            continue
        dtype = np.dtype(np.float32)
        if slot.path not in always_f32:
            dtype = _STORED.get(options.dtype, max(kinds[slot.path], key=lambda d: d.itemsize))
        shape = leaf_shapes(config, options.scope)[slot.path]
        leaves[slot.path] = Leaf.make(shape, dtype, len(slot.index), policy)
    for slot in found.values():
        if slot.is_buffer:
            leaves[slot.path] = Leaf.make(slot.shape, DTYPES[slot.dtype], 0, policy)
    return leaves


def _fingerprint(listing: Listing, options: Options, policy: ChunkPolicy) -> Fingerprint:
    """Everything that the chunks depend on."""
    decided = dataclasses.asdict(options)
    del decided["copies"]  # no chunk depends on it
    headers = {file: {"header": digest(header.raw)} for file, header in listing.headers.items()}
    files = listing.file_states()
    return {
        "options": {**decided, **dataclasses.asdict(policy), "table version": TABLE_VERSION},
        "files": {file: headers.get(file, {}) | state for file, state in files.items()},
    }

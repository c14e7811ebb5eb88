"""Logits of a checkpoint directory against the plain-torch reference on the source's own files.

Both run in float32 on the same seeded tokens.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.exporting.encode import Encoder, held_slots
from converters.format.header import DTYPES
from converters.format.listing import SourceCheckpoint
from converters.format.mapping import Slot
from mtp_model.checkpoint.directory import Checkpoint, CheckpointError
from mtp_model.context import make_context
from mtp_model.load import load
from mtp_model.model import DeepSeekV3
from mtp_model.reporting import human_bytes

if TYPE_CHECKING:
    from converters.verifying.torch_reference import Get

TOLERANCE = 1e-5  # max |a - b| / max |b|, float32
SEED = 20_241_226
LENGTH = 48
# Rows of the batch, as lengths of documents: one document; three packed ones and padding.
DOCUMENTS = ((LENGTH,), (19, 7, 16))


@dataclass(frozen=True, kw_only=True)
class DepthCheck:
    """Logits of the main model (depth 0) or of an MTP depth, where both have a defined input.

    relative_difference: max |ours - reference| / max |reference|. by_position: the same numerator
    at each position of a row, the larger of the batch's rows; None where no row has one.
    argmax_agreement: share of rows of logits whose largest entry is the same.
    """

    depth: int
    rows: int
    relative_difference: float
    argmax_agreement: float
    by_position: tuple[float | None, ...]

    @property
    def holds(self) -> bool:
        return self.relative_difference <= TOLERANCE


@dataclass(frozen=True, kw_only=True)
class LogitsCheck:
    """All depths that the checkpoint directory holds."""

    tolerance: float
    rounded_leaves: tuple[str, ...]
    """Trained leaves, kept finer than the source's dtypes: compared as export writes them."""
    depths: tuple[DepthCheck, ...]

    @property
    def holds(self) -> bool:
        return all(depth.holds for depth in self.depths)


def check_logits(source: SourceCheckpoint, checkpoint: Checkpoint) -> LogitsCheck:
    """Compare main model and every MTP depth, as far as the checkpoint directory holds them.

    source: a local folder. The checkpoint is in memory
    whole, in float32, the reference one matrix at a time. Raises CheckpointError where the machine
    has too little memory, UserError without torch.
    """
    _raise_unless_it_fits(checkpoint)
    from converters.verifying import torch_reference  # here: it needs the extra `verify`

    config = checkpoint.config
    scope, files = checkpoint.provenance["scope"], source.tensors
    held = held_slots(checkpoint)
    dtypes = {name: files[name].dtype for name in held if name in files}
    finer = _finer_leaves(checkpoint, held, dtypes)
    stored = torch_reference.weights_of(Path(source.source.name), source.config)
    get = _rounded_like(checkpoint, held, finer, stored)
    as_imported = {**source.config, "mtp_hidden_state": config.mtp_hidden_state}
    reference = torch_reference.TorchReference(as_imported, get)
    model = load(checkpoint.path, dtype=jnp.float32, scope=scope)
    _round_as_exported(model, checkpoint, Encoder(checkpoint, held, dtypes), finer)
    tokens, segments = seeded_batch(config.vocab_size)
    h0, theirs = reference.by_depth(tokens, segments)
    ours = _our_logits(model, tokens, segments, h0.numpy())
    depths = tuple(_compare(k, got, theirs[k].numpy(), segments) for k, got in ours.items())
    return LogitsCheck(tolerance=TOLERANCE, depths=depths, rounded_leaves=tuple(sorted(finer)))


def _finer_leaves(
    checkpoint: Checkpoint, held: Mapping[str, Slot], dtypes: Mapping[str, str]
) -> frozenset[str]:
    """Leaves that training changed and that are kept finer than export writes them.

    Export quantises and rounds them on the way out; so has who compares with what it wrote.
    held: the checkpoint's tensors. dtypes: of what export writes, by tensor name.
    """
    derived = checkpoint.provenance.get("derived", ())
    trained = {path for derivation in derived for path in derivation["changed"]}
    return frozenset(
        slot.path
        for name, slot in held.items()
        if slot.path in trained
        and name in dtypes
        and checkpoint.leaves[slot.path].dtype != DTYPES[dtypes[name]]
    )


def _round_as_exported(
    model: DeepSeekV3, checkpoint: Checkpoint, encoder: Encoder, leaves: frozenset[str]
) -> None:
    """Set these leaves of a float32 model to the values that export writes, one leaf at a time."""
    for path in sorted(leaves):
        values = np.empty(checkpoint.leaves[path].shape, np.float32)
        for slot in encoder.slots.values():
            if slot.path == path and not slot.copy_of:
                for rows, exported in encoder.values(slot.name):
                    values[slot.index][rows.start : rows.stop] = exported
        *owners, name = path.split(".")
        owner: Any = model
        for attribute in owners:
            owner = getattr(owner, attribute)
        getattr(owner, name)[...] = values


def seeded_batch(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and their segment ids, int32 [B, T]; segment 0 is padding."""
    rng = np.random.default_rng(SEED)
    tokens = rng.integers(vocab_size, size=(len(DOCUMENTS), LENGTH), dtype=np.int32)
    segments = np.zeros_like(tokens)
    for row, lengths in enumerate(DOCUMENTS):
        ids = np.repeat(np.arange(1, 1 + len(lengths), dtype=np.int32), lengths)
        segments[row, : len(ids)] = ids
    return tokens, segments


def _raise_unless_it_fits(checkpoint: Checkpoint) -> None:
    needed = 4 * sum(math.prod(leaf.shape) for leaf in checkpoint.leaves.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise CheckpointError(
            f"{checkpoint.path}: its logits need {human_bytes(needed)} of memory for float32 "
            f"weights, this machine has {human_bytes(memory)}; verify without --logits, which "
            "needs little memory, or on a larger machine"
        )


def _rounded_like(
    checkpoint: Checkpoint, held: Mapping[str, Slot], finer: frozenset[str], get: "Get"
) -> "Get":
    """The source's weights, rounded to bfloat16 where import has stored them so."""
    bf16 = {path for path, leaf in checkpoint.leaves.items() if leaf.dtype == DTYPES["BF16"]}
    rounds = {name for name, slot in held.items() if slot.path in bf16 - finer}

    def rounded(name: str):
        weight = get(name)
        return weight.bfloat16().float() if name in rounds else weight

    return rounded


def _our_logits(
    model: DeepSeekV3, tokens: np.ndarray, segments: np.ndarray, h0: np.ndarray
) -> dict[int, np.ndarray]:
    """Logits by depth, 0 for the main model; without one, depth 1 is fed the reference's state."""
    tokens_BT, segments_BT = jnp.asarray(tokens), jnp.asarray(segments)
    with jax.default_matmul_precision("highest"):
        if model.scope == "mtp":
            logits = _draft_logits(model, jnp.asarray(h0), tokens_BT, segments_BT)
        else:
            logits = _all_logits(model, tokens_BT, segments_BT)
    first = int(model.scope == "mtp")
    return {k: np.asarray(depth) for k, depth in enumerate(logits, start=first)}


@jax.jit
def _all_logits(model: DeepSeekV3, tokens_BT: jax.Array, segments_BT: jax.Array) -> list[jax.Array]:
    out = model(tokens_BT, segments_BT)
    return [out.logits_BTV, *out.mtp_logits]


@jax.jit
def _draft_logits(
    model: DeepSeekV3, h0_BTD: jax.Array, tokens_BT: jax.Array, segments_BT: jax.Array
) -> list[jax.Array]:
    drafts = model.draft(h0_BTD, tokens_BT, make_context(segments_BT))
    return [model.lm_head.logits(h_BTD) for h_BTD in drafts.hidden]


def _compare(depth: int, ours: np.ndarray, theirs: np.ndarray, segments: np.ndarray) -> DepthCheck:
    """Logits [B, T, V] of one depth, at the positions whose input token is in their document."""
    valid = segments != 0
    valid[:, LENGTH - depth :] = False
    valid[:, : LENGTH - depth] &= segments[:, depth:] == segments[:, : LENGTH - depth]
    peak = np.abs(theirs[valid]).max()
    # Padding comes out as 0: only positions with a defined input count.
    difference_BT = np.where(valid, np.abs(ours - theirs).max(axis=-1), 0) / peak
    same = ours[valid].argmax(-1) == theirs[valid].argmax(-1)
    return DepthCheck(
        depth=depth,
        rows=int(valid.sum()),
        relative_difference=float(difference_BT.max()),
        argmax_agreement=float(same.mean()),
        by_position=tuple(
            float(worst) if any_valid else None
            for worst, any_valid in zip(difference_BT.max(0), valid.any(0), strict=True)
        ),
    )

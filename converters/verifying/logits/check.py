"""Logits of a checkpoint directory against the plain-torch reference on the source's own files.

Both run in float32 on the same tokens, a layer at a time (layers.py): one layer without its routed
experts is in memory, and a few of these, whatever the size of the model.
"""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.exporting.encode import Encoder, held_slots
from converters.exporting.plan import make_plan
from converters.format.header import DTYPES
from converters.format.listing import SourceCheckpoint
from converters.format.mapping import Slot
from converters.verifying.fetched import fetched_by_part
from converters.verifying.logits.depths import TOLERANCE, DepthCheck, compare_depths
from converters.verifying.logits.devices import Devices, by_layer
from converters.verifying.logits.jax_parts import (
    EXPERTS_BYTES,
    ExportedLeaves,
    JaxParts,
    MeshParts,
)
from converters.verifying.logits.layers import (
    LayerCheck,
    Parts,
    SavedWalk,
    Walk,
    modules_of_parts,
    valid_positions,
    walk,
    worst_row,
)
from converters.verifying.logits.text import text_problem, tokens_of_text
from mtp_model.checkpoint.directory import Checkpoint, CheckpointError, digest_of_json
from mtp_model.config import ModelConfig
from mtp_model.model import Scope
from mtp_model.progress import OnProgress
from mtp_model.reporting import human_bytes, plural

if TYPE_CHECKING:
    from converters.verifying.logits.torch_reference import Get

SEED = 20_241_226
LENGTH = 48
Documents = tuple[tuple[int, ...], ...]
# Rows of the batch, as lengths of documents: one document; three packed ones and padding.
DOCUMENTS = ((LENGTH,), (19, 7, 16))
SPOT_DOCUMENTS = ((12,), (5, 4))  # few tokens choose few experts, and reading these takes the time
MOST_TOKENS = 512  # of a text: their logits of V3 need half of what its head does
_HEAD = "lm_head"
FETCHED = "logits.fetched"  # a folder beside what is saved: files of a far source


@dataclass(frozen=True, kw_only=True)
class LogitsCheck:
    """All depths that the checkpoint directory holds, and every part of the network on the way."""

    tolerance: float
    devices: str
    """Where our side ran, and whether whole or a layer at a time."""
    text: str | None
    """What was given to both; None for the built-in tokens."""
    tokens: int
    rounded_leaves: tuple[str, ...]
    """Leaves that are kept finer than the source's dtypes: compared as export writes them."""
    depths: tuple[DepthCheck, ...]
    layers: tuple[LayerCheck, ...]
    first_wrong: str | None
    """The first part that, given the reference's state, gives another one than the reference."""
    layers_left_out: int = 0
    """Layers of the main model that a spot check did not run."""

    @property
    def holds(self) -> bool:
        return self.first_wrong is None and all(depth.holds for depth in self.depths)


def check_logits(
    source: SourceCheckpoint,
    checkpoint: Checkpoint,
    *,
    text: str | None = None,
    spot: bool = False,
    seed: int = SEED,
    saved: Path | None = None,
    devices: Devices | None = None,
    progress: OnProgress | None = None,
) -> LogitsCheck:
    """Compare main model and every MTP depth, as far as the checkpoint directory holds them.

    source: of a far one, the files of each part of the network are fetched for it, and deleted.
    text: what is compared on, by the source's tokenizer; None: built-in tokens. spot: of the main
    model's layers run only those of _spot_layers, on few tokens, and read no others. seed: of the
    built-in tokens. saved: a file that is written after each layer, from which the same comparison
    goes on, and which is gone once it has ended. devices: where our side runs; on a mesh it is
    loaded whole, as training and answers have it. None: on one, a layer at a time.
    Raises CheckpointError where the machine has too little memory, or room for what is fetched,
    ProblemsError for a text that is none of this model's, UserError without torch.
    """
    config = checkpoint.config
    instead = "verify without --logits, which needs little memory, or on a larger machine"
    raise_unless_it_fits(str(checkpoint.path), config, instead)
    tokens, segments = (
        seeded_batch(config.vocab_size, SPOT_DOCUMENTS if spot else DOCUMENTS, seed)
        if text is None
        else text_batch(text, source, config)
    )
    from converters.verifying.logits import torch_reference  # here: it needs the extra `verify`

    scope, files = checkpoint.provenance["scope"], source.tensors
    held = held_slots(checkpoint)
    dtypes = {name: files[name].dtype for name in held if name in files}
    finer = _finer_leaves(checkpoint, held, dtypes)
    reference = torch_reference.TorchReference(
        source.config, _rounded_like(checkpoint, held, finer, _weights(source))
    )
    exported = ExportedLeaves(Encoder(checkpoint, held, dtypes), finer)
    batch = tokens, segments
    where = devices or by_layer()
    if where.mesh is None:
        ours = JaxParts(checkpoint, exported, *batch)
    else:
        ours = MeshParts(checkpoint, exported, *batch, where.mesh)
    theirs = torch_reference.TorchParts(reference, *batch)
    kept = SavedWalk(saved, (_identity(source, checkpoint, tokens), where.shape)) if saved else None
    begun = (kept and kept.read()) or Walk()
    layers = _spot_layers(config, scope) if spot else range(config.num_hidden_layers)
    parts = {**modules_of_parts(config, scope, layers), _HEAD: (_HEAD,)}
    to_run = dict([*parts.items()][begun.done :])
    with fetched_by_part(source, to_run, saved and saved.with_name(FETCHED)) as finish:
        done = walk(
            ours,
            theirs,
            config,
            scope,
            segments,
            layers=layers,
            begun=begun,
            saved=kept,
            finish=finish,
            progress=progress,
        )
        depths, head = _compare_heads(done, ours, theirs, segments)
        finish(_HEAD)
    checks = (*done.checks, head)
    wrong = (check.name for check in checks if not check.alone <= TOLERANCE)
    if saved:
        saved.unlink(missing_ok=True)
    return LogitsCheck(
        tolerance=TOLERANCE,
        devices=where.said,
        text=text,
        tokens=int(np.count_nonzero(segments)),
        depths=depths,
        rounded_leaves=tuple(sorted(finer)),
        layers=checks,
        first_wrong=next(wrong, None),
        layers_left_out=config.num_hidden_layers - len(layers),
    )


def _spot_layers(config: ModelConfig, scope: Scope) -> list[int]:
    """The first layer; the first with experts too, where no MTP module stands for its kind."""
    dense = config.num_dense_layers
    no_module = scope == "main" or not config.num_nextn_predict_layers
    return sorted({0, dense} if no_module and dense < config.num_hidden_layers else {0})


def _weights(source: SourceCheckpoint) -> "Get":
    """The source's weights by checkpoint name, read with no code of the import."""
    # Here: they need the extra `verify`.
    from converters.verifying.logits.torch_weights import far_weights, weights_of

    place = source.source
    if not place.is_far:
        return weights_of(Path(place.name), source.config)
    files = sorted(set(_files(source)))
    return far_weights(files, place.read_into, source.config, place.name)


def _identity(source: SourceCheckpoint, checkpoint: Checkpoint, tokens: np.ndarray) -> object:
    """What a saved comparison belongs to: these weights, these files, these tokens."""
    weights = digest_of_json(checkpoint.provenance["pieces"])
    return {**source_identity(source, tokens), "checkpoint": weights}


def source_identity(source: SourceCheckpoint, tokens: np.ndarray) -> dict[str, Any]:
    """What a saved state belongs to, of a source that was run on tokens."""
    place = source.source
    return {
        "source": place.name if place.is_far else str(Path(place.name).resolve()),
        "config": digest_of_json(dict(source.config)),
        "files": {file: place.fingerprint(file) for file in sorted(set(_files(source)))},
        "tokens": tokens.tolist(),
    }


def _files(source: SourceCheckpoint) -> Iterator[str]:
    return (tensor.file for tensor in source.tensors.values())


def _compare_heads(
    done: Walk, ours: Parts, theirs: Parts, segments: np.ndarray
) -> tuple[tuple[DepthCheck, ...], LayerCheck]:
    """The logits of all depths that ours has, and the head alone on the reference's states."""
    began = time.monotonic()
    first = next(depth for depth, (own, _) in enumerate(done.hidden) if own is not None)
    pairs = [(own, reference) for own, reference in done.hidden if own is not None]
    own, reference = (np.stack(side) for side in zip(*pairs, strict=True))
    wanted = _by_depth(theirs, reference)
    got, alone = _by_depth(ours, own), _by_depth(ours, reference)
    valid = np.stack([valid_positions(segments, first + k) for k in range(len(pairs))])
    depths = compare_depths(first, got, wanted, valid)
    return depths, LayerCheck(
        name=_HEAD,
        depth=0,
        alone=worst_row(alone, wanted, valid),
        after=worst_row(got, wanted, valid),
        seconds=round(time.monotonic() - began, 3),
    )


def _by_depth(side: Parts, hidden: np.ndarray) -> np.ndarray:
    """Logits [K, B, T, V] of states [K, B, T, D], the head read once."""
    logits = side.logits(hidden.reshape(-1, *hidden.shape[2:]))
    return logits.reshape(*hidden.shape[:-1], -1)


def _finer_leaves(
    checkpoint: Checkpoint, held: Mapping[str, Slot], dtypes: Mapping[str, str]
) -> frozenset[str]:
    """Leaves that are kept finer than they are written: trained ones, and those of an export whose
    dtypes are not the import's source's.

    Export quantises and rounds them on the way out; so has who compares with what it wrote.
    held: the checkpoint's tensors. dtypes: of what export writes, by tensor name.
    """
    trained = trained_leaves(checkpoint)
    imported = make_plan(checkpoint, "keep", has_base=True).dtypes
    return frozenset(
        slot.path
        for name, slot in held.items()
        if name in dtypes
        and checkpoint.leaves[slot.path].dtype != DTYPES[dtypes[name]]
        and (slot.path in trained or imported[name] != dtypes[name])
    )


def trained_leaves(checkpoint: Checkpoint) -> frozenset[str]:
    """Paths of the leaves that training wrote."""
    derived = checkpoint.provenance.get("derived", ())
    return frozenset(path for derivation in derived for path in derivation["changed"])


def seeded_batch(
    vocab_size: int, documents: Documents = DOCUMENTS, seed: int = SEED
) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and their segment ids, int32 [B, T]; segment 0 is padding."""
    rng = np.random.default_rng(seed)
    shape = len(documents), max(map(sum, documents))
    tokens = rng.integers(vocab_size, size=shape, dtype=np.int32)
    segments = np.zeros_like(tokens)
    for row, lengths in enumerate(documents):
        ids = np.repeat(np.arange(1, 1 + len(lengths), dtype=np.int32), lengths)
        segments[row, : len(ids)] = ids
    return tokens, segments


def text_batch(
    text: str, source: SourceCheckpoint, config: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a text by the source's tokenizer, and their segment ids, int32 [1, T]."""
    ids = tokens_of_text(text, source, "--text", config.vocab_size)
    fewest = 2 + config.num_nextn_predict_layers
    if not fewest <= len(ids) <= MOST_TOKENS:
        found = f"makes {plural(len(ids), 'token')} of the text"
        asked = f"give --text as much as makes {fewest} to {MOST_TOKENS}"
        raise text_problem(source, f"{found}; {asked}")
    tokens = np.array([ids], np.int32)
    return tokens, np.ones_like(tokens)


def memory_needed(config: ModelConfig) -> int:
    """An estimate: the largest matrices as stored and in float32. For V3's layers it says 11.7 GB,
    11.0 GB were measured."""
    dense = 3 * config.hidden_size * config.intermediate_size if config.num_dense_layers else 0
    head = config.vocab_size * config.hidden_size
    return 2 * EXPERTS_BYTES + 12 * max(head, dense)


def raise_unless_it_fits(where: str, config: ModelConfig, instead: str) -> None:
    """CheckpointError where this machine has too little memory; it says what to do instead."""
    needed = memory_needed(config)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise CheckpointError(
            f"{where}: its logits need {human_bytes(needed)} of memory, a layer at a time; this "
            f"machine has {human_bytes(memory)}; {instead}"
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

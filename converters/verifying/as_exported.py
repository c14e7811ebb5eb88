"""A loaded model's weights as export writes them; knows no logits and no files.

Training keeps weights finer than the source's dtypes: what it changed is quantised and rounded on
the way out. Comparing the model with what was exported needs the same rounding.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.exporting.encode import Encoder
from converters.format.fp8 import Block, dequantise_into
from converters.format.header import DTYPES
from converters.format.mapping import Slot
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.model import DeepSeekV3


def finer_leaves(checkpoint: Checkpoint, dtypes: Mapping[str, str]) -> frozenset[str]:
    """Leaves that training changed and that are not stored in the dtype that export writes.

    dtypes: what export writes, as safetensors names it, by tensor name.
    """
    derived = checkpoint.provenance.get("derived", ())
    trained = {path for derivation in derived for path in derivation["changed"]}
    return frozenset(
        slot.path
        for name, slot in Encoder(checkpoint, dtypes).slots.items()
        if slot.path in trained
        and name in dtypes
        and checkpoint.leaves[slot.path].dtype != DTYPES[dtypes[name]]
    )


def round_as_exported(
    model: DeepSeekV3,
    checkpoint: Checkpoint,
    dtypes: Mapping[str, str],
    block: Block | None,
    leaves: frozenset[str],
) -> None:
    """Set these leaves of a float32 model to the values that export writes. Leaf by leaf."""
    encoder = Encoder(checkpoint, dtypes)
    for path in sorted(leaves):
        values = np.empty(checkpoint.leaves[path].shape, np.float32)
        for slot in encoder.slots.values():
            if slot.path == path and not slot.copy_of:
                values[slot.index] = _exported(encoder, slot, dtypes, block)
                for part in slot.with_scale:
                    encoder.forget(part)
        *owners, name = path.split(".")
        owner: Any = model
        for attribute in owners:
            owner = getattr(owner, attribute)
        getattr(owner, name)[...] = values


def _exported(
    encoder: Encoder, slot: Slot, dtypes: Mapping[str, str], block: Block | None
) -> np.ndarray:
    stored = _bytes(encoder, slot.name).view(DTYPES[dtypes[slot.name]]).reshape(slot.shape)
    if dtypes[slot.name] != "F8_E4M3":
        return stored.astype(np.float32)
    assert slot.scale
    assert block
    values = np.empty(slot.shape, np.float32)
    scale = _bytes(encoder, slot.scale).view(np.float32)
    dequantise_into(values, stored, scale.reshape(encoder.slots[slot.scale].shape), block)
    return values


def _bytes(encoder: Encoder, name: str) -> np.ndarray:
    return np.concatenate([piece.copy() for piece in encoder.blocks(name)])

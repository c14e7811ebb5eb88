"""An estimate of a step's seconds, by what it computes, reads and sends."""

import math
from typing import Any

from finetune.devices import MeshShape, Workload, gathered_bytes
from finetune.planning.slices import Slice
from finetune.settings import Part
from mtp_model.sharding import BATCH_AXES

# Parts of their highest speed that a step is taken to reach, where nothing was measured.
MATRIX_UNITS, MEMORY, LINKS = 0.5, 0.8, 0.7


def terms_of(
    place: Slice,
    work: Workload,
    part: Part,
    shape: MeshShape,
    flops: float,
    memory: Any,
    tokens: int,
) -> dict[str, float]:
    """Seconds that a step takes by each part of a chip, none of them beside another."""
    if place.family is None or memory is None:
        return {}
    a_chip = len(place.devices) / place.chips  # devices
    compute = flops / len(place.devices) / (place.family.flops / a_chip * MATRIX_UNITS)
    # Arguments are read once and, where they are trained, written; temporaries both.
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    moved += 2 * memory.temp_size_in_bytes
    through = moved / (place.family.hbm_bytes / a_chip * MEMORY)
    sent = gathered_bytes(work, shape) + _sent_to_experts(work, part, shape, tokens)
    links = sent / (place.family.interconnect_bytes / a_chip * LINKS)
    return {"compute": compute, "memory": through, "interconnect": links}


def _sent_to_experts(work: Workload, part: Part, shape: MeshShape, tokens: int) -> float:
    """Bytes that a device receives of tokens on their way to experts and back, in bfloat16.

    Once a layer in the forward pass; where a layer is trained again as it is recomputed, and for
    the gradients there and back.
    """
    c = work.config
    devices = math.prod(shape[name] for name in BATCH_AXES)
    a_pass = (
        tokens / devices * c.num_experts_per_tok * c.hidden_size * 2 * (1 - 1 / shape["expert"])
    )
    passes = {"mtp": int(work.scope == "all"), "all": 4}[part] * c.num_moe_layers
    return 2 * a_pass * (passes + 4 * c.num_nextn_predict_layers)

"""An estimate of a step's seconds, by what it computes, reads and sends."""

from collections.abc import Mapping
from typing import Any

from finetune.planning.collectives import Sent
from finetune.planning.slices import Slice

# Parts of their highest speed that a step is taken to reach, where nothing was measured.
MATRIX_UNITS, MEMORY, LINKS = 0.5, 0.8, 0.7


def terms_of(
    place: Slice, flops: float, memory: Any, collectives: Mapping[str, Sent]
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
    sent = sum(each.received_bytes for each in collectives.values())
    links = sent / (place.family.interconnect_bytes / a_chip * LINKS)
    return {"compute": compute, "memory": through, "interconnect": links}

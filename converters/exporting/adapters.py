"""Adapters as PEFT stores them: adapter_model.safetensors and adapter_config.json.

What `train --train lora --lora.keep` leaves in RUN/adapters is a checkpoint directory whose leaves
are the adapters' matrices alone, stacked as the weights that they stand beside.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from converters.format.header import make_header, parse_header
from converters.format.mapping import slots
from converters.format.writer import StreamWriter
from mtp_model.checkpoint.directory import Checkpoint, CheckpointError
from mtp_model.files.open import as_place
from mtp_model.files.place import Place

MODEL_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_MATRICES = ("lora_A", "lora_B")


class AdapterTensor(NamedTuple):
    """A matrix of one adapter, and where it is stored."""

    name: str
    path: str
    place: tuple[int, ...]  # in the stacked leaf
    shape: tuple[int, ...]


class WrittenAdapters(NamedTuple):
    """What was written."""

    path: Place
    adapters: int
    nbytes: int


def settings_of(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """What a run's adapters were made with; None for any other checkpoint directory."""
    derived = checkpoint.provenance.get("derived") or [{}]
    kept = derived[-1].get("adapters")
    return kept if isinstance(kept, Mapping) else None


def write_adapters(
    checkpoint: Checkpoint, settings: Mapping[str, Any], dst: str, *, overwrite: bool
) -> WrittenAdapters:
    """Write the folder; CheckpointError where something else is there."""
    place = as_place(dst)
    _raise_if_occupied(place, overwrite)
    place.make_folder()
    tensors = sorted(_tensors(checkpoint))
    raw = make_header(((t.name, "F32", t.shape) for t in tensors), {"format": "pt"})
    header = parse_header(raw, MODEL_FILE, str(place))
    with StreamWriter((place / MODEL_FILE).appended(), header) as out:
        for each in tensors:
            out.write(
                np.ascontiguousarray(checkpoint.read_rows(each.path, each.place, 0, each.shape[0]))
            )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.provenance["source"]["name"],
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        **targets(each.name for each in tensors),
    }
    text = json.dumps(config, indent=2) + "\n"
    (place / CONFIG_FILE).write_pieces([text.encode()])
    return WrittenAdapters(place, len(tensors) // len(_MATRICES), header.size)


def targets(names: Iterable[str]) -> dict[str, list[str]]:
    """The settings by which PEFT finds what the matrices of these names stand beside.

    Of a model with fused experts (Transformers 5) it takes gate_proj, up_proj and down_proj among
    the modules as those of routed experts, and no others: layers without experts, and shared
    experts, are found as parameters.
    """
    modules, parameters = set(), set()
    for name in names:
        parent, module = name.split(".")[-4:-2]
        if parent in ("mlp", "shared_experts"):
            parameters.add(f"{parent}.{module}.weight")
        else:
            modules.add(module)
    found = {"target_modules": sorted(modules)}
    return found | ({"target_parameters": sorted(parameters)} if parameters else {})


def _tensors(checkpoint: Checkpoint) -> Iterator[AdapterTensor]:
    for slot in slots(checkpoint.config).values():
        for matrix in _MATRICES:
            path = f"{slot.path.removesuffix('weight')}{matrix}"
            if slot.name.endswith(".weight") and not slot.copy_of and path in checkpoint.leaves:
                module = slot.name.removesuffix(".weight")
                shape = checkpoint.leaves[path].tensor_shape
                yield AdapterTensor(f"{_PREFIX}{module}.{matrix}.weight", path, slot.index, shape)


def _raise_if_occupied(place: Place, overwrite: bool) -> None:
    names = {entry.name for entry in place.entries()}
    foreign = names - {MODEL_FILE, CONFIG_FILE}
    if foreign or (names and not overwrite):
        found = f"other files (as {min(foreign)})" if foreign else "adapters"
        advice = "name another place, or empty it" if foreign else "name another, or --overwrite it"
        raise CheckpointError(f"{place} holds {found}; nothing in it was touched; {advice}")

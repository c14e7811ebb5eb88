"""What a checkpoint is, from its headers and config alone; must not read tensors nor print."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from converters.format.fit import Fit, fit
from converters.format.kinds import PlainWeights
from converters.format.listing import Listing, list_checkpoint, read_config
from converters.format.mapping import GROUPS, Slot, group_of
from converters.sources.source import Source
from mtp_model.checkpoint.writer import reserved_names
from mtp_model.config import ModelConfig
from mtp_model.problems import Problem, ProblemsError


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Of some tensors. `parameters` counts weights and router biases, no FP8 scales or buffers."""

    tensors: int
    bytes: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class MtpModule:
    """One MTP module of the config. `copies` are those that the files hold."""

    layer: int
    tensors: int
    parameters: int
    """Without its copies."""
    copies: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Network:
    """What config and headers say together."""

    config: ModelConfig
    groups: dict[str, Tally]
    parameters: int
    """Of the main model and the MTP modules, copies not counted again."""
    active_parameters: int
    """Of the main model, that one token passes through: all but the experts it is not sent to."""
    mtp: tuple[MtpModule, ...]
    plain_weights: tuple[PlainWeights, ...]
    """Weights that are not FP8 in a checkpoint whose others are."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Everything `inspect` tells. What the problems made unknowable is None or empty."""

    source: str
    model_type: str | None
    files: int
    file_bytes: int
    dtypes: dict[str, Tally]
    network: Network | None
    problems: tuple[Problem, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {**dataclasses.asdict(self), "importable": not self.problems}


def inspect_source(source: Source) -> Inspection:
    """Read config.json and all headers; problems are part of the result, not raised."""
    problems: list[Problem] = []
    config, listing, comparison = None, None, None
    try:
        config = read_config(source)
    except ProblemsError as err:
        problems += err.problems
    try:
        listing = list_checkpoint(source)
    except ProblemsError as err:
        problems += err.problems
    if config is not None and listing is not None:
        comparison = fit(listing, config)
        problems += [*comparison.problems, *reserved_names(listing.copied_files)]
    headers = listing.headers.values() if listing else ()
    return Inspection(
        source=source.name,
        model_type=str(config["model_type"]) if config and "model_type" in config else None,
        files=len(headers),
        file_bytes=sum(header.size for header in headers),
        dtypes=_dtypes(listing, comparison) if listing else {},
        network=_network(listing, comparison) if listing and comparison else None,
        problems=tuple(problems),
    )


def _dtypes(listing: Listing, comparison: Fit | None) -> dict[str, Tally]:
    others = _no_parameters(comparison.slots.values()) if comparison else frozenset()
    names: dict[str, list[str]] = {}
    for tensor in listing.tensors.values():
        names.setdefault(tensor.dtype, []).append(tensor.name)
    return {dtype: _tally(listing, names[dtype], others) for dtype in sorted(names)}


def _no_parameters(slots: Iterable[Slot]) -> frozenset[str]:
    """Names of the tensors that are scales or buffers."""
    slots = list(slots)
    scales = {slot.scale for slot in slots if slot.scale}
    return frozenset(scales | {slot.name for slot in slots if slot.is_buffer})


def _tally(listing: Listing, names: Iterable[str], others: frozenset[str]) -> Tally:
    """others: names of tensors whose elements are no parameters."""
    tensors = [listing.tensors[name] for name in names]
    return Tally(
        tensors=len({tensor.name_in_file for tensor in tensors}),
        bytes=sum(tensor.nbytes for tensor in tensors),
        parameters=sum(math.prod(t.shape) for t in tensors if t.name not in others),
    )


def _network(listing: Listing, comparison: Fit) -> Network | None:
    config, slots = comparison.config, comparison.slots
    if config is None:
        return None
    others = _no_parameters(slots.values())
    members: dict[str, list[str]] = {group: [] for group in GROUPS}
    for slot in slots.values():
        members[group_of(slot)].append(slot.name)
    groups = {group: _tally(listing, names, others) for group, names in members.items()}
    counts = {group: tally.parameters for group, tally in groups.items()}
    total = sum(counts.values()) - counts["copies"]
    experts = counts["routed experts"]
    idle = experts - experts * config.num_experts_per_tok // config.n_routed_experts
    return Network(
        config=config,
        groups={group: tally for group, tally in groups.items() if tally.tensors},
        parameters=total,
        active_parameters=total - counts["MTP modules"] - idle,
        mtp=tuple(_modules(listing, comparison, others)),
        plain_weights=comparison.plain_weights,
    )


def _modules(listing: Listing, comparison: Fit, others: frozenset[str]) -> Iterator[MtpModule]:
    config = comparison.config
    assert config is not None
    for module in range(config.num_nextn_predict_layers):
        layer = config.num_hidden_layers + module
        prefix = f"model.layers.{layer}."
        slots = [slot for slot in comparison.slots.values() if slot.name.startswith(prefix)]
        own = [slot.name for slot in slots if not slot.copy_of]
        yield MtpModule(
            layer=layer,
            tensors=len(slots),
            parameters=_tally(listing, own, others).parameters,
            copies=tuple(slot.name.removeprefix(prefix) for slot in slots if slot.copy_of),
        )

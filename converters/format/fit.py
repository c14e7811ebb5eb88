"""Names, shapes and dtypes of a checkpoint against its config; reads no tensor.

A config that contradicts the files is one problem, not one for every tensor that it mistakes.
"""

import dataclasses
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from converters.format.header import TensorInfo
from converters.format.kinds import (
    FP8,
    NotConverted,
    PlainWeights,
    as_stored,
    list_problems,
    plain_weights,
    stray_scales,
)
from converters.format.listing import Listing, SourceCheckpoint, is_module_alone
from converters.format.mapping import (
    SCALE_SUFFIX,
    Slot,
    buffers,
    fused_weights,
    layer_of,
    mtp_layers,
    slots,
)
from mtp_model.config import ConfigError, ModelConfig
from mtp_model.families import MODEL_TYPES, not_converted
from mtp_model.files.untrusted_json import shown
from mtp_model.model import Scope
from mtp_model.problems import Problem, braces, raise_if_any

_LARGEST_NUM_TENSORS = 1 << 20  # the released checkpoints have 91,991
_BUFFER_DTYPES = ("F32", "BF16", "F16")
_OF_OTHER_FORMATS = set(
    (
        "qweight qzeros scales g_idx "  # AWQ, GPTQ
        "weight_packed weight_shape weight_scale weight_zero_point weight_g_idx "  # compressed
        "weight_global_scale input_global_scale weight_scale_2 input_scale "  # FP4, FP8 by tensors
        "absmax quant_map nested_absmax nested_quant_map"  # bitsandbytes
    ).split()
)
_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

Tensors = Mapping[str, TensorInfo]
Slots = Mapping[str, Slot]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How config and headers of a checkpoint fit together, for a scope."""

    config: ModelConfig | None
    """None when config.json is no network that we know; the other checks need it."""
    slots: dict[str, Slot]
    """Those that the files hold, in the shape and dtype needed."""
    problems: tuple[Problem, ...]
    plain_weights: tuple[PlainWeights, ...] = ()
    """Those that are not FP8 in a checkpoint whose others are."""


class _Contradiction(NamedTuple):
    """One line of the report, and the tensors that need no line of their own for it."""

    problem: Problem
    names: set[str]


def fit(listing: Listing, config: Mapping[str, Any], *, scope: Scope = "all") -> Fit:
    """All that headers and config (the parsed config.json) tell about the tensors of a scope."""
    cfg, problems = checked_config(config, scope)
    if cfg is None:
        return Fit(config=None, slots={}, problems=problems)
    return _compare(listing, cfg, scope, config)


def checked_config(
    config: Mapping[str, Any], scope: Scope = "all"
) -> tuple[ModelConfig | None, tuple[Problem, ...]]:
    """The network of a parsed config.json; None where it is none that we know, and why."""
    try:
        cfg = ModelConfig.from_dict(config)
        faults = [*_size_faults(cfg, scope)]
    except ConfigError as err:
        cfg, faults = None, err.faults
    return None if faults else cfg, tuple(_config_problem(fault) for fault in faults)


class SoundFit(NamedTuple):
    """A fit without problems."""

    config: ModelConfig
    slots: Slots
    plain_weights: tuple[PlainWeights, ...]


def sound_fit(checkpoint: SourceCheckpoint, scope: Scope) -> SoundFit:
    """The network and the tensors of a scope; ProblemsError when anything does not fit."""
    found = fit(checkpoint, checkpoint.config, scope=scope)
    raise_if_any(checkpoint.source.name, found.problems)
    assert found.config is not None
    return SoundFit(found.config, found.slots, found.plain_weights)


def _compare(listing: Listing, cfg: ModelConfig, scope: Scope, config: Mapping[str, Any]) -> Fit:
    tensors: Tensors = listing.tensors
    key, entries = not_converted(config)
    if scope == "main":
        tensors = {name: t for name, t in tensors.items() if not _is_mtp(name, cfg)}
    known = slots(cfg)
    table = known if scope == "all" else slots(cfg, scope)
    stored = as_stored(table, tensors)
    problems: list[Problem] = []
    explained: set[str] = set()
    for contradiction in _contradictions(tensors, cfg, stored, listing.source.name):
        problems.append(contradiction.problem)
        explained |= contradiction.names
    if cfg.weight_block_size and not any(t.dtype == FP8 for t in listing.tensors.values()):
        problems += _nothing_quantised(tensors, table, entries)
    problems += list_problems(key, entries, table, tensors)
    problems += stray_scales(table, stored, tensors)
    problems += _missing(tensors, stored, explained)
    problems += _unknown(tensors, {**known, **buffers(cfg)}, explained)
    wanted = {**stored, **_found_buffers(tensors, cfg, scope)}
    misfits = [*_misfits(tensors, wanted)]
    problems += [p for p in misfits if not (p.kind == "dtype" and p.subject in explained)]
    unfit = {problem.subject for problem in misfits}
    sound = {name: s for name, s in wanted.items() if name in tensors and name not in unfit}
    plain = tuple(plain_weights(entries, table, sound)) if cfg.weight_block_size else ()
    return Fit(config=cfg, slots=sound, problems=tuple(problems), plain_weights=plain)


def _found_buffers(tensors: Tensors, cfg: ModelConfig, scope: Scope) -> dict[str, Slot]:
    """Those that the files hold, in the dtype that they have there if it is a known one."""
    found = {name: slot for name, slot in buffers(cfg, scope).items() if name in tensors}
    return {
        name: dataclasses.replace(slot, dtype=tensors[name].dtype)
        if tensors[name].dtype in _BUFFER_DTYPES
        else slot
        for name, slot in found.items()
    }


def _config_problem(fault: str) -> Problem:
    key, _, detail = fault.partition(" ")
    return Problem("config", key, detail)


def _size_faults(cfg: ModelConfig, scope: Scope) -> Iterator[str]:
    """What is wrong with sizes that are possible one by one; a table of them must fit in memory."""
    layers = cfg.num_hidden_layers + cfg.num_nextn_predict_layers
    count = layers * (cfg.n_routed_experts + 1)
    if count > _LARGEST_NUM_TENSORS:
        yield (
            f"n_routed_experts is {cfg.n_routed_experts} in {layers} layers: {count} experts; "
            f"this toolkit reads up to {_LARGEST_NUM_TENSORS}"
        )
    modules = cfg.num_nextn_predict_layers if scope != "main" else 0
    if modules and cfg.first_k_dense_replace > cfg.num_hidden_layers:
        yield (
            f"first_k_dense_replace is {cfg.first_k_dense_replace}, needed at most "
            f"num_hidden_layers {cfg.num_hidden_layers}: readers build an MTP module dense else"
        )
    if scope == "mtp" and not cfg.num_nextn_predict_layers:
        yield (
            "num_nextn_predict_layers is 0: there is no MTP module for --scope mtp; take one in "
            "with --mtp-from, naming a checkpoint that has it, or leave out --scope mtp"
        )


def _contradictions(
    tensors: Tensors, cfg: ModelConfig, wanted: Slots, where: str
) -> Iterator[_Contradiction]:
    yield from _layer_contradictions(tensors, cfg, wanted, where)
    yield from _other_quantisation(tensors, wanted)
    if cfg.weight_block_size is None:
        yield from _quantisation_contradictions(tensors, wanted)
    yield from _dtype_contradictions(tensors, cfg, wanted)
    yield from _module_contradictions(tensors, cfg, wanted, where)


def _is_mtp(name: str, cfg: ModelConfig) -> bool:
    layer = layer_of(name)
    return layer is not None and layer >= cfg.num_hidden_layers


def _by_layer(names: Iterable[str]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in names:
        layer = layer_of(name)
        if layer is not None:
            found.setdefault(layer, []).append(name)
    return found


def _layer_contradictions(
    tensors: Tensors, cfg: ModelConfig, wanted: Slots, where: str
) -> Iterator[_Contradiction]:
    """Layers that the config promises and no file has, and layers that it does not know of."""
    have, need = _by_layer(tensors), _by_layer(wanted)
    end, modules = cfg.num_hidden_layers, mtp_layers(tensors)
    if is_module_alone([*tensors]):
        found = f"is {end}, the files hold the MTP module model.layers.{braces(modules)} alone"
        advice = "import the main model, with --mtp-from naming this"
        problem = Problem("config", "num_hidden_layers", f"{found}; {advice}")
        yield _Contradiction(problem, {*tensors, *wanted})
        return
    if modules and modules[0] != end and (advice := _renumbering(modules[0], end, have, where)):
        found = f"is {end}, the first MTP module (the layer with eh_proj) is model.layers."
        problem = Problem("config", "num_hidden_layers", f"{found}{modules[0]}; {advice}")
        yield _Contradiction(problem, _names_from(min(modules[0], end), have, need))
        if len(modules) != cfg.num_nextn_predict_layers and advice.startswith("make"):
            found = f"is {cfg.num_nextn_predict_layers}, the files hold {len(modules)}"
            detail = f"{found}; make it {len(modules)}"
            yield _Contradiction(Problem("config", "num_nextn_predict_layers", detail), set())
        return
    absent = [layer for layer in need if layer not in have]
    main = [layer for layer in absent if layer < end]
    if main:
        found = f"is {end}, no file has a tensor of model.layers.{braces(main)}"
        names = {name for layer in main for name in need[layer]}
        yield _Contradiction(Problem("config", "num_hidden_layers", found), names)
    taken = "take the module in with --mtp-from, naming a checkpoint that has it"
    advice = f"make it {len(modules)}" if modules else taken
    if len(main) < len(absent):
        yield _mtp_contradiction("no file has a tensor of", cfg, absent[len(main) :], need, advice)
    extra = sorted(layer for layer in have if layer >= end + cfg.num_nextn_predict_layers)
    if extra:
        advice = advice if set(extra) <= set(modules) else taken
        yield _mtp_contradiction("the files also hold", cfg, extra, have, advice)


def _renumbering(first: int, end: int, have: Iterable[int], where: str) -> str | None:
    """What to do where the first MTP module is not layer `end`; None if that is not what is wrong.

    A model that was cut shorter may have kept the number that its module had before.
    """
    if set(range(first)) <= set(have):
        return f"make it {first}"
    if first < end:
        return None
    return f"to take it in as model.layers.{end}, import with --mtp-from {shlex.quote(where)}"


def _mtp_contradiction(
    finding: str, cfg: ModelConfig, layers: list[int], names_of: dict[int, list[str]], advice: str
) -> _Contradiction:
    names = {name for layer in layers for name in names_of[layer]}
    found = f"{finding} model.layers.{braces(layers)} ({len(names):,} tensors)"
    detail = f"is {cfg.num_nextn_predict_layers}, {found}; {advice}, or import with --scope main"
    return _Contradiction(Problem("config", "num_nextn_predict_layers", detail), names)


def _names_from(first: int, *groups: dict[int, list[str]]) -> set[str]:
    """Names of all layers from `first` on."""
    layers = (item for group in groups for item in group.items())
    return {name for layer, names in layers if layer >= first for name in names}


def _quantisation_contradictions(tensors: Tensors, wanted: Slots) -> Iterator[_Contradiction]:
    """FP8 tensors under a config without quantization_config."""
    stored = [name for name in wanted if name in tensors and tensors[name].dtype == FP8]
    if stored:
        scales = {name + SCALE_SUFFIX for name in stored}
        detail = f"is absent, the files hold {len(stored):,} {FP8} tensors"
        advice = "take over the source's, with its weight_block_size"
        problem = Problem("config", "quantization_config", f"{detail}; {advice}")
        yield _Contradiction(problem, {*stored, *scales})


def _other_quantisation(tensors: Tensors, wanted: Slots) -> Iterator[_Contradiction]:
    """Tensors of formats that this toolkit does not read, and the weights that they stand for."""
    found = {name for name in tensors if name.rpartition(".")[2] in _OF_OTHER_FORMATS}
    names = sorted(found - wanted.keys())
    if names:
        kinds = " and ".join(sorted({name.rpartition(".")[2] for name in names}))
        detail = f"is of another format: {len(names):,} tensors of {kinds}, as {shown(names[0])}"
        needed = "needed FP8 in blocks, or weights that were dequantised to bfloat16"
        weights = {f"{name.rpartition('.')[0]}.weight" for name in names}
        problem = Problem("config", "quantization_config", f"{detail}; {needed}")
        yield _Contradiction(problem, {*names, *weights, *(w + SCALE_SUFFIX for w in weights)})


def _nothing_quantised(
    tensors: Tensors, table: Slots, entries: tuple[str, ...]
) -> Iterator[Problem]:
    """A quantization_config for weights of which none is FP8, as dequantising tools leave it."""
    modules = NotConverted(entries)
    meant = [slot for slot in table.values() if slot.scale and not modules.entry_for(slot.name)]
    present = [slot.name for slot in meant if slot.name in tensors]
    if present and not any(slot.scale in tensors for slot in meant):
        detail = f"is there, none of the {len(present):,} tensors that it means is {FP8}"
        advice = "remove it where the weights were dequantised"
        yield Problem("config", "quantization_config", f"{detail}; {advice}")


def _dtype_contradictions(
    tensors: Tensors, cfg: ModelConfig, wanted: Slots
) -> Iterator[_Contradiction]:
    """A torch_dtype that most tensors do not have."""
    plain = wanted["model.embed_tokens.weight"].dtype
    scales = {slot.scale for slot in wanted.values()}
    plain_slots = (slot for slot in wanted.values() if slot.dtype == plain)
    named = [s.name for s in plain_slots if s.name in tensors and s.name not in scales]
    (common, count), *_ = Counter(tensors[name].dtype for name in named).most_common(1) or [("", 0)]
    if common in _TORCH_DTYPES and common != plain and 2 * count > len(named):
        detail = f"is {cfg.dtype!r}, {count:,} of {len(named):,} unquantised tensors are {common}"
        problem = Problem("config", "torch_dtype", f"{detail}: {_TORCH_DTYPES[common]}")
        yield _Contradiction(problem, {n for n in named if tensors[n].dtype == common})


def _module_contradictions(
    tensors: Tensors, cfg: ModelConfig, wanted: Slots, where: str
) -> Iterator[_Contradiction]:
    """An MTP module in float32 beside a bfloat16 main model, as training leaves it; or reversed."""
    embedding = "model.embed_tokens.weight"
    if embedding not in tensors or tensors[embedding].dtype != wanted[embedding].dtype:
        return  # the main model itself is in another dtype
    other = {"F32": "BF16", "BF16": "F32"}[wanted[embedding].dtype]
    scales = {slot.scale for slot in wanted.values()}
    names = {
        name
        for name, slot in wanted.items()
        if _is_mtp(name, cfg) and name not in scales and not slot.is_widened
        if name in tensors and tensors[name].dtype == other
    }
    if names:
        detail = f"holds {len(names):,} tensors in {other}, the main model's are not"
        advice = f"to write them as the main model's, import with --mtp-from {shlex.quote(where)}"
        layers = braces(layer for name in names if (layer := layer_of(name)) is not None)
        yield _Contradiction(
            Problem("dtype", f"model.layers.{layers}", f"{detail}; {advice}"), names
        )


def _missing(tensors: Tensors, wanted: Slots, explained: set[str]) -> Iterator[Problem]:
    weights = {slot.scale: slot.name for slot in wanted.values() if slot.scale}
    for name, slot in wanted.items():
        if name in tensors or name in explained or slot.copy_of:
            continue
        weight = tensors.get(weights.get(name, ""))
        if slot.scale and slot.scale in tensors:
            yield Problem("scale", slot.scale, "is there and its weight is missing")
        elif weight is None:
            yield Problem("missing", name)
        elif weight.dtype == FP8:  # the scale of another dtype is not what is wrong there
            yield Problem("scale", weight.name, f"is {FP8} and its {SCALE_SUFFIX} is missing")


def _unknown(tensors: Tensors, known: Slots, explained: set[str]) -> Iterator[Problem]:
    readable = " and ".join(MODEL_TYPES)
    for name, tensor in tensors.items():
        if name in known or name in explained:
            continue
        weight = name.removesuffix(SCALE_SUFFIX)
        if weight != name and weight in known:
            yield Problem("scale", name, "scales a tensor that is not quantised under this config")
        elif fused := fused_weights(name):
            detail = f"is {tensor.shape}, needed [experts, {len(fused)} x rows, columns]"
            yield Problem("shape", name, f"{detail}, of each expert {' and '.join(fused)}")
        else:
            yield Problem("unknown", shown(name), f"has no rule; this toolkit reads {readable}")


def _misfits(tensors: Tensors, wanted: Slots) -> Iterator[Problem]:
    for name, slot in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tensor.shape != slot.shape:
            yield Problem("shape", name, f"is {tensor.shape}, the config needs {slot.shape}")
        if tensor.dtype != slot.dtype:
            yield Problem("dtype", name, f"is {tensor.dtype}, the config needs {slot.dtype}")

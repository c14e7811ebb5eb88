"""Which weights are FP8: what their tensors say, and where config.json contradicts them.

A weight is FP8 if its tensor is F8_E4M3 with block scales beside it. `quantization_config` says
only how large the blocks are; a checkpoint may hold any of its weights in its own dtype instead: an
MTP module tuned in BF16 beside an FP8 main model, the reverse, or single projections.

`modules_to_not_convert` (other name: `ignored_layers`) names such weights for engines, which build
their modules by it before they see a tensor. So

* a module that it names and whose weight is FP8 is an error: Transformers and SGLang would read the
  codes as numbers, without their scales;
* a weight that is not FP8 and that it does not name is imported, and said: tools that merge or tune
  modules leave the list out, as DeepSeek's own releases do for `eh_proj`, and no value is in doubt.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from converters.format.header import TensorInfo
from converters.format.mapping import SCALE_SUFFIX, Slot
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem, group_names

FP8 = "F8_E4M3"
_MOST_PATTERNS = 64
_OF_REGEXES = set("[](){}+?^$|\\:")


@dataclass(frozen=True, kw_only=True)
class PlainWeights:
    """Weights that are not FP8 in a checkpoint whose others are.

    where: layers of which no weight is FP8, or weights with alike names. named: whether
    `modules_to_not_convert` names them all, so that engines expect them so.
    """

    where: str
    dtype: str
    weights: int
    named: bool


def as_stored(table: Mapping[str, Slot], tensors: Mapping[str, TensorInfo]) -> dict[str, Slot]:
    """The slots of a network in the kind that their tensors have, where it may be another one.

    A weight that may be FP8 may have its checkpoint's own dtype instead, and no scales then. A
    router bias may be BF16: it is widened, which is exact.
    """
    plain = table["model.embed_tokens.weight"].dtype
    found = dict(table)
    for name, slot in table.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype == slot.dtype:
            continue
        if slot.scale and tensor.dtype == plain:
            found[name] = dataclasses.replace(slot, dtype=plain, scale=None)
            del found[slot.scale]
        elif slot.is_widened and tensor.dtype == "BF16":
            found[name] = dataclasses.replace(slot, dtype="BF16")
    return found


class NotConverted:
    """The list of modules that are not FP8, as any of its readers understands an entry.

    Transformers: a name from its start to a dot, with `*` or `.*` for anything, or the end of a
    name. SGLang: whole parts of a name anywhere. vLLM: a name in full.
    """

    def __init__(self, entries: Sequence[str]):
        parts = {entry: entry.removesuffix(".weight").strip(".") for entry in entries}
        self._faulty = [entry for entry, part in parts.items() if not part or _is_regex(part)]
        readable = {part: entry for entry, part in parts.items() if entry not in self._faulty}
        self._names = {part: entry for part, entry in readable.items() if "*" not in part}
        patterns = {part: entry for part, entry in readable.items() if "*" in part}
        self._patterns = {part.replace(".*", "*"): entry for part, entry in patterns.items()}
        self._lengths = {len(name) for name in self._names}

    def faults(self) -> Iterator[str]:
        """What cannot be read of the list."""
        for entry in self._faulty:
            found = f"holds {shown(entry)}, which is no name of a module"
            yield f"{found}; write the names out, with * for any part of them"
        if len(self._patterns) > _MOST_PATTERNS:
            found = f"holds {len(self._patterns)} entries with *, this toolkit reads"
            yield f"{found} {_MOST_PATTERNS}; write the names out"

    def entry_for(self, weight: str) -> str | None:
        """The entry that names the module of a weight; None where there is none."""
        module = weight.removesuffix(".weight")
        parts = module.split(".")
        for start in range(len(parts)):
            for stop in range(start + 1, len(parts) + 1):
                entry = self._names.get(".".join(parts[start:stop]))
                if entry is not None:
                    return entry
        for length in self._lengths:
            if module[-length:] in self._names:
                return self._names[module[-length:]]
        return next((e for glob, e in self._patterns.items() if _matches(glob, module)), None)


def _is_regex(entry: str) -> bool:
    return not _OF_REGEXES.isdisjoint(entry)


def _matches(glob: str, module: str) -> bool:
    """Whether a pattern fits whole parts of a module's name; `*` stands for any text."""
    first, *others = glob.split("*")
    last = others.pop()
    at = 0
    if first:
        at = f".{module}".find(f".{first}")
        if at < 0:
            return False
        at += len(first)
    for piece in others:
        at = module.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return not last or f"{module}.".find(f"{last}.", at) >= 0


def list_problems(
    key: str,
    entries: Sequence[str],
    table: Mapping[str, Slot],
    tensors: Mapping[str, TensorInfo],
) -> Iterator[Problem]:
    """Entries of the list, a key of the config, that cannot be read or that tensors contradict."""
    modules = NotConverted(entries)
    unreadable = [*modules.faults()]
    yield from (Problem("config", key, fault) for fault in unreadable)
    if unreadable or not entries:
        return
    contradicted: dict[str, list[str]] = {}
    for name in table:
        if name in tensors and tensors[name].dtype == FP8 and (entry := modules.entry_for(name)):
            contradicted.setdefault(entry, []).append(name)
    for entry, names in contradicted.items():
        found = f"names {shown(entry)}, and {len(names):,} of its weights are {FP8}"
        yield Problem("config", key, f"{found}, as {names[0]}; take it out of the list")


def stray_scales(
    table: Mapping[str, Slot], wanted: Mapping[str, Slot], tensors: Mapping[str, TensorInfo]
) -> Iterator[Problem]:
    """Scales beside weights that are not FP8: one of the two is of another checkpoint."""
    for name, slot in table.items():
        if slot.scale in tensors and name in wanted and not wanted[name].scale:
            found = f"is there, and {name} is {wanted[name].dtype}, which has none"
            yield Problem("scale", name + SCALE_SUFFIX, f"{found}; remove the scales")


def plain_weights(
    entries: Sequence[str], table: Mapping[str, Slot], wanted: Mapping[str, Slot]
) -> Iterator[PlainWeights]:
    """The weights that could be FP8 and are not: whole layers, then what is left, in groups.

    wanted: of the table, as it is stored.
    """
    modules = NotConverted(entries)
    layers: dict[str, list[Slot]] = {}
    for slot in table.values():
        if slot.scale and slot.name in wanted:
            layer = ".".join(slot.name.split(".", 3)[:3])
            layers.setdefault(layer, []).append(wanted[slot.name])
    whole: dict[bool, list[tuple[str, Slot]]] = {}
    single: dict[bool, list[tuple[str, Slot]]] = {}
    for layer, found in layers.items():
        plain = [slot for slot in found if not slot.scale]
        is_named = [modules.entry_for(slot.name) is not None for slot in plain]
        if len(plain) == len(found):
            whole.setdefault(all(is_named), []).extend((layer, slot) for slot in plain)
            continue
        for slot, named in zip(plain, is_named, strict=True):
            single.setdefault(named, []).append((slot.name, slot))
    for groups in (whole, single):
        for named, members in groups.items():
            yield from _grouped(members, named=named)


def _grouped(members: list[tuple[str, Slot]], *, named: bool) -> Iterator[PlainWeights]:
    """Weights by the names of what they are told by, alike names as one."""
    weights = Counter(name for name, _ in members)
    for where, count in group_names(weights):
        each = len(members) // len(weights)  # of a layer its weights, of a weight one
        dtype = members[0][1].dtype
        yield PlainWeights(where=where, dtype=dtype, weights=count * each, named=named)

"""Any two checkpoints, tensor by tensor: what differs, by part of the network and by name.

Each may be a safetensors checkpoint anywhere, a checkpoint directory (as its export would write it)
or a draft: MTP modules alone, whatever the number of their layer. Tensors of one dtype differ where
their bytes do. Where dtypes or FP8 scales are not the same, their float32 values tell; FP8 beside
bfloat16 is first rounded to that, as tools that dequantise do.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, NamedTuple

from converters.exporting.as_source import DirectorySource
from converters.format import fp8
from converters.format.header import TensorInfo
from converters.format.kinds import FP8
from converters.format.listing import open_safetensors
from converters.format.mapping import GROUPS, SCALE_SUFFIX, group_of_name, layer_of, mtp_layers
from converters.sources.source import Finish, Source
from converters.verifying.digests import DEFAULT_WORKERS
from converters.verifying.fetched import fetched_ahead
from converters.verifying.tensors import Errors, PairComparer, Stored, ratio
from converters.verifying.verify import STORAGE_FIELDS
from mtp_model.families import read_config
from mtp_model.files.untrusted_json import shown
from mtp_model.model import Scope
from mtp_model.problems import Problem, ProblemsError, raise_if_any
from mtp_model.progress import OnProgress
from mtp_model.threads import in_threads

_MODULE = "model.mtp."
MAIN, MTP = "main model", "MTP module"
MTP_GROUPS = ("MTP modules", "copies")
MAIN_GROUPS = tuple(group for group in GROUPS if group not in (*MTP_GROUPS, "buffers"))
_NOT_NEEDED = ("copies", "buffers")  # a checkpoint may leave these out, and is the same network


@dataclass(frozen=True, kw_only=True)
class ChangedTensor:
    """A tensor that differs. in_b: its name there, if that is another one.

    max_error: the largest difference of a value over the largest magnitude in A; rms_error: root
    mean square of the differences over that of the values in A. Both are infinite where a value is
    no finite number, or shapes differ. changed: how many of its values; None for another shape.
    """

    name: str
    in_b: str | None
    group: str
    a: str
    b: str
    values: int
    changed: int | None
    max_error: float
    rms_error: float


@dataclass(frozen=True, kw_only=True)
class ComparedPart:
    """A group of tensors, scales counted with their weights.

    bytes: of A's side. equal: other bytes in another format, and the same values. max_error,
    rms_error: of those that differ, the largest of all, and of all together.
    """

    tensors: int
    bytes: int
    identical: int
    equal: int
    differing: int
    max_error: float
    rms_error: float
    only_in_a: int
    only_in_b: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that `verify A B` found. main_changed, mtp_changed: None where it was not compared."""

    a: str
    b: str
    scope: Scope
    parts: dict[str, ComparedPart]
    differences: tuple[ChangedTensor, ...]
    """The worst first."""
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    config: tuple[str, ...]
    """What config.json says of the network, where it is not the same."""
    not_compared: dict[str, str]
    """Of `main model` and `MTP module`, why it was not compared."""
    main_changed: bool | None
    mtp_changed: bool | None

    @property
    def holds(self) -> bool:
        """Whether nothing differs of what both sides are to hold."""
        missing = (p for group, p in self.parts.items() if group not in _NOT_NEEDED)
        return not (
            self.differences or self.config or any(p.only_in_a or p.only_in_b for p in missing)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json and report.json."""
        return {**dataclasses.asdict(self), "holds": self.holds}


class Side(NamedTuple):
    """One of two checkpoints. weights: by names that both sides have: modules are counted from 0.

    lacks: of `main model` and `MTP module`, what this kind of checkpoint has not.
    """

    source: Source
    weights: Mapping[str, Stored]
    fields: Mapping[str, Any]
    lacks: frozenset[str]


def open_side(source: Source) -> Side:
    """Headers and config; ProblemsError where its FP8 weights have no scales that fit."""
    opened = open_safetensors(source)
    fields, faults = read_config({**opened.config, "architectures": None})  # a draft's are its own
    raise_if_any(source.name, (Problem("config", *fault.split(" ", 1)) for fault in faults))
    tensors, lacks = opened.tensors, set[str]()
    if isinstance(source, DirectorySource):
        tensors = {name: tensors[name] for name in tensors if name in source.held}
        if source.scope == "main":  # its files name the copies too, which it could give
            lacks.add(MTP)
            end = fields["num_hidden_layers"]
            tensors = {n: tensors[n] for n in tensors if (layer_of(n) or 0) < end}
    stored, problems = {}, []
    for name, tensor in tensors.items():
        weight = name.removesuffix(SCALE_SUFFIX)
        if weight != name and weight in tensors and tensors[weight].dtype == FP8:
            continue  # goes with its weight
        scale = tensors.get(name + SCALE_SUFFIX) if tensor.dtype == FP8 else None
        block = fields["weight_block_size"] if tensor.dtype == FP8 else (1, 1)
        stored[name] = Stored(tensor, scale, block or (1, 1))
        if tensor.dtype == FP8 and not _is_scaled(tensor, scale, block):
            detail = f"is {FP8} without float32 scales of the blocks that config.json says"
            problems.append(Problem("scale", shown(name), detail))
    raise_if_any(source.name, problems)
    modules = mtp_layers(tensors)
    if all(layer is None or layer in modules for layer in map(layer_of, tensors)):
        lacks.add(MAIN)
    return Side(source, _by_common_name(stored, modules), fields, frozenset(lacks))


def _is_scaled(tensor: TensorInfo, scale: TensorInfo | None, block: fp8.Block | None) -> bool:
    if scale is None or block is None or scale.dtype != "F32" or len(tensor.shape) != 2:
        return False
    return scale.shape == fp8.grid(tensor.shape, block)


def _by_common_name(stored: Mapping[str, Stored], modules: list[int]) -> dict[str, Stored]:
    numbers = {layer: f"{_MODULE}{k}." for k, layer in enumerate(modules)}
    return {
        name.replace(f"model.layers.{layer}.", numbers[layer], 1) if layer in numbers else name: s
        for name, s in stored.items()
        for layer in (layer_of(name),)
    }


def _half(name: str) -> str | None:
    """What a weight, by its common name, belongs to; None for embedding, norm, head and others."""
    if name.startswith(_MODULE):
        return MTP
    return MAIN if layer_of(name) is not None else None


def compare(
    a: Side,
    b: Side,
    *,
    scope: Scope = "all",
    workers: int = DEFAULT_WORKERS,
    progress: OnProgress | None = None,
) -> Comparison:
    """Compare what both sides are to hold, `workers` tensors at once, a few pieces in memory.

    Raises ProblemsError where there is nothing to compare, CheckpointError where the disk of
    temporary files has no room for what a far source needs.
    """
    not_compared = _not_compared(a, b, scope)
    names = [n for n in {**a.weights, **b.weights} if _half(n) not in not_compared]
    both = [n for n in names if n in a.weights and n in b.weights]
    # Who has no layers of one half may do without embedding, norm and head too.
    partial = bool(a.lacks | b.lacks)
    only = [n for n in names if (n in a.weights) != (n in b.weights) and (_half(n) or not partial)]
    if not both:
        detail = "have no tensor in common; name two checkpoints of one network"
        where = f"{a.source.name} and {b.source.name}"
        raise ProblemsError(where, [Problem("names", "A and B", detail)])
    both.sort(key=lambda name: a.weights[name].reads[0])
    errors = _errors(a, b, both, workers, progress)
    parts = _parts(a, errors, only)
    differing = (_changed(name, e, a, b) for name, e in errors.items() if e and e.differs)
    return Comparison(
        a=a.source.name,
        b=b.source.name,
        scope=scope,
        parts=parts,
        differences=tuple(sorted(differing, key=lambda t: (-t.max_error, t.name))),
        only_in_a=tuple(a.weights[n].tensor.name for n in only if n in a.weights),
        only_in_b=tuple(b.weights[n].tensor.name for n in only if n in b.weights),
        config=() if partial else tuple(_other_config(a.fields, b.fields)),
        not_compared=not_compared,
        main_changed=_is_changed(parts, MAIN_GROUPS) if MAIN not in not_compared else None,
        mtp_changed=_is_changed(parts, MTP_GROUPS) if MTP not in not_compared else None,
    )


def _not_compared(a: Side, b: Side, scope: Scope) -> dict[str, str]:
    """Of both halves, why they are left out; ProblemsError where --scope asks for one of them."""
    found = {}
    for half, other in ((MAIN, "mtp"), (MTP, "main")):
        lacking = [side.source.name for side in (a, b) if half in side.lacks]
        present = any(_half(name) == half for side in (a, b) for name in side.weights)
        if scope == other:
            found[half] = "left out by --scope"
        elif lacking or not present:
            found[half] = f"{lacking[0]} holds none" if lacking else "neither side holds one"
            if scope != "all":
                problem = Problem("scope", half, f"{found[half]}; compare without --scope {scope}")
                raise ProblemsError(f"{a.source.name} and {b.source.name}", [problem])
    return found


def _errors(
    a: Side, b: Side, names: Sequence[str], workers: int, progress: OnProgress | None
) -> dict[str, Errors | None]:
    """How far both are apart in each weight, in the order of `names`."""
    found: dict[str, Errors | None] = {}
    comparer, sides = PairComparer(a.source, b.source), (a, b)
    total, done = sum(s.weights[n].nbytes for s in sides for n in names), 0
    with ExitStack() as stack:
        finishes: list[Finish] = [
            stack.enter_context(fetched_ahead(s.source, {n: s.weights[n].reads for n in names}))
            for s in sides
        ]

        def compare_one(name: str) -> str:
            found[name] = comparer.compare(a.weights[name], b.weights[name])
            for finish in finishes:
                finish(name)
            return name

        with closing(in_threads(compare_one, names, workers)) as compared:
            for name in compared:
                done += sum(side.weights[name].nbytes for side in sides)
                if progress:
                    progress(done, total)
    return {name: found[name] for name in names}


def _changed(name: str, errors: Errors, a: Side, b: Side) -> ChangedTensor:
    ours, theirs = a.weights[name], b.weights[name]
    alike = ours.tensor.shape == theirs.tensor.shape
    return ChangedTensor(
        name=ours.tensor.name,
        in_b=theirs.tensor.name if theirs.tensor.name != ours.tensor.name else None,
        group=_group(name),
        a=ours.format,
        b=theirs.format,
        values=math.prod(ours.tensor.shape),
        changed=errors.changed if alike else None,
        max_error=errors.max_error,
        rms_error=errors.rms_error,
    )


def _group(name: str) -> str:
    """The group of a weight by its common name."""
    return group_of_name(name.removeprefix(_MODULE), is_mtp=name.startswith(_MODULE))


def _parts(
    a: Side, errors: Mapping[str, Errors | None], only: Sequence[str]
) -> dict[str, ComparedPart]:
    members: dict[str, list[str]] = {}
    for name in (*errors, *only):
        members.setdefault(_group(name), []).append(name)
    parts = {}
    for group in (group for group in GROUPS if group in members):
        names = [name for name in members[group] if name in errors]
        other = [e for name in names if (e := errors[name])]
        wrong = [e for e in other if e.differs]
        missing = [name for name in members[group] if name not in errors]
        in_a = sum(name in a.weights for name in missing)
        squares, of = sum(e.squares for e in wrong), sum(e.of for e in wrong)
        parts[group] = ComparedPart(
            tensors=len(names),
            bytes=sum(a.weights[name].nbytes for name in names),
            identical=len(names) - len(other),
            equal=len(other) - len(wrong),
            differing=len(wrong),
            max_error=max((e.max_error for e in wrong), default=0.0),
            rms_error=math.sqrt(ratio(squares, of)),
            only_in_a=in_a,
            only_in_b=len(missing) - in_a,
        )
    return parts


def _is_changed(parts: Mapping[str, ComparedPart], groups: Sequence[str]) -> bool:
    return any(
        part.differing or (group not in _NOT_NEEDED and part.only_in_a + part.only_in_b)
        for group, part in parts.items()
        if group in groups
    )


def _other_config(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(a.keys() - STORAGE_FIELDS):
        if a[key] != b[key]:
            yield f"{key} is {shown(a[key])} in A, {shown(b[key])} in B"

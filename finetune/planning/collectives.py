"""What the devices of a compiled step send each other: how often, and how many bytes.

Read from the program's text, in which the compiler's own collectives stand too, beside those of
`shard_map`. The format is XLA's (`HloModule::ToString`), of CPU and TPU alike.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

# Received by each of n devices, relative to the operation's result.
_RECEIVED = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,  # its parts, then the sums of the others' parts
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda _: 1,
    "collective-broadcast": lambda _: 1,
}
# `  ROOT %name = f32[2,3]{1,0} all-gather-start(%operand), ...`
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?[\w.-]+ = (?P<result>.*?) (?P<operation>[a-z][\w-]*)\((?P<rest>.*)$"
)
# `%body.3 (x: f32[2]) -> f32[2] {`, and of the whole program `ENTRY %main.9 (...) -> ... {`
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
    r"|(?:called_computations|branch_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')  # CPU's programs say it
# What TPU's have instead: `ROOT %lt = pred[] compare(%counter, %limit), direction=LT`
_LIMIT = re.compile(r"ROOT .* compare\(%?[\w.-]+, %?([\w.-]+)\), direction=LT")
_CONSTANT = re.compile(r"^\s+%?([\w.-]+) = [su]32\[\]\S* constant\((\d+)\)")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
# The three ways in which XLA writes which devices are a group; of each the size of one is wanted.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_OF_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\)[^{]*)? ?\{([^}]*)\}"
)
_DEVICES = re.compile(r"^HloModule .*\bnum_partitions=(\d+)")


@dataclass(frozen=True)
class Sent:
    """Of one kind of collective, in a step."""

    count: int
    received_bytes: int  # by one device


class _Instruction(NamedTuple):
    """A collective, or a call of other computations."""

    kind: str
    nbytes: float
    called: tuple[str, ...]
    trips: int | None  # that the program says they are run
    condition: str | None  # of a loop


class _Computation:
    """Its instructions that matter, and how often a loop runs of which it is the condition."""

    def __init__(self) -> None:
        self.instructions: list[_Instruction] = []
        self._constants: dict[str, int] = {}
        self._limit = ""

    def add(self, line: str, devices: int) -> None:
        if found := _CONSTANT.match(line):
            self._constants[found[1]] = int(found[2])
        elif found := _LIMIT.search(line):
            self._limit = found[1]
        elif found := _INSTRUCTION.match(line):
            self.instructions.extend(_instruction(devices, **found.groupdict()))

    @property
    def rounds(self) -> int:
        """JAX counts from 0 by ones; 1 where it is not a constant that is counted to."""
        return self._constants.get(self._limit, 1)


def collectives_of(text: str) -> dict[str, Sent]:
    """By kind. Loops count as often as they run; those of which that depends on the data, the
    rounds in which tokens are brought to experts, once, as under a balanced load. Of a choice each
    branch counts.
    """
    computations, entry = _parse(text)
    if not entry:
        return {}
    counts: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for name, times in _runs(computations, entry).items():
        for each in computations[name].instructions:
            if each.kind:
                counts[each.kind] += times
                nbytes[each.kind] += round(times * each.nbytes)
    return {kind: Sent(counts[kind], nbytes[kind]) for kind in sorted(counts)}


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry = name = ""
    header = _DEVICES.match(text)
    devices = int(header[1]) if header else 1
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found["name"]
            computations[name] = _Computation()
            entry = name if found["entry"] else entry
        elif name:
            computations[name].add(line, devices)
    return computations, entry


def _instruction(devices: int, result: str, operation: str, rest: str) -> Iterator[_Instruction]:
    kind = operation.removesuffix("-start")
    if kind in _RECEIVED:
        arrays = [_of_array(*found) for found in _ARRAY.findall(result)]
        size = sum(arrays if operation == kind else _begun(arrays, kind))
        together = _group_size(rest) or devices
        if together > 1:
            yield _Instruction(kind, size * _RECEIVED[kind](together), (), None, None)
        return
    called = tuple(
        name.strip().removeprefix("%")
        for one, several in _CALLED.findall(rest)
        for name in (several.split(",") if several else [one])
    )
    if called:
        trips, condition = _TRIPS.search(rest), _CONDITION.search(rest)
        yield _Instruction("", 0, called, trips and int(trips[1]), condition and condition[1])


def _begun(arrays: list[float], kind: str) -> list[float]:
    """The results among what a collective that has begun gives: others come before them, but for
    a sum, which gives its results alone; behind those of a permutation there are counters."""
    if kind == "all-reduce":
        return arrays
    return [arrays[1]] if kind == "collective-permute" else arrays[len(arrays) // 2 :]


def _of_array(dtype: str, dimensions: str) -> float:
    """Bytes."""
    bits = 8 if dtype == "pred" else int(dtype.lstrip("abcfsu").partition("e")[0])
    return math.prod(map(int, filter(None, dimensions.split(",")))) * bits / 8


def _group_size(rest: str) -> int | None:
    """None: of all devices together, or in pairs."""
    if found := _LISTED.search(rest):
        return len(found[1].split(","))
    if found := _COUNTED.search(rest):
        return int(found[1])
    if found := _OF_MESH.search(rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # an axis, or a part of it
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return None


def _runs(computations: Mapping[str, _Computation], entry: str) -> Counter[str]:
    """How often each computation runs."""
    runs: Counter[str] = Counter()

    def run(name: str, times: int) -> None:
        runs[name] += times
        for each in computations[name].instructions:
            rounds = computations[each.condition].rounds if each.condition else 1
            for called in each.called:
                run(called, times * (each.trips or rounds))

    run(entry, 1)
    return runs

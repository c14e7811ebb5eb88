"""Slices of TPUs that need not be here: their devices, their speed, and compiling for them.

A file of its own: it knows of hardware, and nothing of models.
Source of the speeds: Google's pages on TPU system architecture (cloud.google.com/tpu/docs), a chip.
"""

import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from finetune.planning.collectives import Sent, collectives_of
from mtp_model import make_mesh
from mtp_model.meshes import VMEM_LIMIT
from mtp_model.problems import UserError

HERE = "here"  # the topology of the devices of this machine

# What libtpu is told where there is no TPU: ask nobody for one, and let others load it too.
_WITHOUT_A_TPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# The compiler for TPUs optimises at levels. At its first (EFFORT_O1 of xla's ExecutionOptions) a
# step of DeepSeek-V3 is compiled in a third of the time and two thirds of the host's memory, and
# takes between 1.4 of 100 GB less and 0.4 more of a device than that of `train`, which has them all
# (docs/performance.md).
_FIRST_LEVEL = 19
# Of a v6e at that level, as libtpu has it: with what `train` has (mtp_model/meshes.py) a step takes
# two to four times as long to compile, and the same memory of a device.
_FIRST_VMEM_KIB = 32 << 10
_BETWEEN_LEVELS = 0.03  # of a device's memory: twice what was found to lie between the two
_MOST_SAID = 800  # characters of what the compiler says
_IS_VMEM = "ScopedVmemOom"  # in what the compiler says where a kernel needs more than it may have
_AVAILABLE = re.compile(r"available HBM \(([\d.]+)G\)|of ([\d.]+)G hbm")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A generation of TPUs: what a chip does in a second, and the slices there are."""

    flops: float  # bfloat16, multiply and add counted apart
    hbm_bytes: float
    interconnect_bytes: float  # of all links of a chip
    sizes: tuple[str, ...]  # from the smallest


_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

FAMILIES = {
    "v5e": Family(
        flops=197e12,
        hbm_bytes=819e9,
        interconnect_bytes=200e9,
        sizes=_SQUARES,
    ),
    "v5p": Family(
        flops=459e12,
        hbm_bytes=2765e9,
        interconnect_bytes=600e9,
        sizes=_CUBES,
    ),
    "v6e": Family(
        flops=918e12,
        hbm_bytes=1640e9,
        interconnect_bytes=448e9,
        sizes=_SQUARES,
    ),
    "tpu7x": Family(
        flops=2307e12,
        hbm_bytes=7380e9,
        interconnect_bytes=1200e9,
        sizes=_CUBES,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Devices that are planned for."""

    name: str
    devices: Sequence[Any]
    chips: int
    memory: int | None  # bytes of a device that a program may use; None: nobody knows
    family: Family | None  # None: of another kind of device


class Compiled(NamedTuple):
    """A step as it was compiled; bytes are those of one device."""

    memory: Any | None  # None: it does not fit
    needed: int | None  # bytes; None: the compiler did not say
    limit: int | None  # bytes; None: nobody knows
    collectives: dict[str, Sent] | None
    in_full: bool  # with all the optimisations that `train` has

    @property
    def is_open(self) -> bool:
        """Whether the step may fit, or not fit, when it is compiled in full."""
        if self.in_full or self.limit is None:
            return False
        if self.needed is None:
            return True
        return abs(self.needed - self.limit) < _BETWEEN_LEVELS * self.limit


def open_slice(name: str) -> Slice:
    """The slice of a topology, `v5p:2x2x4`; `here` are the devices of this machine.

    UserError for a name that is none, and where libtpu is not installed.
    """
    if name == HERE:
        return Slice(
            name=name, devices=jax.devices(), chips=jax.device_count(), memory=None, family=None
        )
    family = family_of(name)
    size = name.partition(":")[2]
    if size not in FAMILIES[family].sizes:
        known = ", ".join(f"{family}:{each}" for each in FAMILIES[family].sizes)
        raise UserError(f"--topology is {name}, needed {HERE} or one of {known}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {name} is compiled for by libtpu, which is not here: it comes with the "
            "extra `tpu` of deepseek-mtp, and needs no TPU"
        )
    os.environ |= _WITHOUT_A_TPU
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    chips = len({tuple(device.coords) for device in devices})
    return Slice(
        name=name,
        devices=devices,
        chips=chips,
        memory=_available(devices),
        family=FAMILIES[family],
    )


def family_of(name: str) -> str:
    """The family of a topology's name; UserError where it has none."""
    family = name.partition(":")[0]
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"--topology is {name}, needed {HERE} or a slice of {known}: v5p:2x2x4")
    return family


def compile_step(lowered: jax.stages.Lowered, place: Slice, in_full: bool) -> Compiled:
    """Compile for a slice; for devices of another kind always in full.

    Raises UserError where the compiler refuses the step for another reason than its memory.
    """
    in_full = in_full or place.family is None
    try:
        memory, collectives = _memory_and_sent(lowered, place, in_full)
    except jax.errors.JaxRuntimeError as error:
        needed, has = memory_in(error)
        if has is None:
            if _IS_VMEM in str(error) and not in_full:
                return compile_step(lowered, place, in_full=True)
            raise refusal(place, error) from error
        return Compiled(None, needed, place.memory, None, in_full)
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = memory.argument_size_in_bytes + kept + memory.temp_size_in_bytes
    return Compiled(memory, needed, place.memory, collectives, in_full)


def _memory_and_sent(
    lowered: jax.stages.Lowered, place: Slice, in_full: bool
) -> tuple[Any, dict[str, Sent] | None]:
    """Programs for slices are written down by the compiler: jaxlib 0.10 cannot read them back where
    they have asynchronous calls of several operands."""
    if place.family is None:
        compiled = lowered.compile()
        return compiled.memory_analysis(), collectives_of(compiled.as_text() or "")
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        options: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        if not in_full:
            options["optimization_level"] = _FIRST_LEVEL
            if place.family is FAMILIES["v6e"]:
                options[VMEM_LIMIT] = str(_FIRST_VMEM_KIB)
        memory = lowered.compile(compiler_options=options).memory_analysis()
        text = next(Path(folder).glob("*.after_optimizations.txt"), None)
        return memory, collectives_of(text.read_text()) if text else None


def memory_in(error: Exception) -> tuple[int | None, int | None]:
    """Bytes that a program needs and that a device has, as XLA says where it does not fit."""
    said = str(error)
    needed = re.search(r"Used ([\d.]+)G of|memory required[^(]*\(([\d.]+)G\)", said)
    has = _AVAILABLE.search(said)
    return _gibibytes(needed), _gibibytes(has)


def refusal(place: Slice, error: Exception) -> UserError:
    """What the compiler says of a step that it cannot compile at all."""
    said = " ".join(str(error).split())
    words = f"the compiler refuses the step, not for want of HBM: {said[:_MOST_SAID]}"
    if _IS_VMEM in said:  # of 32 MB for a kernel, also where a core has more (v6e)
        words += "; set LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=98304 and run it again"
    return UserError(f"{place.name}: {words}")


def _gibibytes(found: re.Match[str] | None) -> int | None:
    return int(float(next(filter(None, found.groups()))) * 2**30) if found else None


def _available(devices: Sequence[Any]) -> int | None:
    """Bytes of a device that a program may use: what the compiler says of one that needs more."""
    rows = NamedSharding(make_mesh(data=len(devices), devices=devices), PartitionSpec("data"))
    large = jax.ShapeDtypeStruct((len(devices), 1 << 42), jnp.float32, sharding=rows)
    try:
        jax.jit(lambda x: x + 1).lower(large).compile()
    except jax.errors.JaxRuntimeError as error:
        return memory_in(error)[1]
    return None

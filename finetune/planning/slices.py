"""Slices of TPUs that need not be here: their devices, to compile for, and their speed.

A file of its own: it knows of hardware, and nothing of models.
Source of the speeds: Google's pages on TPU system architecture (cloud.google.com/tpu/docs), a chip.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from mtp_model import make_mesh
from mtp_model.problems import UserError

HERE = "here"  # the topology of the devices of this machine

# What libtpu is told where there is no TPU: ask nobody for one, and let others load it too.
_WITHOUT_A_TPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
_MOST_SAID = 800  # characters of what the compiler says
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
    if "ScopedVmemOom" in said:  # of 32 MB for a kernel, also where a core has more (v6e)
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

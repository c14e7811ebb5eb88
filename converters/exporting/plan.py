"""What an export writes: files, headers, side files; reads no tensor and writes nothing."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from converters.format.header import TensorInfo, make_header, parse_header
from converters.format.listing import INDEX_FILE
from converters.format.mapping import slots
from mtp_model.checkpoint.directory import CONFIG, Checkpoint
from mtp_model.config import ModelConfig
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem, ProblemsError

Dtype = Literal["keep", "bf16"]


@dataclass(frozen=True, kw_only=True)
class OutFile:
    """A safetensors file to write."""

    name: str
    size: int
    raw_header: bytes
    tensors: tuple[TensorInfo, ...]
    is_source_file: bool
    """Header and dtypes are those of the source's file of this name."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An export. `replaced`: side files whose content is not the checkpoint's."""

    files: tuple[OutFile, ...]
    replaced: dict[str, bytes]
    notes: tuple[str, ...]

    @property
    def dtypes(self) -> dict[str, str]:
        """Dtype of every tensor that is written."""
        return {tensor.name: tensor.dtype for file in self.files for tensor in file.tensors}


def make_plan(checkpoint: Checkpoint, dtype: Dtype, *, has_base: bool = False) -> Plan:
    """The plan; ProblemsError when the checkpoint lacks tensors, and there is no base to have them.

    With a base the dtype is `keep`.
    """
    assert dtype == "keep" or not has_base
    where = str(checkpoint.path / "layout.json")
    files = tuple(
        _out_file(name, text.encode(), where, is_source_file=True)
        for name, text in checkpoint.layout().items()
    )
    scope = checkpoint.provenance["scope"]
    if scope != "all" and not has_base:
        name = shown(checkpoint.provenance["source"]["name"])
        detail = f"was imported with --scope {scope}, which left out the other tensors of {name}"
        advice = "export it with --base, naming that source, to write the whole checkpoint"
        problem = Problem("scope", "the checkpoint", f"{detail}; {advice}")
        raise ProblemsError(str(checkpoint.path), [problem])
    config = ModelConfig.from_dict(checkpoint.config_dict)
    if dtype == "keep":
        return Plan(files=files, replaced={}, notes=())
    return _as_bf16(checkpoint, config, files)


def _out_file(name: str, raw_header: bytes, where: str, *, is_source_file: bool) -> OutFile:
    header = parse_header(raw_header, name, where)
    return OutFile(
        name=name,
        size=header.size,
        raw_header=raw_header,
        tensors=header.tensors,
        is_source_file=is_source_file,
    )


def _as_bf16(checkpoint: Checkpoint, config: ModelConfig, files: tuple[OutFile, ...]) -> Plan:
    """The same files with what a bfloat16 checkpoint of this network has: no scales."""
    plain = slots(dataclasses.replace(config, dtype="bfloat16", weight_block_size=None))
    where = str(checkpoint.path / "layout.json")
    written = []
    for file in files:
        kept = [(t.name, plain[t.name].dtype, t.shape) for t in file.tensors if t.name in plain]
        metadata = parse_header(file.raw_header, file.name, where).metadata
        if kept:
            header = make_header(kept, metadata)
            written.append(_out_file(file.name, header, where, is_source_file=False))
    replaced = {CONFIG: _json(_bf16_config(checkpoint.config_dict))}
    if INDEX_FILE in checkpoint.side_files():
        replaced[INDEX_FILE] = _json(_index(written))
    num_scales = sum(len(file.tensors) for file in files) - sum(len(f.tensors) for f in written)
    notes = ("weights are written as bfloat16",)
    if num_scales:
        notes += (f"{num_scales:,} scales and config.json's quantization_config are left out",)
    return Plan(files=tuple(written), replaced=replaced, notes=notes)


def _bf16_config(config: Mapping[str, Any]) -> dict[str, Any]:
    changed = {key: value for key, value in config.items() if key != "quantization_config"}
    return changed | {key: "bfloat16" for key in ("torch_dtype", "dtype") if key in config}


def _index(files: list[OutFile]) -> dict[str, Any]:
    places = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

"""What an export writes: files, headers, side files. Reads no tensor and writes nothing."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from converters.exporting.encode import held_slots
from converters.format.header import Header, TensorInfo, make_header, parse_header
from converters.format.listing import INDEX_FILE
from converters.format.mapping import Slot, buffers, parts, slots, unfused
from mtp_model.checkpoint.directory import CONFIG, LAYOUT, Checkpoint
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem, ProblemsError

Dtype = Literal["keep", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What an export writes, made once a command.

    dtype `keep`: headers and dtypes are the source's. slots: of the tensors whose leaves the
    checkpoint has. replaced: side files whose content is not the checkpoint's. whole: of an MTP
    module alone, the files of the checkpoint that it is of; its only side file is config.json.
    """

    dtype: Dtype
    files: tuple[Header, ...]
    slots: Mapping[str, Slot]
    replaced: dict[str, bytes]
    notes: tuple[str, ...]
    whole: tuple[Header, ...] = ()

    @property
    def dtypes(self) -> dict[str, str]:
        """Dtype of every tensor that is written."""
        return {tensor.name: tensor.dtype for file in self.files for tensor in file.tensors}

    def side_files(self, checkpoint: Checkpoint) -> list[str]:
        """What is written beside the tensors, config.json last: without it nobody takes this for a
        checkpoint."""
        names = [CONFIG] if self.whole else checkpoint.side_files()
        return sorted(names, key=lambda name: name == CONFIG)

    def held(self, file: Header) -> tuple[TensorInfo, ...]:
        """The tensors of a file that the checkpoint has, copies of them included."""
        return tuple(tensor for tensor in file.tensors if tensor.name in self.slots)


def make_plan(
    checkpoint: Checkpoint, dtype: Dtype, *, has_base: bool = False, in_part: bool = False
) -> ExportPlan:
    """The plan; ProblemsError when the checkpoint lacks tensors, and there is no base to have them.

    With a base the dtype is `keep`. in_part: only some tensors will be written.
    """
    assert dtype == "keep" or not has_base
    scope = checkpoint.provenance["scope"]
    if scope != "all" and not (has_base or in_part):
        detail = (
            f"was imported with --scope {scope}, which left out the other tensors of its source"
        )
        advice = f"export it with --base {origin(checkpoint)} to write the whole checkpoint"
        problem = Problem("scope", "the checkpoint", f"{detail}; {advice}")
        raise ProblemsError(str(checkpoint.path), [problem])
    kept = ExportPlan(
        dtype="keep",
        files=tuple(
            unfused(parse_header(text.encode(), name, _where(checkpoint)))
            for name, text in checkpoint.layout().items()
        ),
        slots=held_slots(checkpoint),
        replaced={},
        notes=(),
    )
    return kept if dtype == "keep" else as_bf16(kept, checkpoint)


def origin(checkpoint: Checkpoint) -> str:
    """What a checkpoint was imported from, as a user names it to a command."""
    record = checkpoint.provenance
    name, taken = record["source"]["name"], record.get("mtp_source")
    return f"{_quoted(name)} --mtp-from {_quoted(taken['name'])}" if taken else _quoted(name)


def _quoted(name: str) -> str:
    return shlex.quote(shown(name))


def as_bf16(kept: ExportPlan, checkpoint: Checkpoint) -> ExportPlan:
    """The same files with what a bfloat16 checkpoint of this network has: no scales."""
    config = checkpoint.config
    plain = slots(dataclasses.replace(config, dtype="bfloat16", weight_block_size=None))
    dtypes = {name: slot.dtype for name, slot in plain.items()}
    as_in_file = {name for name, slot in plain.items() if slot.is_widened} | buffers(config).keys()
    written = []
    for file in kept.files:
        dtypes |= {t.name: t.dtype for t in file.tensors if t.name in as_in_file}
        stored = parse_header(file.raw, file.file, _where(checkpoint)).tensors
        named = [(tensor, next(parts(tensor)).name) for tensor in stored]
        tensors = [(t.name, dtypes[name], t.shape) for t, name in named if name in dtypes]
        if tensors:
            raw = make_header(tensors, file.metadata)
            written.append(unfused(parse_header(raw, file.file, _where(checkpoint))))
    replaced = {CONFIG: _json(_bf16_config(checkpoint.config_dict))}
    if INDEX_FILE in checkpoint.side_files():
        replaced[INDEX_FILE] = _json(_index(written))
    num_scales = sum(len(file.tensors) for file in kept.files)
    num_scales -= sum(len(file.tensors) for file in written)
    notes = ("weights are written as bfloat16",)
    if num_scales:
        notes += (f"{num_scales:,} scales and config.json's quantization_config are left out",)
    return ExportPlan(
        dtype="bf16", files=tuple(written), slots=kept.slots, replaced=replaced, notes=notes
    )


def _where(checkpoint: Checkpoint) -> str:
    return str(checkpoint.path / LAYOUT)


def _bf16_config(config: Mapping[str, Any]) -> dict[str, Any]:
    changed = {key: value for key, value in config.items() if key != "quantization_config"}
    return changed | {key: "bfloat16" for key in ("torch_dtype", "dtype") if key in config}


def _index(files: list[Header]) -> dict[str, Any]:
    places = {tensor.name_in_file: file.file for file in files for tensor in file.tensors}
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

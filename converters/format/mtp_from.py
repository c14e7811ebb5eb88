"""The main model of one checkpoint with the MTP module of another, as one checkpoint.

The files of the main model stay as they are. The module becomes one more file, in the format that
the main model's config promises: engines load it by that config. The index names the file, and
config.json announces the module. Tensors of a module that the main model has already are left out,
and the module is numbered as the config wants it, whatever number it had.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.format import fp8
from converters.format.fit import checked_config
from converters.format.header import Header, TensorInfo, parse_header
from converters.format.joined import (
    Format,
    JoinedSource,
    MadeFile,
    MadeTensor,
    RecodedTensor,
    TakenTensor,
    nbytes_of,
)
from converters.format.kinds import FP8, NotConverted
from converters.format.listing import (
    CONFIG_FILE,
    INDEX_FILE,
    SUFFIX,
    Listing,
    SourceCheckpoint,
    TakenModule,
    is_module_alone,
    list_checkpoint,
    named_files,
    open_safetensors,
    read_config,
    read_config_text,
    read_headers,
    read_index,
)
from converters.format.mapping import SCALE_SUFFIX, Slot, layer_of, mtp_layers, slots
from converters.sources.source import Source
from mtp_model.config import ModelConfig
from mtp_model.families import ALIASES, not_converted
from mtp_model.families import read_config as read_fields
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem, ProblemsError, braces, raise_if_any
from mtp_model.reporting import plural

MTP_FILE = "mtp.safetensors"
_PLAIN = ("BF16", "F32")
NEW_LAYERS = "mtp_new_layers"  # in a draft's config.json: layers that nothing was trained in
_ANNOUNCES = "num_nextn_predict_layers"
# What may differ: the module has no part in it, or is brought into the main model's.
_OF_THE_MAIN_MODEL = frozenset(
    "num_hidden_layers first_k_dense_replace intermediate_size num_nextn_predict_layers "
    "dtype weight_block_size power_of_two_scales mtp_hidden_state vocab_size".split()
)
_SIZES = frozenset(
    "hidden_size moe_intermediate_size num_attention_heads q_lora_rank kv_lora_rank "
    "qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts".split()
)


@dataclass(frozen=True, kw_only=True)
class FoundModule:
    """The MTP modules that a checkpoint holds, by whatever numbers; `config` {} where it has none.

    headers: of the files that they are in. tensors: those of their layers.
    """

    source: Source
    config: Mapping[str, Any]
    headers: Mapping[str, Header]
    layers: tuple[int, ...]
    tensors: Mapping[str, TensorInfo]

    @property
    def block(self) -> tuple[int, int] | None:
        """Blocks of its FP8 scales."""
        return read_fields(self.config)[0]["weight_block_size"]


def find_module(source: Source) -> FoundModule:
    """The MTP modules of a source; ProblemsError where it has none.

    It may be a whole checkpoint, one of which only the files of the module are there, a stand-alone
    draft, or a file that no index names.
    """
    sizes = source.files()
    stored = [file for file in sizes if file.endswith(SUFFIX)]
    if not stored:
        detail = f"has no {SUFFIX} file; name a folder or a model that holds an MTP module"
        raise ProblemsError(source.name, [Problem("file", "it", detail)])
    index, weight_map = read_index(source, sizes)
    config = read_config(source) if CONFIG_FILE in sizes else {}
    layers = mtp_layers(weight_map)
    if layers:
        files = sorted({file for name, file in weight_map.items() if layer_of(name) in layers})
    else:
        named = named_files(stored, index, weight_map) if index is not None else ()
        files = [file for file in stored if file not in named]
    problems = [
        Problem("missing", shown(file), "which holds the MTP module by the index")
        for file in files
        if file not in stored
    ]
    headers = read_headers(source, [file for file in files if file in stored], problems)
    raise_if_any(source.name, problems)
    return _of_headers(source, config, headers)


def _of_headers(
    source: Source, config: Mapping[str, Any], headers: Mapping[str, Header]
) -> FoundModule:
    every = [tensor for header in headers.values() for tensor in header.tensors]
    layers = mtp_layers(tensor.name for tensor in every)
    if not layers:
        detail = "no tensor is called model.layers.N.eh_proj.weight; name a checkpoint that has one"
        raise ProblemsError(source.name, [Problem("missing", "MTP module", detail)])
    own = [tensor for tensor in every if layer_of(tensor.name) in layers]
    tensors = {tensor.name: tensor for tensor in own}
    twice = sorted({t.name for t in own if tensors[t.name] is not t})
    raise_if_any(source.name, (Problem("index", n, "is in two files; needed once") for n in twice))
    return FoundModule(
        source=source,
        config=config,
        headers={f: h for f, h in headers.items() if any(t.name in tensors for t in h.tensors)},
        layers=tuple(layers),
        tensors=tensors,
    )


def open_joined(main: Source, module: FoundModule) -> SourceCheckpoint:
    """The checkpoint of both; ProblemsError where they cannot be one."""
    listing = list_checkpoint(main, may_lie_beside=is_module_alone)
    text, config = read_config_text(main)
    announcing = _announcing(config, module)
    text = text if announcing == config else _json(announcing)
    config = announcing
    cfg, faults = checked_config(config)
    raise_if_any(main.name, faults)
    assert cfg
    raise_if_any(module.source.name, _contradictions(config, module))
    joining = _Joining(listing, config, text, cfg, module)
    source = joining.source()
    known = {file: header for file, header in listing.headers.items() if source.is_main(file)}
    opened = open_safetensors(source, known=known)
    fields = {key: getattr(opened, key) for key in ("headers", "tensors", "side_files", "index")}
    return SourceCheckpoint(
        **fields, source=opened.source, config=opened.config, taken=joining.taken()
    )


def announcing_modules(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A config.json that says so many MTP modules, by all names that it has for their number."""
    said = {_ANNOUNCES: count}
    said |= {alias: count for alias, key in ALIASES.items() if key == _ANNOUNCES}
    changed = {key: said.get(key, value) for key, value in config.items()}
    changed.setdefault(_ANNOUNCES, count)
    return changed


def _announcing(config: Mapping[str, Any], module: FoundModule) -> dict[str, Any]:
    """config.json of the main model with what it has to say of the module."""
    changed = announcing_modules(config, len(module.layers))
    state = module.config.get("mtp_hidden_state")  # what the module was trained to be fed
    changed.pop("mtp_hidden_state", None)
    return changed if state is None else {**changed, "mtp_hidden_state": state}


def _contradictions(config: Mapping[str, Any], module: FoundModule) -> Iterator[Problem]:
    """What is wrong with the module's config, and sizes of another network than the main model."""
    if not module.config:
        if any(tensor.dtype == FP8 for tensor in module.tensors.values()):
            detail = "is missing; the blocks of its FP8 scales come from it: put it there"
            yield Problem("config", CONFIG_FILE, detail)
        return
    fields, faults = read_fields({**module.config, "architectures": None})
    for fault in faults:
        key, _, detail = fault.partition(" ")
        yield Problem("config", key, detail)
    new = module.config.get(NEW_LAYERS, [])
    if not isinstance(new, list) or not all(layer in module.layers for layer in new):
        yield Problem("config", NEW_LAYERS, f"is {shown(new)}, needed layers of its MTP modules")
    ours = read_fields(config)[0]
    for key in sorted(_SIZES):
        if not faults and fields[key] != ours[key]:
            detail = f"is {fields[key]}, the main model's is {ours[key]}: it is of another network"
            yield Problem("config", key, f"{detail}; name a checkpoint of the same sizes")


class _Joining:
    """Decides for each tensor of the module, and of a module that was there, what becomes of it."""

    def __init__(
        self,
        main: Listing,
        config: Mapping[str, Any],
        text: bytes,
        cfg: ModelConfig,
        module: FoundModule,
    ):
        """text: of config.json, which says `config`."""
        self._main, self._config, self._text, self._module = main, config, text, module
        self._slots = slots(cfg, "mtp")
        self._scales = frozenset(slot.scale for slot in self._slots.values() if slot.scale)
        self._fp8 = Format(FP8, cfg.weight_block_size, powers_of_two=cfg.power_of_two_scales)
        self._plain = Format(self._slots["model.embed_tokens.weight"].dtype)
        self._not_converted = NotConverted(not_converted(config)[1])
        self._number = {layer: cfg.num_hidden_layers + k for k, layer in enumerate(module.layers)}
        self._gone = {*mtp_layers(main.tensors), *self._number.values()}
        self._notes: list[str] = []
        self._names: dict[str, str] = {}

    def source(self) -> JoinedSource:
        """Both as one source of files."""
        main = self._main
        kept = {file: self._kept(header) for file, header in main.headers.items()}
        made = {
            file: MadeFile.of(tensors, main.headers[file].metadata)
            for file, tensors in kept.items()
            if tensors and any(map(self._is_gone, main.headers[file].tensors))
        }
        names = {file for file, tensors in kept.items() if tensors}
        new = next(name for name in (MTP_FILE, f"of-{MTP_FILE}") if name not in names)
        of_module = MadeFile.of(sorted(self._tensors(), key=lambda t: t.name), {"format": "pt"})
        stored = [file for file in main.source.files() if file.endswith(SUFFIX)]
        self._note_what_goes()
        self._note_the_config()
        kept[new] = [*of_module.tensors]
        return JoinedSource(
            main.source,
            self._module.source,
            made={**made, new: of_module},
            texts={INDEX_FILE: self._index(kept), CONFIG_FILE: self._text},
            left_out=[file for file in stored if file not in names],
        )

    def taken(self) -> TakenModule:
        """What is to be recorded of the module; after source()."""
        return TakenModule(
            main=self._main.source.name,
            source=self._module.source,
            headers=self._module.headers,
            names=self._names,
            notes=tuple(self._notes),
            new_layers=tuple(
                self._number[layer] for layer in self._module.config.get(NEW_LAYERS, ())
            ),
        )

    def _kept(self, header: Header) -> list[MadeTensor]:
        """The tensors of a file of the main model that stay in it, as the file has them: fused
        experts, which are of one layer, in one."""
        source, tensors = self._main.source, header.tensors
        if any(tensor.fused_in for tensor in tensors):
            tensors = parse_header(header.raw, header.file, source.name).tensors
        kept = (tensor for tensor in tensors if not self._is_gone(tensor))
        return [TakenTensor(name=t.name, source=source, tensor=t) for t in kept]

    def _is_gone(self, tensor: TensorInfo) -> bool:
        """Whether it is of a module that the main model had, or has the new one's number."""
        return layer_of(tensor.name) in self._gone

    def _tensors(self) -> Iterator[MadeTensor]:
        """The tensors of the module, by their names in the new checkpoint."""
        recoded = []
        for tensor in self._module.tensors.values():
            layer = layer_of(tensor.name)
            assert layer is not None
            name = tensor.name.replace(f".{layer}.", f".{self._number[layer]}.", 1)
            of_weight = self._module.tensors.get(tensor.name.removesuffix(SCALE_SUFFIX))
            if self._is_recoded(name, tensor):
                recoded += self._recoded(name, tensor)
            elif of_weight and self._is_recoded(name.removesuffix(SCALE_SUFFIX), of_weight):
                continue  # scales of a weight that brings new ones, or needs none
            else:
                yield self._as_it_is(name, tensor)
        if recoded:
            written = "FP8" if any(t.dtype == FP8 for t in recoded) else recoded[0].dtype
            count = plural(len(recoded), "tensor")
            self._notes.append(f"{count} of the module: written as {written}, as the main model's")
        yield from recoded

    def _as_it_is(self, name: str, tensor: TensorInfo) -> TakenTensor:
        slot = self._slots.get(name)
        original = self._main.tensors.get(slot.copy_of) if slot and slot.copy_of else None
        if slot and original and (tensor.shape, tensor.dtype) != (slot.shape, slot.dtype):
            found = f"is {tensor.dtype} {list(tensor.shape)} where the module is from"
            self._notes.append(f"{name} {found}; the main model's is taken, as engines do")
            return TakenTensor(name=name, source=self._main.source, tensor=original)
        self._names[tensor.name] = name
        return TakenTensor(name=name, source=self._module.source, tensor=tensor)

    def _wanted(self, slot: Slot) -> Format:
        """The format that the main model's config promises of a weight."""
        if slot.dtype != FP8:
            return Format(slot.dtype)
        return self._plain if self._not_converted.entry_for(slot.name) else self._fp8

    def _is_recoded(self, name: str, tensor: TensorInfo) -> bool:
        """Whether a weight of the module is in another format than it has to be."""
        slot = self._slots.get(name)
        if slot is None or slot.copy_of or name in self._scales or tensor.shape != slot.shape:
            return False
        wanted = self._wanted(slot)
        if tensor.dtype == FP8:
            same = wanted.dtype == FP8 and self._module.block in (None, wanted.block)
            scale = self._module.tensors.get(tensor.name + SCALE_SUFFIX)
            return not same and self._are_scales(scale, tensor)
        return tensor.dtype != wanted.dtype and tensor.dtype in _PLAIN

    def _are_scales(self, scale: TensorInfo | None, weight: TensorInfo) -> bool:
        """Whether these are the scales of an FP8 weight in the module's own blocks."""
        block = self._module.block
        if scale is None or block is None or scale.dtype != "F32":
            return False
        return len(weight.shape) == 2 and scale.shape == fp8.grid(weight.shape, block)

    def _recoded(self, name: str, tensor: TensorInfo) -> Iterator[RecodedTensor]:
        """A weight in the main model's format, and its new scales where that is FP8."""
        slot, is_fp8 = self._slots[name], tensor.dtype == FP8
        wanted = self._wanted(slot)
        made = RecodedTensor(
            name=name,
            source=self._module.source,
            tensor=tensor,
            scale=self._module.tensors[tensor.name + SCALE_SUFFIX] if is_fp8 else None,
            stored=Format(tensor.dtype, self._module.block if is_fp8 else None),
            wanted=wanted,
        )
        yield made
        if slot.scale and wanted.dtype == FP8:
            yield dataclasses.replace(made, name=slot.scale, is_scale=True)

    def _note_what_goes(self) -> None:
        gone = [name for name in self._main.tensors if layer_of(name) in self._gone]
        if gone:
            layers = braces(layer for name in gone if (layer := layer_of(name)) is not None)
            count = plural(len(gone), "tensor")
            self._notes.append(f"replaced: {count} of model.layers.{layers} of the main model's")

    def _note_the_config(self) -> None:
        """Keys that the module was trained with, and the main model's config has otherwise."""
        if not self._module.config:
            return
        theirs, ours = (read_fields(values)[0] for values in (self._module.config, self._config))
        for key in sorted(ours.keys() - _OF_THE_MAIN_MODEL - _SIZES):
            if ours[key] != theirs[key]:
                found = f"is {theirs[key]} where the module is from, {ours[key]} here"
                self._notes.append(f"{key} {found}; the module is computed with the latter")

    def _index(self, kept: Mapping[str, Sequence[MadeTensor]]) -> bytes:
        """The index of all files; `total_size` is the true sum."""
        sizes = {file: [nbytes_of(tensor) for tensor in of] for file, of in kept.items()}
        index = {
            "metadata": {"total_size": sum(map(sum, sizes.values()))},
            "weight_map": {tensor.name: file for file, of in kept.items() for tensor in of},
        }
        return _json(index)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

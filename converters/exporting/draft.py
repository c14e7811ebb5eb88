"""The MTP module alone, as a serving engine loads a draft beside the main model.

vLLM reads the module under its own names (`model.layers.61.*` of V3) with the main model's config;
SGLang reads `model.layers.0.*` of a config with one layer, and takes embedding and head from the
main model. Both read weights as the main model's config says they are.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from converters.exporting.plan import ExportPlan
from converters.format.header import make_header, parse_header
from converters.format.kinds import NotConverted
from converters.format.mapping import SCALE_SUFFIX, layer_of, mtp_layers
from converters.format.mtp_from import MTP_FILE
from mtp_model.checkpoint.directory import CONFIG, Checkpoint
from mtp_model.families import DRAFT_ARCHITECTURE, NOT_CONVERTED, not_converted
from mtp_model.problems import Problem, raise_if_any

Engine = Literal["vllm", "sglang"]
_QUANTISATION = "quantization_config"
_LAYER = re.compile(r"\blayers\.(\d+)\b", re.A)


def draft_plan(whole: ExportPlan, checkpoint: Checkpoint, engine: Engine) -> ExportPlan:
    """What an export of the module alone writes: one file and config.json.

    whole: the plan of the whole checkpoint, whose bytes every tensor of the draft has. Raises
    ProblemsError where there is no module, or the engine could not load it.
    """
    where = str(checkpoint.path)
    modules = mtp_layers(whole.dtypes)
    raise_if_any(where, _problems(checkpoint, engine, modules))
    config = _config_written(whole, checkpoint)
    raise_if_any(where, _other_formats(whole, config, modules))
    tensors = [t for file in whole.files for t in file.tensors if layer_of(t.name) in modules]
    if engine == "sglang":
        tensors = [tensor for tensor in tensors if not whole.slots[tensor.name].copy_of]
    names = {tensor.name: _name(tensor.name, engine) for tensor in tensors}
    raw = make_header(((names[t.name], t.dtype, t.shape) for t in tensors), {"format": "pt"})
    header = parse_header(raw, MTP_FILE, where)
    named = zip(header.tensors, tensors, strict=True)
    own = tuple(dataclasses.replace(written, name=tensor.name) for written, tensor in named)
    text = json.dumps(_config(config, checkpoint, engine), indent=2, ensure_ascii=False) + "\n"
    return dataclasses.replace(
        whole,
        files=(dataclasses.replace(header, tensors=own),),
        replaced={CONFIG: text.encode()},
        whole=whole.files,
    )


def _name(name: str, engine: Engine) -> str:
    """A tensor's name in the draft; of the only module for SGLang, which counts it from 0."""
    layer = layer_of(name)
    return name.replace(f".{layer}.", ".0.", 1) if engine == "sglang" else name


def _problems(checkpoint: Checkpoint, engine: Engine, modules: Sequence[int]) -> Iterator[Problem]:
    if not modules:
        advice = "`convert-deepseek new-mtp` makes one"
        yield Problem("draft", "MTP module", f"is none there to write alone; {advice}")
    elif checkpoint.provenance["scope"] == "main":
        advice = "import it with --scope mtp, or without --scope"
        yield Problem("draft", "the checkpoint", f"was imported with --scope main; {advice}")
    if engine == "sglang" and len(modules) > 1:
        found = f"are {len(modules)}, SGLang loads a draft of one"
        yield Problem("draft", "MTP modules", f"{found}; write it for vLLM: --draft vllm")


def _other_formats(
    whole: ExportPlan, config: Mapping[str, Any], modules: Sequence[int]
) -> Iterator[Problem]:
    """Weights of another dtype than the last main layer's, where config.json does not say so."""
    dtypes, last = whole.dtypes, min(modules) - 1
    listed = NotConverted(not_converted(config)[1])
    weights = [name for name in dtypes if not name.endswith(SCALE_SUFFIX)]
    for name in (name for name in weights if layer_of(name) in modules):
        other = dtypes.get(name.replace(f".{layer_of(name)}.", f".{last}.", 1))
        if other and other != dtypes[name] and not listed.entry_for(name):
            found = f"is {dtypes[name]}, the main model's layer {last} has {other}"
            advice = "engines load a draft in the main model's format: import the module with"
            yield Problem("format", name, f"{found}; {advice} --mtp-from, which converts it")


def _config_written(whole: ExportPlan, checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of the whole checkpoint as export writes it."""
    replaced = whole.replaced.get(CONFIG)
    return dict(json.loads(replaced) if replaced else checkpoint.config_dict)


def _config(config: Mapping[str, Any], checkpoint: Checkpoint, engine: Engine) -> dict[str, Any]:
    """config.json of the draft. Code that the main model brings along is not in its folder."""
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    kept |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    if checkpoint.provenance["mtp_hidden_state"] != "post_norm":
        kept["mtp_hidden_state"] = checkpoint.provenance["mtp_hidden_state"]
    if engine == "vllm":
        return kept
    layers = kept["num_hidden_layers"]
    kept |= {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    kept |= {"architectures": [DRAFT_ARCHITECTURE]}
    if quantisation := kept.get(_QUANTISATION):
        lists = {
            key: _renumbered(quantisation[key], layers)
            for key in NOT_CONVERTED
            if quantisation.get(key)
        }
        kept[_QUANTISATION] = {**quantisation, **lists}
    return kept


def _renumbered(entries: Sequence[str], layer: int) -> list[str]:
    """A list of modules without those of the main model's layers; the draft's own as layer 0."""
    found = []
    for entry in entries:
        number = _LAYER.search(entry)
        if number is None or int(number[1]) == layer:
            found.append(_LAYER.sub("layers.0", entry, count=1) if number else entry)
    return found

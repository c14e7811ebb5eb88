"""What `modules_to_not_convert` names, and what a tensor's own dtype decides."""

import re
from pathlib import Path
from typing import Any

import pytest
from layouts import in_bf16, make_edited
from roundtrip import opened
from transformers.quantizers.quantizers_utils import should_convert_module

from converters.format.fit import Fit, fit
from converters.format.kinds import NotConverted
from tools.make_tiny_checkpoint import make_tiny_checkpoint

MODULES = (
    "model.layers.1.self_attn.o_proj",
    "model.layers.11.self_attn.kv_b_proj",
    "model.layers.3.mlp.gate_proj",
    "model.layers.3.mlp.experts.7.up_proj",
    "model.layers.61.mlp.shared_experts.down_proj",
)
ENTRIES = (
    "o_proj",
    "b_proj",
    "lm_head",
    "gate",
    "mlp.gate",
    "model.layers.1",
    "model.layers.61",
    "layers.6",
    "model.layers.1.self_attn",
    "model.layers.3.mlp.experts",
    "model.layers.3.mlp.experts.7.up_proj",
    "model.layers.*.self_attn",
    "model.layers.*.mlp.gate",
    "model.layers.*.mlp.experts.*",
    ".*self_attn.*",
    "model.layers.3.*",
)


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_transformers_leaves_out_is_named(entry: str):
    """Ours names no less; more only where SGLang does: whole parts in the middle of a name."""
    named = {module for module in MODULES if NotConverted([entry]).entry_for(f"{module}.weight")}
    theirs = {module for module in MODULES if not should_convert_module(module, [entry])}
    inner = {module for module in MODULES if f".{entry.strip('.')}." in f".{module}."}
    globbed = {m for m in MODULES if "*" in entry and not should_convert_module(m, [f".*{entry}"])}
    assert theirs <= named <= theirs | inner | globbed
    assert len(named) < len(MODULES)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "fp8"
    make_tiny_checkpoint(folder)
    return folder


def fit_with(folder: Path, **quantization: Any) -> Fit:
    source = opened(folder)
    found = {**source.config["quantization_config"], **quantization}
    return fit(source, {**source.config, "quantization_config": found})


def lines(found: Fit) -> list[str]:
    return [f"{p.kind} {p.subject} {p.detail}" for p in found.problems]


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_an_fp8_weight_that_the_config_denies_is_one_line_that_says_what_to_do(fp8: Path, key: str):
    names = ["lm_head", "model.layers.*.mlp.gate", "self_attn.o_proj", "model.layers.4"]
    found = fit_with(fp8, **{key: names})
    first = "model.layers.0.self_attn.o_proj.weight"
    layer, advice = "model.layers.4.self_attn.q_a_proj.weight", "take it out of the list"
    where = f"config quantization_config.{key}"
    assert sorted(lines(found)) == [
        f"{where} names model.layers.4, and 44 of its weights are F8_E4M3, as {layer}; {advice}",
        f"{where} names self_attn.o_proj, and 4 of its weights are F8_E4M3, as {first}; {advice}",
    ]
    assert not fit_with(fp8, **{key: names[:2]}).problems  # as the advice says


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (["model\\.layers\\.\\d+"], "which is no name of a module; write the names out, with \\*"),
        (["re:.*lm_head"], "which is no name of a module"),
        ([""], "which is no name of a module"),
        ([f"a{number}*" for number in range(65)], "holds 65 entries with \\*"),
        ("lm_head", "needed a list of module names, or null"),
        ([1], "needed a list of module names, or null"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(fp8: Path, entries: Any, told: str):
    [line] = lines(fit_with(fp8, modules_to_not_convert=entries))
    assert re.search(told, line)
    assert "modules_to_not_convert" in line


def test_two_lists_have_to_be_one(fp8: Path):
    [line] = lines(fit_with(fp8, modules_to_not_convert=["a"], ignored_layers=["b"]))
    assert "two values for one thing" in line
    assert not fit_with(fp8, modules_to_not_convert=None, ignored_layers=["lm_head"]).problems


def test_scales_beside_a_weight_that_is_not_fp8_are_named(tmp_path: Path):
    name = "model.layers.1.self_attn.o_proj.weight"

    def edit(tensors, plain):
        tensors[name] = plain[name]

    [line] = lines(fit_with(make_edited(tmp_path / "x", edit)))
    told = f"is there, and {name} is BF16, which has none; remove the scales"
    assert line == f"scale {name}_scale_inv {told}"


def test_a_config_that_promises_fp8_where_nothing_is_is_named_unless_it_says_so(tmp_path: Path):
    source = make_edited(tmp_path / "x", in_bf16("proj"))
    [line] = lines(fit_with(source))
    assert "none of the 148 tensors that it means is F8_E4M3" in line
    assert not fit_with(source, modules_to_not_convert=["self_attn", "mlp"]).problems


def test_plain_weights_are_told_by_layer_or_by_name_and_by_what_the_config_says(tmp_path: Path):
    source = make_edited(tmp_path / "x", in_bf16("o_proj", "layers.4."))
    found = fit_with(source, modules_to_not_convert=["self_attn.o_proj"]).plain_weights
    assert [(plain.where, plain.weights, plain.named) for plain in found] == [
        ("model.layers.4", 44, False),
        ("model.layers.{0..3}.self_attn.o_proj.weight", 4, True),
    ]

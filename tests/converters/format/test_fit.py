"""Every problem a checkpoint can have is found, named, and reported with all the others."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.format.fit import SoundFit, sound_fit
from converters.format.listing import SourceCheckpoint, open_safetensors, read_config
from converters.sources.open import open_source
from mtp_model.problems import Problem, ProblemsError, braces, group_names, group_problems
from tools.make_tiny_checkpoint import make_tiny_checkpoint

MTP = "model.layers.4."
COPIES = (MTP + "embed_tokens.weight", MTP + "shared_head.head.weight")
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for flavour in ("fp8", "bf16", "f32"):
        found[flavour] = tmp_path_factory.mktemp(flavour)
        make_tiny_checkpoint(found[flavour], dtype=flavour)
    return found


@pytest.fixture
def fp8(folders: dict[str, Path]) -> SourceCheckpoint:
    return opened(folders["fp8"])


@pytest.fixture
def config(folders: dict[str, Path]) -> dict[str, Any]:
    return read_config(open_source(str(folders["fp8"])))


def opened(folder: Path) -> SourceCheckpoint:
    return open_safetensors(open_source(str(folder)))


def without(listing: SourceCheckpoint, *names: str) -> SourceCheckpoint:
    """The listing as if no file had these tensors."""
    assert set(names) <= listing.tensors.keys()
    kept = {name: t for name, t in listing.tensors.items() if name not in names}
    return dataclasses.replace(listing, tensors=kept)


def changed(listing: SourceCheckpoint, name: str, /, **fields: Any) -> SourceCheckpoint:
    """The listing with another header entry for a tensor."""
    tensor = dataclasses.replace(listing.tensors[name], **fields)
    return dataclasses.replace(listing, tensors=listing.tensors | {tensor.name: tensor})


def slots_of(listing: SourceCheckpoint, config: dict[str, Any], scope: Any = "all") -> SoundFit:
    """Config and tensors of a sound checkpoint with this config.json."""
    return sound_fit(dataclasses.replace(listing, config=config), scope)


def lines_of(listing: SourceCheckpoint, config: dict[str, Any], **options: Any) -> list[str]:
    """The report of the problems, alike ones grouped."""
    with pytest.raises(ProblemsError) as caught:
        slots_of(listing, config, **options)
    return group_problems(caught.value.problems)


def fields_of(line: str) -> str:
    """The line with its padding taken out."""
    return " ".join(line.split())


@pytest.mark.parametrize("flavour", ["fp8", "bf16", "f32"])
def test_sound_checkpoint_passes(folders: dict[str, Path], flavour: str):
    listing = opened(folders[flavour])
    slots = sound_fit(listing, "all").slots
    assert slots.keys() == listing.tensors.keys()


def test_scopes_need_only_their_own_tensors(fp8: SourceCheckpoint, config: dict[str, Any]):
    main = slots_of(fp8, config, scope="main").slots.keys()
    mtp = slots_of(fp8, config, scope="mtp").slots.keys()
    assert main | mtp == fp8.tensors.keys()
    assert main & mtp == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    layer = "model.layers.0.input_layernorm.weight"
    slots_of(without(fp8, layer), config, scope="mtp")
    assert lines_of(without(fp8, layer), config, scope="main") == [f"missing   {layer}"]


def test_copies_may_be_absent(fp8: SourceCheckpoint, config: dict[str, Any]):
    slots = slots_of(without(fp8, *COPIES), config).slots
    assert slots.keys() == fp8.tensors.keys() - set(COPIES)


def test_missing_and_unknown_and_shape_and_dtype_come_in_one_report(
    fp8: SourceCheckpoint, config: dict[str, Any]
):
    listing = without(fp8, MTP + "enorm.weight")
    listing = changed(listing, MTP + "hnorm.weight", name=MTP + "surprise")
    listing = changed(listing, MTP + "eh_proj.weight", shape=(80, 40))
    listing = changed(listing, "model.norm.weight", dtype="F16")
    assert [fields_of(line) for line in lines_of(listing, config)] == [
        "missing model.layers.4.enorm.weight",
        "unknown model.layers.4.surprise has no rule; this toolkit reads deepseek_v3 and kimi_k2",
        "dtype model.norm.weight is F16, the config needs BF16",
        "shape model.layers.4.eh_proj.weight is (80, 40), the config needs (40, 80)",
    ]


def test_scale_problems_of_the_headers(fp8: SourceCheckpoint, config: dict[str, Any]):
    gone = "model.layers.0.self_attn.o_proj.weight"
    lonely = "model.layers.1.self_attn.o_proj.weight"
    listing = without(fp8, gone + "_scale_inv", lonely)
    extra = MTP + "eh_proj.weight_scale_inv"
    listing = changed(listing, gone, name=extra)
    listing = dataclasses.replace(listing, tensors=fp8.tensors | listing.tensors)
    listing = without(listing, gone + "_scale_inv", lonely)
    assert [fields_of(line) for line in lines_of(listing, config)] == [
        f"scale {gone} is F8_E4M3 and its _scale_inv is missing",
        f"scale {lonely}_scale_inv is there and its weight is missing",
        f"scale {extra} scales a tensor that is not quantised under this config",
    ]


def test_router_bias_is_float32_or_bfloat16(folders: dict[str, Path]):
    listing = opened(folders["bf16"])
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    in_bf16 = changed(listing, bias, dtype="BF16")
    slots = slots_of(in_bf16, read_config(listing.source))[1]
    assert slots[bias].dtype == "BF16"
    lines = lines_of(changed(listing, bias, dtype="F16"), read_config(listing.source))
    assert lines == [f"dtype     {bias} is F16, the config needs F32"]


@pytest.mark.parametrize(
    ("change", "key", "told"),
    [
        ({"num_nextn_predict_layers": 0}, "num_nextn_predict_layers", "also hold model.layers.4 "),
        ({"num_nextn_predict_layers": 3}, "num_nextn_predict_layers", "no file has .*{5..6} "),
        ({"num_hidden_layers": 3}, "num_hidden_layers", "make it 4"),
        ({"num_hidden_layers": 7}, "num_hidden_layers", "make it 4"),
        ({"quantization_config": None}, "quantization_config", "is absent, .* 148 F8_E4M3 tensors"),
        ({"torch_dtype": "float32"}, "torch_dtype", "'float32', 32 of 35 .* are BF16: bfloat16"),
    ],
)
def test_config_that_contradicts_the_tensors_is_one_line(
    fp8: SourceCheckpoint, config: dict[str, Any], change: dict[str, Any], key: str, told: str
):
    with pytest.raises(ProblemsError, match=told) as caught:
        slots_of(fp8, config | change)
    [problem] = caught.value.problems
    assert (problem.kind, problem.subject) == ("config", key)


def test_quantisation_that_no_tensor_has_is_one_line(
    folders: dict[str, Path], config: dict[str, Any]
):
    with pytest.raises(ProblemsError, match=r"none of the 148 .* is F8_E4M3; remove it") as caught:
        slots_of(opened(folders["bf16"]), config)
    [problem] = caught.value.problems
    assert problem.subject == "quantization_config"


def test_layers_that_no_file_has_are_one_line(fp8: SourceCheckpoint, config: dict[str, Any]):
    config = config | {"num_nextn_predict_layers": 0, "num_hidden_layers": 6}
    listing = without(fp8, *(name for name in fp8.tensors if name.startswith(MTP)))
    [line] = lines_of(listing, config)
    needed = "num_hidden_layers is 6, no file has a tensor of model.layers.{4..5}"
    assert fields_of(line) == f"config {needed}"


def test_main_scope_reads_past_a_contradicted_mtp_module(
    fp8: SourceCheckpoint, config: dict[str, Any]
):
    config = config | {"num_nextn_predict_layers": 0}
    assert slots_of(fp8, config, scope="main")[0].num_nextn_predict_layers == 0
    [line] = lines_of(fp8, config, scope="mtp")
    assert "there is no MTP module for --scope mtp" in line


def test_every_config_fault_is_reported(fp8: SourceCheckpoint, config: dict[str, Any]):
    config = config | {"hidden_size": -1, "model_type": "deepseek_v32", "torch_dtype": "float16"}
    assert [fields_of(line) for line in lines_of(fp8, config)] == [
        "config model_type is 'deepseek_v32', needed deepseek_v3 or kimi_k2",
        "config hidden_size is -1, needed 1 to 16777216",
        "config torch_dtype is 'float16', needed bfloat16 or float32",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"n_routed_experts": 1 << 24},
        {"num_hidden_layers": 1 << 24},
        {"num_hidden_layers": 1 << 18, "n_routed_experts": 1 << 10},
    ],
)
def test_absurd_numbers_of_tensors_are_refused_at_once(
    fp8: SourceCheckpoint, config: dict[str, Any], change: dict[str, Any]
):
    [line] = lines_of(fp8, config | change)
    assert "this toolkit reads up to 1048576" in line


def test_absurd_sizes_are_shape_problems(fp8: SourceCheckpoint, config: dict[str, Any]):
    huge = 1 << 24
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "moe_intermediate_size"), huge)
    lines = lines_of(fp8, config | sizes)
    assert f"lm_head.weight is (384, 40), the config needs ({huge}, {huge})" in "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[1, 2]", "is [1, 2], needed an object"),
        (b'{"a": 1, "a": 2}', "has the key a twice"),
        (b'{"a": NaN}', "holds NaN, which is not JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b" " * (2 << 20), "is 2097152 bytes, more than 1048576"),
        (None, "is missing; every size of the network comes from it"),
    ],
)
def test_config_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, told: str):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ProblemsError) as caught:
        read_config(open_source(str(tmp_path)))
    [problem] = caught.value.problems
    assert (problem.kind, problem.subject, problem.detail) == ("config", "config.json", told)


def test_index_and_header_problems_are_the_listings(tmp_path: Path):
    make_tiny_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "model-00099-of-000007.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ProblemsError, match="model-00099-of-000007"):
        opened(tmp_path)


def test_numbers_in_braces():
    assert braces([7]) == "7"
    assert braces(range(8)) == "{0..7}"
    assert braces([5, 1, 2, 0]) == "{0..2,5}"


def test_names_are_grouped_by_experts_then_layers():
    names = [f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in (3, 4) for e in range(4)]
    assert group_names(names) == [("model.layers.{3..4}.mlp.experts.{0..3}.up_proj", 8)]
    assert group_names([*names[:-1], "model.norm"]) == [
        ("model.layers.3.mlp.experts.{0..3}.up_proj", 4),
        ("model.layers.4.mlp.experts.{0..2}.up_proj", 3),
        ("model.norm", 1),
    ]


def test_only_equal_faults_are_grouped():
    problems = [Problem("shape", f"layers.{n}.x", f"is {n // 2}") for n in range(4)]
    assert group_problems(problems) == [
        "shape     layers.{0..1}.x is 0 (2 tensors)",
        "shape     layers.{2..3}.x is 1 (2 tensors)",
    ]


INT4 = {"weight_packed": ("I32", (28, 5)), "weight_scale": ("BF16", (28, 2))}
NVFP4 = {
    "weight": ("U8", (28, 20)),
    "weight_scale": ("F8_E4M3", (28, 3)),
    "weight_scale_2": ("F32", ()),
}
AWQ = {"qweight": ("I32", (40, 4)), "qzeros": ("I32", (1, 4)), "scales": ("F16", (1, 28))}


@pytest.mark.parametrize("stored", [INT4, NVFP4, AWQ], ids=["int4", "nvfp4", "awq"])
def test_weights_of_another_format_are_one_line(
    folders: dict[str, Path], stored: dict[str, tuple[str, tuple[int, ...]]]
):
    """Told by their tensors: exports of some tools have no quantization_config in config.json."""
    listing = opened(folders["bf16"])
    modules = [f"model.layers.2.mlp.experts.{expert}.up_proj" for expert in range(12)]
    tensors = {n: t for n, t in listing.tensors.items() if n.removesuffix(".weight") not in modules}
    for module in modules:
        was = listing.tensors[f"{module}.weight"]
        for kind, (dtype, shape) in stored.items():
            name = f"{module}.{kind}"
            tensors[name] = dataclasses.replace(was, name=name, dtype=dtype, shape=shape)
    with pytest.raises(ProblemsError) as caught:
        sound_fit(dataclasses.replace(listing, tensors=tensors), "all")
    problems = [p for p in caught.value.problems if p.kind != "shape"]
    [problem] = problems
    assert problem.subject == "quantization_config"
    assert "dequantised to bfloat16" in problem.detail
    assert all(kind in problem.detail for kind in stored if kind != "weight")


def test_no_mtp_module_may_be_dense(fp8: SourceCheckpoint, config: dict[str, Any]):
    """Transformers and engines build layer 4 dense then, whatever tensors it has."""
    with pytest.raises(ProblemsError, match="first_k_dense_replace is 5, needed at most num_hid"):
        slots_of(fp8, config | {"first_k_dense_replace": 5})

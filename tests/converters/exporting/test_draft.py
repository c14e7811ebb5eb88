"""`export --draft`: the MTP module alone, as vLLM and SGLang load it beside the main model."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from advice import done, follows, told
from changed import leaf_of_rows
from gcs_server import GcsServer, key_of
from layouts import fused, in_bf16, make_edited
from modules import assert_only_the_module_is_new, config_of, module_of, without_module
from roundtrip import read_tensors, tree_bytes

from converters.cli.main import main
from converters.exporting import draft as draft_module
from converters.exporting.exporter import export_checkpoint
from converters.verifying.export_gate import check_draft
from mtp_model.checkpoint.derived import write_derived
from mtp_model.checkpoint.directory import open_checkpoint
from tools.make_tiny_checkpoint import make_tiny_checkpoint

ENGINES = ("vllm", "sglang")
COPIES = {"embed_tokens.weight", "shared_head.head.weight"}
LAYERS = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fp8`, its import `ckpt`, and `tuned`, whose module was trained; `whole`, all of that."""
    folder = tmp_path_factory.mktemp("drafts")
    make_tiny_checkpoint(folder / "fp8")
    done("import", folder / "fp8", folder / "ckpt")
    checkpoint = open_checkpoint(folder / "ckpt")

    def rows(leaf: str) -> Any:
        return lambda index, start, stop: (
            checkpoint.read_rows(leaf, index, start, stop).astype(np.float32) + np.float32(0.5)
        )

    leaves = ("mtp.eh_proj.weight", "mtp.block.self_attn.o_proj.weight")
    changed = {leaf: leaf_of_rows(np.dtype(np.float32), rows(leaf)) for leaf in leaves}
    settings = {"train": "mtp", "draft_tokens": 3}
    write_derived(checkpoint, folder / "tuned", changed, {"settings": settings})
    done("export", folder / "tuned", folder / "whole", "--no-verify")
    return folder


def test_a_draft_of_a_trained_main_model_goes_beside_the_whole_export(
    made: Path, tmp_path: Path, capsys
):
    tuned = open_checkpoint(made / "tuned")

    def rows(index: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        return tuned.read_rows("norm.weight", index, start, stop).astype(np.float32) + np.float32(1)

    changed = {"norm.weight": leaf_of_rows(np.dtype(np.float32), rows)}
    write_derived(tuned, tmp_path / "both", changed, {"settings": {"train": "all"}})
    done("export", tmp_path / "both", tmp_path / "draft", "--draft", "vllm")
    said = " ".join(capsys.readouterr().out.split())
    whole = f"`convert-deepseek export {tmp_path / 'both'} DIR`"
    assert f"MAIN_MODEL was trained with the module: {whole} writes it" in said
    assert "trained beside" not in said


@pytest.mark.parametrize("engine", ENGINES)
def test_a_draft_has_the_bytes_of_the_whole_export(made: Path, tmp_path: Path, capsys, engine: str):
    done("export", made / "tuned", tmp_path / "draft", "--draft", engine)
    said = capsys.readouterr().out
    assert "tensors agree" in said
    assert f"the MTP module alone, for {engine}" in said
    assert "MAIN_MODEL is the one that the module was trained beside" in said
    wanted = module_of(made / "whole")
    if engine == "sglang":
        wanted = {name: tensor for name, tensor in wanted.items() if name not in COPIES}
    assert {file.name for file in (tmp_path / "draft").iterdir()} == {
        *("config.json", "mtp.safetensors")
    }
    layer = LAYERS if engine == "vllm" else 0
    found = read_tensors(tmp_path / "draft")
    assert found.keys() == {f"model.layers.{layer}.{name}" for name in wanted}
    for name, tensor in wanted.items():
        ours = found[f"model.layers.{layer}.{name}"]
        assert (ours.dtype, ours.shape, ours.tobytes()) == (
            *(tensor.dtype, tensor.shape, tensor.tobytes()),
        ), name
    untuned = module_of(made / "fp8")
    assert untuned["eh_proj.weight"].tobytes() != wanted["eh_proj.weight"].tobytes()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_main_model_takes_a_draft_back(made: Path, tmp_path: Path, engine: str):
    """With a main model that lost its module, it is the whole export again."""
    done("export", made / "tuned", tmp_path / "draft", "--draft", engine)
    lost = without_module(made / "fp8", tmp_path / "lost", num_nextn_predict_layers=0)
    done("import", lost, tmp_path / "back", "--mtp-from", tmp_path / "draft")
    done("export", tmp_path / "back", tmp_path / "out", "--no-verify")
    assert_only_the_module_is_new(tmp_path / "out", lost)
    found, wanted = module_of(tmp_path / "out"), module_of(made / "whole")
    assert found.keys() >= wanted.keys() - COPIES
    for name in found:
        assert found[name].tobytes() == wanted[name].tobytes(), name
    done("verify", made / "tuned", tmp_path / "draft")
    assert main(["verify", str(made / "ckpt"), str(tmp_path / "draft")]) == 1


def test_configs_are_what_engines_look_for(made: Path):
    """vLLM: the main model's, under a type that it knows to have modules. SGLang: one layer."""
    config = config_of(made / "fp8")
    listed = ["model.layers.4.self_attn", "model.layers.0.mlp", "lm_head"]
    config["quantization_config"]["modules_to_not_convert"] = listed
    config |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.X"}}
    checkpoint = open_checkpoint(made / "ckpt")
    vllm = draft_module._config(config, checkpoint, "vllm")
    assert "auto_map" not in vllm
    assert vllm["model_type"] == "deepseek_v3"
    assert (vllm["num_hidden_layers"], vllm["num_nextn_predict_layers"]) == (LAYERS, 1)
    assert vllm["quantization_config"] == config["quantization_config"]
    assert vllm["architectures"] == ["DeepseekV3ForCausalLM"]
    same = vllm.keys() - {"model_type", "architectures"}
    assert {key: vllm[key] for key in same} == {key: config[key] for key in same}
    sglang = draft_module._config(config, checkpoint, "sglang")
    assert sglang["architectures"] == ["DeepseekV3ForCausalLMNextN"]
    assert (sglang["num_hidden_layers"], sglang["num_nextn_predict_layers"]) == (1, 1)
    quantisation = sglang["quantization_config"]
    assert quantisation["modules_to_not_convert"] == ["model.layers.0.self_attn", "lm_head"]
    assert quantisation["weight_block_size"] == config["quantization_config"]["weight_block_size"]


def test_a_directory_of_the_module_alone_and_bf16(made: Path, tmp_path: Path):
    """What --scope mtp read suffices; in bfloat16 the draft is that of the bfloat16 export."""
    done("import", made / "fp8", tmp_path / "mtp", "--scope", "mtp")
    for ckpt, name in ((tmp_path / "mtp", "alone"), (made / "ckpt", "of-all")):
        done("export", ckpt, tmp_path / name, "--draft", "vllm")
    assert tree_bytes(tmp_path / "alone") == tree_bytes(tmp_path / "of-all")
    done("export", made / "tuned", tmp_path / "bf16", "--draft", "vllm", "--dtype", "bf16")
    done("export", made / "tuned", tmp_path / "all-bf16", "--dtype", "bf16", "--no-verify")
    found, wanted = read_tensors(tmp_path / "bf16"), module_of(tmp_path / "all-bf16")
    assert {n: t.tobytes() for n, t in found.items()} == {
        f"model.layers.{LAYERS}.{name}": tensor.tobytes() for name, tensor in wanted.items()
    }
    assert {tensor.dtype for tensor in found.values()} == {
        *(np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
    }
    assert "quantization_config" not in config_of(tmp_path / "bf16")


def test_a_draft_in_a_bucket(made: Path, tmp_path: Path, gcs: GcsServer, url: str):
    done("export", made / "tuned", url, "--draft", "sglang")
    done("export", made / "tuned", tmp_path / "draft", "--draft", "sglang")
    assert gcs.contents(key_of(url)) == tree_bytes(tmp_path / "draft")


def test_an_experts_file_of_transformers_is_written_expert_by_expert(made: Path, tmp_path: Path):
    make_edited(tmp_path / "fused", lambda tensors, _: fused(tensors), num_files=1)
    done("import", tmp_path / "fused", tmp_path / "ckpt")
    done("export", tmp_path / "ckpt", tmp_path / "draft", "--draft", "vllm")
    found, wanted = read_tensors(tmp_path / "draft"), module_of(made / "fp8")
    prefix = f"model.layers.{LAYERS}."
    assert {n.removeprefix(prefix): t.tobytes() for n, t in found.items()} == {
        name: tensor.tobytes() for name, tensor in wanted.items()
    }


def test_nothing_is_overwritten(made: Path, tmp_path: Path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    command = ("export", made / "ckpt", tmp_path / "mine", "--draft", "vllm")
    assert "is not empty and no safetensors checkpoint" in told(capsys, *command)
    done("export", made / "ckpt", tmp_path / "whole")
    before = tree_bytes(tmp_path / "whole")
    command = ("export", made / "ckpt", tmp_path / "whole", "--draft", "vllm")
    assert "holds a checkpoint; name another place or --overwrite it" in told(capsys, *command)
    assert tree_bytes(tmp_path / "whole") == before
    wrong = ["export", str(made / "ckpt"), "x", "--draft", "vllm", "--base", str(made / "fp8")]
    with pytest.raises(SystemExit) as stopped:
        main(wrong)
    assert stopped.value.code == 2
    assert "--draft writes a module alone" in capsys.readouterr().err


def test_a_draft_that_was_damaged_is_found(made: Path, tmp_path: Path):
    """The controls of the check: a byte, a tensor that is gone, a config of another network."""
    checkpoint = open_checkpoint(made / "ckpt")
    summary = export_checkpoint(checkpoint, tmp_path / "draft", draft="vllm")
    options = {"keeps_dtypes": True, "workers": 2}
    assert check_draft(checkpoint, summary, **options).holds
    file = tmp_path / "draft" / "mtp.safetensors"
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    [problem] = check_draft(checkpoint, summary, **options).problems
    assert "has other values than the whole export writes" in problem.detail
    renamed = sound.replace(b"model.layers.4.enorm.weight", b"model.layers.4.enorn.weight")
    file.write_bytes(renamed)
    kinds = {p.subject for p in check_draft(checkpoint, summary, **options).problems}
    assert kinds == {"model.layers.4.enorn.weight", "model.layers.4.enorm.weight"}
    file.write_bytes(sound)
    (tmp_path / "draft" / "config.json").write_text("{}")
    assert not check_draft(checkpoint, summary, **options).holds


@follows("import it with --scope mtp, or without --scope", "write it for vLLM: --draft vllm")
def test_what_cannot_be_written_alone_is_told(made: Path, tmp_path: Path, capsys):
    done("import", made / "fp8", tmp_path / "main", "--scope", "main")
    message = told(capsys, "export", tmp_path / "main", tmp_path / "x", "--draft", "vllm")
    assert "import it with --scope mtp" in message
    done("import", made / "fp8", tmp_path / "mtp", "--scope", "mtp")
    done("export", tmp_path / "mtp", tmp_path / "draft", "--draft", "vllm")

    make_tiny_checkpoint(tmp_path / "two", num_mtp=2, num_files=1)
    done("import", tmp_path / "two", tmp_path / "of-two")
    message = told(capsys, "export", tmp_path / "of-two", tmp_path / "y", "--draft", "sglang")
    assert "are 2, SGLang loads a draft of one; write it for vLLM: --draft vllm" in message
    assert not (tmp_path / "y").exists()
    done("export", tmp_path / "of-two", tmp_path / "y", "--draft", "vllm")

    make_tiny_checkpoint(tmp_path / "none", num_mtp=0, num_files=1)
    done("import", tmp_path / "none", tmp_path / "of-none")
    message = told(capsys, "export", tmp_path / "of-none", tmp_path / "z", "--draft", "vllm")
    assert "`convert-deepseek new-mtp` makes one" in message


@follows("engines load a draft in the main model's format: import the module with")
def test_a_module_in_another_format_is_told(tmp_path: Path, capsys):
    """A bfloat16 module beside an FP8 main model would be loaded by nobody."""
    source = make_edited(tmp_path / "mixed", in_bf16("", layers=(LAYERS,)), num_files=1)
    done("import", source, tmp_path / "ckpt")
    command = ("export", tmp_path / "ckpt", tmp_path / "draft", "--draft", "vllm")
    assert f"is BF16, the main model's layer {LAYERS - 1} has F8_E4M3" in told(capsys, *command)
    done("import", source, tmp_path / "again", "--mtp-from", source)
    done("export", tmp_path / "again", tmp_path / "draft", "--draft", "vllm")


def test_how_to_serve_a_draft_is_said(made: Path, tmp_path: Path, capsys):
    found = {}
    for engine in ENGINES:
        capsys.readouterr()
        done("export", made / "tuned", tmp_path / engine, "--draft", engine, "--json")
        [found[engine]] = json.loads(capsys.readouterr().out)["serve"]
    draft = json.dumps(str(tmp_path / "vllm"))
    assert f'"num_speculative_tokens": 3, "model": {draft}' in found["vllm"]
    assert f"--speculative-draft-model-path {tmp_path / 'sglang'}" in found["sglang"]
    assert "--model-path MAIN_MODEL" in found["sglang"]

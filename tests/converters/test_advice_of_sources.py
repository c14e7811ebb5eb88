"""What is wrong with a source, and that doing what the message says helps."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import pytest
from advice import done, follows, told
from hub_client import REPO, TOKEN, lone_hub
from hub_server import Fault
from huggingface_hub import constants
from modules import (
    INDEX,
    MTP_FILE,
    config_of,
    draft_of,
    module_of,
    set_config,
    weight_map,
    without_module,
    write_files,
)
from roundtrip import dequantised, patch_tensor, read_tensors, tree_bytes

from tools.make_tiny_checkpoint import make_tiny_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_tiny_checkpoint(folder / "fp8")
    make_tiny_checkpoint(folder / "bf16", dtype="bf16")
    make_tiny_checkpoint(folder / "other", seed=1)
    return folder


@pytest.fixture
def src(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "fp8", tmp_path / "src"))


def refused(capsys: pytest.CaptureFixture[str], src: object, *options: object) -> str:
    return told(capsys, "import", src, Path(str(src)).parent / "refused", *options)


def imported(src: object, *options: object) -> Path:
    """The import succeeds, and its export is a checkpoint again; returns the export."""
    parent = Path(str(src)).parent
    done("import", src, parent / "ckpt", *options)
    done("export", parent / "ckpt", parent / "out")
    done("import", parent / "out", parent / "again")
    return parent / "out"


def shard_of(src: Path, name: str) -> Path:
    return src / weight_map(src)[name]


# --- an MTP module in another dtype


@follows("to write them as the main model's, import with --mtp-from")
def test_a_module_in_float32_beside_a_bfloat16_main_model(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    src = Path(shutil.copytree(made / "bf16", tmp_path / "src"))
    stored = read_tensors(src)
    tensors = {
        name: tensor.astype("float32") if name.startswith("model.layers.4.") else tensor
        for name, tensor in stored.items()
    }
    for file in src.glob("model*"):
        file.unlink()
    write_files(src, {"model.safetensors": tensors}, index=False)
    said = refused(capsys, src)
    assert f"1 problem in {src}: dtype model.layers.4 holds 55 tensors in F32" in said
    out = read_tensors(imported(src, "--mtp-from", src))
    assert out.keys() == stored.keys()
    for name, tensor in stored.items():
        assert out[name].dtype == tensor.dtype, name
        assert out[name].tobytes() == tensor.tobytes(), name


# --- files that no index names


def in_a_file_of_its_own(made: Path, tmp_path: Path) -> Path:
    src = without_module(made / "fp8", tmp_path / "src")
    tensors = {f"model.layers.4.{name}": tensor for name, tensor in module_of(made / "fp8").items()}
    write_files(src, {MTP_FILE: tensors}, index=False)
    return src


def with_its_number_of_before(made: Path, tmp_path: Path) -> Path:
    """A model that was cut to three layers, whose MTP module is still layer 4."""
    src = without_module(made / "fp8", tmp_path / "src", num_hidden_layers=3)
    tensors = {n: t for n, t in read_tensors(made / "fp8").items() if ".layers.3." not in n}
    for file in {*weight_map(src).values()}:
        (src / file).unlink()
    write_files(src, {"model-00001-of-00001.safetensors": tensors}, index=True)
    return src


@pytest.mark.parametrize("layout", [in_a_file_of_its_own, with_its_number_of_before])
@pytest.mark.parametrize("scope", [(), ("--scope", "mtp")])
@follows(": import with --mtp-from ", ", import with --mtp-from ")
def test_a_module_that_is_not_where_it_should_be(made, tmp_path, capsys, layout, scope):
    src = layout(made, tmp_path)
    message = refused(capsys, src, *scope)
    option = re.search(r"import with (--mtp-from \S+)", message)
    assert option, message
    done("import", src, tmp_path / "ckpt", *shlex.split(option[1]), *scope)
    if not scope:
        found = module_of(imported(src, *shlex.split(option[1]), "--overwrite"))
        theirs = module_of(made / "fp8")
        assert {n: t.tobytes() for n, t in found.items()} == {
            n: t.tobytes() for n, t in theirs.items()
        }


@follows("move it out of the folder")
def test_a_file_that_repeats_others(src, tmp_path, capsys):
    shutil.copy(shard_of(src, "lm_head.weight"), src / "consolidated.safetensors")
    message = refused(capsys, src)
    assert "consolidated.safetensors is in the folder and not named by the index; move" in message
    (src / "consolidated.safetensors").rename(tmp_path / "away.safetensors")
    imported(src)


@follows(" out of the folder, the files' own headers tell the same")
def test_a_file_that_the_index_forgot(src, tmp_path, capsys):
    gone = shard_of(src, "lm_head.weight").name
    places = {name: file for name, file in weight_map(src).items() if file != gone}
    (src / INDEX).write_text(json.dumps({"weight_map": places}))
    message = refused(capsys, src)
    assert f"if it belongs to the checkpoint, move {INDEX} out of the folder" in message
    (src / INDEX).rename(tmp_path / "index")
    imported(src)


@follows(" another name, without one of that name all files are read")
def test_a_second_file_beside_a_single_one(src, capsys):
    (src / INDEX).unlink()
    shard_of_names = sorted(src.glob("*.safetensors"))
    shard_of_names[0].rename(src / "model.safetensors")
    assert "give model.safetensors another name" in refused(capsys, src)
    (src / "model.safetensors").rename(src / "model-0.safetensors")
    imported(src)


# --- config.json against the files


@pytest.mark.parametrize(
    ("config", "key", "needed"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers", 4),
        ({"num_hidden_layers": 7}, "num_hidden_layers", 4),
        ({"num_nextn_predict_layers": 0}, "num_nextn_predict_layers", 1),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers", 1),
    ],
)
@follows("; make it ", "make it ")
def test_a_number_of_layers_that_the_files_contradict(src, capsys, config, key, needed):
    set_config(src, **config)
    number = re.search(rf"{key} is .*?make it (\d+)", refused(capsys, src))
    assert number
    assert int(number[1]) == needed
    set_config(src, **{key: int(number[1])})
    imported(src)


def test_two_numbers_of_layers_that_the_files_contradict_are_told_together(src, capsys):
    set_config(src, num_hidden_layers=7, num_nextn_predict_layers=3)
    message = refused(capsys, src)
    for key in ("num_hidden_layers", "num_nextn_predict_layers"):
        number = re.search(rf"{key} is .*?make it (\d+)", message)
        assert number
        set_config(src, **{key: int(number[1])})
    imported(src)


@pytest.mark.parametrize("options", [["--mtp-from"], ["--scope", "main"]])
@follows("take the module in with --mtp-from, naming a checkpoint that has it")
@follows("export it with --base ", ", or import with --scope main")
def test_a_module_that_is_announced_and_lost(made, tmp_path, capsys, options):
    src = without_module(made / "fp8", tmp_path / "src")
    message = refused(capsys, src)
    assert "no file has a tensor of model.layers.4" in message
    assert options[0] in message
    if options == ["--mtp-from"]:
        imported(src, *options, made / "other")
    else:
        done("import", src, tmp_path / "ckpt", *options)
        base = re.search(
            r"export it with (--base \S+)", told(capsys, "export", tmp_path / "ckpt", "x")
        )
        assert base
        done("export", tmp_path / "ckpt", tmp_path / "out", *shlex.split(base[1]))


@follows("take one in with --mtp-from, naming a checkpoint that has it, or leave out --scope mtp")
def test_the_module_alone_of_what_has_none(made, tmp_path, capsys):
    src = without_module(made / "fp8", tmp_path / "src", num_nextn_predict_layers=0)
    assert "take one in with --mtp-from" in refused(capsys, src, "--scope", "mtp")
    done("import", src, tmp_path / "mtp", "--scope", "mtp", "--mtp-from", made / "other")
    imported(src)


@follows("take over the source's, with its weight_block_size")
def test_a_config_that_lost_its_quantisation(made, src, capsys):
    set_config(src, quantization_config=...)
    assert "take over the source's, with its weight_block_size" in refused(capsys, src)
    set_config(src, quantization_config=config_of(made / "fp8")["quantization_config"])
    imported(src)


@follows("remove it where the weights were dequantised")
def test_a_config_that_kept_its_quantisation(src, capsys):
    """Dequantised by plain means, as other tools do, and the config as it was."""
    plain, places = {}, weight_map(src)
    for name, tensor in read_tensors(src).items():
        scale = read_tensors(src).get(f"{name}_scale_inv") if name.endswith("weight") else None
        if scale is not None:
            tensor = dequantised(tensor, scale, (8, 16)).astype(ml_dtypes.bfloat16)
        if not name.endswith("_scale_inv"):
            plain.setdefault(places[name], {})[name] = tensor
    write_files(src, plain, index=True)
    assert "remove it where the weights were dequantised" in refused(capsys, src)
    set_config(src, quantization_config=...)
    imported(src)


def test_a_dtype_that_the_files_contradict(src, capsys):
    set_config(src, torch_dtype="float32")
    found = re.search(r"unquantised tensors are BF16: (\w+)", refused(capsys, src))
    assert found
    set_config(src, torch_dtype=found[1])
    imported(src)


def set_not_converted(src: Path, *entries: str) -> None:
    quantisation = config_of(src)["quantization_config"]
    set_config(src, quantization_config={**quantisation, "modules_to_not_convert": [*entries]})


@follows("; take it out of the list")
def test_a_list_that_names_what_is_fp8(src, capsys):
    set_not_converted(src, "lm_head", "model.layers.4")
    message = refused(capsys, src)
    entry = re.search(r"names (\S+), and .*; take it out of the list", message)
    assert entry
    set_not_converted(src, *({"lm_head", "model.layers.4"} - {entry[1]}))
    imported(src)


@pytest.mark.parametrize(
    ("entries", "written_out"),
    [
        (["re:lm_head|router"], ["lm_head", "*.gate"]),
        ([f"*.{n}.gate" for n in range(99)], ["gate"]),
    ],
)
@follows("; write the names out, with * for any part of them", "; write the names out")
def test_a_list_that_cannot_be_read(src, capsys, entries, written_out):
    set_not_converted(src, *entries)
    assert "; write the names out" in refused(capsys, src)
    set_not_converted(src, *written_out)
    imported(src)


@follows("; remove the scales")
def test_scales_that_were_left_behind(made, src, capsys):
    name = "model.layers.3.self_attn.o_proj.weight"
    files, places = {}, weight_map(src)
    for each, tensor in read_tensors(src).items():
        files.setdefault(places[each], {})[each] = tensor
    files[places[name]][name] = read_tensors(made / "bf16")[name]
    write_files(src, files, index=True)
    assert "; remove the scales" in refused(capsys, src)
    del files[places[f"{name}_scale_inv"]][f"{name}_scale_inv"]
    write_files(src, files, index=True)
    imported(src)


@follows(": two values for one thing; remove the one that is wrong")
def test_two_values_for_one_key(src, capsys):
    set_config(src, num_mtp_layers=2)
    assert "remove the one that is wrong" in refused(capsys, src)
    set_config(src, num_mtp_layers=...)
    imported(src)


@follows("know what it changes; remove it where it changes no logit")
def test_a_key_that_nobody_knows(src, capsys):
    set_config(src, my_training_note="v7")
    message = refused(capsys, src)
    assert "'my_training_note' is 'v7'" in message
    set_config(src, my_training_note=...)
    imported(src)


@follows("import the main model, with --mtp-from naming this")
def test_a_module_alone_as_vllm_has_it(made, src, capsys, tmp_path):
    """Its config is the main model's, so that nothing but its tensors tells."""
    done("import", made / "other", tmp_path / "other")
    done("export", tmp_path / "other", tmp_path / "draft", "--draft", "vllm")
    said = refused(capsys, tmp_path / "draft")
    assert said.startswith("1 problem ")
    assert "import the main model, with --mtp-from naming this" in said
    out = imported(src, "--mtp-from", tmp_path / "draft")
    assert module_of(out)["eh_proj.weight"].tobytes() == (
        module_of(made / "other")["eh_proj.weight"].tobytes()
    )


@follows("import the main model, with --mtp-from naming this draft")
def test_a_stand_alone_draft(made, tmp_path, capsys):
    draft = draft_of(made / "other", tmp_path / "draft")
    assert "import the main model, with --mtp-from naming this draft" in refused(capsys, draft)
    imported(without_module(made / "fp8", tmp_path / "lost"), "--mtp-from", draft)


# --- what --mtp-from names


@follows("no tensor is called model.layers.N.eh_proj.weight; name a checkpoint that has one")
@follows(
    " file; name a folder or a model that holds an MTP module", "; name a checkpoint of the same"
)
def test_what_holds_no_module_of_this_model(made, tmp_path, capsys):
    lost = without_module(made / "fp8", tmp_path / "lost")
    make_tiny_checkpoint(tmp_path / "wide", sizes={"hidden_size": 48})
    (tmp_path / "empty").mkdir()
    for wrong, message in {
        lost: "name a checkpoint that has one",
        tmp_path / "wide": "name a checkpoint of the same sizes",
        tmp_path / "empty": "name a folder or a model that holds an MTP module",
    }.items():
        assert message in refused(capsys, lost, "--mtp-from", wrong)
    imported(lost, "--mtp-from", made / "other")


@follows("is missing; the blocks of its FP8 scales come from it: put it there")
def test_a_module_in_fp8_without_a_config(made, tmp_path, capsys):
    lost = without_module(made / "fp8", tmp_path / "lost")
    draft = draft_of(made / "other", tmp_path / "draft")
    (draft / "config.json").unlink()
    assert "put it there" in refused(capsys, lost, "--mtp-from", draft)
    shutil.copy(made / "other/config.json", draft)
    imported(lost, "--mtp-from", draft)


# --- files and links


@follows("is a Git LFS pointer, not the file it stands for; run `git lfs pull`")
def test_a_pointer_of_git_lfs(src, capsys):
    file = shard_of(src, "lm_head.weight")
    content = file.read_bytes()
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "run `git lfs pull`" in refused(capsys, src)
    file.write_bytes(content)  # which is what that does
    imported(src)


def to_a_file_outside(src: Path) -> tuple[str, Callable[[], object]]:
    file, outside = shard_of(src, "lm_head.weight"), src.parent / "outside.safetensors"
    file.rename(outside)
    file.symlink_to(outside)
    return "put the file itself there", lambda: (file.unlink(), outside.rename(file))


def to_a_folder_outside(src: Path) -> tuple[str, Callable[[], object]]:
    outside = src.parent / "figures"
    outside.mkdir()
    (outside / "a.svg").write_text("<svg/>")
    (src / "inner").mkdir()
    (src / "figures").symlink_to(src / "inner")
    return "put the folder itself there", lambda: (
        (src / "figures").unlink(),
        shutil.copytree(outside, src / "figures"),
    )


def to_nowhere(src: Path) -> tuple[str, Callable[[], object]]:
    (src / "notes.txt").symlink_to("nowhere")
    return "mend the link or remove it", (src / "notes.txt").unlink


def of_another_encoding(src: Path) -> tuple[str, Callable[[], object]]:
    odd = src / "a\udcff.txt"
    odd.write_text("")
    return "rename it", lambda: odd.rename(src / "a.txt")


@pytest.mark.parametrize(
    "fault", [to_a_file_outside, to_a_folder_outside, to_nowhere, of_another_encoding]
)
@follows(
    "read it with --follow-links, or put the file itself there",
    "read it with --follow-links, or put the folder itself there",
    "; mend the link or remove it",
    "has a name that is not UTF-8; rename it",
)
def test_a_file_that_cannot_be_read_where_it_is(src, tmp_path, capsys, fault):
    advice, mend = fault(src)
    message = refused(capsys, src)
    assert advice in message
    if "--follow-links" in message:
        done("import", src, tmp_path / "followed", "--follow-links")
    mend()
    imported(src)


@follows("; remove the link")
def test_a_link_without_an_end(src, capsys):
    (src / "loop").symlink_to(src)
    assert "remove the link" in refused(capsys, src, "--follow-links")
    (src / "loop").unlink()
    done("import", src, src.parent / "ckpt", "--follow-links")


@follows("name what it was imported from, or what `convert-deepseek export` made of it")
def test_a_checkpoint_directory_as_a_source(src, capsys):
    out = imported(src)
    advice = "name what it was imported from, or what `convert-deepseek export` made of it"
    assert advice in refused(capsys, src.parent / "ckpt")
    done("import", src, src.parent / "first")
    done("import", out, src.parent / "second")


@follows("has a name that the checkpoint directory needs for itself; move it out of the source")
def test_a_side_file_of_a_reserved_name(src, capsys):
    (src / "params").mkdir()
    (src / "params/notes.txt").write_text("")
    dst = src.parent / "ckpt"
    assert "move it out of the source" in told(capsys, "import", src, dst)
    assert "move it out of the source" in told(capsys, "inspect", src)
    assert not dst.exists()  # it is told before anything is written
    shutil.move(src / "params", src.parent / "away")
    done("import", src, dst)


@follows("; name another place, or shorten the name")
def test_a_side_file_with_a_name_that_has_no_room(src, capsys):
    """A name of 250 bytes has; in a folder whose own path is that long it has none."""
    name = 250 * "x"
    (src / name).write_text("as it was")
    deep = src.parent / "/".join([200 * "d"] * 19) / "ckpt"
    deep.parent.mkdir(parents=True)
    assert "name another place, or shorten" in told(capsys, "import", src, deep)
    assert not deep.exists()
    out = imported(src)
    assert (out / name).read_text() == "as it was"
    assert "name another place" in told(capsys, "export", src.parent / "ckpt", deep)
    assert not deep.exists()
    (src / name).rename(src / "short")
    done("import", src, deep)


@follows(", as its text_config is; save that language model alone and import that")
def test_a_language_model_in_another_model(src, capsys):
    """As Kimi-K2.5 has one. What it lacks of our keys is not told: it has no need of them."""
    inner = config_of(src)
    outer = {"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"]}
    (src / "config.json").write_text(json.dumps({**outer, "text_config": inner}))
    said = refused(capsys, src)
    assert said.startswith("2 problems")
    assert "as its text_config is; save that language model alone" in said
    (src / "config.json").write_text(json.dumps(inner))
    imported(src)


# --- values


@follows("import with --copies main to take the main model's")
def test_a_copy_of_an_older_embedding(src, capsys):
    patch_tensor(src, "model.layers.4.embed_tokens.weight", {(0, 0): b"\x00\x40"})
    assert "import with --copies main" in told(capsys, "import", src, src.parent / "ckpt")
    done("import", src, src.parent / "ckpt", "--copies", "main")


# --- the Hub


@follows("needs the Hub, and HF_HUB_OFFLINE is set; unset it, or use a folder")
@follows("); name a branch, a tag or a commit after the @", "); use a local copy")
@follows("run `hf auth login` or set HF_TOKEN", "use a token that has it")
@follows(
    "): ask for access on its page on the Hub, then ", " times; run the same command again later"
)
def test_the_hub(made, tmp_path, capsys, monkeypatch):
    with lone_hub(tmp_path, monkeypatch) as hub:
        model = hub.add(REPO, tree_bytes(made / "fp8"))
        assert "name a branch, a tag or a commit" in told(capsys, "inspect", f"{REPO}@nope")
        done("inspect", f"{REPO}@main")
        with monkeypatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            assert "unset it, or use a folder" in told(capsys, "inspect", REPO)
            done("inspect", made / "fp8")
        disabled = {"X-Error-Message": "Access to this resource is disabled."}
        hub.fail("^GET /api/", Fault(status=403, headers=disabled, times=9))
        assert "use a local copy" in told(capsys, "inspect", REPO)
        done("inspect", made / "fp8")
        hub.clear_faults()
        hub.fail("^GET /api/", Fault(status=500, times=9))
        assert "run the same command again later" in told(capsys, "inspect", REPO)
        hub.clear_faults()
        done("inspect", REPO)
        model.private = True
        assert "run `hf auth login` or set HF_TOKEN" in told(capsys, "inspect", REPO)
        monkeypatch.setenv("HF_TOKEN", "hf_without_access")
        assert "use a token that has it" in told(capsys, "inspect", REPO)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        done("inspect", REPO)
        model.gated, model.private = True, False
        monkeypatch.delenv("HF_TOKEN")
        assert "ask for access on its page on the Hub, then run" in told(capsys, "inspect", REPO)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        done("import", REPO, tmp_path / "ckpt")

"""`import --mtp-from`: the main model of one checkpoint with the MTP module of another."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xxhash
from changed import leaf_of_rows
from gcs_server import GcsServer
from hub_client import REPO, lone_hub
from modules import (
    COPIES,
    MTP_FILE,
    assert_module,
    assert_only_the_module_is_new,
    config_of,
    draft_of,
    module_of,
    round_trip,
    run,
    set_config,
    weight_map,
    without_module,
    write_files,
)
from roundtrip import (
    assert_same_files,
    block_scales,
    dequantised,
    patch_tensor,
    quantised,
    read_tensors,
    tree_bytes,
)

from converters.cli.main import main
from mtp_model.checkpoint.derived import write_derived
from mtp_model.checkpoint.directory import Checkpoint, open_checkpoint
from tools.make_tiny_checkpoint import make_tiny_checkpoint

BLOCK = (8, 16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fp8`, `bf16`: whole checkpoints. `other_*`: of the same sizes, every value another."""
    folder = tmp_path_factory.mktemp("made")
    for dtype in ("fp8", "bf16"):
        make_tiny_checkpoint(folder / dtype, dtype=dtype)
        make_tiny_checkpoint(folder / f"other_{dtype}", dtype=dtype, seed=1)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        {},  # still announces the module
        {"num_nextn_predict_layers": 0},
        {"num_nextn_predict_layers": None},
        {"num_nextn_predict_layers": ...},  # no such key
        {"num_nextn_predict_layers": ..., "num_mtp_layers": 0},
    ],
    ids=["announced", "0", "null", "absent", "other name"],
)
def test_a_lost_module_comes_back(made, tmp_path, config):
    lost = without_module(made / "fp8", tmp_path / "lost", **config)
    out = round_trip(lost, made / "other_fp8", tmp_path)
    assert_only_the_module_is_new(out, lost)
    assert_module(out, module_of(made / "other_fp8"))
    said = config_of(out)
    assert said["num_nextn_predict_layers"] == 1
    assert said.get("num_mtp_layers", 1) == 1
    if not config:
        assert (out / "config.json").read_bytes() == (lost / "config.json").read_bytes()
    run("import", out, tmp_path / "again")  # it is a checkpoint like any other


def test_with_its_own_module_it_is_the_checkpoint_that_it_was(made, tmp_path):
    lost = without_module(made / "bf16", tmp_path / "lost")
    out = round_trip(lost, made / "bf16", tmp_path)
    found, whole = read_tensors(out), read_tensors(made / "bf16")
    assert {n: t.tobytes() for n, t in found.items()} == {n: t.tobytes() for n, t in whole.items()}


@pytest.mark.usefixtures("_torch")
def test_the_logits_are_those_of_both(made, tmp_path, capsys):
    """The plain-torch reference reads the export, our model the checkpoint directory."""
    lost = without_module(made / "bf16", tmp_path / "lost")
    out = round_trip(lost, made / "other_bf16", tmp_path)
    run("verify", "--logits", out, tmp_path / "ckpt")
    capsys.readouterr()  # and without the other module: depth 0 is the main model
    assert main(["verify", "--logits", "--json", str(made / "bf16"), str(tmp_path / "ckpt")]) == 1
    check = json.loads(capsys.readouterr().out)["logits"]
    main_model, module = (depth["relative_difference"] for depth in check["depths"])
    assert main_model <= check["tolerance"] < 100 * check["tolerance"] < module


def test_provenance_names_both_with_the_digests_of_all_that_was_read(made, tmp_path):
    lost = without_module(made / "fp8", tmp_path / "lost")
    round_trip(lost, made / "other_fp8", tmp_path)
    record = open_checkpoint(tmp_path / "ckpt").provenance
    assert record["source"]["name"] == str(lost)
    assert record["mtp_source"]["name"] == str(made / "other_fp8")
    places = weight_map(made / "other_fp8")
    files = {file for name, file in places.items() if name.startswith("model.layers.4.")}
    assert record["mtp_source"]["files"].keys() == files
    tensors = read_tensors(made / "other_fp8")
    wanted = {
        xxhash.xxh3_128_hexdigest(tensors[name].tobytes())
        for name in places
        if name.startswith("model.layers.4.")
    }
    found = [
        digest for file in record["mtp_source"]["files"].values() for digest in file["tensors"]
    ]
    assert {*found} - {None} == wanted
    assert MTP_FILE in record["source"]["files"]


def test_copies_of_another_embedding_are_named_and_the_main_models_are_taken(
    made, tmp_path, capsys
):
    """Engines feed a module the main model's embedding and head, whatever copies it has."""
    lost = without_module(made / "bf16", tmp_path / "lost")
    run("import", lost, tmp_path / "ckpt", "--mtp-from", made / "other_bf16", "--json")
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert f"from {made / 'other_bf16'}" in notes
    for name in COPIES:
        assert f"model.layers.4.{name} differs; the main model's is taken" in notes
    run("import", lost, tmp_path / "same", "--mtp-from", made / "bf16", "--json")
    assert json.loads(capsys.readouterr().out)["notes"] == [f"from {made / 'bf16'}"]


def test_copies_of_another_vocabulary_are_not_taken(made, tmp_path, capsys):
    make_tiny_checkpoint(tmp_path / "longer", dtype="bf16", sizes={"vocab_size": 400})
    lost = without_module(tmp_path / "longer", tmp_path / "lost")
    out = round_trip(lost, made / "other_bf16", tmp_path)
    assert "is BF16 [384, 40] where the module is from; the main model's" in capsys.readouterr().out
    assert_module(out, module_of(made / "other_bf16"))


def test_a_module_without_copies_gets_none(made, tmp_path):
    lost = without_module(made / "bf16", tmp_path / "lost")
    draft = draft_of(made / "other_bf16", tmp_path / "draft", copies=False)
    wanted = {n: t for n, t in module_of(made / "other_bf16").items() if n not in COPIES}
    assert_module(round_trip(lost, draft, tmp_path), wanted)


def test_a_module_that_is_there_is_replaced_and_that_is_said(made, tmp_path, capsys):
    out = round_trip(made / "fp8", made / "other_fp8", tmp_path)
    assert "replaced: 100 tensors of model.layers.4" in " ".join(capsys.readouterr().out.split())
    assert_module(out, module_of(made / "other_fp8"))
    kept = {n for n in read_tensors(made / "fp8") if not n.startswith("model.layers.4.")}
    found, whole = read_tensors(out), read_tensors(made / "fp8")
    assert kept == {n for n in found if not n.startswith("model.layers.4.")}
    assert all(found[name].tobytes() == whole[name].tobytes() for name in kept)
    whole_files = {f for n, f in weight_map(made / "fp8").items() if n not in kept}
    for file in {*weight_map(made / "fp8").values()} - whole_files:
        assert (out / file).read_bytes() == (made / "fp8" / file).read_bytes()


@pytest.mark.parametrize("kind", ["draft", "cut down", "engine's draft", "part of the files"])
def test_a_module_is_found_whatever_its_number_and_what_is_around_it(made, tmp_path, kind):
    lost, other = without_module(made / "fp8", tmp_path / "lost"), made / "other_fp8"
    module = tmp_path / "module"
    if kind == "draft":
        draft_of(other, module)
    elif kind == "cut down":  # to two layers, and the module kept its number
        shutil.copytree(other, module)
        set_config(module, num_hidden_layers=2)
    elif kind == "engine's draft":  # the tensors of the layer under their own names
        draft_of(other, module)
        tensors = {f"model.layers.4.{name}": t for name, t in module_of(other).items()}
        write_files(module, {"nextn.safetensors": tensors}, index=False)
        shutil.copy(other / "config.json", module)
    else:  # only the files that the index names for the module were downloaded
        shutil.copytree(other, module)
        needed = {f for n, f in weight_map(other).items() if n.startswith("model.layers.4.")}
        for file in {*weight_map(other).values()} - needed:
            (module / file).unlink()
    assert_module(round_trip(lost, module, tmp_path), module_of(other))


def test_two_modules(made, tmp_path):
    make_tiny_checkpoint(tmp_path / "two", num_mtp=2, seed=1)
    lost = without_module(made / "fp8", tmp_path / "lost")
    out = round_trip(lost, tmp_path / "two", tmp_path)
    assert config_of(out)["num_nextn_predict_layers"] == 2
    of = [n for n, file in weight_map(out).items() if file == MTP_FILE]
    assert {name.split(".")[2] for name in of} == {"4", "5"}


def test_a_single_file_gets_an_index(made, tmp_path):
    make_tiny_checkpoint(tmp_path / "one", num_mtp=0, num_files=1)
    out = round_trip(tmp_path / "one", made / "other_fp8", tmp_path)
    assert_only_the_module_is_new(out, tmp_path / "one")
    assert {*weight_map(out).values()} == {"model.safetensors", MTP_FILE}


def test_a_module_in_fp8_under_a_main_model_in_bf16(made, tmp_path, capsys):
    """Engines load it by the main model's config, which promises bfloat16."""
    lost = without_module(made / "bf16", tmp_path / "lost")
    out = round_trip(lost, made / "other_fp8", tmp_path)
    assert "written as BF16, as the main model's" in " ".join(capsys.readouterr().out.split())
    assert "quantization_config" not in config_of(out)
    theirs, found = module_of(made / "other_fp8"), module_of(out)
    assert found.keys() == {name for name in theirs if not name.endswith("_scale_inv")}
    for name, tensor in found.items():
        scale = theirs.get(f"{name}_scale_inv")
        if scale is not None:
            plain = dequantised(theirs[name], scale, BLOCK).astype(ml_dtypes.bfloat16)
            assert tensor.tobytes() == plain.tobytes(), name


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_a_module_in_bf16_under_a_main_model_in_fp8(made, tmp_path, powers_of_two):
    """vLLM leaves bfloat16 weights under an FP8 config uninitialised."""
    lost = without_module(made / "fp8", tmp_path / "lost")
    if powers_of_two:
        quantised_as = config_of(lost)["quantization_config"] | {"scale_fmt": "ue8m0"}
        set_config(lost, quantization_config=quantised_as)
    out = round_trip(lost, made / "other_bf16", tmp_path)
    theirs, found = module_of(made / "other_bf16"), module_of(out)
    weights = [name for name in theirs if f"{name}_scale_inv" in found]
    assert {f"{name}_scale_inv" for name in weights} == found.keys() - theirs.keys()
    assert weights
    for name in weights:
        scale = block_scales(theirs[name], BLOCK)
        if powers_of_two:
            scale = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)
        assert found[f"{name}_scale_inv"].tobytes() == scale.tobytes(), name
        codes = quantised(theirs[name], scale, BLOCK)
        assert found[name].tobytes() == codes.tobytes(), name


@pytest.mark.parametrize("module", ["other_fp8", "other_bf16"])
def test_modules_that_the_config_says_are_not_fp8(made, tmp_path, module):
    """Engines build these in bfloat16 before they see a tensor."""
    lost = without_module(made / "fp8", tmp_path / "lost")
    listed = config_of(lost)["quantization_config"]
    set_config(lost, quantization_config=listed | {"modules_to_not_convert": ["model.layers.4"]})
    found = module_of(round_trip(lost, made / module, tmp_path))
    theirs = module_of(made / module)
    assert found.keys() == module_of(made / "other_bf16").keys()
    name = "mlp.experts.3.up_proj.weight"
    plain = theirs[name]
    if module == "other_fp8":
        plain = dequantised(plain, theirs[f"{name}_scale_inv"], BLOCK).astype(ml_dtypes.bfloat16)
    assert found[name].tobytes() == plain.tobytes()


def test_a_module_of_other_blocks(made, tmp_path):
    make_tiny_checkpoint(tmp_path / "blocks", seed=1, sizes={"weight_block_size": [16, 8]})
    lost = without_module(made / "fp8", tmp_path / "lost")
    out = round_trip(lost, tmp_path / "blocks", tmp_path)
    name = "mlp.experts.3.up_proj.weight"
    theirs, found = module_of(tmp_path / "blocks"), module_of(out)
    plain = dequantised(theirs[name], theirs[f"{name}_scale_inv"], (16, 8))
    scale = block_scales(plain, BLOCK)
    assert found[f"{name}_scale_inv"].tobytes() == scale.tobytes()
    assert found[name].tobytes() == quantised(plain, scale, BLOCK).tobytes()


def trained(checkpoint: Checkpoint, to: Path) -> Path:
    """The checkpoint with other values in a part of its MTP module, as training leaves it."""
    leaf = "mtp.block.mlp.experts.up_proj.weight"
    shape = checkpoint.leaves[leaf].tensor_shape

    def rows(index: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        values = np.random.default_rng(index[-1]).normal(size=shape)
        return values[start:stop].astype(np.float32)

    write_derived(checkpoint, to, {leaf: leaf_of_rows(np.dtype(np.float32), rows)}, {})
    return to


@pytest.mark.parametrize("scope", ["all", "mtp"])
@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_the_module_of_a_checkpoint_directory(made, tmp_path, scope, dtype):
    other = made / "other_fp8"
    run("import", other, tmp_path / "theirs", "--scope", scope, "--dtype", dtype)
    lost = without_module(made / "fp8", tmp_path / "lost")
    out = round_trip(lost, tmp_path / "theirs", tmp_path)
    assert_module(out, module_of(other))


def test_the_module_of_a_trained_run_is_what_its_export_has(made, tmp_path):
    run("import", made / "other_fp8", tmp_path / "theirs")
    final = trained(open_checkpoint(tmp_path / "theirs"), tmp_path / "final")
    run("export", final, tmp_path / "exported")
    wanted = module_of(tmp_path / "exported")
    name = "mlp.experts.3.up_proj.weight"
    assert wanted[name].tobytes() != module_of(made / "other_fp8")[name].tobytes()
    lost = without_module(made / "fp8", tmp_path / "lost")
    assert_module(round_trip(lost, final, tmp_path), wanted)


def test_a_damaged_checkpoint_directory_gives_no_module(made, tmp_path, capsys):
    run("import", made / "other_fp8", tmp_path / "theirs")
    chunk = next((tmp_path / "theirs/params/mtp.eh_proj.weight").glob("0.*"))
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    lost = without_module(made / "fp8", tmp_path / "lost")
    told = refused(capsys, "import", lost, tmp_path / "ckpt", "--mtp-from", tmp_path / "theirs")
    assert "mtp.eh_proj.weight/0.0.0 has other bytes than were written" in told
    assert not (tmp_path / "ckpt").exists()


def test_it_is_trained_and_exported_over_the_files_of_its_source(made, tmp_path, capsys):
    """A module taken in, with --scope mtp, trained, and completed from what it came from."""
    lost, other = without_module(made / "fp8", tmp_path / "lost"), made / "other_fp8"
    taken = ("--mtp-from", other)
    run("import", lost, tmp_path / "mtp", *taken, "--scope", "mtp")
    final = trained(open_checkpoint(tmp_path / "mtp"), tmp_path / "final")
    run("export", final, tmp_path / "out", "--base", lost, *taken)
    assert_only_the_module_is_new(tmp_path / "out", lost)
    for file in {*weight_map(lost).values()}:
        assert (tmp_path / "out" / file).samefile(lost / file)
    run("import", lost, tmp_path / "all", *taken)
    all_trained = trained(open_checkpoint(tmp_path / "all"), tmp_path / "all_final")
    run("export", all_trained, tmp_path / "wanted")
    assert_same_files(tmp_path / "out", tmp_path / "wanted")
    told = refused(capsys, "export", final, tmp_path / "no", "--base", lost)
    assert f"({lost} --mtp-from {other})" in told


@pytest.mark.parametrize("taken", ["main", "module"])
def test_from_the_hub(made, tmp_path, monkeypatch, taken):
    lost, other = without_module(made / "fp8", tmp_path / "lost"), made / "other_fp8"
    wanted = round_trip(lost, other, tmp_path)
    (tmp_path / "hub").mkdir()
    with lone_hub(tmp_path, monkeypatch) as hub:
        hub.add(REPO, tree_bytes(lost if taken == "main" else other))
        pair = (REPO, other) if taken == "main" else (lost, REPO)
        run("import", pair[0], tmp_path / "hub/ckpt", "--mtp-from", pair[1])
    run("export", tmp_path / "hub/ckpt", tmp_path / "hub/out")
    assert_same_files(tmp_path / "hub/out", wanted)


def test_from_a_bucket(made, tmp_path, gcs: GcsServer, url: str):
    lost, other = without_module(made / "fp8", tmp_path / "lost"), made / "other_fp8"
    for name, content in tree_bytes(other).items():
        gcs.put(f"{url.split('/', 3)[3]}/{name}", content)
    assert_module(round_trip(lost, url, tmp_path), module_of(other))
    run("import", other, f"{url}-ckpt", "--scope", "mtp")
    (tmp_path / "second").mkdir()
    assert_module(round_trip(lost, f"{url}-ckpt", tmp_path / "second"), module_of(other))


def test_what_is_no_module_of_this_main_model_is_refused(made, tmp_path, capsys):
    lost = without_module(made / "fp8", tmp_path / "lost")
    make_tiny_checkpoint(tmp_path / "wide", sizes={"hidden_size": 48})
    make_tiny_checkpoint(tmp_path / "none", num_mtp=0)
    shutil.copytree(made / "other_fp8", tmp_path / "part")
    tensors = module_of(made / "other_fp8")
    del tensors["enorm.weight"]
    draft_of(made / "other_fp8", tmp_path / "draft")
    named = {f"model.layers.0.{name}": tensor for name, tensor in tensors.items()}
    write_files(tmp_path / "draft", {"nextn.safetensors": named}, index=False)
    for module, told in {
        "wide": "hidden_size is 48, the main model's is 40",
        "none": "no tensor is called model.layers.N.eh_proj.weight",
        "draft": "missing   model.layers.4.enorm.weight",
    }.items():
        command = ("import", lost, tmp_path / "ckpt", "--mtp-from", tmp_path / module)
        assert told in refused(capsys, *command), module
        assert not (tmp_path / "ckpt").exists()
    with pytest.raises(SystemExit):
        main(["import", str(lost), "x", "--scope", "main", "--mtp-from", "y"])
    assert "leave out one of them" in capsys.readouterr().err


def test_other_settings_of_the_modules_config_are_told(made, tmp_path, capsys):
    lost = without_module(made / "fp8", tmp_path / "lost", rope_theta=50000)
    run("import", lost, tmp_path / "ckpt", "--mtp-from", made / "fp8", "--json")
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert [note for note in notes if note.startswith("rope_theta is 1000")], notes
    assert len(notes) == 2


def test_the_state_that_the_module_was_trained_on_comes_with_it(made, tmp_path):
    run("import", made / "fp8", tmp_path / "theirs", "--mtp-hidden-state", "pre_norm")
    lost = without_module(made / "fp8", tmp_path / "lost")
    run("import", lost, tmp_path / "ckpt", "--mtp-from", tmp_path / "theirs")
    assert open_checkpoint(tmp_path / "ckpt").config.mtp_hidden_state == "pre_norm"


def test_an_interrupted_import_continues_and_notices_another_module(made, tmp_path, capsys):
    lost, other = without_module(made / "fp8", tmp_path / "lost"), tmp_path / "other"
    shutil.copytree(made / "other_fp8", other)
    wanted = round_trip(lost, other, tmp_path)
    run("import", lost, tmp_path / "again", "--mtp-from", other, "--worker", "1/2")  # half of it
    command = ("import", lost, tmp_path / "again", "--mtp-from", other)
    capsys.readouterr()
    run(*command, "--json")
    assert json.loads(capsys.readouterr().out)["resumed_units"] > 0
    run("export", tmp_path / "again", tmp_path / "out2")
    assert_same_files(tmp_path / "out2", wanted)
    shutil.rmtree(tmp_path / "again")
    run(*command, "--worker", "1/2")
    name = "model.layers.4.eh_proj.weight"
    patch_tensor(other, name, {(0, 0): b"\x00\x40"})
    assert f"changed   {MTP_FILE} was" in refused(capsys, *command)


def test_what_a_module_is_read_from_is_never_written_over(made, tmp_path, capsys):
    """A checkpoint directory by import, a stand-alone draft by export, with --overwrite too."""
    lost, ckpt, draft = (tmp_path / name for name in ("lost", "ckpt", "draft"))
    without_module(made / "bf16", lost)
    run("import", made / "other_bf16", ckpt)
    run("export", ckpt, draft, "--draft", "vllm")
    module, alone = tree_bytes(ckpt), tree_bytes(draft)
    said = refused(capsys, "import", lost, ckpt, "--mtp-from", ckpt, "--overwrite")
    assert f"{ckpt} and {ckpt} of --mtp-from overlap" in said
    assert "name another place" in said
    given = ("--base", lost, "--mtp-from", draft, "--overwrite")
    assert "of --mtp-from overlap" in refused(capsys, "export", ckpt, draft, *given)
    assert (tree_bytes(ckpt), tree_bytes(draft)) == (module, alone)
    run("import", lost, tmp_path / "another", "--mtp-from", ckpt)

"""`convert-deepseek export` as a user meets it: over a base, pushed to the Hub, requantised."""

import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from changed import leaf_of_rows
from hub_client import TOKEN, lone_hub
from hub_server import Fault, HubServer
from roundtrip import assert_same_files, dequantised, read_tensors, tree_bytes

from converters.cli.main import main
from converters.publishing import push as hub_push
from converters.verifying import export_gate
from converters.verifying.logits.check import check_logits
from mtp_model.checkpoint.derived import write_derived
from mtp_model.checkpoint.directory import Checkpoint, open_checkpoint
from tools.make_tiny_checkpoint import make_tiny_checkpoint

REPO = "org/Tuned-V3"
EXPERTS = "mtp.block.mlp.experts.up_proj.weight"
BLOCK = (8, 16)
COLUMNS = "weight rms error / rms weight largest error / block's largest"

# How huggingface_hub 2.4 itself calls httpx2 to send a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def mtp(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("mtp") / "checkpoint"
    assert main(["import", str(source), str(folder), "--scope", "mtp", "--dtype", "f32"]) == 0
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def tuned(mtp: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """With the MTP module's experts trained."""

    def rows(index: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        noise = np.random.default_rng(index[-1]).normal(size=(stop - start, 1))
        return mtp.read_rows(EXPERTS, index, start, stop) + (0.01 * noise).astype(np.float32)

    changed = {EXPERTS: leaf_of_rows(np.dtype(np.float32), rows)}
    return write_derived(mtp, tmp_path_factory.mktemp("tuned") / "final", changed, {})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub of a user who is logged in."""
    with lone_hub(tmp_path, monkeypatch) as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(hub_push, "_MOST_FILES", 2)
        yield server


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """The command in this process: exit status, stdout, stderr."""
    status = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return status, out, err


def lines(out: str) -> list[str]:
    return [" ".join(line.split()) for line in out.splitlines()]


def test_over_a_base(source: Path, tuned: Checkpoint, tmp_path: Path, capsys):
    out_folder = tmp_path / "out"
    status, out, err = run(capsys, "export", tuned.path, out_folder, "--base", source)
    assert (status, err) == (0, "")
    table = lines(out)
    assert f"base {source}" in table
    assert "files 7, of which 4 have the source's every byte" in table
    assert "changed 24 tensors of the source" in table
    links = "model-00001-of-000007 to model-00004-of-000007 4 hard link "
    assert any(line.startswith(links) for line in table), out
    size = 0
    for number, changed in ((5, 4), (6, 12), (7, 8)):
        name = f"model-{number:05}-of-000007"
        assert any(line.startswith(f"{name} 1 rewritten {changed} ") for line in table), out
        size += (out_folder / f"{name}.safetensors").stat().st_size
    assert "config, tokenizer, index, others 5 copy" in table
    assert f"written {size / 1000:.2f} kB" in table
    status, out, _ = run(capsys, "verify", out_folder, tuned.path)
    assert status == 0
    assert run(capsys, "verify", source, tuned.path)[0] == 1


def test_over_a_base_as_json(source: Path, tuned: Checkpoint, tmp_path: Path, capsys):
    command = ("export", tuned.path, tmp_path / "out", "--base", source, "--json")
    status, out, _ = run(capsys, *command)
    assert status == 0
    found = json.loads(out)
    hows = [file["how"] for file in found["files"]]
    assert hows == ["hard link"] * 4 + ["written"] * 3
    assert found["base"] == str(source)
    assert [len(file["changed"]) for file in found["files"]] == [0, 0, 0, 0, 4, 12, 8]


def test_what_a_partial_checkpoint_needs_is_told(
    source: Path, tuned: Checkpoint, tmp_path: Path, capsys
):
    status, out, err = run(capsys, "export", tuned.path, tmp_path / "out")
    assert (status, out) == (1, "")
    assert "was imported with --scope mtp" in err
    assert f"export it with --base {source} to write the whole checkpoint" in err
    assert not (tmp_path / "out").exists()


def test_another_base_is_told(tuned: Checkpoint, tmp_path: Path, capsys):
    make_tiny_checkpoint(tmp_path / "other", seed=1)
    command = ("export", tuned.path, tmp_path / "out", "--base", tmp_path / "other")
    status, out, err = run(capsys, *command)
    assert (status, out) == (1, "")
    assert f"which has to be what {tuned.path} was imported from" in err
    assert "has other bytes than what was imported" in err
    status, _, err = run(capsys, *command[:-1], tuned.path)
    assert status == 1
    assert "is a checkpoint directory, not a safetensors checkpoint" in err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--base", "src", "--dtype", "bf16"], "with --dtype bf16 none would be"),
        (["--push", "name"], "--push name is no model on the Hub; needed ORG/NAME"),
        (["--push", ""], "needed ORG/NAME"),
        (["--push", "org/name@main"], "needed ORG/NAME"),
        (["--push", "../name"], "needed ORG/NAME"),
        (2 * ["--acceptance", "a.json"], "--acceptance is given 2 times, needed once, with all"),
    ],
)
def test_wrong_usage_is_status_2(args: list[str], told: str, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["export", "ckpt", "dst", *args])
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


# What requantisation costs


def test_the_cost_of_requantisation_is_told(
    source: Path, tuned: Checkpoint, tmp_path: Path, capsys
):
    command = ("export", tuned.path, tmp_path / "out", "--base", source)
    status, out, _ = run(capsys, *command)
    assert status == 0
    assert "12 weights got new FP8 scales, the 8 with the largest errors:" in out
    assert COLUMNS in lines(out)
    status, out, _ = run(capsys, *command, "--overwrite", "--json")
    costs = {cost["name"]: cost for cost in json.loads(out)["requantised"]}
    names = [f"model.layers.4.mlp.experts.{expert}.up_proj.weight" for expert in range(12)]
    assert [*costs] == sorted(names, key=[*costs].index)
    assert len(costs) == 12
    written = read_tensors(tmp_path / "out")
    for expert, name in enumerate(names):
        scale = written[name + "_scale_inv"]
        wanted = tuned.read_rows(EXPERTS, (0, expert), 0, written[name].shape[0])
        error = np.abs(dequantised(written[name], scale, BLOCK) - wanted)
        largest = dequantised(np.full(wanted.shape, 448, np.float32), scale, BLOCK)
        rms = np.sqrt((error**2).sum() / (wanted**2).sum())
        assert costs[name]["rms_rel_err"] == pytest.approx(float(rms), rel=1e-3)
        assert costs[name]["max_rel_err"] == pytest.approx(float((error / largest).max()), rel=1e-3)


def test_bf16_of_fp8_is_the_dequantised_weights(source: Path, tmp_path: Path, capsys):
    assert run(capsys, "import", source, tmp_path / "ckpt")[0] == 0
    status, out, _ = run(capsys, "export", tmp_path / "ckpt", tmp_path / "out", "--dtype", "bf16")
    assert status == 0
    assert "weights are written as bfloat16" in out
    assert "148 scales and config.json's quantization_config are left out" in out
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    theirs, ours = read_tensors(source), read_tensors(tmp_path / "out")
    bf16 = np.dtype(ml_dtypes.bfloat16)
    for name, value in ours.items():
        wanted = theirs[name]
        if name + "_scale_inv" in theirs:
            wanted = dequantised(wanted, theirs[name + "_scale_inv"], BLOCK).astype(bf16)
        assert value.tobytes() == wanted.tobytes(), name
    assert not [name for name in ours if name.endswith("_scale_inv")]


def test_bf16_of_bf16_is_bit_exact(tmp_path: Path, capsys):
    make_tiny_checkpoint(tmp_path / "src", dtype="bf16")
    assert run(capsys, "import", tmp_path / "src", tmp_path / "ckpt")[0] == 0
    for dtype in ("keep", "bf16"):
        out = tmp_path / dtype
        assert run(capsys, "export", tmp_path / "ckpt", out, "--dtype", dtype)[0] == 0
        theirs, ours = read_tensors(tmp_path / "src"), read_tensors(out)
        assert {n: t.tobytes() for n, t in ours.items()} == {
            n: t.tobytes() for n, t in theirs.items()
        }
    assert_same_files(tmp_path / "keep", tmp_path / "src")


# Pushed to the Hub


def on_the_hub(hub: HubServer) -> dict[str, bytes]:
    model = hub.models[REPO]
    return model.commits[model.branches["main"]]


def test_pushed_after_the_export(hub, source: Path, tuned: Checkpoint, tmp_path: Path, capsys):
    command = ("export", tuned.path, tmp_path / "out", "--base", source, "--push", REPO)
    status, out, err = run(capsys, *command)
    assert status == 0, err
    url = f"{hub.url}/{REPO}/tree/{hub.models[REPO].branches['main']}"
    assert any(line.startswith("pushed 13 files, ") and url in line for line in lines(out)), out
    files = tree_bytes(tmp_path / "out")
    assert {name: on_the_hub(hub)[name] for name in files} == files
    assert len(files) == 12, "nothing is left beside the checkpoint"
    assert TOKEN not in out + err
    status, out, err = run(capsys, *command)
    assert (status, out) == (1, "")
    assert "holds a checkpoint; name another place or --overwrite it" in err


def claims_of(readme: str) -> dict[str, str]:
    """The rows of the card's table of what was verified."""
    table = readme.partition("| verified when it was exported | |\n|---|---|\n")[2]
    rows = itertools.takewhile(lambda line: line.startswith("| "), table.splitlines())
    return dict(row.strip("| ").split(" | ") for row in rows)


def changed_tensors(one: Path, other: Path) -> set[str]:
    ours, theirs = read_tensors(one), read_tensors(other)
    assert ours.keys() == theirs.keys()
    return {name for name in ours if ours[name].tobytes() != theirs[name].tobytes()}


def test_the_card_claims_what_anybody_finds(
    hub, source: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """Counted again from both folders; its commands, run as they stand there."""
    pytest.importorskip("torch")
    monkeypatch.setattr(export_gate, "check_logits", check_logits)
    hub.add("org/Base", tree_bytes(source))
    assert run(capsys, "import", "org/Base", tmp_path / "ckpt")[0] == 0
    base, leaf = open_checkpoint(tmp_path / "ckpt"), "mtp.enorm.weight"
    rows = base.read_rows(leaf, (0,), 0, base.leaves[leaf].tensor_shape[0])
    changed = {leaf: leaf_of_rows(rows.dtype, lambda _, a, b: -rows[a:b])}
    write_derived(base, tmp_path / "tuned", changed, {})
    out = tmp_path / "out"
    assert run(capsys, "export", tmp_path / "tuned", out, "--push", REPO)[0] == 0
    readme, tensors = on_the_hub(hub)["README.md"].decode(), read_tensors(out)
    different = changed_tensors(out, source)
    module = {name for name in tensors if name.startswith("model.layers.4.")}
    copies = {"model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"}
    values = sum(tensor.size for tensor in tensors.values())
    claims = claims_of(readme)
    logits = claims.pop("float32 logits, against plain torch")
    assert re.fullmatch(r"differ by \d\.\de-0[678] at most, allowed 1e-05; on every layer", logits)
    assert claims == {
        "tensors": f"{len(tensors):,}, of {values:,} values",
        "index, headers and config.json": "agree with all tensors",
        "MTP module's copies of embedding and head": "2, with the main model's bytes",
        "main model, tensors that changed": str(len(different - module)),
        "MTP module, tensors that changed": f"{len(different & module)} of {len(module - copies)}",
    }
    assert len(different) == 1
    commands = re.findall("^convert-deepseek (verify .*)$", readme, re.MULTILINE)
    revision = hub.models["org/Base"].branches["main"]
    main_alone = f"verify org/Base@{revision} {REPO} --scope main"
    assert commands == [main_alone, main_alone.removesuffix(" --scope main")]
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert [main(command.split()) for command in commands] == [0, 1]


def test_the_card_says_where_nothing_was_verified(
    hub, source: Path, tuned: Checkpoint, tmp_path: Path, capsys
):
    place = (tmp_path / "out", "--base", source)
    assert run(capsys, "export", tuned.path, *place, "--push", REPO, "--no-verify")[0] == 0
    readme = on_the_hub(hub)["README.md"].decode()
    assert "Nothing of this was verified when it was exported." in readme
    assert not claims_of(readme)


def test_a_push_that_fails_is_continued_by_the_same_command(
    hub, source: Path, tuned: Checkpoint, tmp_path: Path, capsys, monkeypatch
):
    command = ("export", tuned.path, tmp_path / "out", "--base", source, "--push", REPO)
    hub.fail("^POST .*/commit/", Fault())
    hub.fail("^POST .*/commit/", Fault(status=403, times=9))
    status, out, err = run(capsys, *command)
    assert (status, out) == (1, "")
    assert "model-00003-of-000007.safetensors and 1 more is forbidden (403)" in err
    assert f"{tmp_path / 'out'} is exported in full, " in err
    assert " kB is not on the Hub yet; the same command continues" in err
    sent = len(hub.requests("^PUT "))
    hub.clear_faults()
    monkeypatch.setattr("converters.exporting.files.ExportFiles.take", None)
    monkeypatch.setattr("converters.exporting.exporter.StreamWriter", None)
    status, out, err = run(capsys, *command, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["resumed_files"] == 7
    assert found["pushed"]["url"].endswith(hub.models[REPO].branches["main"])
    assert len(hub.requests("^PUT ")) < 2 * 7 - sent + 1
    files = tree_bytes(tmp_path / "out")
    assert {name: on_the_hub(hub)[name] for name in files} == files


@pytest.mark.usefixtures("hub")
def test_without_a_token_nothing_is_lost(
    source: Path, tuned: Checkpoint, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.delenv("HF_TOKEN")
    command = ("export", tuned.path, tmp_path / "out", "--base", source, "--push", REPO, "--json")
    status, out, err = run(capsys, *command)
    assert status == 1
    assert "run `hf auth login` or set HF_TOKEN" in err
    assert "all of it is not on the Hub yet; the same command continues" in err
    assert [problem["kind"] for problem in json.loads(out)["problems"]] == ["hub", "push"]
    assert run(capsys, "verify", tmp_path / "out", tuned.path)[0] == 0, "it is a checkpoint"


def test_another_export_does_not_take_up_a_pushed_one(
    hub, source: Path, mtp: Checkpoint, tuned: Checkpoint, tmp_path: Path, capsys
):
    hub.fail("^POST ", Fault(status=403, times=99))
    place = (tmp_path / "out", "--base", source)
    assert run(capsys, "export", tuned.path, *place, "--push", REPO)[0] == 1
    status, _, err = run(capsys, "export", mtp.path, *place, "--push", REPO)
    assert status == 1
    assert "holds a checkpoint" in err
    assert run(capsys, "export", mtp.path, *place, "--overwrite")[0] == 0
    assert_same_files(tmp_path / "out", source)  # nothing is left of the other's journal

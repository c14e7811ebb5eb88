"""`convert-deepseek` as a user meets it: results on stdout, the rest on stderr, exit statuses."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from roundtrip import assert_same_files, tree_bytes

from converters.cli.main import main
from tools.make_tiny_checkpoint import make_tiny_checkpoint

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "checkpoint"
    assert main(["import", str(source), str(folder)]) == 0
    return folder


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A checkpoint whose config promises more experts than there are, and one stale copy."""
    make_tiny_checkpoint(tmp_path / "broken")
    change_config(tmp_path / "broken", n_routed_experts=16)
    return tmp_path / "broken"


def change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def set_zero(file: Path, tensor: str) -> None:
    content = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    first, end = json.loads(content[8:begin])[tensor]["data_offsets"]
    content[begin + first : begin + end] = bytes(end - first)
    file.write_bytes(content)


def command_line(*args: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "converters.cli", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """The command in this process: exit status, stdout, stderr."""
    status = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return status, out, err


def usage_error(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    return err


def test_the_whole_way(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    status, out, err = run(capsys, "import", source, checkpoint)
    assert (status, err) == (0, "")
    assert "read        331 tensors, 348.40 kB\n" in out
    status, out, err = run(capsys, "verify", source, checkpoint)
    assert (status, err) == (0, "")
    assert "export writes the source's bytes for all 331 tensors" in out
    status, out, err = run(capsys, "export", checkpoint, exported)
    assert (status, err) == (0, "")
    assert "files       7, of which 7 have the source's every byte\n" in out
    assert_same_files(exported, source)


def test_inspect(source: Path, capsys: pytest.CaptureFixture[str]):
    status, out, err = run(capsys, "inspect", source)
    assert (status, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert f"checkpoint {source}" in lines
    assert "layers 2 dense, 2 MoE (12 experts, 4 for a token)" in lines
    assert (
        "parameters 242.40 K: main model 183.20 K, 129.44 K active for a token; MTP 59.20 K"
        in lines
    )
    module = "model.layers.4, 100 tensors, 59.20 K parameters"
    assert f"MTP module 1 {module}; copies: embed_tokens, shared_head.head" in lines
    assert "routed experts 144 80.64 K 83.90 kB" in lines
    assert not any(line != line.rstrip() for line in out.splitlines())


def test_inspect_json(source: Path, capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "inspect", source, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["importable"] is True
    assert found["dtypes"]["F8_E4M3"]["tensors"] == 148
    assert found["network"]["mtp"][0]["layer"] == 4
    assert found["network"]["config"]["weight_block_size"] == [8, 16]


def test_inspect_of_a_checkpoint_without_mtp(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_tiny_checkpoint(tmp_path, num_mtp=0, dtype="bf16")
    status, out, _ = run(capsys, "inspect", tmp_path)
    assert status == 0
    assert "none: num_nextn_predict_layers is 0" in out
    assert "not quantised" in out


def test_inspect_tells_an_absent_mtp_module(tmp_path: Path, capsys):
    make_tiny_checkpoint(tmp_path, num_mtp=0)
    change_config(tmp_path, num_nextn_predict_layers=1)
    status, out, _ = run(capsys, "inspect", tmp_path)
    assert status == 1
    assert "MTP module 1     model.layers.4, absent\n" in out
    assert "1 problem in " in out


def test_inspect_shows_what_it_can_of_a_broken_checkpoint(
    broken: Path, capsys: pytest.CaptureFixture[str]
):
    status, out, err = run(capsys, "inspect", broken)
    assert (status, err) == (1, "")
    assert "can be imported  no (problems below)\n" in out
    assert "78 problems in " in out
    grouped = "model.layers.{2..4}.mlp.experts.{12..15}.up_proj.weight (12 tensors)"
    assert f"  missing   {grouped}\n" in out
    assert len(json.loads(run(capsys, "inspect", broken, "--json")[1])["problems"]) == 78


def test_inspect_reads_on_where_config_and_index_are_bad(
    broken: Path, capsys: pytest.CaptureFixture[str]
):
    (broken / "config.json").write_text("{")
    (broken / "model-00003-of-000007.safetensors").unlink()
    status, out, _ = run(capsys, "inspect", broken)
    assert status == 1
    assert "config    config.json is not JSON" in out
    assert "index     model-00003-of-000007.safetensors is named by the index" in out


def test_import_reports_problems_and_writes_nothing(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    status, out, err = run(capsys, "import", broken, tmp_path / "checkpoint")
    assert (status, out) == (1, "")
    assert err.startswith(f"78 problems in {broken}:\n")
    assert not (tmp_path / "checkpoint").exists()


def test_problems_as_json_are_complete(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    status, out, err = run(capsys, "import", broken, tmp_path / "checkpoint", "--json")
    assert status == 1
    found = json.loads(out)
    assert found["where"] == str(broken)
    assert len(found["problems"]) == 78
    assert found["problems"][0].keys() == {"kind", "subject", "detail"}
    assert "78 problems" in err


def test_stale_copies_stop_an_import_until_told_what_to_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, checkpoint = tmp_path / "source", tmp_path / "checkpoint"
    make_tiny_checkpoint(source, num_files=1)
    set_zero(source / "model.safetensors", "model.layers.4.shared_head.head.weight")
    status, _, err = run(capsys, "import", source, checkpoint)
    assert status == 1
    assert "differs from lm_head.weight in 384 of 384 rows" in err
    assert "import with --copies main" in err
    status, out, _ = run(capsys, "import", source, checkpoint, "--copies", "main")
    assert status == 0
    assert "stale copy  model.layers.4.shared_head.head.weight differs" in out
    status, out, _ = run(capsys, "verify", source, checkpoint)
    assert status == 0
    assert "stale in the source, export writes the main model's" in out
    assert "the source's bytes for 330 of 331 tensors, the main model's for the others" in out


def test_options_reach_the_import(source: Path, tmp_path: Path, capsys):
    options = "--scope mtp --dtype bf16 --mtp-hidden-state pre_norm --workers 1 --json".split()
    status, out, _ = run(capsys, "import", source, tmp_path / "checkpoint", *options)
    assert status == 0
    assert json.loads(out)["num_tensors"] == 103
    provenance = json.loads((tmp_path / "checkpoint" / "provenance.json").read_text())
    decided = {key: provenance[key] for key in ("scope", "dtype", "mtp_hidden_state", "copies")}
    assert decided == {
        "scope": "mtp",
        "dtype": "bf16",
        "mtp_hidden_state": "pre_norm",
        "copies": "check",
    }


def test_shares_of_an_import(
    checkpoint: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    dst = tmp_path / "checkpoint"
    status, out, err = run(capsys, "import", source, dst, "--worker", "2/2")
    assert (status, err) == (0, "")
    assert "worker      2 of 2, " in out
    assert "unfinished  this share is done, others are not; the last of them finishes" in out
    assert run(capsys, "verify", dst)[0] == 1
    status, out, _ = run(capsys, "import", source, dst, "--worker", "1/2", "--json")
    assert status == 0
    assert {"finished": True, "worker": [0, 2]}.items() <= json.loads(out).items()
    assert_same_files(dst, checkpoint)


def test_two_processes_at_once_give_the_same_bytes(checkpoint: Path, source: Path, tmp_path: Path):
    dst = tmp_path / "checkpoint"
    command = [sys.executable, "-m", "converters.cli", "import", str(source), str(dst), "--json"]
    shares = [
        subprocess.Popen([*command, "--worker", share], cwd=ROOT, stdout=subprocess.PIPE)
        for share in ("1/2", "2/2")
    ]
    results = [json.loads(share.communicate(timeout=100)[0]) for share in shares]
    assert [share.returncode for share in shares] == [0, 0]
    assert any(result["finished"] for result in results)
    assert sum(result["num_tensors"] for result in results) == 331
    assert_same_files(dst, checkpoint)


def test_overwrite_is_asked_for(
    checkpoint: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for command, other in (("import", source), ("--dtype", "f32")), (("export", checkpoint), ()):
        dst = tmp_path / command[0]
        assert run(capsys, *command, dst)[0] == 0
        status, out, err = run(capsys, *command, dst, *other)
        assert (status, out) == (1, "")
        assert "--overwrite" in err
        assert run(capsys, *command, dst, "--overwrite")[0] == 0


def test_a_finished_import_has_nothing_to_do(source: Path, tmp_path: Path, capsys):
    assert run(capsys, "import", source, tmp_path / "ckpt")[0] == 0
    before = tree_bytes(tmp_path / "ckpt")
    status, out, _ = run(capsys, "import", source, tmp_path / "ckpt")
    assert status == 0
    assert "pieces were there already" in out
    assert tree_bytes(tmp_path / "ckpt") == before
    next((tmp_path / "ckpt/params/norm.weight").glob("[0-9]*")).unlink()
    status, _, err = run(capsys, "import", source, tmp_path / "ckpt")
    assert status == 1, "it is damaged"
    assert "--overwrite" in err


def test_bf16_export_says_what_it_leaves_out(checkpoint: Path, tmp_path: Path, capsys):
    status, out, _ = run(capsys, "export", checkpoint, tmp_path / "bf16", "--dtype", "bf16")
    assert status == 0
    assert "148 scales and config.json's quantization_config are left out" in out
    assert run(capsys, "verify", tmp_path / "bf16", checkpoint)[0] == 0


def test_verify_of_a_checkpoint_alone(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "verify", checkpoint, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["holds"] is True
    assert found["storage"] is None
    assert found["digests"]["files"] > 100


def test_verify_leaves_the_reports_of_runs_and_checkpoints(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint, made = tmp_path / "checkpoint", tmp_path / "run"
    assert run(capsys, "import", source, checkpoint)[0] == 0
    made.mkdir()
    (made / "config.yaml").write_text("of the run")
    (made / "report.json").write_text('{"report_version": 1}')
    for folder in (made, checkpoint):
        before = tree_bytes(folder)
        status, _, err = run(capsys, "verify", checkpoint, "--report", folder)
        assert status == 1
        assert "which is a run or a checkpoint with reports of its own" in err
        assert tree_bytes(folder) == before


def test_verify_names_a_damaged_chunk(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint = tmp_path / "checkpoint"
    assert run(capsys, "import", source, checkpoint)[0] == 0
    chunk = checkpoint / "params" / "mtp.eh_proj.weight" / "0.0.0"
    content = np.fromfile(chunk, np.uint8)
    content[17] ^= 1
    content.tofile(chunk)
    status, out, _ = run(capsys, "verify", source, checkpoint, "--report", tmp_path / "report")
    assert status == 1
    assert "digest    params/mtp.eh_proj.weight/0.0.0 has other bytes than were written" in out
    assert "FAILED: 1 damaged file" in out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["holds"] is False
    assert report["storage"] is None


def test_verify_against_another_source_fails(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    make_tiny_checkpoint(tmp_path, seed=1)
    status, out, _ = run(capsys, "verify", tmp_path, checkpoint)
    assert status == 1
    assert "FAILED: 331 of 331 tensors differ" in out
    assert "  model.layers.{0..4}.input_layernorm.weight (5 tensors)\n" in out
    assert "... and 31 more lines; --json lists all" in out


@pytest.mark.usefixtures("_torch")
def test_verify_logits(
    source: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    report = tmp_path / "report"
    status, out, _ = run(capsys, "verify", source, checkpoint, "--logits", "--report", report)
    assert status == 0
    assert "MTP depth 1" in out
    assert "logits agree" in out
    assert {file.name for file in report.iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
        "logits.png",
    }


def test_a_report_is_written_over_no_file_of_another_origin(
    source: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    own = tmp_path / "report.md"
    own.write_text("my own")
    for command in (["verify", checkpoint], ["probe", source, "--data", own]):
        status, _, said = run(capsys, *command, "--report", tmp_path)
        assert status == 1
        assert "which has report.md that no report left there, needed another folder" in said
    assert own.read_text() == "my own"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["inspect", "nowhere"], "nowhere does not exist; needed the folder"),
        (["import", "nowhere", "dst"], "nowhere does not exist; needed the folder"),
        (["export", "nowhere", "dst"], "nowhere does not exist; name a checkpoint directory"),
        (["verify", "nowhere"], "nowhere does not exist; name a checkpoint directory"),
        (["verify", "SOURCE"], "is a safetensors checkpoint, not a checkpoint directory"),
        (["export", "SOURCE", "dst"], "is a safetensors checkpoint, not a checkpoint directory"),
        (["import", "CHECKPOINT", "dst"], "is a checkpoint directory, not a safetensors"),
        (["inspect", "CHECKPOINT"], "is a checkpoint directory, not a safetensors"),
        (["import", "SOURCE", "SOURCE"], "which it is made of, overlap; name another place"),
        (["export", "CHECKPOINT", "SOURCE"], "name another place"),
        (["verify", "CHECKPOINT", "--report", "/dev/null"], "but /dev/null is a file; name"),
    ],
)
def test_bad_input_is_one_message(
    args: list[str],
    told: str,
    source: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    places = {"SOURCE": str(source), "CHECKPOINT": str(checkpoint)}
    status, out, err = run(capsys, *(places.get(arg, arg) for arg in args))
    assert (status, out) == (1, "")
    assert told in err
    assert "Traceback" not in err
    assert not (tmp_path / "dst").exists()


def test_unfinished_checkpoint_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / ".unfinished").mkdir()
    status, _, err = run(capsys, "verify", tmp_path)
    assert status == 1
    assert "run the same command again, it continues where it stopped" in err


def test_other_errors_are_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status, out, err = run(capsys, "verify", tmp_path / "nowhere", "--json")
    assert status == 1
    assert json.loads(out)["error"] + "\n" == err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "subcommand"),
        (["convert"], "convert"),
        (["inspect"], "SRC"),
        (["inspect", "src", "--verbose"], "--verbose"),
        (["import", "src", "dst", "--scope", "some"], "some"),
        (["import", "src", "dst", "--workers", "0"], "--workers needs to be 1 or more"),
        (["import", "src", "dst", "--worker", "0/2"], "--worker 0/2 is no share; needed I/N"),
        (["import", "src", "dst", "--worker", "3/2"], "with I from 1 to N, as 2/4"),
        (["import", "src", "dst", "--worker", "1/0"], "--worker 1/0 is no share"),
        (["import", "src", "dst", "--worker", "2"], "--worker 2 is no share"),
        (["import", "src", "dst", "--worker=-1/2"], "--worker -1/2 is no share"),
        (["verify", "ckpt", "--logits"], "verify SRC CKPT"),
        (["verify", "ckpt", "--scope", "main"], "verify SRC CKPT"),
        (["verify", "src", "ckpt", "--text", "words"], "needed both, or neither"),
        (["verify", "src", "ckpt", "--mesh.expert", "2"], "--mesh is what --logits runs on"),
        (["verify", "a", "b", "--logits", "--mesh.data", "0"], "--mesh.data is 0, needed 1 or"),
    ],
)
def test_wrong_usage_is_status_2(args: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    assert told in usage_error(capsys, *args)


def test_version(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "--version")
    assert status == 0
    assert out.startswith("convert-deepseek ")


def test_interruption_says_how_to_go_on(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("converters.cli.import_command.import_checkpoint", interrupted)
    status, _, err = run(capsys, "import", source, tmp_path / "checkpoint")
    assert status == 130
    assert "the same command continues" in err


def test_process_exits_with_the_status_and_keeps_the_streams_apart(source: Path, broken: Path):
    good = command_line("inspect", source, "--json")
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["model_type"] == "deepseek_v3"
    bad = command_line("import", broken, broken.parent / "checkpoint")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("78 problems in ")
    wrong = command_line("import", broken)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "Traceback" not in bad.stderr + wrong.stderr


def test_reader_that_goes_away_is_no_traceback(source: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "converters.cli", "inspect", str(source)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.parametrize("words", [["--help"], ["import", "--help"], ["--version"]])
def test_help_does_not_wait_for_jax(words: list[str]):
    code = (
        "import contextlib, sys\n"
        "from converters.cli.main import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(sys.argv[1:])\n"
        "sys.exit('jax' in sys.modules)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "convert-deepseek" in process.stdout


def test_a_full_disk_is_told_with_what_to_do(source, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("converters.cli.import_command.run_import", full)
    assert main(["import", str(source), str(tmp_path / "ckpt")]) == 1
    told = capsys.readouterr().err
    assert told.endswith("No space left on device; make room and run the same command again\n")

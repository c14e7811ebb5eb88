"""Settings: defaults < YAML < command line, and every mistake in them named."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import TrainCommand, parse, run
from finetune.data.files import kinds
from finetune.evaluate import EvaluateSettings
from finetune.run.changes import differences
from finetune.settings import RunSettings, SettingsError, flat, option
from finetune.settings_file import read_yaml, write_yaml
from finetune.settings_rules import check
from finetune.weights import raise_unless_fitting
from mtp_model.checkpoint.directory import open_checkpoint

NEEDED = ["train", "--checkpoint", "CKPT", "--data", "a.txt", "b", "--out", "RUN"]
ADAMW, MUON, ADAFACTOR = (["--optimizer.name", name] for name in ("adamw", "muon", "adafactor"))
DECAY = ["--objective.depth-decay", "0.5"]


def parsed(*extra: str) -> RunSettings:
    command = parse([*NEEDED, *extra])
    assert isinstance(command, TrainCommand)
    return command.settings


def yaml_file(tmp_path: Path, text: str) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return str(file)


def test_three_options_are_enough():
    settings = parsed()
    assert (settings.checkpoint, settings.out) == ("CKPT", Path("RUN"))
    assert settings.data == (Path("a.txt"), Path("b"))
    check(settings)


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    file = yaml_file(
        tmp_path, "steps: 7\ntrain: all\noptimizer:\n  learning_rate: 1e-4\n  clip_norm: 2\n"
    )
    default = parsed()
    settings = parsed("--config", file, "--optimizer.learning-rate", "0.5", "--steps", "9")
    assert (settings.steps, settings.train) == (9, "all")
    assert settings.optimizer.learning_rate == 0.5
    assert settings.optimizer.clip_norm == 2.0
    assert settings.optimizer.beta2 == default.optimizer.beta2
    assert settings.batch == default.batch


def test_yaml_alone_is_enough(tmp_path):
    file = yaml_file(tmp_path, "checkpoint: C\ndata: a.txt\nout: R\noptimizer: {epsilon: 1e-6}\n")
    command = parse(["train", "--config", file])
    assert isinstance(command, TrainCommand)
    assert command.settings.data == (Path("a.txt"),)
    assert command.settings.optimizer.epsilon == 1e-6


def test_all_may_be_in_a_bucket(tmp_path):
    command = [*NEEDED[:2], "gs://b/ckpt", "--data", "gs://b/text", "--out", "gs://b/run"]
    from_words = parse(command)
    assert isinstance(from_words, TrainCommand)
    file = yaml_file(tmp_path, "checkpoint: gs://b/ckpt\ndata: gs://b/text\nout: gs://b/run\n")
    for settings in (from_words.settings, read_yaml(Path(file))):
        assert settings.checkpoint == "gs://b/ckpt"
        check(settings)
        write_yaml(settings, tmp_path / "again.yaml")
        assert "out: gs://b/run\n" in (tmp_path / "again.yaml").read_text()
        assert read_yaml(tmp_path / "again.yaml") == settings
        moved = dataclasses.replace(settings, out=Path("gs://b/moved"))
        assert differences(settings, moved) == {"out": "--out was gs://b/run, is now gs://b/moved"}
        states = dataclasses.replace(settings, data=(), states=(Path("gs://b/states"),))
        check(states)
        write_yaml(states, tmp_path / "again.yaml")
        assert read_yaml(tmp_path / "again.yaml") == states


def test_resolved_settings_come_back(tmp_path):
    settings = parsed("--eval-data", "e", "--optimizer.learning-rate", "3e-4", "--seed", "5")
    write_yaml(settings, tmp_path / "config.yaml")
    assert read_yaml(tmp_path / "config.yaml") == settings


def test_every_fault_of_a_yaml_file_is_reported(tmp_path):
    file = yaml_file(
        tmp_path,
        "learning_rate: 1\noptimizer: {learning_rat: 1, clip_norm: loud}\nsteps: 1.5\n"
        "train: mpt\nbatch: 3\ndata: 4\nseed: true\n",
    )
    with pytest.raises(SettingsError) as caught:
        read_yaml(Path(file))
    assert caught.value.faults == [
        "unknown setting learning_rate; the nearest is optimizer.learning_rate",
        "unknown setting optimizer.learning_rat; the nearest is optimizer.learning_rate",
        "optimizer.clip_norm is 'loud', needed a number",
        "steps is 1.5, needed a whole number",
        "train is 'mpt', needed mtp or all or lora",
        "batch is 3, needed names with values",
        "data is 4, needed a path or a list of paths",
        "seed is True, needed a whole number",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- 1\n- 2\n", "the file is .* needed names with values"),
        ("steps: 1\nseed: 1\nsteps: 2\n", "it has steps twice in what begins in line 1"),
        ("steps: 1\nbatch:\n  rows: 1\n  rows: 2\n", "it has rows twice in what begins in line 3"),
    ],
)
def test_what_is_no_settings_file(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message):
        read_yaml(Path(yaml_file(tmp_path, text)))


def test_a_missing_settings_file(tmp_path):
    with pytest.raises(SettingsError, match=r"no\.yaml:\n  cannot be read: No such file"):
        read_yaml(tmp_path / "no.yaml")


def test_an_empty_settings_file_is_the_defaults(tmp_path):
    assert parsed("--config", yaml_file(tmp_path, "")) == parsed()


@pytest.mark.parametrize(
    ("given", "needed", "with_it"),
    [
        (["--mtp-lambda", "0.5"], "--train all", ["--train", "all"]),
        (["--mtp-lambda-schedule", "step"], "--train all", ["--train", "all"]),
        (["--detach-main"], "--train all", ["--train", "all"]),
        (["--train", "lora", "--detach-main"], "--lora.part all", ["--lora.part", "all"]),
        (
            ["--train", "all", "--mtp-lambda-end", "0.5"],
            "--mtp-lambda-schedule linear or step",
            ["--mtp-lambda-schedule", "linear"],
        ),
        (
            ["--train", "lora", "--router-bias-rate", "0.1"],
            "--train mtp or all",
            ["--train", "all"],
        ),
        (["--train", "lora", *MUON], "--train mtp or all", ["--train", "mtp"]),
        (
            ["--optimizer.schedule", "constant", "--optimizer.final-fraction", "0"],
            "--optimizer.schedule cosine, linear or wsd",
            ["--optimizer.schedule", "wsd"],
        ),
        ([*MUON, "--optimizer.epsilon", "0.1"], "--optimizer.name adamw", ADAMW),
        ([*ADAFACTOR, "--optimizer.epsilon", "0.1"], "--optimizer.name adamw", ADAMW),
        ([*ADAFACTOR, "--optimizer.beta1", "0.5"], "--optimizer.name adamw", ADAMW),
        ([*ADAFACTOR, "--optimizer.beta2", "0.5"], "--optimizer.name adamw", ADAMW),
        (DECAY, "--objective.ce, kl, tv or lk", ["--objective.kl", "1"]),
        (
            [*DECAY, "--objective.e2e-tv", "1"],
            "--objective.ce, kl, tv or lk",
            ["--objective.ce", "1"],
        ),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused(given, needed, with_it):
    """And is taken with what it needs."""
    with pytest.raises(SettingsError) as caught:
        check(parsed(*given))
    [fault] = caught.value.faults
    assert fault.endswith(f"needed {needed} beside it")
    check(parsed(*given, *with_it))


def test_unusable_samples_are_left_out_of_captured_states_only():
    with pytest.raises(SettingsError, match="--skip-unusable is True, needed --states beside it"):
        check(parsed("--skip-unusable"))


def test_every_value_that_cannot_be_used_is_reported():
    wrong = {
        "--steps": ("0", "more than 0"),
        "--seed": ("-1", "0 or more"),
        "--optimizer.learning-rate": ("-1.0", "more than 0"),
        "--optimizer.warmup-fraction": ("1.5", "from 0 to 1"),
        "--optimizer.beta1": ("1.0", "from 0 to less than 1"),
        "--batch.row-tokens": ("1", "2 or more"),
        "--evaluation.holdout-every": ("1", "0, or 2 and more"),
        "--batch.accumulation": ("3", "a divisor of the 8 rows of a batch"),
        "--lora.rank": ("3", "--train lora beside it"),
        "--optimizer.ema": ("1.0", "from 0 to less than 1"),
        "--optimizer.weight-decay-of": ("o_proj=-1", "NAME=NUMBER, 0 or more"),
    }
    settings = parsed(*(part for name, (value, _) in wrong.items() for part in (name, value)))
    with pytest.raises(SettingsError) as caught:
        check(dataclasses.replace(settings, data=()))
    assert len(caught.value.faults) == len(wrong) + 1
    for name, (value, needed) in wrong.items():
        assert f"{name} is {value}, needed {needed}" in caught.value.faults
    assert "--data is (), needed at least one path, or --states" in caught.value.faults


NUMBERS = [name for name, value in flat(parsed()).items() if isinstance(value, float)]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e39])
@pytest.mark.parametrize("name", NUMBERS)
def test_no_setting_is_infinite_or_no_number(name: str, value: float):
    """1e39 is a number, but none of float32, which steps are computed in."""
    asks_all = ["--train", "all", "--mtp-lambda-schedule", "linear"]
    if name.startswith("lora."):
        asks_all += ["--train", "lora", "--lora.part", "all"]
    settings = parsed(*asks_all, f"{option(name)}={value}")
    with pytest.raises(SettingsError) as caught:
        check(settings)
    told = f"{option(name)} is {value}, needed a finite number (of float32)"
    assert caught.value.faults == [told]
    check(parsed(*asks_all, f"{option(name)}=0.5"))


def test_every_kind_of_setting_was_tried():
    assert {"mtp_lambda", "objective.lk", "lora.alpha", "optimizer.clip_norm"} <= set(NUMBERS)


@pytest.mark.parametrize("value", ["1e999", "1e39", "9" * 400])
def test_no_weight_decay_is_infinite(value: str):
    with pytest.raises(SettingsError, match=r"weight-decay-of is o_proj=.*, needed NAME=NUMBER"):
        check(parsed("--optimizer.weight-decay-of", f"o_proj={value}"))


def test_a_whole_number_beyond_all_floats_is_said(tmp_path):
    file = yaml_file(tmp_path, f"optimizer: {{clip_norm: {'9' * 400}}}\n")
    with pytest.raises(SettingsError, match=r"clip_norm is 9+, needed a number"):
        read_yaml(Path(file))


def test_weight_decays_of_what_is_not_there(checkpoint):
    """Of each name it is said; a name of the main model is none of what learns in the module."""
    named = ("o_proj=0.1", "lm_head=0", "proj=0.1", "o_proj=0.2", "o_proj=x")
    settings = parsed("--optimizer.weight-decay-of", *named)
    with pytest.raises(SettingsError) as caught:
        check(settings)
    assert caught.value.faults == [
        "--optimizer.weight-decay-of names o_proj twice: needed one number",
        "--optimizer.weight-decay-of is o_proj=x, needed NAME=NUMBER, 0 or more",
    ]
    config = open_checkpoint(checkpoint).config
    settings = parsed("--optimizer.weight-decay-of", *named[:3])
    with pytest.raises(SettingsError, match="names proj, needed the end of") as caught:
        raise_unless_fitting(settings, config)
    lm_head, _ = caught.value.faults
    assert "names lm_head, needed the end of what learns: input_layernorm, down_proj" in lm_head
    raise_unless_fitting(
        dataclasses.replace(
            settings,
            train="all",
            optimizer=parsed("--optimizer.weight-decay-of", *named[:2]).optimizer,
        ),
        config,
    )
    adapters = parsed(
        *("--train", "lora", "--lora.projections", "o_proj"),
        *("--optimizer.weight-decay-of", "o_proj=0.1", "down_proj=0.1"),
    )
    with pytest.raises(SettingsError, match="names down_proj, needed the end of what learns: o_pr"):
        raise_unless_fitting(adapters, config)


@pytest.mark.parametrize(
    ("modules", "drafts", "fault"),
    [
        (1, 0, "needed --draft-tokens 2 or more beside it"),
        (1, 1, "needed --draft-tokens 2 or more beside it"),
        (1, 2, None),
        (2, 0, "needed text for a model of 2 MTP modules"),
        (2, 3, "needed text for a model of 2 MTP modules"),
    ],
)
def test_drafts_own_tokens_need_a_draft_after_the_first(checkpoint, modules, drafts, fault):
    config = open_checkpoint(checkpoint).config
    config = dataclasses.replace(config, num_nextn_predict_layers=modules)
    settings = parsed("--draft-input", "own", "--draft-tokens", str(drafts))
    if fault is None:
        raise_unless_fitting(settings, config)
        return
    with pytest.raises(SettingsError) as caught:
        raise_unless_fitting(settings, config)
    assert caught.value.faults == [f"--draft-input is own, {fault}"]


def test_differences_are_named_as_options():
    before, now = parsed(), parsed("--optimizer.clip-norm", "3", "--eval-data", "c", "d")
    assert differences(before, now) == {
        "eval_data": "--eval-data was nothing, is now c d",
        "optimizer.clip_norm": "--optimizer.clip-norm was 1.0, is now 3.0",
    }


# --- exit status


def status(argv) -> Any:
    try:
        return run(argv)
    except SystemExit as stopped:  # tyro's own
        return stopped.code


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "Missing subcommand"),
        (["fine"], "fine"),
        (["train", "--checkpoint", "C"], "--out"),
        (["train", "--checkpoint", "C", "--out", "R"], "--data is (), needed at least one path"),
        ([*NEEDED, "--optimizer.learning-rat", "1"], "--optimizer.learning-rate"),
        ([*NEEDED, "--steps", "many"], "many"),
        ([*NEEDED, "--config", "no.yaml"], "no.yaml"),
        ([*NEEDED, "--config"], "--config"),
        ([*NEEDED, "--steps", "-4"], "--steps is -4, needed more than 0"),
        (["evaluate", "--checkpoint", "C", "--data", "d", "--rows", "0"], "--rows is 0"),
        (["evaluate", "--checkpoint", "C", "--data"], "--data is empty"),
        ([*NEEDED, "--data", "c"], "--data is given 2 times, needed once, with all values"),
        ([*NEEDED, "--eval_data", "c", "--eval-data=d"], "--eval-data is given 2 times"),
        (
            [*NEEDED, "--lora.projections", "a", "--lora.projections", "b"],
            "--lora.projections is given 2",
        ),
        (["capture", "--checkpoint", "C", "--out", "o", *2 * ["--data", "d"]], "--data is given 2"),
    ],
)
def test_wrong_usage_has_status_2_and_says_what(argv, said, capsys):
    assert status(argv) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert not out


def test_an_option_of_one_value_may_come_twice():
    """The last one counts, so that a command can be called again with something added."""
    assert parsed("--steps", "4", "--steps", "6").steps == 6


def test_help_gives_units_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # wide enough for an option and its default in a line
    assert status(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--optimizer.learning-rate FLOAT" in text
    assert "(default: 5e-05)" in text
    assert "Tokens in a row" in text


def test_evaluate_has_its_own_settings():
    command = parse(["evaluate", "--checkpoint", "C", "--data", "a", "--draft-tokens", "3"])
    assert isinstance(command, EvaluateSettings)
    assert command.draft_tokens == 3


def test_every_command_says_the_same_of_its_data(capsys):
    said = []
    for command in ("train", "evaluate"):
        assert status([command, "--help"]) == 0
        words = "".join(" " if mark in "│╭╮╰╯─\n" else mark for mark in capsys.readouterr().out)
        said.append(" ".join(words.split()).partition("--data ")[2].partition("docs/data.md")[0])
    assert said[0] == said[1]
    assert all(suffix in said[0] for suffix in kinds._KINDS)

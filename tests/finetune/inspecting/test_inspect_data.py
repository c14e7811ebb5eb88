"""`finetune-deepseek inspect-data`: exactly what training is given, in a form for people."""

import io
import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from rich.console import Console
from trained import read_rows

from finetune import cli
from finetune.data.packing import Batch
from finetune.inspecting.inspect_data import InspectDataSettings, inspect_data, show_rows
from finetune.objective.head import Asked
from finetune.run.metrics import summarise
from finetune.state import Split, make_measure_step
from mtp_model.load import load

Y, N = True, False


def rows_as_json(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict]:
    assert cli.run(["inspect-data", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """Eleven tokens, 10 to 20, of which the first three and the seventh are not learnt."""
    mask = [0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1]
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"input_ids": [*range(10, 21)], "loss_mask": mask}))
    return file


def options(checkpoint: Path, data: Path, **more: object) -> list[object]:
    chosen = {"rows": 1, "row-tokens": 8, "holdout-every": 0, "batches": 2} | more
    named = [word for name, value in chosen.items() for word in (f"--{name}", value)]
    return ["--checkpoint", checkpoint, "--data", data, *named]


def test_rows_are_those_worked_out_by_hand(checkpoint, record, capsys):
    """A row of 8, then its rest; what follows in the text again is too long, but for its rest."""
    first, second = rows_as_json(capsys, *options(checkpoint, record))
    assert first["token_ids"] == [10, 11, 12, 13, 14, 15, 16, 17]
    assert first["segment_ids"] == [1] * 8
    assert first["positions"] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert first["loss_mask"] == [0, 0, 0, 1, 1, 1, 0, 1]
    main, depth_1 = first["targets"]
    assert main == {
        "depth": 0,
        "token_ids": [11, 12, 13, 14, 15, 16, 17, 0],
        "valid": [N, N, Y, Y, Y, N, Y, N],
    }
    assert depth_1["token_ids"] == [12, 13, 14, 15, 16, 17, 0, 0]
    assert depth_1["valid"] == [N, Y, Y, Y, N, Y, N, N]
    assert second["token_ids"] == [18, 19, 20, 18, 19, 20, 0, 0]
    assert second["segment_ids"] == [1, 1, 1, 2, 2, 2, 0, 0]
    assert second["positions"] == [0, 1, 2, 0, 1, 2, 0, 0]
    assert [target["valid"] for target in second["targets"]] == [
        [Y, Y, N, Y, Y, N, N, N],
        [Y, N, N, Y, N, N, N, N],
    ]
    assert (first["documents"], second["documents"]) == ([f"{record}:1"], [f"{record}:1"] * 2)


def test_tokens_are_shown_as_text(checkpoint, tmp_path, capsys):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "words \x1b[2J and é"}))
    row, *_ = rows_as_json(capsys, *options(checkpoint, file, **{"row-tokens": 32}))
    text = "".join(piece for piece in row["tokens"][1:] if not piece.startswith("<"))
    assert text.startswith("words \x1b[2J and ")
    assert cli.run(["inspect-data", *map(str, options(checkpoint, file))]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r'"\x1b"' in shown


def test_training_sees_these_rows(finished, settings, checkpoint, data, capsys):
    """The loss of a run's first step is that of the batch shown; of another seed's it is not."""
    split = Split.of(load(str(checkpoint), compute_dtype="float32"), "mtp")
    step = make_measure_step(split.graphdef, Asked())

    def main_loss(seed: int) -> float:
        every = {"rows": 2, "row-tokens": 32, "batches": 1, "holdout-every": 20, "seed": seed}
        rows = rows_as_json(capsys, *options(checkpoint, data, **every))
        names = ("token_ids", "segment_ids", "positions", "loss_mask")
        batch = Batch(*(jnp.array([row[name] for row in rows], jnp.int32) for name in names))
        found, _ = step(split.trainable, split.biases, split.frozen, batch)
        return summarise(found).main_loss or 0.0

    trained_on = read_rows(finished.run.metrics)[0]["main_loss"]
    assert main_loss(settings.seed) == pytest.approx(trained_on, rel=1e-5)
    assert main_loss(settings.seed + 1) != pytest.approx(trained_on, rel=1e-5)


def test_a_table_has_what_lies_around_changes_in_colour_on_a_terminal(checkpoint, record):
    found = inspect_data(
        InspectDataSettings(
            checkpoint=str(checkpoint), data=(record,), rows=1, row_tokens=16, holdout_every=0
        )
    )
    for terminal in (True, False):
        file = io.StringIO()
        show_rows(Console(file=file, force_terminal=terminal, width=100), found, around=1)
        lines = file.getvalue().splitlines()
        assert any("\x1b[" in line for line in lines) == terminal
    # 11 tokens, mask 00011101111, 5 of padding: shown are 0, 2 3, 5 6, 7, 10 11, 15
    counted = [line.split()[1] for line in lines if "more" in line]
    assert counted == ["1", "1", "2", "3"]
    shown = [line.split()[0] for line in lines if line.strip()[:1].isdigit()]
    assert shown[1:] == ["0", "2", "3", "5", "6", "7", "10", "11", "15"]


def test_one_document_is_shown_as_the_message_says(checkpoint, record, capsys):
    asked = ["inspect-data", "--checkpoint", str(checkpoint), "--data", str(record)]
    assert cli.run(asked) == 1
    advice = "--evaluation.holdout-every 0"
    assert f"or {advice} to train without evaluation" in capsys.readouterr().err
    assert cli.run([*asked, *advice.split()]) == 0


def test_settings_that_cannot_be_used_are_named_together(checkpoint, record, capsys):
    wrong = options(checkpoint, record, **{"rows": 0, "row-tokens": 1, "holdout-every": 1})
    assert cli.run(["inspect-data", *map(str, wrong)]) == 2
    said = capsys.readouterr().err
    for name in ("--rows is 0", "--row-tokens is 1", "--holdout-every is 1"):
        assert name in said
    wrong = options(checkpoint, record, **{"row-tokens": 4, "draft-tokens": 3})
    assert cli.run(["inspect-data", *map(str, wrong)]) == 2
    assert "--row-tokens is 4, needed 5 or more for this model" in capsys.readouterr().err

"""The logs of a run: broken lines, and as many rows as there may be."""

import itertools
import json
import os
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from finetune.run.metrics import MOST_POINTS, RunLog, Thinned, first_and_last, read_rows
from finetune.run.plots import REDRAWN_AFTER_S, draw_curves, just_drawn

ROW = {"main_loss": 1.5, "mtp_loss": [2.5], "acceptance": [None], "lr": 0.1}


def written(file: Path, *lines: object) -> Path:
    text = "".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines)
    file.write_text(text)
    return file


def opened(tmp_path: Path, last_step: int) -> RunLog:
    log = RunLog(tmp_path / "metrics.jsonl", tmp_path / "e.jsonl", tmp_path / "tb", last_step)
    log.close()
    return log


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 2, "main_lo\n',
        "[2]\n",
        "\n",
        '{"step": "2", "main_loss": 1, "mtp_loss": [1], "acceptance": [1]}\n',
        '{"step": 2, "main_loss": 1, "mtp_loss": 1, "acceptance": [1]}\n',
        '{"step": 2, "main_loss": 1, "mtp_lass": [1], "acceptance": [1]}\n',
        '{"step": 2\x00\udcff}\n'.encode("utf-8", "replace").decode(),
        "[" * 100_000 + "\n",
    ],
)
def test_a_broken_line_is_named_and_left_out(tmp_path: Path, line: str):
    file = written(tmp_path / "metrics.jsonl", {"step": 1} | ROW, line, {"step": 3} | ROW)
    log = opened(tmp_path, 9)
    assert log.faults == [f"{file} line 2 is broken and left out"]
    assert [row["step"] for row in read_rows(file)] == [1, 3]
    assert opened(tmp_path, 9).faults == [], "said once"


def test_a_half_line_is_cut_off_and_rows_after_the_checkpoint_too(tmp_path: Path):
    rows = [{"step": step} | ROW for step in range(1, 6)]
    file = written(tmp_path / "metrics.jsonl", *rows, '{"step": 6, "lo')
    log = opened(tmp_path, 3)
    assert log.faults == [f"{file} line 6 is broken and left out"]
    assert log.seen == 5
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
    assert [row["step"] for row in log.step_rows.rows()] == [1, 2, 3]


@pytest.mark.parametrize("count", [0, 1, 1999, 2000, 2001, 123_457])
def test_curves_have_a_few_thousand_points_with_both_ends(count: int):
    thinned = Thinned()
    for step in range(1, count + 1):
        thinned.add({"step": step})
    steps = [row["step"] for row in thinned.rows()]
    assert len(steps) <= MOST_POINTS
    if count < MOST_POINTS:
        assert steps == list(range(1, count + 1))
    else:
        assert (steps[0], steps[-1]) == (1, count)
        assert len(steps) > MOST_POINTS // 2
        gaps = {b - a for a, b in itertools.pairwise(steps[:-1])}
        assert len(gaps) == 1


def test_a_long_log_is_read_in_little_memory_and_drawn(tmp_path: Path):
    line = json.dumps({"step": 0} | ROW)
    with (tmp_path / "metrics.jsonl").open("w") as out:
        out.writelines(line.replace('"step": 0', f'"step": {n}') + "\n" for n in range(1, 60_001))
    tracemalloc.start()
    log = opened(tmp_path, 1 << 30)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = (tmp_path / "metrics.jsonl").stat().st_size
    assert peak < size, f"{peak:,} bytes for a file of {size:,}"  # 40 times as much as objects
    draw_curves(tmp_path / "curves.png", log.step_rows.rows(), [], "long")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_before_is_the_first_evaluation_on_the_same_text(tmp_path: Path):
    file = tmp_path / "evaluations.jsonl"
    assert first_and_last(file) is None
    rows = [{"step": step, "held_out": text} | ROW for step, text in enumerate("aabbb")]
    written(file, *rows)
    first, last = first_and_last(file) or (None, None)
    assert (first, last) == (rows[2], rows[4])
    earlier = [{"step": 0} | ROW, {"step": 1} | ROW, {"step": 2, "held_out": "a"} | ROW]
    written(file, *earlier)
    assert first_and_last(file) == (earlier[0], earlier[2])


def test_a_drawing_that_is_not_old_is_not_drawn_anew(tmp_path):
    curves = tmp_path / "curves.png"
    assert not just_drawn(curves)
    draw_curves(curves, [{"step": 1, **ROW}], [], "one")
    assert just_drawn(curves)
    then = time.time() - REDRAWN_AFTER_S - 1
    os.utime(curves, (then, then))
    assert not just_drawn(curves)


def test_tensorboard_is_written_without_torch(tmp_path, monkeypatch):
    """Which tensorboardX imports where it is installed, for seconds at the start of each run."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("tensorboardX", "torch"):
            monkeypatch.delitem(sys.modules, name)
    opened(tmp_path, 0)
    assert "tensorboardX" in sys.modules
    assert "torch" not in sys.modules
    assert list((tmp_path / "tb").iterdir())

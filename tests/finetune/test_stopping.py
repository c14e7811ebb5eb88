"""SIGTERM and Ctrl-C at every moment of a run, and damage between two processes of one.

All with processes of their own; what they end with equals a run that nothing disturbed.
"""

import random
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from trained import arguments, assert_same_result, command, environment, read_rows, run_until

from finetune.run.checkpoints import saved_steps
from finetune.settings import RunSettings
from finetune.train import Result

# Where, how often before, the signals, the steps that are saved then (None: as before).
MOMENTS = [
    ("load", 1, "INT", []),
    ("evaluation", 1, "TERM", []),
    ("compile", 1, "INT", []),
    ("step", 2, "TERM", [2]),
    ("checkpoint", 1, "INT", [2, 3]),
    ("evaluation", 2, "TERM", [3, 6]),  # of step 6, which is saved before it is measured
    ("final", 4, "INT", [6, 7]),
]


def test_a_run_that_is_stopped_at_every_moment_equals_one_that_is_not(
    finished: Result, settings: RunSettings, tmp_path: Path
):
    out = tmp_path / "a run"
    argv = arguments(settings, out)
    (tmp_path / "compiled").mkdir()  # nothing is: one of the signals comes meanwhile
    for point, count, signals, saved in MOMENTS:
        done = run_until(point, count, signals, argv)
        assert done.returncode == (130 if signals == "INT" else 0), (point, done.stderr)
        said, _, advice = done.stderr.splitlines()[-1].partition("continue with: ")
        assert said.startswith(f"SIG{signals}: stopped"), point
        assert shlex.split(advice) == ["finetune-deepseek", *argv]
        assert "Traceback" not in done.stderr
        found = saved_steps(out / "checkpoints")
        assert len(found) == len(saved), point
        if saved:  # the next step may have begun while a checkpoint is written: it is finished
            assert found[-1] in (saved[-1], saved[-1] + 1), point
            assert found[-1] == read_rows(out / "metrics.jsonl")[-1]["step"], point
    assert not (out / "final" / "COMPLETE").exists()
    done = run_until("none", 0, "", argv)
    assert done.returncode == 0, done.stderr
    assert_same_result(out, finished.run.path)


def test_a_second_ctrl_c_stops_at_once(settings: RunSettings, tmp_path: Path):
    """And the command to continue with does not delete what there is."""
    argv = arguments(settings, tmp_path / "run")
    done = run_until("step", 2, "INT,INT", [*argv, "--overwrite"])
    assert done.returncode == 130
    lines = done.stderr.splitlines()
    assert "SIGINT: finishing this step and saving; Ctrl-C stops at once" in lines
    assert lines[-1].startswith("SIGINT again: stopped at once; continue with: finetune-deepseek")
    assert "--overwrite" not in lines[-1]
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [1]
    assert saved_steps(tmp_path / "run/checkpoints") == []


def damage(run: Path, rng: random.Random) -> str:
    """Harm a file or a folder of the newest checkpoint, or the end of a log; what was done."""
    steps = saved_steps(run / "checkpoints")
    kind = rng.choice(["flip", "cut", "remove", "log"])
    if kind == "log" or len(steps) < 2:
        log = run / "metrics.jsonl"
        log.write_bytes(log.read_bytes()[: -rng.randrange(1, 9)] if log.exists() else b"{")
        return "log"
    paths = [*(run / "checkpoints" / str(steps[-1])).rglob("*")]
    path = rng.choice([p for p in paths if p.is_file() or kind == "remove"])
    if kind == "remove":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        content = bytearray(path.read_bytes())
        at = rng.randrange(len(content))
        content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(content[:at] if kind == "cut" else content)
    return f"{kind} {path.relative_to(run)}"


@pytest.mark.long
@pytest.mark.parametrize("seed", [8])
def test_kills_damage_and_full_disks_at_random_moments(
    finished: Result, settings: RunSettings, tmp_path: Path, seed: int
):
    """Every way ends with a status and a line that are documented; the last one is whole."""
    rng, out = random.Random(seed), tmp_path / "run"
    argv = [*arguments(settings, out), "--checkpoints.every", "1", "--checkpoints.keep", "3"]
    history = []
    for _ in range(6):
        ending = rng.choice(["KILL", "TERM", "INT", "FULL"])
        at, full = rng.uniform(0, 8), rng.randint(1, 3)
        status = ended(ending, at, full, argv)
        history.append((ending, at, status))
        assert status in {"KILL": (-9, 0), "TERM": (0,), "INT": (130, 0), "FULL": (1, 0)}[ending]
        if (out / "final" / "COMPLETE").exists():
            break
        history.append(damage(out, rng) if (out / "checkpoints").is_dir() else "nothing yet")
    if not (out / "final" / "COMPLETE").exists():
        done = run_until("none", 0, "", argv)
        assert done.returncode == 0, (history, done.stderr)
    broken = "log" in history  # a line that was damaged after its step was saved is left out
    if broken:
        kept = {row["step"]: row["loss"] for row in read_rows(out / "metrics.jsonl")}
        whole = {row["step"]: row["loss"] for row in read_rows(finished.run.metrics)}
        assert kept.items() <= whole.items(), history
        shutil.copy(finished.run.metrics, out / "metrics.jsonl")
    assert_same_result(out, finished.run.path)


def ended(ending: str, after_s: float, count: int, argv: list[str]) -> int:
    """Exit status of a process that is sent a signal so long after it began to read the text."""
    point = ("save", count, "FULL") if ending == "FULL" else ("none", 0, "")
    process = subprocess.Popen(
        command(*point, argv), env=environment(argv), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    lines = [process.stderr.readline()]
    if ending != "FULL":
        time.sleep(after_s)
        process.send_signal(signal.Signals[f"SIG{ending}"])
    lines += process.communicate()[1].splitlines()
    assert "Traceback" not in "".join(lines), lines
    return process.returncode

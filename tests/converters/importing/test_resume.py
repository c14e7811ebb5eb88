"""Import and export killed anywhere continue, and end with the same bytes."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
from roundtrip import (
    SMALL_CHUNKS,
    assert_same_files,
    make_source,
    opened,
    run_import,
    tree_bytes,
)
from side_by_side import run_all

from converters.exporting.exporter import export_checkpoint
from converters.importing.convert import unit_bytes
from converters.importing.plan import make_plan
from mtp_model.checkpoint.claim import LOCK, claim
from mtp_model.checkpoint.derived import write_derived
from mtp_model.checkpoint.directory import UNFINISHED, Checkpoint, CheckpointError, open_checkpoint
from mtp_model.files.local import LocalPlace
from mtp_model.problems import ProblemsError

SIZES = {"n_routed_experts": 8, "num_hidden_layers": 2, "first_k_dense_replace": 1}


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "src", sizes=SIZES)


@pytest.fixture(scope="module")
def whole(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """What an uninterrupted import gives."""
    dst = tmp_path_factory.mktemp("whole") / "ckpt"
    run_import(src, dst, dtype="bf16")
    return open_checkpoint(dst)


def num_done(dst: Path) -> int:
    lines = (dst / UNFINISHED / "journal-0-of-1.jsonl").read_bytes().split(b"\n")
    return len(lines) - 2  # without the fingerprint and what follows the last newline


IMPORT_POINTS = [
    ("chunk", 100),
    ("chunk written", 160),
    ("journal", 40),
    ("side file", 2),
    ("metadata", 1),
    ("layout", 3),  # COMPLETE
]


def test_import_killed_anywhere_ends_with_the_same_bytes(
    src: Path, whole: Checkpoint, tmp_path: Path
):
    folders = {point: tmp_path / "-".join(map(str, point)) for point in IMPORT_POINTS}
    run_all(
        [("import", src, dst, *point, (0, 1)) for point, dst in folders.items()], -signal.SIGKILL
    )
    resumed = {}
    for point, dst in folders.items():
        with pytest.raises(CheckpointError, match="is unfinished"):
            open_checkpoint(dst)
        done = num_done(dst)
        summary = run_import(src, dst, dtype="bf16")
        assert summary.resumed_units == done, point
        assert_same_files(dst, whole.path)
        resumed[point] = (done, summary.num_units)
    assert 20 < resumed["chunk", 100][0] < resumed["chunk", 100][1]
    assert 30 < resumed["journal", 40][0] < 40
    for point in IMPORT_POINTS[3:]:
        assert resumed[point][0] == resumed[point][1]


def test_import_killed_after_complete_is_complete(src: Path, whole: Checkpoint, tmp_path: Path):
    run_all([("import", src, tmp_path / "ckpt", "marker", 1, (0, 1))])
    assert (tmp_path / "ckpt" / UNFINISHED).is_dir()
    assert open_checkpoint(tmp_path / "ckpt").damaged_files() == []
    again = run_import(src, tmp_path / "ckpt", dtype="bf16")
    assert again.resumed_units == again.num_units
    assert_same_files(tmp_path / "ckpt", whole.path)


EXPORT_POINTS = [
    ("piece", 100),
    ("read back", 4),
    ("exported side file", 1),
    ("marker", 1),
]


def test_export_killed_anywhere_ends_with_the_same_bytes(
    src: Path, whole: Checkpoint, tmp_path: Path
):
    folders = {point: tmp_path / "-".join(map(str, point)) for point in EXPORT_POINTS}
    run_all(
        [("export", whole.path, dst, *point, (0, 1)) for point, dst in folders.items()],
    )
    for point, dst in folders.items():
        assert (dst / UNFINISHED).is_dir()
        done = num_done(dst)
        assert export_checkpoint(whole, dst).resumed_files == done, point
        assert_same_files(dst, src)


def test_shares_of_two_processes_give_the_same_bytes(src: Path, whole: Checkpoint, tmp_path: Path):
    dst = tmp_path / "ckpt"
    run_all([("import", src, dst, "none", 0, (i, 2)) for i in range(2)], 0)
    assert_same_files(dst, whole.path)


def test_workers_may_begin_at_the_same_moment(tmp_path: Path):
    """Each finds a folder that another one is just making."""
    faults = []

    def begin(dst: Path, together: threading.Barrier) -> None:
        together.wait()
        try:
            with claim(dst, shared=True):
                pass
        except CheckpointError as error:
            faults.append(error)

    for number in range(50):
        together = threading.Barrier(4)
        threads = [
            threading.Thread(target=begin, args=(tmp_path / str(number), together))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not faults


def test_shares_one_after_the_other(src: Path, whole: Checkpoint, tmp_path: Path):
    dst = tmp_path / "ckpt"
    for index in range(3):
        summary = run_import(src, dst, dtype="bf16", worker=(index, 3))
        assert summary.finished == (index == 2)
        if index < 2:
            with pytest.raises(CheckpointError, match="is unfinished"):
                open_checkpoint(dst)
    assert_same_files(dst, whole.path)


def test_a_share_may_be_finished_by_one_process(src: Path, whole: Checkpoint, tmp_path: Path):
    dst = tmp_path / "ckpt"
    first = run_import(src, dst, dtype="bf16", worker=(1, 2))
    summary = run_import(src, dst, dtype="bf16")
    assert not first.finished
    assert summary.resumed_units == first.num_units < summary.num_units
    assert_same_files(dst, whole.path)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000])
def test_shares_are_stretches_of_the_source_equal_in_bytes(src: Path, count: int):
    plan = make_plan(
        opened(src),
        scope="all",
        dtype="keep",
        copies="check",
        mtp_hidden_state=None,
        policy=SMALL_CHUNKS,
    )
    shares = [plan.share((index, count)) for index in range(count)]
    assert [unit for share in shares for unit in share] == plan.units
    sizes = [unit_bytes(plan.conversion, unit) for unit in plan.units]
    for share in shares:
        nbytes = sum(unit_bytes(plan.conversion, unit) for unit in share)
        assert abs(nbytes - sum(sizes) / count) <= max(sizes)


def test_shares_of_another_count_go_on(src: Path, whole: Checkpoint, tmp_path: Path):
    dst = tmp_path / "ckpt"
    for worker in ((1, 3), (0, 2)):
        assert not run_import(src, dst, dtype="bf16", worker=worker).finished
    summary = run_import(src, dst, dtype="bf16", worker=(1, 2))
    assert summary.finished
    assert 0 < summary.resumed_units < summary.num_units
    assert_same_files(dst, whole.path)


def test_an_import_that_is_finished_has_nothing_to_do(src: Path, whole: Checkpoint, tmp_path: Path):
    dst = tmp_path / "ckpt"
    for index in range(2):
        run_import(src, dst, dtype="bf16", worker=(index, 2))
    for worker in ((0, 2), (2, 3), (0, 1)):
        again = run_import(src, dst, dtype="bf16", worker=worker)
        assert again.finished
        assert again.resumed_units == again.num_units
    assert_same_files(dst, whole.path)
    assert not (dst / UNFINISHED).exists()
    for other in ({"dtype": "keep"}, {"dtype": "bf16", "scope": "mtp"}):
        with pytest.raises(CheckpointError, match="is a complete checkpoint"):
            run_import(src, dst, worker=(0, 2), **other)
    assert not run_import(src, dst, dtype="bf16", worker=(0, 2), overwrite=True).finished


def test_a_trained_checkpoint_is_not_taken_for_the_import_it_began_as(
    src: Path, whole: Checkpoint, tmp_path: Path
):
    write_derived(whole, tmp_path / "final", {}, {})
    with pytest.raises(CheckpointError, match="is a complete checkpoint"):
        run_import(src, tmp_path / "final", dtype="bf16", worker=(0, 2))


def test_a_worker_tells_a_changed_source_from_what_was_imported(tmp_path: Path):
    src = make_source(tmp_path / "src", sizes=SIZES)
    for index in range(2):
        run_import(src, tmp_path / "ckpt", worker=(index, 2))
    os.utime(src / "model-00003-of-000007.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="is a complete checkpoint"):
        run_import(src, tmp_path / "ckpt", worker=(0, 2))


def test_the_second_process_stops(src: Path, whole: Checkpoint, tmp_path: Path):
    with claim(tmp_path / "ckpt"):
        for worker in ((0, 1), (0, 2)):
            with pytest.raises(CheckpointError, match="another process is writing"):
                run_import(src, tmp_path / "ckpt", worker=worker)
    (tmp_path / "out" / UNFINISHED).mkdir(parents=True)
    with (
        LocalPlace(tmp_path / "out" / UNFINISHED / LOCK).locked(),
        pytest.raises(CheckpointError, match="another process is writing"),
    ):
        export_checkpoint(whole, tmp_path / "out")


def interrupt(src: Path, dst: Path) -> None:
    """Leave an import unfinished."""

    def stop(done: int, total: int) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_import(src, dst, dtype="bf16", progress=stop)
    assert num_done(dst) > 10


def test_a_changed_source_is_refused(whole: Checkpoint, tmp_path: Path):
    src = make_source(tmp_path / "src", sizes=SIZES)
    dst = tmp_path / "ckpt"
    interrupt(src, dst)
    file = src / "model-00003-of-000007.safetensors"
    stamp = file.stat().st_mtime_ns
    os.utime(file, ns=(stamp, stamp + 1_000_000))
    (src / "tokenizer.json").write_text("{}")
    with pytest.raises(ProblemsError) as caught:
        run_import(src, dst, dtype="bf16")
    assert {problem.subject for problem in caught.value.problems} == {file.name, "tokenizer.json"}
    assert "was mtime_ns" in str(caught.value) or "mtime_ns" in str(caught.value)
    assert "start over with --overwrite" in str(caught.value)
    os.utime(file, ns=(stamp, stamp))
    (src / "tokenizer.json").unlink()
    run_import(src, dst, dtype="bf16", overwrite=True)
    assert tree_bytes(dst / "params") == tree_bytes(whole.params)


def test_another_header_is_noticed_at_the_same_size_and_time(tmp_path: Path):
    src = make_source(tmp_path / "src", sizes=SIZES)
    interrupt(src, tmp_path / "ckpt")
    file = src / "model-00003-of-000007.safetensors"
    stamp = file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes().replace(b'{"format":"pt"}', b'{"format":"np"}', 1))
    os.utime(file, ns=(stamp, stamp))
    with pytest.raises(ProblemsError, match=r"changed +model-00003.*header"):
        run_import(src, tmp_path / "ckpt", dtype="bf16")


def test_other_options_are_refused(src: Path, tmp_path: Path):
    interrupt(src, tmp_path / "ckpt")
    with pytest.raises(ProblemsError, match=r"changed +dtype was bf16 when this began, is keep"):
        run_import(src, tmp_path / "ckpt", dtype="keep")
    assert run_import(src, tmp_path / "ckpt", dtype="bf16").resumed_units > 10


def test_a_source_replaced_meanwhile_is_noticed(tmp_path: Path):
    src = make_source(tmp_path / "src", sizes=SIZES)
    file = src / "model-00002-of-000007.safetensors"

    def touch(done: int, total: int) -> None:
        if done == total:
            os.utime(file, ns=(1, 1))

    with pytest.raises(ProblemsError, match=r"model-00002.* was replaced while it was read"):
        run_import(src, tmp_path / "ckpt", progress=touch)
    with pytest.raises(CheckpointError, match="is unfinished"):
        open_checkpoint(tmp_path / "ckpt")


def test_lost_and_torn_pieces_are_done_again(src: Path, whole: Checkpoint, tmp_path: Path):
    """What a power cut may leave: names without files, files cut short, a journal of zeros."""
    dst = tmp_path / "ckpt"
    interrupt(src, dst)
    chunks = sorted(path for path in (dst / "params").rglob("*") if path.name[0].isdigit())
    chunks[0].unlink()
    os.truncate(chunks[1], 7)
    with (dst / UNFINISHED / "journal-0-of-1.jsonl").open("ab") as journal:
        journal.write(bytes(1000))
    summary = run_import(src, dst, dtype="bf16")
    assert summary.resumed_units > 5
    assert_same_files(dst, whole.path)


def test_a_file_that_was_written_to_since_is_exported_again(
    src: Path, whole: Checkpoint, tmp_path: Path
):
    """Its size tells nothing, and on a large model logits are compared on a few layers only."""

    def stop(done: int, total: int) -> None:
        if done > total * 3 // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(whole, tmp_path / "first", progress=stop)
    shutil.copytree(tmp_path / "first", tmp_path / "out", copy_function=shutil.copyfile)
    done = num_done(tmp_path / "out")
    assert done >= 2
    file = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    assert export_checkpoint(whole, tmp_path / "out").resumed_files == done - 1
    assert_same_files(tmp_path / "out", src)


def test_export_of_another_checkpoint_is_refused(src: Path, whole: Checkpoint, tmp_path: Path):
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(whole, tmp_path / "out", progress=stop)
    run_import(src, tmp_path / "other")
    other = open_checkpoint(tmp_path / "other")
    with pytest.raises(ProblemsError, match=r"changed +COMPLETE"):
        export_checkpoint(other, tmp_path / "out")
    with pytest.raises(ProblemsError, match=r"changed +dtype was keep when this began, is bf16"):
        export_checkpoint(whole, tmp_path / "out", dtype="bf16")
    assert export_checkpoint(other, tmp_path / "out", overwrite=True).resumed_files == 0
    assert_same_files(tmp_path / "out", src)


def test_journal_lines_are_plain_json(src: Path, tmp_path: Path):
    interrupt(src, tmp_path / "ckpt")
    lines = (tmp_path / "ckpt" / UNFINISHED / "journal-0-of-1.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert entries[0]["fingerprint"]["options"]["dtype"] == "bf16"
    assert all({"unit", "pieces", "tensors"} == set(entry) for entry in entries[1:])

"""Captured states in a bucket: gone on with from the bucket alone, and learnt from there."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
from advice import follows
from captures import SIZE, capture_of, run_settings
from gcs_server import GcsServer, key_of
from roundtrip import tree_bytes
from trained import QUIET, read_rows, run_until

from finetune import cli
from finetune.captured import capture, documents
from finetune.captured.capture import CaptureError
from finetune.captured.documents import open_states
from finetune.data.packing import Packer
from finetune.data.records import DataError
from finetune.settings import EvaluationSettings
from finetune.train import train
from finetune.weights import open_trainable
from mtp_model.files.object_place import ObjectPlace
from mtp_model.files.objects import CloudError


def put_states(gcs: GcsServer, url: str, states: Path) -> None:
    for name, content in tree_bytes(states).items():
        if name != capture.LOCK:
            gcs.put(f"{key_of(url)}/{name}", content)


def test_a_capture_that_is_killed_goes_on_from_the_bucket_alone(
    checkpoint: Path,
    records: Path,
    states: Path,
    gcs: GcsServer,
    url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """In the first batch, and between a batch's samples and the word that they are there."""
    argv = ["capture", "--checkpoint", str(checkpoint), "--data", str(records), "--out", url]
    argv += ["--stored", "float32", "--rows", str(SIZE["rows"])]
    argv += ["--row-tokens", str(SIZE["row_tokens"])]
    for point, count in (("sample", 2), ("samples counted", 3)):
        killed = run_until(point, count, "KILL", argv, tmp_path / "none")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not json.loads(gcs.content(f"{key_of(url)}/capture.json"))["finished"]
    assert gcs.keys(f"{key_of(url)}/sample")

    assert cli.run(argv) == 0
    assert f"next: finetune-deepseek train --states {url} --check" in capsys.readouterr().out
    undisturbed = tree_bytes(states)
    undisturbed.pop(capture.LOCK)
    assert gcs.contents(key_of(url)) == undisturbed
    gcs.log.clear()
    assert cli.run(argv) == 0  # nothing left to do
    assert {key for method, key in gcs.log if method == "POST"} <= {f"{key_of(url)}/lock"}


@follows("; wait or end it")
def test_what_is_not_a_capture_of_this_is_not_touched(
    checkpoint: Path, records: Path, states: Path, gcs: GcsServer, url: str
):
    put_states(gcs, url, states)
    gcs.put(f"{key_of(url)}/mine/precious.txt", b"")
    before = gcs.contents(key_of(url))
    for folder, said in ((url, "is a capture of something else"), (f"{url}/mine", "no capture; ")):
        with pytest.raises(CaptureError, match=said):
            capture_of(checkpoint, records, Path(folder), stored="float8")
    assert gcs.contents(key_of(url)) == before
    busy = ObjectPlace("bucket", f"{key_of(url)}/busy") / capture.LOCK
    said = rf"captures to {url}/busy \(pid .*; wait or end"
    with busy.locked(), pytest.raises(CaptureError, match=said):
        capture_of(checkpoint, records, Path(f"{url}/busy"))
    capture_of(checkpoint, records, Path(f"{url}/busy"))
    assert len(gcs.keys(f"{key_of(url)}/busy/sample")) == len(list(states.glob("sample*")))


def test_a_run_learns_the_same_from_there(
    mtp_only: Path, states: Path, gcs: GcsServer, url: str, tmp_path: Path
):
    """And one that was begun from a folder goes on from the bucket that it was copied to."""
    put_states(gcs, url, states)
    here = run_settings(mtp_only, states, tmp_path / "here", eval_data=(states,))
    there = dataclasses.replace(here, out=tmp_path / "there", states=(Path(url),))
    there = dataclasses.replace(there, eval_data=(Path(url),))
    train(here, QUIET)
    train(dataclasses.replace(there, out=tmp_path / "there"), QUIET)
    rows = [read_rows(run / "metrics.jsonl") for run in (here.out, there.out)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert len({row["loss"] for row in rows[0]}) == 3
    assert f"- {url}" in (there.out / "config.yaml").read_text()
    train(dataclasses.replace(there, out=here.out, steps=4), QUIET)
    assert len(read_rows(here.out / "metrics.jsonl")) == 4


@pytest.fixture
def damaged(states: Path, gcs: GcsServer, url: str) -> str:
    """The name of a sample whose object has a bit flipped."""
    put_states(gcs, url, states)
    name = gcs.keys(f"{key_of(url)}/sample")[1]
    content = bytearray(gcs.content(name))
    content[-7] ^= 1
    gcs.put(name, bytes(content))
    return f"{url}/{name.rpartition('/')[2]}"


def read_all(mtp_only: Path, url: str, lines: list[str], **changes) -> int:
    """How many tokens two epochs of the states have."""
    settings = run_settings(mtp_only, Path(url), evaluation=EvaluationSettings(holdout_every=0))
    base = open_trainable(str(mtp_only), captured=True)[0]
    settings = dataclasses.replace(settings, **changes)
    found = open_states(settings, base, "float32", lines.append).train
    return sum((b.segment_ids_BT != 0).sum() for b, _ in Packer(found, **SIZE, seed=0, epochs=2))


def test_what_cannot_be_used_is_named(mtp_only: Path, gcs: GcsServer, url: str, damaged: str):
    with pytest.raises(DataError, match=f"{damaged} is damaged: its bytes give .*skip-unusable"):
        read_all(mtp_only, url, [])
    lines: list[str] = []
    assert read_all(mtp_only, url, lines, skip_unusable=True)
    assert [line.partition(" ")[0] for line in lines] == [damaged]
    gcs.put(key_of(damaged), gcs.content(key_of(damaged))[:-9])
    with pytest.raises(DataError, match=f"{damaged} was cut short"):
        read_all(mtp_only, url, [])
    progress = json.loads(gcs.content(f"{key_of(url)}/capture.json")) | {"finished": False}
    gcs.put(f"{key_of(url)}/capture.json", json.dumps(progress).encode())
    with pytest.raises(DataError, match=f"{url} is not finished: run the same `capture` again"):
        read_all(mtp_only, url, [])
    with pytest.raises(DataError, match=f"{url}/none is no folder of captured states"):
        read_all(mtp_only, f"{url}/none", [])


def test_a_refused_request_is_no_damage(
    mtp_only: Path, url: str, damaged: str, monkeypatch: pytest.MonkeyPatch
):
    """A sample is not left out because the network was."""

    def refused(self: ObjectPlace, *_: object) -> None:
        raise CloudError(f"{self}: 403")

    monkeypatch.setattr(ObjectPlace, "pieces", refused)
    assert damaged
    with pytest.raises(CloudError, match="403"):
        read_all(mtp_only, url, [], skip_unusable=True)


def test_few_samples_are_held_and_each_is_asked_for_once(
    mtp_only: Path, states: Path, gcs: GcsServer, url: str, monkeypatch: pytest.MonkeyPatch
):
    put_states(gcs, url, states)
    count = len(gcs.keys(f"{key_of(url)}/sample"))
    tokens, asked = [], []
    for most in (1 << 30, 1):
        monkeypatch.setattr(documents, "_HELD_BYTES", most)
        gcs.log.clear()
        tokens.append(read_all(mtp_only, url, []))
        asked.append(sum("/sample" in key for _, key in gcs.log))
    assert tokens[0] == tokens[1]
    # What tells a sample's header and tokens, then its state, size and bytes.
    assert asked[0] <= 6 * count
    assert asked[1] > 8 * count  # the control: each is fetched in each epoch, and for its states

"""A capture in several processes of which one is killed goes on, in a bucket too."""

import json
from pathlib import Path

import clusters
import killed_training
from gcs_server import GcsServer, key_of
from trained import environment

ROWS = {"rows": 4, "row-tokens": 32}


def begin(checkpoint: Path, records: Path, out: str, ended: list[str], logs: Path, beside: Path):
    """Start two processes of a capture; the second one is ended at a point."""
    argv = ["capture", "--checkpoint", str(checkpoint), "--data", str(records), "--out", out]
    argv += ["--stored", "float32", *(w for k, v in ROWS.items() for w in (f"--{k}", str(v)))]

    def command(address: str, process: int) -> list[str]:
        where = {"coordinator": address, "processes": "2", "process": str(process)}
        words = [word for name, value in where.items() for word in (f"--cluster.{name}", value)]
        point = ended if process == 1 else ["none", "0", ""]
        return [killed_training.__file__, *point, *argv, *words]

    return clusters.start(2, 2, command, logs, environment(argv, beside))


def test_a_capture_of_two_processes_goes_on(
    checkpoint: Path, records: Path, gcs: GcsServer, url: str, tmp_path: Path
):
    """One dies in its second batch; what is there in the end is what two undisturbed ones write."""
    whole, beside = tmp_path / "whole", tmp_path / "none"
    never = ["none", "0", ""]
    undisturbed = begin(checkpoint, records, str(whole), never, tmp_path / "a", beside)
    assert clusters.end(undisturbed, 300) == [0, 0]
    wanted = {path.name: path.read_bytes() for path in whole.iterdir() if path.name != "lock"}
    last = json.loads(wanted["capture.json"])
    assert len(wanted) == last["samples"] + 1

    killed = begin(checkpoint, records, url, ["sample", "4", "KILL"], tmp_path / "b", beside)
    assert killed[1].wait(300) == -9
    assert clusters.end(killed, 90)[0] != 0
    at = json.loads(gcs.content(f"{key_of(url)}/capture.json"))
    assert 0 < at["samples"] < last["samples"]
    assert not at["finished"]

    again = begin(checkpoint, records, url, never, tmp_path / "c", beside)
    assert clusters.end(again, 300) == [0, 0], (tmp_path / "c" / "0.log").read_text()
    assert gcs.contents(key_of(url)) == wanted

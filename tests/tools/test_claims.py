"""What docs/verification.md claims of this toolkit is what is counted here."""

from pathlib import Path

import pytest

pytest.importorskip("torch")

from tools.claims import COLUMNS, claims, differing_files, stored

DOCS = Path(__file__).parents[2] / "docs" / "verification.md"


def test_the_docs_claim_what_is_counted(tmp_path: Path):
    lines = DOCS.read_text().splitlines()
    first = lines.index(f"| {' | '.join(COLUMNS)} |") + 2
    rows = list(claims(tmp_path))
    assert lines[first : first + len(rows)] == [f"| {' | '.join(row)} |" for row in rows]
    for row in rows:
        assert row[3:] == ("0", "0", "within 1e-05")


def test_a_bit_that_differs_is_counted(tmp_path: Path):
    for name, last in (("a", b"\x00"), ("b", b"\x01")):
        (tmp_path / name).mkdir()
        header = b'{"x":{"dtype":"U8","shape":[2,1],"data_offsets":[0,2]}}'
        content = len(header).to_bytes(8, "little") + header + b"\x07" + last
        (tmp_path / name / "m.safetensors").write_bytes(content)
    assert stored(tmp_path / "a") == {"x": (2, b"\x07\x00")}
    assert stored(tmp_path / "a") != stored(tmp_path / "b")
    assert differing_files(tmp_path / "a", tmp_path / "b") == {"m.safetensors"}
    (tmp_path / "b" / "m.safetensors").unlink()
    assert differing_files(tmp_path / "a", tmp_path / "b") == {"m.safetensors"}

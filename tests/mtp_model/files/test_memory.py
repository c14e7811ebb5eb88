"""How much memory there still is."""

from pathlib import Path

import pytest

from mtp_model.files import memory
from mtp_model.files.memory import available_bytes


@pytest.mark.parametrize(
    ("most", "used", "expected"),
    [("max", "7", 2 << 20), ("1000", "300", 700), ("300", "1000", 0), (None, None, 2 << 20)],
)
def test_the_kernel_and_the_control_group_limit_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: str, used: str, expected: int
):
    (tmp_path / "meminfo").write_text("MemTotal: 9999 kB\nMemAvailable:    2048 kB\n")
    for name, text in (("most", most), ("used", used)):
        if text is not None:
            (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "LIMITS", [(tmp_path / "most", tmp_path / "used")])
    assert available_bytes() == expected


def test_it_is_none_where_nobody_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "no")
    assert available_bytes() == 0

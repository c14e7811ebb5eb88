"""The folder of `verify --report`: what it says and draws is what was found."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from imported import import_tiny
from verified import Pair, opened, storage

from converters.verifying.digests import check_digests
from converters.verifying.logits.check import LENGTH, TOLERANCE, LogitsCheck, check_logits
from converters.verifying.report import write_report
from converters.verifying.verify import Verification
from mtp_model.checkpoint.directory import open_checkpoint


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """An FP8 source and its import."""
    folder = tmp_path_factory.mktemp("kept")
    return folder / "source", import_tiny(folder, dtype="fp8")


@pytest.fixture(scope="module")
def kept_logits(kept: Pair, _torch: None) -> LogitsCheck:
    return check_logits(opened(kept[0]), open_checkpoint(kept[1]))


def test_report_folder(kept: Pair, kept_logits: LogitsCheck, tmp_path: Path):
    checkpoint = open_checkpoint(kept[1])
    found = Verification(
        source=str(kept[0]),
        checkpoint=str(kept[1]),
        digests=check_digests(checkpoint),
        storage=storage(*kept),
        logits=kept_logits,
    )
    write_report(tmp_path / "report", found)
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert content["holds"] is True
    assert content["storage"]["parts"]["MTP modules"]["differing"] == 0
    assert content["logits"]["depths"][1]["rows"] == 86
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| total | 331 |" in text
    assert "![difference by position](logits.png)" in text
    assert (tmp_path / "report" / "logits.png").read_bytes().startswith(b"\x89PNG")
    assert content["report_version"] == 1
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<svg") == 5  # by layer, by position, KL, and logits of two depths
    assert ">layers.4</text>" in page
    assert "not finite" not in page
    assert "<td>MTP modules</td>" in page


def test_a_report_of_logits_that_are_no_numbers(
    kept: Pair, kept_logits: LogitsCheck, tmp_path: Path
):
    nothing = dict.fromkeys(("relative_difference", "kl", "kl_largest"), float("nan"))
    broken = [
        dataclasses.replace(
            depth,
            **nothing,
            kl_by_row=(float("nan"),) * depth.rows,
            sample=((0.0, float("nan")), (1.0, float("inf"))),
            by_position=(float("nan"),) * LENGTH,
        )
        for depth in kept_logits.depths
    ]
    found = Verification(
        source=str(kept[0]),
        checkpoint=str(kept[1]),
        digests=check_digests(open_checkpoint(kept[1])),
        storage=None,
        logits=dataclasses.replace(kept_logits, depths=tuple(broken)),
    )
    assert not found.holds
    write_report(tmp_path, found)
    assert "main model, 90 not finite" in (tmp_path / "report.html").read_text()


def test_what_a_report_draws_is_what_was_found(kept_logits: LogitsCheck):
    for depth in kept_logits.depths:
        assert len(depth.kl_by_row) == depth.rows
        assert max(depth.kl_by_row) == depth.kl_largest
        theirs, ours = np.array(depth.sample).T
        assert len(theirs) == 200
        assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max() * 2
        assert np.ptp(theirs) > 1  # and not all one logit

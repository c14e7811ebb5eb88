"""The folder of `verify --report`: what it says and draws is what was found."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from browser import assert_readable
from imported import import_tiny
from verified import Pair, opened, storage

from converters.verifying.digests import check_digests
from converters.verifying.logits.check import LENGTH, LogitsCheck, check_logits
from converters.verifying.logits.depths import TOLERANCE, accepted_drafts, compare_depths
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


@pytest.fixture(scope="module")
def report(kept: Pair, kept_logits: LogitsCheck, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = Verification(
        source=str(kept[0]),
        checkpoint=str(kept[1]),
        digests=check_digests(open_checkpoint(kept[1])),
        storage=storage(*kept),
        logits=kept_logits,
    )
    folder = tmp_path_factory.mktemp("verified") / "report"
    write_report(folder, found)
    return folder


def test_report_folder(report: Path):
    content = json.loads((report / "report.json").read_text())
    assert content["holds"] is True
    assert content["storage"]["parts"]["MTP modules"]["differing"] == 0
    assert content["logits"]["depths"][1]["rows"] == 86
    text = (report / "report.md").read_text()
    assert "| total | 331 |" in text
    assert "![difference by position](logits.png)" in text
    assert (report / "logits.png").read_bytes().startswith(b"\x89PNG")
    assert content["report_version"] == 1
    page = (report / "report.html").read_text()
    assert page.count("<svg") == 6  # by layer and position, KL, acceptance, logits of two depths
    assert ">layers.4</text>" in page
    assert "not finite" not in page
    assert "<td>MTP modules</td>" in page
    assert "<td>MTP depth 1</td><td>0.00 %</td><td>0.00 %</td><td>100.00 %</td>" in page
    assert content["logits"]["depths"][0]["acceptance"] is None
    assert content["logits"]["depths"][1]["acceptance_agreement"] == 1.0


def test_a_browser_shows_the_report(report: Path, tmp_path: Path):
    assert_readable(report / "report.html", tmp_path)


def test_accepted_drafts_are_those_a_decoder_would_keep():
    """Against a loop over positions; ours differs from theirs in a share of the choices."""
    rng = np.random.default_rng(5)
    wanted = rng.integers(4, size=(2, 12))  # the token that row i of the main model predicts
    sides = [np.eye(4)[np.stack([wanted, wanted, wanted])] for _ in range(2)]
    for side in sides:
        for k in (1, 2):  # depth k predicts what row i + k of the main model does, mostly
            wrong = rng.random((2, 12)) < 0.4
            side[k] = np.eye(4)[np.roll((wanted + wrong * rng.integers(1, 4)) % 4, -k, axis=1)]
    valid = np.ones((3, 2, 12), bool)
    valid[1:, 0, 5:] = valid[1, :, -1:] = valid[2, :, -2:] = False
    counts = {1: [0, 0, 0], 2: [0, 0, 0]}
    for depth, row, i in ((k, *place) for k in (1, 2) for place in np.argwhere(valid[k])):
        kept = [
            all(
                side[k, row, i].argmax() == side[0, row, i + k].argmax()
                for k in range(1, depth + 1)
            )
            for side in sides
        ]
        counts[depth] = [
            n + found for n, found in zip(counts[depth], (*kept, kept[0] == kept[1]), strict=True)
        ]
    main, *depths = compare_depths(0, sides[0], sides[1], valid)
    assert main.acceptance is None
    for depth in depths:
        shares = (depth.acceptance, depth.reference_acceptance, depth.acceptance_agreement)
        assert shares == pytest.approx([n / depth.rows for n in counts[depth.depth]])
        assert all(share is not None and 0 < share < 1 for share in shares)
    assert compare_depths(1, sides[0], sides[1], valid)[0].acceptance is None
    assert accepted_drafts(sides[0])[0] is None


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

"""vLLM against ours: what is compared, and that each difference is found. vLLM is not needed."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

from tools.check_vllm import (
    Check,
    Counted,
    Text,
    count_faults,
    counted_in,
    first_difference,
    of_record,
    record,
    share_faults,
)

STAND_IN = """#!{python}
import json, sys
job = json.load(sys.stdin)
if job["prompts"] == [[9]]:
    sys.exit("no such model")
texts = [[[0]] + [[1] * (job["drafts"] + 1)] * most for most in job["most"]]
said = {{"version": "0", "texts": texts, "counted": {{}}, "mended": job["temperature"] > 0}}
print("loading")
print(json.dumps(said))
"""


def test_rounds_are_counted_up_to_the_end_of_our_text():
    """Of the last one what is in the text; a round behind the end is none of ours."""
    rounds = [[5], [6, 7, 8], [9], [1, 2, 3]]
    counted = [counted_in([rounds], [Text([0], [0] * length)], 2) for length in range(1, 9)]
    assert counted == [
        Counted(0, [0, 0]),
        Counted(1, [1, 0]),  # the text ends with draft 1
        Counted(1, [1, 1]),
        Counted(1, [1, 1]),
        Counted(2, [1, 1]),
        Counted(3, [2, 1]),
        Counted(3, [2, 2]),
        Counted(3, [2, 2]),
    ]


def test_counts_of_whole_texts_are_those_of_their_rounds():
    rng = np.random.default_rng(0)
    accepted = [rng.integers(0, 4, 20).tolist() for _ in range(5)]
    texts = [[[0], *([1] * (a + 1) for a in each)] for each in accepted]
    ends = [Text([0], [0] * sum(map(len, rounds))) for rounds in texts]
    every = np.concatenate(accepted)
    assert counted_in(texts, ends, 3) == Counted(100, [int((every > k).sum()) for k in range(3)])


@pytest.mark.parametrize(
    ("theirs", "place"), [([1, 2, 3, 9], None), ([1, 5, 3], 1), ([1, 2], 2), ([], 0)]
)
def test_the_first_other_token_is_found(theirs: list[int], place: int | None):
    assert first_difference([1, 2, 3], theirs) == place


def test_a_count_that_differs_is_a_fault_unless_texts_parted():
    ours, theirs = Counted(50, [30, 10]), Counted(50, [31, 10])
    assert count_faults(ours, ours, 0, 2) == []
    said = ["K = 2: vLLM has 31 accepted drafts 1, generate --speculate 30"]
    assert count_faults(theirs, ours, 0, 2) == said
    assert count_faults(theirs, ours, 1, 2) == []


def test_shares_may_differ_by_chance_only():
    expected = Counted(1000, [600, 0])
    assert share_faults(Counted(1000, [640, 0]), expected, "") == []
    (fault,) = share_faults(Counted(1000, [700, 0]), expected, "K = 2")
    assert fault == "K = 2: vLLM accepted 70.00% of drafts 1, expected were 60.00% +- 1.55%"
    assert len(share_faults(Counted(1000, [600, 300]), expected, "")) == 1


def test_records_are_those_of_generate():
    text = Text([5, 6], [7])
    assert of_record(record(text)) == text
    assert record(text) == {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 1]}


def test_vllm_is_asked_in_the_environment_that_has_it(tmp_path: Path):
    """For so much more than our text that the round at its end is whole."""
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    asked = argparse.Namespace(out=tmp_path, exported=tmp_path, vllm_python=str(python))
    check = Check(asked)
    assert check._vllm([Text([1], [2, 3])], 1) == [[[0], [1, 1], [1, 1], [1, 1]]]
    assert (check.version, check.mended) == ("0", False)
    check._vllm([Text([1], [2])], 0, temperature=1.0)
    assert check.mended
    with pytest.raises(SystemExit, match="no such model"):
        check._vllm([Text([9], [2])], 0)

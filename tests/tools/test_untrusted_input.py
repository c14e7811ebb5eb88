"""Malformed headers, indices and configs are refused by a report and never crash a reader."""

import pytest

from tools.fuzz_inputs import run


@pytest.mark.parametrize(("name", "examples"), [("header", 1500), ("index", 700), ("config", 500)])
def test_every_input_is_read_consistently_or_refused(name, examples):
    run(name, examples, seed_number=0)

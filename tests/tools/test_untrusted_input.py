"""Malformed headers, indices, configs and data are refused by a report and never crash a reader."""

import pytest

from tools import fuzz_inputs


@pytest.mark.parametrize(("name", "examples"), [("header", 1500), ("index", 700), ("config", 500)])
def test_every_input_is_read_consistently_or_refused(name, examples):
    fuzz_inputs.run(name, examples, seed_number=0)


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("json", 500),
        ("table", 200),
        ("parquet", 150),
        ("arrow", 100),
        ("tokens", 150),
        ("prose", 40),
    ],
)
def test_all_training_data_is_read_consistently_or_refused(name, examples):
    pytest.importorskip("pyarrow")
    from tools import fuzz_data

    fuzz_data.run(name, examples, seed_number=0)

"""A small checkpoint, and prompts of every kind."""

import json
from pathlib import Path

import numpy as np
import pytest
from imported import import_tiny
from trained import SIZES

from finetune.generate import GenerateSettings


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory) -> Path:
    return import_tiny(tmp_path_factory.mktemp("model"), dtype="fp8", sizes=SIZES)


@pytest.fixture(scope="package")
def data(tmp_path_factory) -> Path:
    """Prompts with completions, and plain texts, one of them shorter than a prompt."""
    rng = np.random.default_rng(0)
    rows = [
        {"input_ids": rng.integers(3, 384, n).tolist(), "loss_mask": [0] * p + [1] * (n - p)}
        for n, p in ((9, 4), (30, 0), (7, 5), (1, 0), (12, 0), (20, 11), (8, 2))
    ]
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def settings(checkpoint, data, tmp_path) -> GenerateSettings:
    return GenerateSettings(
        checkpoint=str(checkpoint),
        data=(data,),
        out=tmp_path / "answers.jsonl",
        max_new_tokens=12,
        prompt_tokens=6,
        rows=2,
        compute_dtype="float32",
    )

"""A tiny checkpoint through the importer, and the module tree loaded from it."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from converters.format.listing import open_safetensors
from converters.importing.importer import import_checkpoint
from converters.sources.open import open_source
from mtp_model.load import load
from mtp_model.model import DeepSeekV3
from tools.make_tiny_checkpoint import make_tiny_checkpoint

TOLERANCE = 1e-5  # max |a - b| / max |b|, float32
CONTROL = 100 * TOLERANCE  # what every deliberate mistake has to exceed


def import_tiny(folder: Path, dtype: Any = "f32", import_options: Any = None, **options) -> Path:
    """Make a tiny checkpoint in folder/source and import it; returns the checkpoint directory."""
    source, checkpoint = folder / "source", folder / "checkpoint"
    make_tiny_checkpoint(source, dtype=dtype, **options)
    import_folder(source, checkpoint, **(import_options or {}))
    return checkpoint


def import_folder(source: Path, checkpoint: Path, **options) -> None:
    import_checkpoint(open_safetensors(open_source(str(source))), checkpoint, **options)


def load_float32(checkpoint: Path, **options) -> DeepSeekV3:
    return load(checkpoint, dtype=np.float32, **options)


def relative_error(got: Any, want: Any) -> float:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def assert_close(got: Any, want: Any, what: str) -> None:
    error = relative_error(got, want)
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}, allowed {TOLERANCE:.0e}"


def assert_far(got: Any, want: Any, what: str) -> None:
    error = relative_error(got, want)
    assert error >= CONTROL, f"{what}: relative error {error:.1e}, a mistake gives {CONTROL:.0e}"


@functools.cache
def random_tokens(vocab_size: int, batch: int = 2, length: int = 24) -> np.ndarray:
    rng = np.random.default_rng(7)
    return rng.integers(vocab_size, size=(batch, length)).astype(np.int32)

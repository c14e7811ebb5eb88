"""Strict settings for every test: no silent dtype or rank promotion, every warning an error, and
shapes and dtypes at the boundaries of modules checked as they are annotated."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clusters import FAST

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {FAST}")
# Where in our code each operation comes from is left out of the programs: nobody reads it here.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# torch's products are tiny here: its threads would wait for each other, at three times the cost.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

CHECKED_MODULES = [
    *(f"mtp_model.{name}" for name in ("attention", "block", "context", "dispatch")),
    *(f"mtp_model.{name}" for name in ("batched", "grouped", "layers", "looped", "model", "moe")),
    *(f"mtp_model.{name}" for name in ("mtp", "rope", "rows", "swiglu")),
    *("finetune.objective.losses", "finetune.objective.acceptance"),
]
if TYPE_CHECKING:
    from gcs_server import GcsServer

install_import_hook(CHECKED_MODULES, "beartype.beartype")

# Files of a minute and more come first: one that comes last keeps one of two workers waiting.
LONGEST = (
    "test_meshes",
    "test_processes",
    "test_train",
    "test_stopping",
    "test_decoding",
    "test_decoder",
    "test_state",
    "test_model",
    "test_optimizer",
    "test_mixed_kinds",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all else in its order."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What was imported is no garbage: looking through it again and again takes a tenth of the
    time of tracing."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _no_power_cut() -> Iterator[None]:
    """Without waiting for the disk, tests that write take half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(os, "fdatasync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what XLA compiled, which is half of the time of training runs that are alike.

    A folder for each of several workers: JAX writes into it in place, so no other may read it.
    """
    folder = tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_logits_at_export() -> Iterator[None]:
    """The logits that each `export` compares take seconds: test_export_gate.py compares them."""
    from converters.verifying import export_gate  # imports what is checked: after the hook
    from mtp_model.problems import UserError

    def left_out(*_args: object, **_options: object) -> None:
        raise UserError("left out by the tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_gate, "check_logits", left_out)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_drawings() -> Iterator[None]:
    """What a run draws is a fifth of the time of a short one: `finished` has its drawings."""
    from finetune import train  # imports what is checked: after the hook
    from finetune.run import plots
    from mtp_model.reporting import Picture

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_curves", lambda path, *_: path.write_bytes(b"left out"))
        patch.setattr(plots, "drawing", lambda title, *_: Picture(title, "<svg/>"))
        yield


@pytest.fixture(scope="session")
def _torch() -> None:
    """For tests that need torch: they are skipped where it is missing (`make test-newest`)."""
    pytest.importorskip("torch")


@pytest.fixture(scope="module")
def gcs() -> "Iterator[GcsServer]":
    """Google Cloud Storage on loopback."""
    from gcs_server import gcs_server  # imports what is checked: after the hook

    with gcs_server() as server:
        yield server


@pytest.fixture
def url(gcs: "GcsServer", request: pytest.FixtureRequest) -> Iterator[str]:
    """A folder of its own for a test."""
    from gcs_server import BUCKET

    yield f"gs://{BUCKET}/{request.node.name}"
    for key in gcs.keys(request.node.name):
        gcs.delete(key)

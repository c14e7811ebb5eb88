"""Shared by the tests of the Hub: a server, a machine without its user's settings, sources."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from huggingface_hub.utils import close_session, disable_progress_bars, enable_progress_bars

from converters.sources.hub import HubSource
from converters.sources.hub_errors import Patience
from mtp_model.problems import ProblemsError

REPO = "org/Model-V3.1"
TOKEN = "hf_MARKER0123456789"
QUICK = Patience(tries=4, first_wait_s=0.001, longest_wait_s=0.05)
BYTES = bytes(range(256)) * 40  # of a file that is large enough to be cut


@contextlib.contextmanager
def lone_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub without models, where TOKEN opens what is closed.

    Meanwhile there is nothing of this machine's user and nothing of a test before.
    """
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    disable_progress_bars()
    close_session()
    with HubServer(token=TOKEN) as server:
        yield server
    close_session()
    enable_progress_bars()


def make_default(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it the Hub that is used when none is named, as HF_ENDPOINT does at import."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def source_of(hub: HubServer, src: str = REPO, **options: Any) -> HubSource:
    """A source that loses its patience soon."""
    return HubSource(src, endpoint=hub.url, **{"patience": QUICK} | options)


def problem(error: pytest.ExceptionInfo[ProblemsError]) -> str:
    """The one problem of an error."""
    (found,) = error.value.problems
    return str(found)


def fetched_bytes(hub: HubServer) -> int:
    """Bytes of files in large file storage that were sent, since `seen` was cleared."""
    return sum(seen.body_bytes for seen in hub.requests("^GET /[0-9a-f]{64}$"))

"""Shared by the tests of the Hub: a server, and a machine without its user's settings."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import HubServer
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http, close_session, disable_progress_bars, enable_progress_bars

from converters.sources import hub_errors
from mtp_model.problems import ProblemsError

REPO = "org/Model-V3.1"
TOKEN = "hf_MARKER0123456789"
BYTES = bytes(range(256)) * 40  # of a file that is large enough to be cut


@contextlib.contextmanager
def lone_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub without models, where TOKEN opens what is closed; the one that is used by default.

    Meanwhile there is nothing of this machine's user and nothing of a test before, and nobody waits
    long before a request is tried again.
    """
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # this server has none
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub_errors, "TRIES", 4)
    monkeypatch.setattr(hub_errors, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(hub_errors, "LONGEST_WAIT_S", 0.05)
    hasty = SimpleNamespace(**{**vars(time), "sleep": lambda _s: None})
    for module in (file_download, _http):
        monkeypatch.setattr(module, "time", hasty)
    disable_progress_bars()
    close_session()
    with HubServer(token=TOKEN) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
    close_session()
    enable_progress_bars()


def problem(error: pytest.ExceptionInfo[ProblemsError]) -> str:
    """The one problem of an error."""
    (found,) = error.value.problems
    return str(found)


def fetched_bytes(hub: HubServer) -> int:
    """Bytes of files in large file storage that were sent, since `seen` was cleared."""
    return sum(seen.body_bytes for seen in hub.requests("^GET /[0-9a-f]{64}$"))

"""Requests to the Hub that fail: which to try again, and what to tell the user about the others.

Must not know what is requested. Only a file's name and the status get into an error, never a URL,
which may be signed, nor a header, which may hold the token.
"""

import email.utils
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import httpx2
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem, ProblemsError

PASSING_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))
REQUEST_ERRORS = (HfHubHTTPError, httpx2.RequestError, OfflineModeIsEnabled)
"""What huggingface_hub raises for a request that failed; `explain` takes each of them."""

T = TypeVar("T")


class PassingError(Exception):
    """A failure that may pass: what was found, and the seconds that the server asks to wait."""

    def __init__(self, found: str, wait_s: float | None = None):
        super().__init__(found)
        self.wait_s = wait_s


class StoppedError(Exception):
    """Whoever wanted the answer no longer does."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often a request is tried. Waits double from `first_wait_s` up to `longest_wait_s`.

    The Hub counts requests over five minutes: its longest Retry-After is waited for in full.
    """

    tries: int = 8
    first_wait_s: float = 1.0
    longest_wait_s: float = 300.0

    def wait_s(self, failures: int, asked_s: float | None) -> float:
        """Seconds to wait after so many failures, when the server asks for `asked_s`."""
        return min(
            max(self.first_wait_s * 2 ** (failures - 1), asked_s or 0.0), self.longest_wait_s
        )


DEFAULT_PATIENCE = Patience()


class Failures:
    """Counts the failures of one thing that is tried, waits after each, and at last gives up."""

    def __init__(
        self, where: str, subject: str, patience: Patience, stop: threading.Event | None = None
    ):
        self._where, self._subject = where, subject
        self._patience = patience
        self._stop = stop or threading.Event()
        self._count = 0

    def add(self, error: PassingError) -> None:
        """Wait before the next try; ProblemsError when there is none, StoppedError when stopped."""
        self._count += 1
        if self._count >= self._patience.tries:
            tried = f"tried {self._count} times; run the same command again later"
            raise hub_error(self._where, self._subject, f"{error}; {tried}")
        if self._stop.wait(self._patience.wait_s(self._count, error.wait_s)):
            raise StoppedError

    def forget(self) -> None:
        """There was progress since the last failure."""
        self._count = 0


def hub_error(where: str, subject: str, detail: str) -> ProblemsError:
    """An error with one problem."""
    return ProblemsError(where, [Problem("hub", subject, detail)])


def persist(task: Callable[[], T], where: str, subject: str, patience: Patience) -> T:
    """The result of `task`, which is tried again when it fails in passing; else ProblemsError."""
    failures = Failures(where, subject, patience)
    while True:
        try:
            return task()
        except REQUEST_ERRORS as err:
            fault = explain(err, where, subject)
        except PassingError as err:
            fault = err
        if isinstance(fault, ProblemsError):
            raise fault
        failures.add(fault)


def explain(err: Exception, where: str, subject: str) -> PassingError | ProblemsError:
    """What one of REQUEST_ERRORS means: worth another try, or what the user can do."""
    if isinstance(err, HfHubHTTPError):
        status = err.response.status_code
        if status in PASSING_STATUS:
            return PassingError(f"the Hub answered {status}", asked_wait_s(err.response.headers))
        return hub_error(where, subject, _advice(err, status))
    if isinstance(err, OfflineModeIsEnabled):
        return hub_error(
            where, subject, "needs the Hub, and HF_HUB_OFFLINE is set; unset it, or use a folder"
        )
    return PassingError(f"the connection failed ({type(err).__name__})")


def _advice(err: HfHubHTTPError, status: int) -> str:
    sent_token = "authorization" in err.response.request.headers
    access = "use a token that has it" if sent_token else "run `hf auth login` or set HF_TOKEN"
    if isinstance(err, GatedRepoError):
        return f"is gated ({status}): ask for access on its page on the Hub, then {access}"
    if isinstance(err, RevisionNotFoundError):
        return f"has no such revision ({status}); name a branch, a tag or a commit after the @"
    if isinstance(err, RemoteEntryNotFoundError):
        return f"is not there ({status}) though the Hub lists it; run the same command again"
    if isinstance(err, DisabledRepoError):
        return f"was disabled on the Hub ({status}); use a local copy"
    if isinstance(err, RepositoryNotFoundError) or status in (401, 404):
        return f"is not there, or needs access ({status}); check the name; for access {access}"
    if status == 403:
        return f"is forbidden ({status}); for access {access}"
    said = f": {shown(err.server_message)}" if err.server_message else ""
    return f"got the answer {status} from the Hub{said}"


def asked_wait_s(headers: httpx2.Headers) -> float | None:
    """Seconds that an answer asks to wait: Retry-After, seconds or a date, or the rate limit."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    if value:
        return _seconds_until(value)
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None


def _seconds_until(date: str) -> float | None:
    try:
        return max(email.utils.parsedate_to_datetime(date).timestamp() - time.time(), 0.0)
    except ValueError:
        return None

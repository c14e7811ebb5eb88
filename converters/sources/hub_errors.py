"""Requests to the Hub that fail: which to try again, and what to tell the user about the others.

Only a file's name and the status get into an error, never a URL, which may be signed, nor a header,
which may hold the token.
"""

import itertools
import threading
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem, ProblemsError

REQUEST_ERRORS = (
    HfHubHTTPError,
    httpx2.RequestError,
    httpx2.InvalidURL,
    OfflineModeIsEnabled,
    LocalEntryNotFoundError,
    FileMetadataError,
)
"""What huggingface_hub raises for a request that failed; `explain` takes each of them."""

TRIES = 8
BRIEF_TRIES = 4  # where huggingface_hub tries again itself, or the user waits for a first answer
FIRST_WAIT_S = 1.0  # doubles with each failure
LONGEST_WAIT_S = 300.0  # the Hub counts requests over five minutes

_PASSING_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))
_EXPIRED_STATUS = frozenset((401, 403, 404, 410))  # of storage: the signed address is too old

T = TypeVar("T")


class PassingError(Exception):
    """A failure that may pass: what was found, and the seconds that the server asks to wait."""

    def __init__(self, found: str, wait_s: float = 0.0):
        super().__init__(found)
        self.wait_s = wait_s


class UnwantedError(Exception):
    """Whoever wanted the answer no longer does."""


def hub_error(where: str, subject: str, detail: str) -> ProblemsError:
    """An error with one problem."""
    return ProblemsError(where, [Problem("hub", subject, detail)])


def persist(
    task: Callable[[], T],
    where: str,
    subject: str,
    *,
    brief: bool = False,
    stop: threading.Event | None = None,
) -> T:
    """The result of `task`, which is tried again when it fails in passing; else ProblemsError.

    brief: it is tried a few times only. UnwantedError once `stop` is set.
    """
    tries = min(TRIES, BRIEF_TRIES) if brief else TRIES
    stop = stop or threading.Event()
    for failures in itertools.count(1):
        try:
            return task()
        except REQUEST_ERRORS as err:
            fault = explain(err, where, subject)
        except PassingError as err:
            fault = err
        if isinstance(fault, ProblemsError):
            raise fault
        if failures >= tries:
            tried = f"tried {failures} times; run the same command again later"
            raise hub_error(where, subject, f"{fault}; {tried}")
        if stop.wait(wait_s(failures, fault.wait_s)):
            raise UnwantedError
    raise AssertionError


def wait_s(failures: int, asked_s: float) -> float:
    """Seconds to wait after so many failures, when the server asks for `asked_s`."""
    return min(max(FIRST_WAIT_S * 2 ** (failures - 1), asked_s), LONGEST_WAIT_S)


def explain(err: BaseException, where: str, subject: str) -> PassingError | ProblemsError:
    """What one of REQUEST_ERRORS means: worth another try, or what the user can do."""
    if isinstance(err, HfHubHTTPError):
        status = err.response.status_code
        stored = _origin(str(err.response.url)) != _origin(constants.ENDPOINT)
        if status in _PASSING_STATUS or (stored and status in _EXPIRED_STATUS):
            return PassingError(f"the Hub answered {status}", _asked_wait_s(err.response.headers))
        return hub_error(where, subject, _advice(err, status))
    if isinstance(err, OfflineModeIsEnabled):
        return hub_error(
            where, subject, "needs the Hub, and HF_HUB_OFFLINE is set; unset it, or use a folder"
        )
    if isinstance(err, LocalEntryNotFoundError) and isinstance(err.__cause__, REQUEST_ERRORS):
        return explain(err.__cause__, where, subject)
    if isinstance(err, FileMetadataError | LocalEntryNotFoundError):
        return PassingError("got an answer that is no place of a file")
    return PassingError(f"the connection failed ({type(err).__name__})")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


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


def _asked_wait_s(headers: httpx2.Headers) -> float:
    """Seconds that an answer asks to wait; 0 when it does not say."""
    value = headers.get("Retry-After", "")
    limit = parse_ratelimit_headers(headers)
    asked = limit.reset_in_seconds if limit and limit.remaining == 0 else 0
    return float(value[:9]) if value.isascii() and value.isdigit() else float(asked)

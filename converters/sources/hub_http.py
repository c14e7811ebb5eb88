"""One repository of the Hub at one commit: its files and their bytes, over HTTP.

Knows the Hub's answers; must not know what is in the files, nor keep any of them.
"""

import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import (
    HfApi,
    HfFileMetadata,
    constants,
    get_hf_file_metadata,
    hf_hub_url,
)
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session

from converters.sources.hub_errors import (
    DEFAULT_PATIENCE,
    PASSING_STATUS,
    REQUEST_ERRORS,
    Failures,
    PassingError,
    Patience,
    StoppedError,
    asked_wait_s,
    explain,
    hub_error,
    persist,
)
from converters.sources.hub_listing import COMMIT, Entry, entries_of
from mtp_model.files.untrusted_json import shown

LIBRARY = "deepseek-mtp"
TIMEOUT_S = 30.0

_EXPIRED_STATUS = frozenset((401, 403, 404, 410))  # of storage: the signed address is too old
_PROGRESS_BYTES = 1 << 20  # a try that got less counts as a failure, so that retries are bounded
_CONTENT_RANGE = re.compile(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20})")


class Repository:
    """A model on the Hub at the commit that `revision` stands for now. Threads may share it.

    Every failure is a ProblemsError that names the file, and what the Hub answered.
    """

    def __init__(
        self,
        repo_id: str,
        revision: str | None = None,
        *,
        token: str | None = None,
        endpoint: str | None = None,
        patience: Patience = DEFAULT_PATIENCE,
        where: str = "the Hub",
    ):
        """`where`: what an error says about where the model was looked for."""
        self.repo_id = repo_id
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._token = token
        self._patience = patience
        self._locations: dict[str, str] = {}
        self._locating: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        # A name that is a mistyped folder's should not take minutes to be refused.
        brief = replace(patience, tries=min(patience.tries, 4))
        subject = f"{repo_id}@{revision}" if revision else repo_id
        self.commit, self.entries = persist(lambda: self._list(revision), where, subject, brief)

    @property
    def name(self) -> str:
        """The repository and its commit: what stays the same when a branch moves."""
        return f"{self.repo_id}@{self.commit}"

    def stream(
        self, file: str, begin: int, end: int, stop: threading.Event | None = None
    ) -> Iterator[bytes]:
        """The bytes begin..end of a file, once each and in order, whatever happens on the way.

        A try that fails in passing is continued where it ended. StoppedError once `stop` is set.
        """
        failures = Failures(self.name, file, self._patience, stop)
        position = reached = begin
        while position < end:
            try:
                for part in self._try(file, position, end):
                    position += len(part)
                    yield part
                    if stop and stop.is_set():
                        raise StoppedError
            except PassingError as err:
                self._locations.pop(file, None)  # signed addresses expire
                if position - reached >= _PROGRESS_BYTES:
                    failures.forget()
                reached = position
                failures.add(err)

    def whole(self, file: str) -> bytes:
        """All bytes of a small file, proved by its digest."""

        def read() -> bytes:
            content = b"".join(self.stream(file, 0, entry.size))
            hasher = entry.hasher()
            hasher.update(content)
            if fault := entry.fault(hasher):
                raise PassingError(fault)
            return content

        entry = self.entries[file]
        return persist(read, self.name, file, self._patience)

    def _list(self, revision: str | None) -> tuple[str, dict[str, Entry]]:
        api = HfApi(endpoint=self._endpoint, token=self._token, library_name=LIBRARY)
        try:
            info = api.model_info(
                self.repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT_S
            )
        except (HfHubHTTPError, OfflineModeIsEnabled):
            raise
        except (ValueError, TypeError, KeyError, AttributeError):
            raise hub_error("the Hub", self.repo_id, "got an answer that is no model") from None
        if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
            fault = f"is at commit {shown(info.sha)}, needed 40 hexadecimal digits"
            raise hub_error("the Hub", self.repo_id, fault)
        return info.sha, entries_of(self.repo_id, info.siblings or [])

    def _try(self, file: str, begin: int, end: int) -> Iterator[bytes]:
        """One request for begin..end. PassingError when it failed, after what did arrive."""
        with self._locating[file]:  # readers of one file share one answer
            url = self._locations.get(file) or self._locate(file)
        headers = {**self._headers(url), "Accept-Encoding": "identity"}
        whole = (begin, end) == (0, self.entries[file].size)
        if not whole:  # the Hub's own servers, which hold the small files, may not know ranges
            headers["Range"] = f"bytes={begin}-{end - 1}"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                self._check_status(file, response, 200 if whole else 206)
                _check_range(response, begin, end, None if whole else self.entries[file].size)
                yield from _exactly(response, end - begin)
        except (httpx2.RequestError, httpx2.InvalidURL) as err:
            raise PassingError(f"the connection failed ({type(err).__name__})") from None

    def _locate(self, file: str) -> str:
        """Where the bytes of a file are; the Hub's word on commit, size and digest is checked."""
        url = hf_hub_url(self.repo_id, file, revision=self.commit, endpoint=self._endpoint)
        try:
            found = get_hf_file_metadata(
                url,
                token=self._token,
                timeout=TIMEOUT_S,
                endpoint=self._endpoint,
                library_name=LIBRARY,
            )
            origin = _origin(found.location)
        except REQUEST_ERRORS as err:
            raise explain(err, self.name, file) from None
        except (ValueError, httpx2.InvalidURL):
            raise PassingError("got an answer that is no place of a file") from None
        self._check_metadata(self.entries[file], found)
        if origin[0] not in ("http", "https"):
            raise PassingError(f"is said to be at {shown(origin[0])}, needed http or https")
        self._locations[file] = found.location
        return found.location

    def _check_metadata(self, entry: Entry, found: HfFileMetadata) -> None:
        if found.commit_hash not in (None, self.commit):
            raise PassingError(f"is served at commit {shown(found.commit_hash)}")
        if not entry.sha256:
            return  # read whole and proved by its digest; its tag is the web server's business
        if found.size not in (None, entry.size) or found.etag not in (None, entry.digest):
            fault = f"is served with {found.size} bytes and tag {shown(found.etag)}"
            raise PassingError(f"{fault}, the Hub lists {entry.size} and {entry.digest}")

    def _headers(self, url: str) -> dict[str, str]:
        """The token goes to the Hub only, never to where it stores files."""
        at_hub = _origin(url) in (_origin(self._endpoint), _origin(constants.ENDPOINT))
        return build_hf_headers(token=self._token if at_hub else False, library_name=LIBRARY)

    def _check_status(self, file: str, response: httpx2.Response, needed: int) -> None:
        status = response.status_code
        if status == needed:
            return
        if status == 200:
            raise PassingError("got the whole file (200) in answer to a range request, needed 206")
        stored = _origin(str(response.url)) != _origin(self._endpoint)
        if status in PASSING_STATUS or (stored and status in _EXPIRED_STATUS):
            raise PassingError(f"the Hub answered {status}", asked_wait_s(response.headers))
        raise hub_error(self.name, file, f"got the answer {status} from the Hub")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _check_range(response: httpx2.Response, begin: int, end: int, size: int | None) -> None:
    """Whether an answer's headers promise exactly what was asked for; `size` for a range."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise PassingError("got a compressed answer, asked for the bytes as they are")
    length = response.headers.get("Content-Length")
    if length is not None and length != str(end - begin):
        raise PassingError(f"got an answer of {shown(length)} bytes, needed {end - begin}")
    if size is None:
        return
    found = response.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(found)
    if not match or tuple(map(int, match.groups())) != (begin, end - 1, size):
        needed = f"bytes {begin}-{end - 1}/{size}"
        raise PassingError(f"got the range {shown(found)}, needed {needed}")


def _exactly(response: httpx2.Response, nbytes: int) -> Iterator[bytes]:
    left = nbytes
    for part in response.iter_raw():
        left -= len(part)
        if left < 0:
            raise PassingError(f"got more than the {nbytes} bytes that were asked for")
        yield part
    if left:
        raise PassingError(f"got {nbytes - left} bytes, needed {nbytes}")

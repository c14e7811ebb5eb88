"""Bytes of one file of the Hub: a range of it, or all of it on disk, proved by its digest."""

import contextlib
import os
import shutil
import threading
from logging import WARNING
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    logging,
    tqdm,
)

from converters.sources.hub_errors import (
    REQUEST_ERRORS,
    PassingError,
    UnwantedError,
    hub_error,
    persist,
)
from converters.sources.hub_listing import LIBRARY, TIMEOUT_S, Model
from mtp_model.files.untrusted_json import shown

_HASH_BYTES = 8 << 20

if logging.get_verbosity() == WARNING:
    # Its warnings of failures that pass show addresses, which may be signed. What stays is raised.
    logging.set_verbosity_error()


def cached(model: Model, file: str) -> Path | None:
    """Where the user's own Hub cache has a file, whole; None when it does not."""
    path = try_to_load_from_cache(model.repo_id, file, revision=model.commit)
    if not isinstance(path, str):
        return None
    try:
        return Path(path) if Path(path).stat().st_size == model.entries[file].size else None
    except FileNotFoundError:  # a link whose blob is gone
        return None


def fetch_range(model: Model, file: str, begin: int, end: int) -> bytes:
    """The bytes begin..end of a file, in memory. ProblemsError when they cannot be had."""
    return persist(lambda: _get(model, file, begin, end), model.name, file)


def fetch_small(model: Model, file: str) -> bytes:
    """All bytes of a file, in memory, proved by its digest."""
    entry = model.entries[file]

    def get() -> bytes:
        content = _get(model, file, 0, entry.size)
        hasher = entry.hasher()
        hasher.update(content)
        if fault := entry.fault(hasher):
            raise PassingError(fault)
        return content

    return persist(get, model.name, file)


def _get(model: Model, file: str, begin: int, end: int) -> bytes:
    """One request; httpx2 sends the token to the Hub only, not to where it is redirected to."""
    size = model.entries[file].size
    whole = (begin, end) == (0, size)
    headers = {**build_hf_headers(library_name=LIBRARY), "Accept-Encoding": "identity"}
    if not whole:  # the Hub's own servers, which hold the small files, may not know ranges
        headers["Range"] = f"bytes={begin}-{end - 1}"
    url = hf_hub_url(model.repo_id, file, revision=model.commit)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    content = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        if not whole and response.status_code != 206:
            raise PassingError("got the whole file (200) in answer to a range request, needed 206")
        place, needed = response.headers.get("Content-Range"), f"bytes {begin}-{end - 1}/{size}"
        if not whole and place != needed:
            raise PassingError(f"got the range {shown(place)}, needed {needed}")
        for part in response.iter_bytes():
            content += part
            if len(content) > end - begin:
                break
    if len(content) != end - begin:
        raise PassingError(f"got an answer of {len(content)} bytes, needed {end - begin}")
    return bytes(content)


class Downloads:
    """Whole files of a model in `folder`, for a while; several threads may fetch."""

    def __init__(self, model: Model, folder: Path, wanted: set[str]):
        """wanted: all that will be fetched; what else an earlier run left there is deleted."""
        self._model = model
        self._folder = folder
        self._stop = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        for path in files_in(folder):
            if path.relative_to(folder).as_posix() not in wanted:
                path.unlink()

    def fetch(self, file: str) -> Path:
        """Where the file is once it is there; UnwantedError after `stop`, else ProblemsError."""
        path, fault = self._folder / file, None
        try:
            if path.is_file() and not self._fault(file):
                return path  # an earlier run fetched it
            for _ in range(2):
                path.unlink(missing_ok=True)
                persist(lambda: self._download(file), self._model.name, file, stop=self._stop)
                fault = self._fault(file)
                if not fault:
                    return path
            path.unlink()
        except OSError as err:
            fault = f"cannot be stored in {self._folder}: {err.strerror}; make room there"
            raise hub_error(self._model.name, file, fault) from err
        raise hub_error(self._model.name, file, f"was fetched twice and {fault}")

    def delete(self, file: str) -> None:
        """Nobody will read the file again."""
        (self._folder / file).unlink(missing_ok=True)

    def stop(self) -> None:
        """End what is being fetched; huggingface_hub keeps nothing of a file in part."""
        self._stop.set()
        with contextlib.suppress(ImportError):  # not public, and the only way to end a Xet transfer
            from huggingface_hub.utils._xet import abort_xet_session

            abort_xet_session()

    def close(self) -> None:
        """Delete the folder unless whole files are left in it, for the next run."""
        shutil.rmtree(self._folder / ".cache", ignore_errors=True)  # huggingface_hub's notes
        if not files_in(self._folder):
            shutil.rmtree(self._folder, ignore_errors=True)

    def _download(self, file: str) -> None:
        try:
            hf_hub_download(
                self._model.repo_id,
                file,
                revision=self._model.commit,
                local_dir=self._folder,
                cache_dir=self._folder / ".cache",  # not the user's: `cached` refused what is there
                library_name=LIBRARY,
                etag_timeout=TIMEOUT_S,
                tqdm_class=_silent_bar(self._stop),
            )
        except REQUEST_ERRORS:
            raise
        except (OSError, RuntimeError) as err:  # RuntimeError: of hf_xet
            if isinstance(err, OSError) and err.errno:  # of the disk
                raise
            raise PassingError(f"the transfer failed ({type(err).__name__})") from None

    def _fault(self, file: str) -> str | None:
        """What is wrong with the digest of a file that is there."""
        entry = self._model.entries[file]
        hasher = entry.hasher()
        with (self._folder / file).open("rb") as content:
            while part := content.read(_HASH_BYTES):
                hasher.update(part)
                if self._stop.is_set():
                    raise UnwantedError
        return entry.fault(hasher)


def _silent_bar(stop: threading.Event) -> type[tqdm]:
    """A progress bar for huggingface_hub that shows nothing, and ends what it counts on `stop`."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:  # noqa: ARG002
            if stop.is_set():
                raise UnwantedError

    return Bar


def files_in(folder: Path) -> list[Path]:
    """All files in a folder and below."""
    return [Path(where, name) for where, _, names in os.walk(folder) for name in names]

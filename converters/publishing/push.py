"""A safetensors checkpoint to the Hub, with a model card; run again, it continues.

Weights are committed a few files at a time, index and config last: until then nobody can load what
is there, and an interrupted push loses at most the files that were on their way.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.utils import build_hf_headers, get_session

from converters.format.listing import SUFFIX, list_checkpoint
from converters.publishing.model_card import merged_readme
from converters.sources.hub_errors import REQUEST_ERRORS, Patience, hub_error, persist
from converters.sources.hub_http import LIBRARY, TIMEOUT_S, Repository
from converters.sources.hub_listing import Entry
from converters.sources.local import LocalSource
from converters.sources.source import HUB_ID
from mtp_model.checkpoint.directory import UNFINISHED, CheckpointError
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem, raise_if_any

README, CONFIG = "README.md", "config.json"

# huggingface_hub itself tries each request six times.
DEFAULT_PATIENCE = Patience(tries=4)


Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """What is committed at once."""

    most_files: int = 16
    most_bytes: int = 50_000_000_000


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """Where the checkpoint is now. `others`: files there that are not of the checkpoint."""

    repo_id: str
    commit: str
    url: str
    num_files: int
    num_bytes: int
    others: tuple[str, ...]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    provenance: Mapping[str, Any],
    private: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
    patience: Patience = DEFAULT_PATIENCE,
    batches: Batches | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Upload an exported checkpoint; what is on the Hub already is not sent again.

    provenance: of the checkpoint directory that was exported. private: of a repository that is made
    for this; one that exists stays as it is. progress is told the bytes that are committed, and
    their total. Raises CheckpointError for a folder that is
    unfinished, ProblemsError for one that is no checkpoint, and for whatever the Hub refuses.
    """
    folder = Path(folder)
    if (folder / UNFINISHED).is_dir():
        raise CheckpointError(f"{folder} is unfinished; run the export again, then push it")
    if not HUB_ID.fullmatch(repo_id) or "@" in repo_id:
        raise hub_error("the Hub", shown(repo_id), "is no place for a model; needed org/name")
    source = LocalSource(str(folder))
    list_checkpoint(source)
    push = _Push(folder, repo_id, token, endpoint, patience)
    push.make_repository(private)
    readme = merged_readme(
        push.existing_readme(), repo_id, provenance, json.loads((folder / CONFIG).read_bytes())
    )
    with push.transfer():
        added = push.commit_all(source.files(), readme, batches or Batches(), progress)
    return push.listed_back(added)


class _Push:
    def __init__(
        self,
        folder: Path,
        repo_id: str,
        token: str | None,
        endpoint: str | None,
        patience: Patience,
    ):
        self._folder = folder
        self._repo_id = repo_id
        self._token = token
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._patience = patience
        self._api = HfApi(endpoint=self._endpoint, token=token, library_name=LIBRARY)

    def make_repository(self, private: bool) -> None:
        def make() -> None:  # asked first: a token may write here without the right to create
            if not self._api.repo_exists(self._repo_id):
                self._api.create_repo(self._repo_id, private=private, exist_ok=True)

        persist(make, "the Hub", self._repo_id, self._patience)

    def existing_readme(self) -> str | None:
        """The README on the Hub, which somebody may have edited there, or else the folder's."""
        remote = self._remote()
        local = self._folder / README
        if README in remote.entries:
            raw = remote.whole(README)
        elif local.is_file():
            raw = local.read_bytes()
        else:
            return None
        try:
            return raw.decode()
        except UnicodeDecodeError:
            fault = "is not UTF-8, which the Hub needs; convert it"
            raise hub_error(self._repo_id, README, fault) from None

    @contextlib.contextmanager
    def transfer(self) -> Iterator[None]:
        """Large files go by Xet where the server offers it, else by LFS.

        huggingface_hub takes Xet whenever hf_xet is installed; only this setting tells it not to.
        """
        before = constants.HF_HUB_DISABLE_XET
        constants.HF_HUB_DISABLE_XET = before or not self._offers_xet()
        try:
            yield
        finally:
            constants.HF_HUB_DISABLE_XET = before

    def commit_all(
        self,
        sizes: Mapping[str, int],
        readme: str,
        batches: Batches,
        progress: Progress | None,
    ) -> list[CommitOperationAdd]:
        """Commit every file; what was added, with digests."""
        added, total = [], sum(sizes.values())
        weights = {file: size for file, size in sizes.items() if file.endswith(SUFFIX)}
        for files in _batched(weights, batches):
            added += self._commit([(file, self._folder / file) for file in files], files[0])
            if progress:
                progress(sum(add.upload_info.size for add in added), total)
        others = [(file, self._folder / file) for file in sizes if file not in weights]
        last = [*(pair for pair in others if pair[0] != README), (README, readme.encode())]
        return added + self._commit(last, CONFIG)

    def listed_back(self, added: Sequence[CommitOperationAdd]) -> Pushed:
        """Compare what the Hub lists now with what was sent."""
        remote = self._remote()
        problems = [
            Problem("hub", add.path_in_repo, fault)
            for add in added
            if (fault := _fault(add, remote.entries.get(add.path_in_repo)))
        ]
        raise_if_any(remote.name, problems)
        ours = {add.path_in_repo for add in added}
        return Pushed(
            repo_id=self._repo_id,
            commit=remote.commit,
            url=f"{self._endpoint}/{self._repo_id}/tree/{remote.commit}",
            num_files=len(ours),
            num_bytes=sum(add.upload_info.size for add in added),
            others=tuple(sorted(remote.entries.keys() - ours - {".gitattributes"})),
        )

    def _remote(self) -> Repository:
        return Repository(
            self._repo_id, token=self._token, endpoint=self._endpoint, patience=self._patience
        )

    def _offers_xet(self) -> bool:
        url = f"{self._endpoint}/api/models/{self._repo_id}/xet-write-token/main"
        headers = build_hf_headers(token=self._token, library_name=LIBRARY)

        def ask() -> bool:
            return get_session().get(url, headers=headers, timeout=TIMEOUT_S).status_code == 200

        return persist(ask, "the Hub", self._repo_id, self._patience)

    def _commit(
        self, contents: Sequence[tuple[str, Path | bytes]], subject: str
    ) -> list[CommitOperationAdd]:
        adds = [
            CommitOperationAdd(path_in_repo=file, path_or_fileobj=content)
            for file, content in contents
        ]
        more = f" and {len(adds) - 1} more" if len(adds) > 1 else ""

        def commit() -> None:
            try:
                self._api.create_commit(
                    self._repo_id, adds, commit_message=f"Upload {subject}{more}"
                )
            except RuntimeError as err:  # of a thread that uploads one file
                if isinstance(err.__cause__, REQUEST_ERRORS):
                    raise err.__cause__ from None
                fault = f"cannot be sent: {err.__cause__ or err}"
                raise hub_error(self._repo_id, subject, fault) from None
            except ValueError as err:
                if isinstance(err, REQUEST_ERRORS):
                    raise
                raise hub_error(self._repo_id, subject, f"was refused: {err}") from None

        persist(commit, self._repo_id, f"{subject}{more}", self._patience)
        return adds


def _batched(sizes: Mapping[str, int], batches: Batches) -> Iterator[list[str]]:
    batch: list[str] = []
    for file, size in sizes.items():
        full = sum(sizes[name] for name in batch) + size > batches.most_bytes
        if batch and (full or len(batch) == batches.most_files):
            yield batch
            batch = []
        batch.append(file)
    yield batch


def _fault(add: CommitOperationAdd, entry: Entry | None) -> str | None:
    """How the Hub's entry differs from what was sent."""
    if entry is None:
        return "was sent and is not listed; push again"
    if entry.size != add.upload_info.size:
        return f"is listed with {entry.size} bytes, {add.upload_info.size} were sent; push again"
    if entry.sha256 and entry.sha256 != add.upload_info.sha256.hex():
        return f"is listed with sha256 {entry.sha256}, other bytes were sent; push again"
    return None

"""A safetensors checkpoint to the Hub, with a model card; run again, it continues.

Weights are committed a few files at a time, index and config last: until then nobody can load what
is there, and an interrupted push loses at most the files that were on their way.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants

from converters.format.listing import SUFFIX, list_checkpoint
from converters.publishing.measured import MeasuredAcceptance
from converters.publishing.model_card import merged_readme
from converters.sources.hub_errors import REQUEST_ERRORS, hub_error, persist
from converters.sources.hub_fetch import fetch_small
from converters.sources.hub_listing import LIBRARY, Entry, Model, list_model
from converters.sources.local import LocalSource
from converters.sources.source import HUB_ID
from mtp_model.checkpoint.directory import UNFINISHED, CheckpointError
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem, raise_if_any
from mtp_model.progress import OnProgress

README, CONFIG = "README.md", "config.json"

# Of one commit.
_MOST_FILES = 16
_MOST_BYTES = 50_000_000_000


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
    verified: Mapping[str, Any] | None = None,
    measured: Sequence[MeasuredAcceptance] = (),
    draft: str | None = None,
    progress: OnProgress | None = None,
) -> Pushed:
    """Upload an exported checkpoint; what is on the Hub already is not sent again.

    A repository that is made for this is private. provenance: of the checkpoint directory that was
    exported. verified, measured, draft: for the card, as merged_readme has them. progress is told
    the bytes that are committed, and their total. Raises CheckpointError for a folder that is
    unfinished, ProblemsError for one that is no checkpoint, and for whatever the Hub refuses.
    """
    folder = Path(folder)
    if (folder / UNFINISHED).is_dir():
        raise CheckpointError(f"{folder} is unfinished; run the export again, then push it")
    if not HUB_ID.fullmatch(repo_id) or "@" in repo_id:
        raise hub_error("the Hub", shown(repo_id), "is no place for a model; needed org/name")
    source = LocalSource(str(folder))
    list_checkpoint(source)
    api = HfApi(library_name=LIBRARY)
    _make_repository(api, repo_id)
    config = json.loads((folder / CONFIG).read_bytes())
    existing = _existing_readme(folder, repo_id)
    readme = merged_readme(existing, repo_id, provenance, config, verified, measured, draft)
    sizes = source.files()
    sent: list[CommitOperationAdd] = []
    for batch in _batches(sizes):
        adds = [CommitOperationAdd(path_in_repo=f, path_or_fileobj=folder / f) for f in batch]
        if CONFIG in batch:
            adds.append(CommitOperationAdd(path_in_repo=README, path_or_fileobj=readme.encode()))
        _commit(api, repo_id, adds)
        sent += adds
        if progress and CONFIG not in batch:
            progress(sum(add.upload_info.size for add in sent), sum(sizes.values()))
    return _listed_back(repo_id, sent)


def _make_repository(api: HfApi, repo_id: str) -> None:
    def make() -> None:  # asked first: a token may write here without the right to create
        if not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=True, exist_ok=True)

    persist(make, "the Hub", repo_id, brief=True)


def _existing_readme(folder: Path, repo_id: str) -> str | None:
    """The README on the Hub, which somebody may have edited there, or else the folder's."""
    remote = list_model(repo_id)
    if README in remote.entries:
        raw = fetch_small(remote, README)
    elif (folder / README).is_file():
        raw = (folder / README).read_bytes()
    else:
        return None
    try:
        return raw.decode()
    except UnicodeDecodeError:
        fault = "is not UTF-8, which the Hub needs; convert it"
        raise hub_error(repo_id, README, fault) from None


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The files of each commit: weights a few at a time, then config.json first of the others."""
    batch: list[str] = []
    for file in (file for file in sizes if file.endswith(SUFFIX)):
        full = sum(sizes[name] for name in batch) + sizes[file] > _MOST_BYTES
        if batch and (full or len(batch) == _MOST_FILES):
            yield batch
            batch = []
        batch.append(file)
    yield batch
    others = {file for file in sizes if not file.endswith(SUFFIX)} - {CONFIG, README}
    yield [CONFIG, *sorted(others)]


def _commit(api: HfApi, repo_id: str, adds: Sequence[CommitOperationAdd]) -> None:
    """One commit, named after its first file; huggingface_hub itself tries each request again."""
    more = f" and {len(adds) - 1} more" if len(adds) > 1 else ""
    subject = f"{adds[0].path_in_repo}{more}"

    def commit() -> None:
        try:
            api.create_commit(repo_id, adds, commit_message=f"Upload {subject}")
        except RuntimeError as err:  # of a thread that uploads one file
            if isinstance(err.__cause__, REQUEST_ERRORS):
                raise err.__cause__ from None
            raise hub_error(repo_id, subject, f"cannot be sent: {err.__cause__ or err}") from None
        except ValueError as err:
            if isinstance(err, REQUEST_ERRORS):
                raise
            raise hub_error(repo_id, subject, f"was refused: {err}") from None

    persist(commit, repo_id, subject, brief=True)


def _listed_back(repo_id: str, sent: Sequence[CommitOperationAdd]) -> Pushed:
    """Compare what the Hub lists now with what was sent."""
    remote: Model = list_model(repo_id)
    listed = ((add, remote.entries.get(add.path_in_repo)) for add in sent)
    faults = [(add.path_in_repo, _fault(add, entry)) for add, entry in listed]
    raise_if_any(remote.name, [Problem("hub", file, fault) for file, fault in faults if fault])
    ours = {add.path_in_repo for add in sent}
    return Pushed(
        repo_id=repo_id,
        commit=remote.commit,
        url=f"{constants.ENDPOINT}/{repo_id}/tree/{remote.commit}",
        num_files=len(ours),
        num_bytes=sum(add.upload_info.size for add in sent),
        others=tuple(sorted(remote.entries.keys() - ours - {".gitattributes"})),
    )


def _fault(add: CommitOperationAdd, entry: Entry | None) -> str | None:
    """How the Hub's entry differs from what was sent."""
    if entry is None:
        return "was sent and is not listed; push again"
    if entry.size != add.upload_info.size:
        return f"is listed with {entry.size} bytes, {add.upload_info.size} were sent; push again"
    if entry.sha256 and entry.sha256 != add.upload_info.sha256.hex():
        return f"is listed with sha256 {entry.sha256}, other bytes were sent; push again"
    return None

"""A model on the Hub and its files, as the Hub lists them; what it lists is checked."""

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoSibling

from converters.sources.hub_errors import hub_error, persist
from mtp_model.files.place import name_fault
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem, raise_if_any

LIBRARY = "deepseek-mtp"
TIMEOUT_S = 30.0

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file as the Hub lists it: size in bytes, and the digest of its content.

    sha256 is that of a file in large file storage; all others have git's sha1 only.
    """

    size: int
    git_blob: str
    sha256: str | None = None

    @property
    def digest(self) -> str:
        """What names the content; hexadecimal digits, so it is safe as a file name."""
        return self.sha256 or self.git_blob

    def hasher(self) -> Any:
        """A hash that gives `digest` once it was fed the whole content."""
        if self.sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    def fault(self, hasher: Any) -> str | None:
        """What is wrong with the content that `hasher` was fed."""
        found = hasher.hexdigest()
        return None if found == self.digest else f"has digest {found}, the Hub lists {self.digest}"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A repository at one commit, and its files by name, sorted."""

    repo_id: str
    commit: str
    entries: dict[str, Entry]

    @property
    def name(self) -> str:
        """What stays the same when a branch moves."""
        return f"{self.repo_id}@{self.commit}"


def list_model(repo_id: str, revision: str | None = None, *, where: str = "the Hub") -> Model:
    """The model at the commit that `revision` stands for now; None: its main branch.

    where: what an error says about where the model was looked for. Raises ProblemsError.
    """

    def ask() -> Model:
        api = HfApi(library_name=LIBRARY)
        try:
            info = api.model_info(
                repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT_S
            )
        except (HfHubHTTPError, OfflineModeIsEnabled):
            raise
        except (ValueError, TypeError, KeyError, AttributeError):
            raise hub_error("the Hub", repo_id, "got an answer that is no model") from None
        if not _matches(_COMMIT, info.sha):
            fault = f"is at commit {shown(info.sha)}, needed 40 hexadecimal digits"
            raise hub_error("the Hub", repo_id, fault)
        entries = _entries_of(repo_id, info.siblings or [])
        return Model(repo_id=repo_id, commit=str(info.sha), entries=entries)

    # A name that is a mistyped folder's should not take minutes to be refused.
    return persist(ask, where, f"{repo_id}@{revision}" if revision else repo_id, brief=True)


def _entries_of(repo_id: str, siblings: list[RepoSibling]) -> dict[str, Entry]:
    """The listed files; ProblemsError tells all that no honest Hub lists."""
    problems, entries = [], {}
    for sibling in siblings:
        file = sibling.rfilename
        fault = _entry_fault(sibling) or (file in entries and "is listed twice")
        if fault:
            problems.append(Problem("file", shown(file), fault))
            continue
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        assert sibling.size is not None, sibling  # else there was a fault
        assert sibling.blob_id, sibling
        entries[file] = Entry(size=sibling.size, git_blob=sibling.blob_id, sha256=sha256)
    raise_if_any(repo_id, problems)
    return dict(sorted(entries.items()))


def _entry_fault(sibling: RepoSibling) -> str | None:
    if not isinstance(sibling.rfilename, str):
        return "is no file name"
    if fault := name_fault(sibling.rfilename):
        return fault
    if not sibling.rfilename.isprintable():  # lone surrogates too, which no report can hold
        return "has a name that cannot be printed"
    if type(sibling.size) is not int or sibling.size < 0:
        return f"is listed with {shown(sibling.size)} bytes"
    if not _matches(_COMMIT, sibling.blob_id):
        return f"is listed with git blob {shown(sibling.blob_id)}"
    if sibling.lfs and not _matches(_SHA256, sibling.lfs.sha256):
        return f"is listed with sha256 {shown(sibling.lfs.sha256)}"
    if sibling.lfs and sibling.lfs.size != sibling.size:
        return f"is listed with {sibling.size} and with {shown(sibling.lfs.size)} bytes"
    return None


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None

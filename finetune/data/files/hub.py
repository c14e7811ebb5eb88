"""Data sets on the Hub as files of this machine: hf://datasets/ORG/NAME[@REVISION][/PATH], or
[:CONFIG[/SPLIT]] instead of PATH.

Files of the kinds that are read are downloaded into the Hub's own cache; nothing of a data set is
run. PATH is a file, a folder, or a pattern with *. CONFIG is a configuration that the data set's
card names. Without either there must be no choice to make: text that is meant for testing is never
trained on by chance.
"""

import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from finetune.data.files.card import CARD, Configuration, choose, configurations
from finetune.data.files.kinds import NAMES, FileError, kind_of
from mtp_model.files.untrusted_json import shown

_TIMEOUT_S = 30.0
_SHOWN = 8
_ANY = "*"
# Words that names of files have, as the Hub's documentation lists them.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


class _Asked(NamedTuple):
    """What a path asks of the Hub."""

    repo: str
    revision: str | None
    config: str | None  # of its card
    inner: str  # within the data set, "" for all of it; of a configuration a split

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"hf://datasets/{self.repo}{at}"


class Downloaded(NamedTuple):
    """Files of a data set in this machine's cache, and which it is, with its commit."""

    files: list[Path]
    name: str


def download(path: Path) -> Downloaded:
    """The files that a path names, downloaded where they are not yet. Raises FileError."""
    asked = _asked(path)
    try:
        info = HfApi().dataset_info(asked.repo, revision=asked.revision, timeout=_TIMEOUT_S)
        names = sorted(sibling.rfilename for sibling in info.siblings or ())
        commit = str(info.sha)
        chosen, part = _chosen(asked, names, commit)
        files = [_file(asked.repo, name, commit) for name in chosen]
    except (HfHubHTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise FileError(_why(error)) from error
    except (httpx2.HTTPError, HFValidationError, OSError) as error:
        raise FileError(f"cannot be read from the Hub ({type(error).__name__})") from error
    return Downloaded(files, f"{asked._replace(revision=commit)}{part}")


def _asked(path: Path) -> _Asked:
    parts = path.parts[2:]
    if len(parts) < 2:
        raise FileError("is no data set on the Hub, needed hf://datasets/ORG/NAME")
    place, has_config, config = parts[1].partition(":")
    name, _, revision = place.partition("@")
    inner = "/".join(parts[2:])
    if has_config and (not config or len(parts) > 4):
        raise FileError("names no configuration, needed hf://datasets/ORG/NAME:CONFIG[/SPLIT]")
    return _Asked(f"{parts[0]}/{name}", unquote(revision) or None, unquote(config) or None, inner)


def _is_data(name: str) -> bool:
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and name.isprintable()
    return inside and not name.lower().startswith("readme") and kind_of(name) is not None


def _chosen(asked: _Asked, all_names: list[str], commit: str) -> tuple[list[str], str]:
    """Of the files with data those that are asked for, and by which words of the card, if by any.

    FileError where that is not clear.
    """
    names = [name for name in all_names if _is_data(name)]
    if asked.inner and asked.config is None:
        return _named(asked, names), ""
    configs: list[Configuration] = []
    if CARD in all_names:
        configs = configurations(_file(asked.repo, CARD, commit).read_bytes())
    if not configs:
        if asked.config is not None:
            raise FileError("names no configurations in its card: name a file, folder or pattern")
        return _only_choice(asked, _some(names)), ""
    config, split = choose(f"{asked}", configs, asked.config, asked.inner or None)
    found = config.files(split or "", names)
    if not found:
        of = f"split {shown(split)} of its " if split else ""
        raise FileError(
            f"has no file that is read in {of}configuration {shown(config.name)}: {NAMES}"
        )
    part = f":{config.name}" + (f"/{split}" if split else "")
    return (found if split else _only_choice(asked, found)), part


def _some(names: list[str]) -> list[str]:
    if not names:
        raise FileError(f"has no file that is read: {NAMES}")
    return names


def _named(asked: _Asked, names: list[str]) -> list[str]:
    """Files that a path or a pattern names."""
    inner, names = asked.inner, _some(names)
    chosen = [name for name in names if name.startswith(f"{inner}/") or fnmatchcase(name, inner)]
    if not chosen:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        there = f"{shown(', '.join(names[:_SHOWN]))}{more}"
        raise FileError(f"names no file with data; there are {there}")
    return chosen


def _only_choice(asked: _Asked, names: list[str]) -> list[str]:
    patterns: dict[str, str] = {}
    for name in names:
        patterns.setdefault(*_part_of(name))
    if len(patterns) > 1:
        choices = ", ".join(f"{asked}/{pattern}" for pattern in list(patterns.values())[:_SHOWN])
        raise FileError(
            f"has several parts ({shown(', '.join(list(patterns)[:_SHOWN]))}): name what to read, "
            f"as {choices}; {asked}/{_ANY} is all of it"
        )
    return names


def _part_of(name: str) -> tuple[str, str]:
    """The part of a data set that a file is of, by folder and split, and a pattern of its files."""
    for word in re.finditer(r"[A-Za-z]+", name):
        if split := _SPLITS.get(word[0].lower()):
            before = name[: word.start()]
            return f"{before.rpartition('/')[0]} {split}".strip(), f"{before}{word[0]}{_ANY}"
    folder = name.rpartition("/")[0]
    return folder or "all", f"{folder}/{_ANY}" if folder else _ANY


def _file(repo: str, name: str, commit: str) -> Path:
    return Path(HfApi().hf_hub_download(repo, name, repo_type="dataset", revision=commit))


def _why(error: Exception) -> str:
    """What the user can do; no address, which may be signed."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403, 404):
            return (
                f"is not there, or needs access ({status}): check name and revision; for access "
                "run `hf auth login` or set HF_TOKEN"
            )
        return f"got the answer {status} from the Hub: run the same command again later"
    if isinstance(error, OfflineModeIsEnabled):
        return "needs the Hub, and HF_HUB_OFFLINE is set: unset it, or give a folder"
    return "could not be downloaded: run the same command again, what is there is kept"

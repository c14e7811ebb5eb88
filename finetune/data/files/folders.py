"""Which files a path of --data means: itself, those of a folder, those of a data set.

Of a folder all are read whose kind is known. A data set that Hugging Face's `datasets` saved
(`save_to_disk`) has its rows in .arrow files that state.json names; others beside them are its
caches. One of several splits is a folder of such folders.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.files.arrays import is_index
from finetune.data.files.kinds import PROSE, FileError, hub_name, is_on_hub, kind_of
from mtp_model.files.objects import CloudError
from mtp_model.files.open import as_place, written
from mtp_model.files.place import Place
from mtp_model.files.untrusted_json import shown
from mtp_model.report_folder import (
    REPORT_FILES,
    REPORT_JSON,
    RUN_RESOLVED,
    RUN_SETTINGS,
    is_report,
)

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
# Text about data, which lies beside it in many folders. Named on its own it is read.
_ABOUT_DATA = ("readme", "license", "licence", "changelog", "contributing", "notice")


class Found(NamedTuple):
    """A file that is to be read."""

    path: Place
    nbytes: int  # of one that is not on this machine, else it may be 0
    is_named: bool  # by the user, not found in a folder


class Listed(NamedTuple):
    """The files of a path in a fixed order."""

    files: list[Found]
    left_out: list[Place]  # no data
    faults: list[str]
    from_hub: list[str]  # which data set it is, with its commit


def shown_path(path: Path) -> str:
    """A path as the user wrote it."""
    return hub_name(path) if is_on_hub(path) else written(path)


def listed_files(path: Path) -> Listed:
    """The files that a path means."""
    if is_on_hub(path):
        return _on_hub(path)
    place = as_place(path)
    if place.is_file() or not place.is_dir():
        nbytes = place.size() if place.is_far and place.is_file() else 0
        return Listed([Found(place, nbytes, True)], [], [], [])
    return _below(place)


def _on_hub(path: Path) -> Listed:
    from finetune.data.files.hub import download  # takes a while, and few need it

    try:
        found = download(path)
    except FileError as error:
        return Listed([], [], [f"{hub_name(path)} {error}"], [])
    files = [Found(as_place(file), 0, False) for file in found.files]
    return Listed(files, [], [], [found.name])


def _below(folder: Place) -> Listed:
    """Files below a folder, sorted by their path in it; hidden ones left out without a word."""
    files = {tuple(name.split("/")): nbytes for name, nbytes in folder.sizes().items()}
    # Consoles leave an object where somebody made a folder: its name ends with a slash.
    seen = [p for p in sorted(files) if p[-1] and not any(part.startswith(".") for part in p)]
    by_place: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for parts in seen:
        by_place[parts[:-1]].add(parts[-1])
    listed = Listed([], [], [], [])
    rows = {p: _rows(_inner(folder, p), names, listed.faults) for p, names in by_place.items()}
    for parts in seen:
        path, beside = _inner(folder, parts), by_place[parts[:-1]]
        kept = rows[parts[:-1]]
        reported = _inner(folder, parts[:-1]) / REPORT_JSON
        if _is_of_a_run(parts, by_place) or (parts[-1] in REPORT_FILES and is_report(reported)):
            listed.left_out.append(path)
            continue
        if is_index(parts[-1], beside) or (kept is not None and parts[-1] in (_STATE, _INFO)):
            continue  # read with the data
        if _is_data(parts[-1]) and (kept is None or parts[-1] in kept):
            listed.files.append(Found(path, files[parts], False))
        else:
            listed.left_out.append(path)
    return listed


def _is_of_a_run(parts: tuple[str, ...], by_place: Mapping[tuple[str, ...], set[str]]) -> bool:
    """Whether a file is below the folder of a run: its logs are .jsonl, and grow while it trains.

    A run whose --out is in the folder of its data has to read the same when it goes on.
    """
    above = (parts[:depth] for depth in range(1, len(parts)))
    return any({RUN_SETTINGS, RUN_RESOLVED} <= by_place.get(folder, set()) for folder in above)


def _inner(folder: Place, parts: tuple[str, ...]) -> Place:
    return folder / "/".join(parts) if parts else folder


def _is_data(name: str) -> bool:
    """Whether a file of a folder is read."""
    kind = kind_of(name)
    is_about = kind and kind.form == PROSE and name.lower().startswith(_ABOUT_DATA)
    return kind is not None and not is_about


def _rows(folder: Place, names: set[str], faults: list[str]) -> set[str] | None:
    """Names of the files with a saved data set's rows; None for a folder that is none."""
    if _SPLITS in names:
        splits = _json(folder / _SPLITS, faults).get("splits")
        if isinstance(splits, list) and len(splits) > 1:
            named = ", ".join(shown(str(split)) for split in splits)
            faults.append(
                f"{folder} is a data set with the splits {named}: name those to read, as "
                f"{folder}/{shown(str(splits[0]))}"
            )
    if not {_STATE, _INFO} <= names:
        return None
    state = _json(folder / _STATE, faults)
    if state.get("_indices_data_files"):
        faults.append(f"{folder} is a choice of rows: save it again after `flatten_indices()`")
    entries = state.get("_data_files")
    entries = entries if isinstance(entries, list) else []
    listed = [str(each.get("filename")) for each in entries if isinstance(each, dict)]
    lost = [name for name in listed if name not in names]
    if lost or not listed:
        what = f"lacks {shown(', '.join(lost))}" if lost else "names no file of rows"
        faults.append(f"{folder}, which `save_to_disk` wrote, is not whole: it {what}")
    return set(listed)


def _json(path: Place, faults: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, CloudError, ValueError, RecursionError) as error:
        faults.append(f"{path} cannot be read: {error}")
        return {}
    return found if isinstance(found, dict) else {}

"""What an interrupted command had finished: one JSON line for each finished unit.

The first line is the fingerprint of plan and source: the same command
on the same source continues, anything else is refused. A line is written once what it stands for
is on the disk; whoever reads a journal checks that it still is there.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mtp_model.files.place import Lines, Place
from mtp_model.problems import Problem, ProblemsError, raise_if_any

PREFIX, SUFFIX = "journal-", ".jsonl"

Fingerprint = Mapping[str, Mapping[str, Any]]
"""Section (`options`, `files`) -> key -> plain data that must be the same to continue."""


class Journal:
    """The journal of one process, open to append to."""

    def __init__(self, folder: Place, fingerprint: Fingerprint, worker: tuple[int, int] = (0, 1)):
        """Continue what `folder` has; ProblemsError when another plan or source began it."""
        self.entries = read_entries(folder, fingerprint)
        """What was finished before, by all processes that share the folder."""
        self._lines = (folder / f"{PREFIX}{worker[0]}-of-{worker[1]}{SUFFIX}").lines()
        whole = [line for line, _ in _whole_lines(self._lines)]
        self._lines.keep(whole)  # not the line that was being written as the process ended
        if not whole:
            self.append({"fingerprint": fingerprint})

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line; several threads may."""
        self._lines.append(json.dumps(entry, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def read_entries(folder: Place, fingerprint: Fingerprint) -> list[dict[str, Any]]:
    """Entries of every journal in `folder`; ProblemsError when another plan or source began it."""
    entries = []
    for file in _journals(folder):
        lines = [entry for _, entry in _whole_lines(file.lines())]
        if lines:
            began, now = lines[0].get("fingerprint", {}), json.loads(json.dumps(fingerprint))
            raise_if_any(f"continuing {folder.parent}", _differences(began, now))
            entries += lines[1:]
    return entries


def begun_by_another(folder: Place, fingerprint: Fingerprint) -> bool:
    """Whether journals in `folder` belong to another plan or source."""
    try:
        read_entries(folder, fingerprint)
    except ProblemsError:
        return True
    return False


def has_journals(folder: Place) -> bool:
    """Whether anything was begun in `folder`."""
    return bool(_journals(folder))


def delete_journals(folder: Place) -> None:
    """Forget what was begun in `folder`."""
    for file in _journals(folder):
        file.delete_tree()


def _journals(folder: Place) -> list[Place]:
    return [file for file in folder.entries(PREFIX) if file.name.endswith(SUFFIX)]


def _whole_lines(lines: Lines) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines, and what they say, up to the first that is torn: a power cut leaves anything there."""
    for line in lines.read():
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(entry, dict):
            return
        yield line, entry


def _differences(began: Fingerprint, now: Fingerprint) -> Iterator[Problem]:
    advice = "undo the change and run it again, or start over with --overwrite"
    for section in now:
        old, new = began.get(section, {}), now[section]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                was, found = _shown(old.get(key)), _shown(new.get(key))
                yield Problem("changed", key, f"was {was} when this began, is {found}; {advice}")


def _shown(value: Any) -> str:
    if value is None:
        return "absent"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)

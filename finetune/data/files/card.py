"""What the card of a data set on the Hub says of its files: configurations, and splits of each.

A card is README.md, which may begin with YAML between two lines of ---. It is from outside: what
it names is looked for among the files of the data set, and nowhere else.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import yaml

from finetune.data.files.kinds import FileError
from mtp_model.files.untrusted_json import shown

CARD = "README.md"
_MOST_BYTES = 4 << 20
_MOST_SHOWN = 20
_FENCE = "---"
_STARS = "**"
_ALL = "train"  # the split of files that are in no split by name
_ADVICE = "name its files, as hf://datasets/ORG/NAME/PATH"


class Configuration(NamedTuple):
    """A part of a data set by its card: patterns of files, by split; None: it names none."""

    name: str
    is_default: bool
    splits: Mapping[str, Sequence[str]] | None
    folder: str  # that the patterns are of

    def files(self, split: str, names: Iterable[str]) -> list[str]:
        """Those of the data set's files that are in a split."""
        patterns = self.splits[split] if self.splits else [_STARS]
        paths = ["/".join(filter(None, (self.folder, each))) for each in patterns]
        return [name for name in names if any(_means(path, name) for path in paths)]


def configurations(card: bytes) -> list[Configuration]:
    """Those that a card names. FileError where that cannot be understood."""
    entries = _metadata(card).get("configs") or []
    if not isinstance(entries, list):
        raise FileError(f"has a card whose configs are no list; {_ADVICE}")
    found = [_configuration(entry) for entry in entries]
    names = [each.name for each in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise FileError(f"has a card with two configurations {shown(twice[0])}; {_ADVICE}")
    return found


def choose(
    asked: str, configs: Sequence[Configuration], config: str | None, split: str | None
) -> tuple[Configuration, str | None]:
    """The configuration and its split; None: its files are not told apart by the card.

    asked: how the data set was named. FileError lists what there is where that is not clear, so
    that nothing is trained on by chance.
    """
    names = ", ".join(f"{c.name}{' (default)' * c.is_default}" for c in configs[:_MOST_SHOWN])
    more = len(configs) - _MOST_SHOWN
    there = shown(names) + (f" and {more} more" if more > 0 else "")
    chosen = [each for each in configs if config in (None, each.name)]
    if config is not None and not chosen:
        raise FileError(f"has no configuration {shown(config)} in its card; there are {there}")
    if len(chosen) > 1:
        example = f"{asked}:{shown(chosen[0].name)}"
        raise FileError(
            f"has the configurations {there}: name one, as {example}; {asked}/* is all files"
        )
    splits = chosen[0].splits
    where = f"configuration {shown(chosen[0].name)}"
    if splits is None:
        if split is not None:
            raise FileError(f"has a {where} whose splits its card does not name; leave it out")
        return chosen[0], None
    of = shown(", ".join(splits))
    if split is not None and split not in splits:
        raise FileError(f"has no split {shown(split)} in its {where}; there are {of}")
    if split is None and len(splits) > 1:
        example = f"{asked}:{shown(chosen[0].name)}/{shown(next(iter(splits)))}"
        raise FileError(f"has the splits {of} in its {where}: name one, as {example}")
    return chosen[0], split or next(iter(splits))


def _metadata(card: bytes) -> Mapping[str, Any]:
    """The YAML that a card begins with; nothing where it begins otherwise."""
    lines = card[:_MOST_BYTES].decode("utf-8-sig", errors="replace").splitlines()
    if not lines or lines[0].rstrip() != _FENCE:
        return {}
    ends = (number for number, line in enumerate(lines[1:], 1) if line.rstrip() == _FENCE)
    end = next(ends, None)
    if end is None:
        return {}
    try:
        found = yaml.safe_load("\n".join(lines[1:end]))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = shown(str(error).partition("\n")[0])
        raise FileError(f"has a card whose YAML cannot be read ({why}); {_ADVICE}") from error
    return found if isinstance(found, Mapping) else {}


def _configuration(entry: Any) -> Configuration:
    name = entry.get("config_name") if isinstance(entry, Mapping) else None
    if not isinstance(name, str) or not name:
        raise FileError(f"has a card with a configuration without config_name; {_ADVICE}")
    folder, files = entry.get("data_dir") or "", entry.get("data_files")
    if not isinstance(folder, str):
        raise _odd(name, "data_dir", folder)
    splits = None if files is None else _splits(name, files)
    return Configuration(name, entry.get("default") is True, splits, folder.strip("/"))


def _splits(config: str, files: Any) -> dict[str, list[str]]:
    """Patterns by split, of the forms that cards have: text, lists of it, {split, path}."""
    found: dict[str, list[str]] = {}
    for each in files if isinstance(files, list) else [files]:
        split: Any = each.get("split") if isinstance(each, Mapping) else _ALL
        path: Any = each.get("path") if isinstance(each, Mapping) else each
        paths: list[Any] = path if isinstance(path, list) else [path]
        if not isinstance(split, str) or not all(isinstance(p, str) and p for p in paths):
            raise _odd(config, "data_files", each)
        if outside := [p for p in paths if "://" in p or p.startswith("/") or ".." in p.split("/")]:
            raise FileError(
                f"has a card whose configuration {shown(config)} names {shown(outside[0])}, needed "
                f"files of the data set itself; {_ADVICE}"
            )
        found.setdefault(split, []).extend(paths)
    return found


def _odd(config: str, key: str, value: Any) -> FileError:
    """The value is not shown: YAML's references make few bytes a value without end."""
    found = f"{key} is {type(value).__name__}"
    return FileError(
        f"has a card in whose configuration {shown(config)} {found}, needed paths; {_ADVICE}"
    )


def _means(path: str, name: str) -> bool:
    """Whether a path means a file: itself, its folder, or a pattern; ** goes through folders.

    Of patterns all ways to fit are followed at once: the time does not grow with their number.
    """
    parts = path.removeprefix("./").rstrip("/").split("/")
    is_pattern = any(mark in path for mark in "*?[")
    at = _with_none_for_stars({0}, parts)
    for folder in name.split("/"):
        if len(parts) in at and not is_pattern:
            return True
        further = {
            n if parts[n] == _STARS else n + 1
            for n in at
            if n < len(parts) and (parts[n] == _STARS or fnmatchcase(folder, parts[n]))
        }
        at = _with_none_for_stars(further, parts)
    return len(parts) in at


def _with_none_for_stars(at: set[int], parts: Sequence[str]) -> set[int]:
    """Places in a pattern, and those behind a ** that stands for no folder."""
    for n in sorted(at):
        while n < len(parts) and parts[n] == _STARS:
            n += 1
            at.add(n)
    return at

"""Settings as a YAML file: read strictly, written so that they are read back the same."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from finetune.settings import RunSettings, SettingsError, blank, flat
from mtp_model.files.open import as_place, written


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which no name is given twice: of two values one would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            found = f"{', '.join(twice)} twice in what begins in line {node.start_mark.line + 1}"
            raise yaml.YAMLError(f"it has {found}")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> RunSettings:
    """Defaults with the file's values over them. Raises SettingsError naming all its faults."""
    try:
        values = yaml.load(as_place(path).read_bytes().decode("utf-8"), _UniqueKeys)
    except OSError as error:
        raise SettingsError(written(path), [f"cannot be read: {error.strerror}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(written(path), [f"is not YAML: {error}"]) from error
    faults: list[str] = []
    settings = _filled(blank(), {} if values is None else values, "", faults)
    if faults:
        raise SettingsError(written(path), faults)
    return settings


def as_plain(settings: RunSettings) -> dict[str, Any]:
    """Settings as what YAML and JSON can hold."""
    return dataclasses.asdict(settings, dict_factory=_plain)


def write_yaml(settings: RunSettings, path: Path) -> None:
    """Save settings so that `read_yaml` gives them back."""
    text = yaml.safe_dump(as_plain(settings), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return written(value)
        return [plain(each) for each in value] if isinstance(value, tuple) else value

    return {key: plain(value) for key, value in items}


def _filled(default: Any, values: Any, prefix: str, faults: list[str]) -> Any:
    """`default` with the mapping `values` over it; what does not fit goes to `faults`."""
    if not isinstance(values, Mapping):
        faults.append(f"{prefix.rstrip('.') or 'the file'} is {values!r}, needed names with values")
        return default
    hints = typing.get_type_hints(type(default))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            faults.append(f"unknown setting {prefix}{key}; the nearest is {_nearest(prefix, key)}")
        elif dataclasses.is_dataclass(hints[key]):
            changes[key] = _filled(getattr(default, key), value, f"{prefix}{key}.", faults)
        else:
            try:
                changes[key] = _converted(value, hints[key])
            except (TypeError, ValueError, OverflowError):  # 1 and 400 digits more
                faults.append(f"{prefix}{key} is {value!r}, needed {_described(hints[key])}")
    return dataclasses.replace(default, **changes)


def _nearest(prefix: str, key: Any) -> str:
    """The known setting that an unknown one is most like, by its full or its last name."""

    def likeness(name: str) -> float:
        last = name.rpartition(".")[2]
        pairs = ((f"{prefix}{key}", name), (str(key), last))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(flat(blank()), key=likeness)


def _converted(value: Any, hint: Any) -> Any:
    """A YAML value as the type of its setting; TypeError or ValueError where it is not one."""
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)  # a string too: YAML reads 1e-4 as one
    if hint is Path and isinstance(value, str):
        return Path(value)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        values = value if isinstance(value, list) else [value]
        return tuple(_converted(each, inner) for each in values)
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    raise TypeError


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(typing.get_args(hint))
    if isinstance(hint, types.GenericAlias):
        what = "path" if typing.get_args(hint)[0] is Path else "name"
        return f"a {what} or a list of {what}s"
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a path",
        Path: "a path",
    }[hint]

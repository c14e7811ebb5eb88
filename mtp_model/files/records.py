"""Plain data from JSON, checked for what its readers index; knows no file's meaning.

The shape of a value is written as: a type; `[shape]`, a list of such; `{"key": shape}`, an object
that has these keys, others aside; `Each(shape)`, an object of any keys; `Maybe(shape)`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any

_NAMES = {str: "text", int: "a whole number", dict: "an object", list: "a list"}


@dataclass(frozen=True)
class Each:
    """An object whose every value has this shape."""

    value: Any


@dataclass(frozen=True)
class Maybe:
    """This shape, or null, or no such key."""

    value: Any


def faults(value: object, shape: Any, *keys: str) -> Iterator[str]:
    """`KEY > KEY is FOUND, needed WANTED`, for each part of `value` that hasn't its shape."""
    if isinstance(shape, Maybe):
        if value is not None:
            yield from faults(value, shape.value, *keys)
        return
    wanted = shape if isinstance(shape, type) else list if isinstance(shape, list) else dict
    if type(value) is not wanted:  # JSON's true is an int to isinstance()
        yield f"{' > '.join(keys) or 'it'} is {shortened(value)}, needed {_NAMES[wanted]}"
        return
    for key, part, inner in _parts(value, shape):
        if part is _ABSENT:
            yield f"{' > '.join((*keys, key))} is missing"
        else:
            yield from faults(part, inner, *keys, key)


_ABSENT = object()


def _parts(value: Any, shape: Any) -> Iterator[tuple[str, object, Any]]:
    """Key, value and shape of everything within a list or an object."""
    if isinstance(shape, list):
        yield from ((str(position), part, shape[0]) for position, part in enumerate(value))
    elif isinstance(shape, Each):
        yield from ((key, part, shape.value) for key, part in value.items())
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            if key in value or not isinstance(inner, Maybe):
                yield key, value.get(key, _ABSENT), inner

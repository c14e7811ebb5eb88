"""JSON from files that nobody vouches for: parsed strictly, and checked for what readers index.

The shape of a value is written as: a type; `[shape]`, a list of such; `{"key": shape}`, an object
that has these keys, others aside; `Each(shape)`, an object of any keys; `Maybe(shape)`.
"""

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

from mtp_model.problems import UserError

MAX_VALUES = 4_000_000
"""In one text. Python takes up to 300 bytes for a value that is three bytes of text; a header has
8 values for a tensor, and V3's 91,991 tensors would be 736,000 in a single file."""

_SHOWN_CHARACTERS = 200
_NAMES = {str: "text", int: "a whole number", dict: "an object", list: "a list"}
_ABSENT = object()


class JsonError(UserError):
    """Why some bytes aren't JSON that we accept; the text reads on after the name of the file."""


@dataclass(frozen=True)
class Each:
    """An object whose every value has this shape."""

    value: Any


@dataclass(frozen=True)
class Maybe:
    """This shape, or null, or no such key."""

    value: Any


def parse(raw: bytes) -> object:
    """The value of UTF-8 JSON text with unique keys and finite numbers.

    Raises JsonError for everything else: other encodings, lone surrogates, `NaN`, keys given twice,
    numbers of thousands of digits, nesting deeper than Python's recursion limit, more than
    MAX_VALUES values.
    """
    # Every value but the first within its brackets has a comma before it. Those in strings count
    # as well: no text that we read has many.
    if (most_values := sum(map(raw.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise JsonError(f"holds about {most_values} values, more than the {MAX_VALUES} allowed")
    try:
        return json.loads(
            raw.decode(),
            object_pairs_hook=_unique_in_utf8,
            parse_constant=_not_a_number,
            parse_float=_finite,
        )
    except JsonError:
        raise
    except UnicodeDecodeError as err:
        found = f"is not UTF-8: byte {raw[err.start]:#04x} at {err.start}"
    except RecursionError:
        found = "is nested too deeply"
    except json.JSONDecodeError as err:
        found = f"is not JSON: {err.msg} at character {err.pos} of {len(err.doc)}"
    except ValueError:  # the one left: int() refuses thousands of digits
        found = "holds a number with thousands of digits"
    raise JsonError(found)


def is_text_map(value: object) -> TypeGuard[dict[str, str]]:
    """Whether parsed JSON is an object whose every value is a string."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def shown(value: object) -> str:
    """`value` for an error message: one line, printable, of bounded length."""
    if not isinstance(value, str):
        return reprlib.repr(value)
    cut = value[:_SHOWN_CHARACTERS]
    text = cut if cut and cut.isprintable() else ascii(cut)
    return text if len(cut) == len(value) else f"{text}... ({len(value)} characters)"


def faults(value: object, shape: Any, *keys: str) -> Iterator[str]:
    """`KEY > KEY is FOUND, needed WANTED`, for each part of `value` that hasn't its shape."""
    if isinstance(shape, Maybe):
        if value is not None:
            yield from faults(value, shape.value, *keys)
        return
    wanted = shape if isinstance(shape, type) else list if isinstance(shape, list) else dict
    if type(value) is not wanted:  # JSON's true is an int to isinstance()
        yield f"{' > '.join(keys) or 'it'} is {reprlib.repr(value)}, needed {_NAMES[wanted]}"
        return
    for key, part, inner in _parts(value, shape):
        if part is _ABSENT:
            yield f"{' > '.join((*keys, key))} is missing"
        else:
            yield from faults(part, inner, *keys, key)


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


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for a decoder's `object_pairs_hook`; JsonError for a key given twice."""
    members = dict(pairs)
    if len(members) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise JsonError(f"has the key {shown(twice)} twice")
    return members


def _unique_in_utf8(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = unique_members(pairs)
    for text in (*members, *members.values()):
        if isinstance(text, str) and not text.isascii():
            _require_utf8(text)
    return members


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise JsonError(f"has a lone surrogate in {shown(text)}") from None


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise JsonError(f"holds {shown(literal)}, which is beyond a double")
    return value


def _not_a_number(literal: str) -> NoReturn:
    raise JsonError(f"holds {literal}, which is not JSON")

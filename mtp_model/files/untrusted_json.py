"""JSON from files that nobody vouches for; knows nothing of what the JSON means."""

import json
import math
import reprlib
from collections import Counter
from typing import NoReturn, TypeGuard

from mtp_model.problems import UserError

MAX_VALUES = 4_000_000
"""In one text. Python takes up to 300 bytes for a value that is three bytes of text; a header has
8 values for a tensor, and V3's 91,991 tensors would be 736,000 in a single file."""

_SHOWN_CHARACTERS = 200


class JsonError(UserError):
    """Why some bytes aren't JSON that we accept; the text reads on after the name of the file."""


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
            object_pairs_hook=_unique,
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


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise JsonError(f"has the key {shown(twice)} twice")
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

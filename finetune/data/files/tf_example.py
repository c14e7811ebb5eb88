"""TensorFlow's `tf.train.Example`, as ArrayRecord files of Grain and TFDS hold it, without it.

Of Protocol Buffers' wire format it reads what such a message is made of: a map from names to lists
of bytes, of floats or of integers. Everything else is no such message.
"""

import struct
from collections.abc import Container, Iterator
from typing import Any

_VARINT, _LENGTH, _FIXED32 = 0, 2, 5  # how a field is written
_MOST_VARINT_BYTES = 10


def parse_example(data: bytes, known: Container[str]) -> dict[str, Any] | None:
    """Features by name, None for bytes that are no Example.

    Bytes are text: of one the text, of several a list; integers and floats are a list. Of features
    that are not `known` only the name is kept.
    """
    try:
        entries = [entry for features in _parts(data, 1) for entry in _parts(features, 1)]
        return dict(_named(dict(_fields(entry)), known) for entry in entries) or None
    except ValueError:
        return None


def _named(entry: dict[int, int | bytes], known: Container[str]) -> tuple[str, Any]:
    name, feature = entry.get(1), entry.get(2, b"")
    if not isinstance(name, bytes) or not isinstance(feature, bytes):
        raise ValueError("a name and a feature")
    text = name.decode()
    return text, _feature(feature) if text in known else ""


def _feature(data: bytes) -> Any:
    """The value of a feature: texts, floats or integers."""
    values: Any = None
    for kind, content in _fields(data):
        if not isinstance(content, bytes):
            raise ValueError("a list")
        if kind == 1:
            texts = [each.decode() for each in _parts(content, 1)]
            values = texts[0] if len(texts) == 1 else texts
        elif kind == 2:
            packed = b"".join(_packed(content))
            if len(packed) % 4:
                raise ValueError("floats")
            values = [value for (value,) in struct.iter_unpack("<f", packed)]
        elif kind == 3:
            values = [value for part in _packed(content) for value in _integers(part)]
        else:
            raise ValueError("a kind of list")
    return values


def _packed(data: bytes) -> Iterator[bytes]:
    """Numbers of a list as they are written, one after the other or each by itself."""
    for number, value in _fields(data):
        if number != 1:
            raise ValueError("a list's values")
        yield value if isinstance(value, bytes) else _varint_bytes(value)


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integers(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value - (1 << 64) if value >> 63 else value


def _parts(data: bytes, wanted: int) -> Iterator[bytes]:
    """The messages or strings of a field that nothing stands beside."""
    for number, value in _fields(data):
        if number != wanted or not isinstance(value, bytes):
            raise ValueError(f"field {wanted} alone")
        yield value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: an integer, or bytes (four of them of a float)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, written = tag >> 3, tag & 7
        if written == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if written == _LENGTH:
            size, at = _varint(data, at)
        elif written == _FIXED32:
            size = 4
        else:
            raise ValueError("a way to write a field")
        if size > len(data) - at:
            raise ValueError("a field that is cut")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer in groups of seven bits, the lowest first, and where it ends."""
    value = 0
    for place in range(_MOST_VARINT_BYTES):
        if at + place >= len(data):
            raise ValueError("an integer that is cut")
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value & ((1 << 64) - 1), at + place + 1
    raise ValueError("an integer too long")

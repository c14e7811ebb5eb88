"""A long text's tokens, stretch by stretch, the same as if it were tokenised whole.

A tokenizer cuts text into words before it makes tokens of them, reading from left to right, and a
word's end depends on little that follows it. So a text may be cut between two words if enough
words follow in sight, and if what follows is tokenised alike from there on. The latter is checked
at every cut: the text from the cut on, with some text before it, is tokenised on its own and must
give the same tokens. A text that is one word to its tokenizer cannot be cut: it is tokenised
whole, up to MOST_BYTES.
"""

from collections.abc import Callable
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

from mtp_model.problems import UserError

MOST_BYTES = 16 << 20
_WINDOW_BYTES = 64 * 1024
_SEEN_CHARS = 4096  # after a cut
_SEEN_WORDS = 16  # after a cut: a run of spaces may be two words or three, and of any length
_CONTEXT_BYTES = 256
_TRIES = 8

Read = Callable[[int, int], bytes]
"""Bytes of the text from the first place to the second."""


class UncuttableError(UserError):
    """A text that is too long to be tokenised whole, without a place to cut it."""


class Stretch(NamedTuple):
    """Tokens from a place on, and the byte where the next stretch begins (None: the text ends)."""

    ids: list[int]
    following: int | None


def read_stretch(tokenizer: Tokenizer, read: Read, nbytes: int, begin: int) -> Stretch:
    """The stretch of a text of `nbytes` that begins at byte `begin`, which ended the one before.

    The tokenizer must not trim offsets. Raises UncuttableError.
    """
    before = _ended(read(max(0, begin - _CONTEXT_BYTES), begin))
    size = _WINDOW_BYTES
    while True:
        text = _begun(read(begin, min(begin + size, nbytes)))
        is_rest = begin + size >= nbytes
        found = _words_from(tokenizer, before, text)
        if is_rest and found is not None:
            return Stretch(found.ids, None)
        cut = found and _cut(tokenizer, before, text, found)
        if found and cut:
            token, char = cut
            return Stretch(found.ids[:token], begin + len(text[:char].encode()))
        if size >= MOST_BYTES or is_rest:
            raise UncuttableError(
                f"cannot be cut between two words from byte {begin:,} on: its tokenizer sees one "
                f"word in {size >> 20} MiB. Split the text into records of at most that"
            )
        size *= 2


class _Words(NamedTuple):
    """Tokens of a text, and where each of them begins; starts: tokens that begin a word."""

    ids: list[int]
    chars: list[int]
    starts: list[int]


def _words_from(tokenizer: Tokenizer, before: str, text: str) -> _Words | None:
    """Tokens of `text` where it follows `before`; None if no word begins with it."""
    # The first word of what is tokenised may be treated as none other is, so some words are put
    # before it; where their beginning is ill-chosen, another is tried.
    for skipped in range(min(len(before), 64) or 1):
        context = before[skipped:]
        found = _words(tokenizer.encode(context + text, add_special_tokens=False), len(context))
        if found is not None:
            return found
    return None


def _words(encoding: Encoding, begin: int) -> _Words | None:
    """Words from a character on, None where a word or a token goes across it."""
    offsets, words, ids = encoding.offsets, encoding.word_ids, encoding.ids
    first = next((n for n, (start, _) in enumerate(offsets) if start >= begin), len(ids))
    if begin and (first == 0 or offsets[first - 1][1] > begin or first == len(ids)):
        return None
    if begin and words[first] == words[first - 1]:
        return None
    starts = [
        number - first
        for number in range(first + 1, len(ids))
        if words[number] != words[number - 1] and offsets[number][0] >= offsets[number - 1][1]
    ]
    return _Words(ids[first:], [start - begin for start, _ in offsets[first:]], starts)


def _cut(tokenizer: Tokenizer, before: str, text: str, found: _Words) -> tuple[int, int] | None:
    """The last good place to cut, as a token and a character; None where there is none."""
    seen = found.starts[:-_SEEN_WORDS]
    places = [token for token in seen if found.chars[token] <= len(text) - _SEEN_CHARS]
    for token in places[: -_TRIES - 1 : -1]:
        char = found.chars[token]
        context = (before + text[:char])[-_CONTEXT_BYTES // 4 :]
        alone = _words_from(tokenizer, context, text[char:])
        if alone is not None and alone.ids == found.ids[token:]:
            return token, char
    return None


def _begun(data: bytes) -> str:
    """UTF-8 that may end within a character, without that."""
    return data.decode("utf-8", errors="ignore")


def _ended(data: bytes) -> str:
    """UTF-8 that may begin within a character, without that; as many characters as a cut sees."""
    return data.decode("utf-8", errors="ignore")[-_CONTEXT_BYTES // 4 :]

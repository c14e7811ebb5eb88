"""The order in which documents are read: shuffled in each epoch, out of several sources by weight.

A source is a part of the documents that gives its share of the tokens, whatever its size: a small
one begins its epochs anew more often. Which source is next follows from the tokens that each gave
so far, so that a few numbers are all that going on needs.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class DataSource(NamedTuple):
    """A part of the documents, by their numbers, and its share of the tokens beside the others'."""

    documents: Sequence[int] | np.ndarray
    weight: float
    name: str = ""  # where it is from

    def without_tokens(self) -> str:
        """What is wrong where no document of it has a token."""
        return f"no document {self.name and f'of {self.name} '}has a token"


class TokenPlace(NamedTuple):
    """A token: the epoch, the document's number in that epoch's order, the token in it.

    Of a long document, `stretch` is where its stretch begins and `token` counts from there.
    source: whose epoch and order they are.
    """

    epoch: int
    document: int
    token: int
    stretch: int = 0
    source: int = 0


class NextPlace(NamedTuple):
    """How far a source is: the document that is begun next, and how many tokens it gave."""

    epoch: int = 0
    document: int = 0
    tokens: int = 0

    def given(self, tokens: int) -> "NextPlace":
        """After so many tokens more."""
        return self._replace(tokens=self.tokens + tokens)


class Order:
    """The documents of each source, shuffled anew in each of its epochs."""

    def __init__(self, sources: Sequence[DataSource], seed: int):
        self.sources, self.seed = sources, seed
        # Of each source the epoch that is read, and the one that is begun.
        self._epoch = functools.lru_cache(maxsize=2 * len(sources))(self._shuffled)

    def document(self, place: TokenPlace) -> int:
        """The number of the document that a place is in."""
        in_source = self._epoch(place.source, place.epoch)[place.document]
        return int(self.sources[place.source].documents[in_source])

    def take(self, source: int, following: NextPlace) -> tuple[TokenPlace, NextPlace]:
        """Where the next document of a source begins, and what follows it."""
        epoch, document, _ = following
        is_last = document + 1 == len(self.sources[source].documents)
        after = (epoch + 1, 0) if is_last else (epoch, document + 1)
        place = TokenPlace(epoch, document, 0, source=source)
        return place, following._replace(epoch=after[0], document=after[1])

    def _shuffled(self, source: int, epoch: int) -> np.ndarray:
        # Of the first source as of all documents together: runs of earlier versions go on.
        key = (self.seed, epoch, source) if source else (self.seed, epoch)
        return np.random.default_rng(key).permutation(len(self.sources[source].documents))


def poorest(among: Iterable[int], tokens: Sequence[int], sources: Sequence[DataSource]) -> int:
    """The source whose tokens are fewest for its weight, the first of equals."""
    return min(among, key=lambda source: tokens[source] / sources[source].weight)

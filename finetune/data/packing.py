"""Documents packed into batches of fixed shape, and the position in them that a run resumes from.

B rows, T tokens a row.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from finetune.data.order import DataSource, NextPlace, Order, TokenPlace, poorest
from finetune.data.records import DataError
from finetune.data.tokens import Tokens

# Pieces that may wait for a later batch because they fit in no row of this one. More of them
# fill rows better; each is encoded again when a run resumes.
LOOKAHEAD = 32


class PreNorm(NamedTuple):
    """States of the main model before its final norm."""

    x_BTD: Any


class PostNorm(NamedTuple):
    """States of the main model after its final norm."""

    x_BTD: Any


class Batch(NamedTuple):
    """Packed rows, int32 [B, T]. Segment ids count from 1 in each row; 0 is padding.

    Positions begin at 0 in every segment. loss_mask belongs to the token itself. states: what the
    main model made of the tokens, where that was captured and need not be computed.
    """

    tokens_BT: Any
    segment_ids_BT: Any
    positions_BT: Any
    loss_mask_BT: Any
    states: PreNorm | PostNorm | None = None


def first_rows(
    batches: Iterable[tuple[Batch, "Position"]], num_rows: int
) -> Iterator[tuple[Batch, "Position"]]:
    """Batches until there are so many rows; what the last one has beyond them is padding."""
    for batch, position in batches:
        rows = len(batch.tokens_BT)
        yield jax.tree.map(functools.partial(_padded_from, num_rows), batch), position
        num_rows -= rows
        if num_rows <= 0:
            return


def _padded_from(row: int, each_BT: np.ndarray) -> np.ndarray:
    """The array with zeros from a row on."""
    if row >= len(each_BT):
        return each_BT
    padded_BT = each_BT.copy()
    padded_BT[row:] = 0
    return padded_BT


class Documents(Protocol):
    """Documents of tokens by number.

    `stretch` is asked for what follows in a document whose tokens say that something does.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, document: int, /) -> Tokens: ...

    def stretch(self, document: int, begin: int, /) -> Tokens: ...


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where packing goes on, in a few numbers."""

    next: tuple[NextPlace, ...] = ()  # what is begun next, by source
    reading: tuple[TokenPlace, ...] = ()  # documents that are begun, and their next token
    waiting: tuple[TokenPlace, ...] = ()  # pieces that have no row yet

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Position":
        reading, waiting = (
            tuple(TokenPlace(*place) for place in values[name]) for name in ("reading", "waiting")
        )
        following = values["next"]
        if following and isinstance(following[0], int):  # of earlier versions: one source
            following = [following]
        following = tuple(NextPlace(*place) for place in following)
        return cls(next=following, reading=reading, waiting=waiting)


class RowPart(NamedTuple):
    """At most a row of one document, from `place` on."""

    place: TokenPlace
    tokens: Tokens


class Packer:
    """Iterates over (batch, position after it); the same seed and position give the same batches.

    As many documents as there are rows are read in turn, so that a batch is no single document. Of
    a long one a stretch is held at a time. Where there are fewer, a batch has several pieces of
    each, which follow each other, and a document is begun anew once it was read to its end.
    A document that fits in a row is never cut. It goes to the first row of the batch with room,
    else waits for a later batch. A longer document is cut into full rows and a rest; each part
    is a segment of its own. Documents are shuffled anew in each epoch.
    sources: parts of the documents, of which each gives its share of the tokens, piece by piece, at
    epochs of its own; () is one of all. Each has its share of the documents that are read in turn,
    one at least.
    epochs: stop after this many of every source; None goes on for ever.
    documents_of_rows: for each row of the batch that was given last, the numbers of the documents
    of its segments 1, 2, ...
    """

    def __init__(
        self,
        documents: Documents,
        *,
        rows: int,
        row_tokens: int,
        seed: int,
        epochs: int | None = None,
        sources: Sequence[DataSource] = (),
        position: Position | None = None,
    ):
        position = position or Position()
        self.documents, self.epochs = documents, epochs
        self.rows, self.row_tokens = rows, row_tokens
        self.sources = tuple(sources) or (DataSource(range(len(documents)), 1.0),)
        whole = sum(source.weight for source in self.sources)
        self._most_read = [max(1, round(rows * each.weight / whole)) for each in self.sources]
        self._order = Order(self.sources, seed)
        self.next = list(position.next) or [NextPlace()] * len(self.sources)
        self.documents_of_rows: list[list[int]] = []
        self.reading = [(place, self._tokens(place)) for place in position.reading]
        self.waiting = [self._cut(place, self._tokens(place))[0] for place in position.waiting]

    def __iter__(self) -> "Packer":
        return self

    def __next__(self) -> tuple[Batch, Position]:
        rows = _Rows(self.rows, self.row_tokens)
        # The longest first, so that short ones fill the gaps; but the oldest before all, so that
        # none waits for more than LOOKAHEAD batches.
        by_length = sorted(self.waiting[1:], key=lambda piece: -piece.tokens.ids.size)
        taken = {piece.place for piece in (*self.waiting[:1], *by_length) if rows.take(piece)}
        self.waiting = [piece for piece in self.waiting if piece.place not in taken]
        while rows.have_room() and len(self.waiting) < LOOKAHEAD and (piece := self._read()):
            if not rows.take(piece):
                self.waiting.append(piece)
        if rows.are_empty():
            raise StopIteration
        self.documents_of_rows = [
            [self._order.document(place) for place in places] for places in rows.places
        ]
        return rows.batch(), self.position

    @property
    def position(self) -> Position:
        return Position(
            next=tuple(self.next),
            reading=tuple(place for place, _ in self.reading),
            waiting=tuple(piece.place for piece in self.waiting),
        )

    def _read(self) -> RowPart | None:
        """The next piece of the documents that are read in turn, or None after the last epoch."""
        left = set(range(len(self.sources)))
        while left:
            source = poorest(sorted(left), [each.tokens for each in self.next], self.sources)
            while len(read := self._read_of(source)) < self._most_read[source]:
                if (begun := self._begin(source, read)) is None:
                    break
                self.reading.append(begun)
            if read:
                break
            left.remove(source)
        else:
            return None
        part, rest = self._cut(*self.reading.pop(read[0]))
        if rest is not None:
            self.reading.append(rest)
        self.next[source] = self.next[source].given(part.tokens.ids.size)
        return part

    def _read_of(self, source: int) -> list[int]:
        """Which of the documents that are read in turn are of a source."""
        return [number for number, (place, _) in enumerate(self.reading) if place.source == source]

    def _begin(self, source: int, read: list[int]) -> tuple[TokenPlace, Tokens] | None:
        """The next document of a source, beside those that are read in turn; or None.

        There is none after the last epoch, and none while the next one is still read where the
        source has too few for all that may be read in turn: it would give the same pieces. Where it
        has enough, only the end of an epoch may meet the beginning of the next.
        Those without tokens are passed.
        """
        documents = self.sources[source].documents
        is_short = len(documents) < self._most_read[source]
        read_now = {self._order.document(self.reading[number][0]) for number in read if is_short}
        # The only one with tokens may come first in an epoch and last in the next.
        for _ in range(2 * len(documents)):
            if self.epochs is not None and self.next[source].epoch >= self.epochs:
                return None
            place, following = self._order.take(source, self.next[source])
            if self._order.document(place) in read_now:
                return None
            self.next[source] = following
            tokens = self._tokens(place)
            if tokens.ids.size:
                return place, tokens
        raise DataError([self.sources[source].without_tokens()])

    def _tokens(self, place: TokenPlace) -> Tokens:
        document = self._order.document(place)
        if place.stretch:
            return self.documents.stretch(document, place.stretch)
        return self.documents[document]

    def _cut(
        self, place: TokenPlace, tokens: Tokens
    ) -> tuple[RowPart, tuple[TokenPlace, Tokens] | None]:
        """At most a row from `place` on, and what is left after it: place, and tokens there.

        `tokens` are those of the document, or of the stretch of it that `place` is in.
        """
        ids, masks, at, room = [], [], place, self.row_tokens
        while True:
            part = slice(at.token, at.token + room)
            ids.append(tokens.ids[part])
            masks.append(tokens.loss_mask[part])
            room -= ids[-1].size
            at = at._replace(token=at.token + ids[-1].size)
            whole = Tokens(np.concatenate(ids), np.concatenate(masks))
            if read := tokens.states:  # such documents have one stretch
                whole = whole._replace(states=functools.partial(_read_from, read, place.token))
            done = RowPart(place, whole)
            if at.token < tokens.ids.size:
                return done, (at, tokens)
            if tokens.following is None:
                return done, None
            at = at._replace(token=0, stretch=tokens.following)
            tokens = self._tokens(at)


def _read_from(read: Callable[[int, int], Any], first: int, begin: int, end: int) -> Any:
    """States of tokens that are counted from `first` of their document."""
    return read(first + begin, first + end)


class _Rows:
    """The rows of one batch while they are filled."""

    def __init__(self, rows: int, row_tokens: int):
        tokens, segments, positions, mask = np.zeros((4, rows, row_tokens), np.int32)
        self.arrays = Batch(tokens, segments, positions, mask)
        self.used = [0] * rows
        self.places: list[list[TokenPlace]] = [[] for _ in range(rows)]

    def have_room(self) -> bool:
        return min(self.used) < self.arrays.tokens_BT.shape[1]

    def are_empty(self) -> bool:
        return not any(self.used)

    def take(self, piece: RowPart) -> bool:
        """Put a piece in the first row with room for all of it; False where there is none."""
        size, width = piece.tokens.ids.size, self.arrays.tokens_BT.shape[1]
        row = next((r for r, used in enumerate(self.used) if used + size <= width), None)
        if row is None:
            return False
        self.places[row].append(piece.place)
        part = (row, slice(self.used[row], self.used[row] + size))
        self.arrays.tokens_BT[part] = piece.tokens.ids
        self.arrays.segment_ids_BT[part] = len(self.places[row])
        self.arrays.positions_BT[part] = np.arange(size)
        self.arrays.loss_mask_BT[part] = piece.tokens.loss_mask
        if read := piece.tokens.states:
            self._take_states(part, read(0, size))
        self.used[row] += size
        return True

    def _take_states(self, part: tuple[int, slice], found: PreNorm | PostNorm) -> None:
        if self.arrays.states is None:
            shape = (*self.arrays.tokens_BT.shape, found.x_BTD.shape[-1])
            states = type(found)(np.zeros(shape, found.x_BTD.dtype))
            self.arrays = self.arrays._replace(states=states)
        assert self.arrays.states is not None
        self.arrays.states.x_BTD[part] = found.x_BTD

    def batch(self) -> Batch:
        return self.arrays

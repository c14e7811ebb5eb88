"""Documents packed into batches of fixed shape, and the position in them that a run resumes from.

Knows documents as an indexed sequence of tokens, and nothing of files. B rows, T tokens a row.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from finetune.corpus import DataError
from finetune.tokens import Tokens

# Pieces that may wait for a later batch because they fit in no row of this one. More of them
# fill rows better; each is encoded again when a run resumes.
LOOKAHEAD = 32


class Batch(NamedTuple):
    """Packed rows, all int32 [B, T]. Segment ids count from 1 in each row; 0 is padding.

    Positions begin at 0 in every segment. loss_mask belongs to the token itself.
    """

    tokens_BT: Any
    segment_ids_BT: Any
    positions_BT: Any
    loss_mask_BT: Any


class Place(NamedTuple):
    """A token: the epoch, the document's number in that epoch's order, the token in it."""

    epoch: int
    document: int
    token: int


BEGINNING = Place(0, 0, 0)


class Documents(Protocol):
    """Documents of tokens by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, document: int, /) -> Tokens: ...


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where packing goes on: the next unread token, and the pieces that wait for a row."""

    next: Place = BEGINNING
    waiting: tuple[Place, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"next": list(self.next), "waiting": [list(place) for place in self.waiting]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Position":
        waiting = tuple(Place(*place) for place in values["waiting"])
        return cls(next=Place(*values["next"]), waiting=waiting)


class Piece(NamedTuple):
    """At most a row of one document, from `place` on."""

    place: Place
    tokens: Tokens


class Packer:
    """Iterates over (batch, position after it); the same seed and position give the same batches.

    A document that fits in a row is never cut. It goes to the first row of the batch with room,
    else waits for a later batch. A longer document is cut into full rows and a rest; each part
    is a segment of its own. Documents are shuffled anew in each epoch.
    epochs: stop after this many; None goes on for ever.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        rows: int,
        row_tokens: int,
        seed: int,
        epochs: int | None = None,
        position: Position | None = None,
    ):
        position = position or Position()
        self.documents, self.seed, self.epochs = documents, seed, epochs
        self.rows, self.row_tokens = rows, row_tokens
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)
        self._open: tuple[tuple[int, int], Tokens] | None = None
        self.next = position.next
        self.waiting = [self._piece(place) for place in position.waiting]

    def __iter__(self) -> "Packer":
        return self

    def __next__(self) -> tuple[Batch, Position]:
        rows = _Rows(self.rows, self.row_tokens)
        # The longest first, so that short ones fill the gaps; but the oldest before all, so that
        # none waits for more than LOOKAHEAD batches.
        by_length = sorted(self.waiting[1:], key=lambda piece: -piece.tokens.ids.size)
        taken = {piece.place for piece in (*self.waiting[:1], *by_length) if rows.take(piece)}
        self.waiting = [piece for piece in self.waiting if piece.place not in taken]
        while rows.have_room() and len(self.waiting) < LOOKAHEAD:
            piece = self._read()
            if piece is None:
                break
            if not rows.take(piece):
                self.waiting.append(piece)
        if rows.are_empty():
            raise StopIteration
        return rows.batch(), self.position

    @property
    def position(self) -> Position:
        return Position(next=self.next, waiting=tuple(piece.place for piece in self.waiting))

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.documents))

    def _document(self, place: Place) -> Tokens:
        """Tokens of a document; the last one is kept, a long one is read row by row."""
        key = (place.epoch, place.document)
        if self._open is None or self._open[0] != key:
            number = int(self._order(place.epoch)[place.document])
            self._open = (key, self.documents[number])
        return self._open[1]

    def _piece(self, place: Place) -> Piece:
        tokens = self._document(place)
        part = slice(place.token, place.token + self.row_tokens)
        return Piece(place, Tokens(tokens.ids[part], tokens.loss_mask[part]))

    def _read(self) -> Piece | None:
        """The next piece, or None after the last epoch. Documents without tokens are passed."""
        for _ in range(len(self.documents) + 1):
            if self.epochs is not None and self.next.epoch >= self.epochs:
                return None
            piece = self._piece(self.next)
            self.next = self._after(piece)
            if piece.tokens.ids.size:
                return piece
        raise DataError(["no document has a token"])

    def _after(self, piece: Piece) -> Place:
        place, end = piece.place, piece.place.token + piece.tokens.ids.size
        if end < self._document(place).ids.size:
            return place._replace(token=end)
        if place.document + 1 < len(self.documents):
            return Place(place.epoch, place.document + 1, 0)
        return Place(place.epoch + 1, 0, 0)


class _Rows:
    """The rows of one batch while they are filled."""

    def __init__(self, rows: int, row_tokens: int):
        self.arrays = Batch(*(np.zeros((rows, row_tokens), np.int32) for _ in Batch._fields))
        self.used = [0] * rows
        self.segments = [0] * rows

    def have_room(self) -> bool:
        return min(self.used) < self.arrays.tokens_BT.shape[1]

    def are_empty(self) -> bool:
        return not any(self.used)

    def take(self, piece: Piece) -> bool:
        """Put a piece in the first row with room for all of it; False where there is none."""
        size, width = piece.tokens.ids.size, self.arrays.tokens_BT.shape[1]
        row = next((r for r, used in enumerate(self.used) if used + size <= width), None)
        if row is None:
            return False
        self.segments[row] += 1
        part = (row, slice(self.used[row], self.used[row] + size))
        self.arrays.tokens_BT[part] = piece.tokens.ids
        self.arrays.segment_ids_BT[part] = self.segments[row]
        self.arrays.positions_BT[part] = np.arange(size)
        self.arrays.loss_mask_BT[part] = piece.tokens.loss_mask
        self.used[row] += size
        return True

    def batch(self) -> Batch:
        return self.arrays

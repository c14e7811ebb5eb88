"""Our packing, shuffling and mixing beside Grain's, on the same documents.

    pip install grain
    python -m tools.bench_packing

Every packer gets the same arrays of tokens from memory, in an order of its own; documents longer
than a row are cut for Grain, which refuses them. Filled is the share of rows that is no padding.
Going on is what the next batch after a saved position takes: documents that are read again.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from finetune.data.order import DataSource
from finetune.data.packing import Packer, Position
from finetune.data.tokens import Tokens

ROWS, ROW_TOKENS = 8, 1024
BINS = (8, 64, 256)  # rows that Grain fills at a time: those of a batch, and more
# Tokens of a document as chats, web pages and books have them: mean and deviation of the logarithm.
LENGTHS = {"chats": (5.3, 0.9), "pages": (6.4, 1.1), "books": (9.5, 1.0)}
MOST_PIECES = 1 << 10  # of one document

Begin = Callable[["Counted", Any], tuple[Iterator[np.ndarray], Callable[[], Any]]]
"""Of documents and a state, or None: segment ids of each batch, and what gives the state."""


class Measured(NamedTuple):
    """One packer over some batches."""

    filled: float
    tokens_per_s: float
    read_again: int  # documents, to go on
    state_bytes: int


class Counted:
    """Documents, and how many of them were read."""

    def __init__(self, documents: list[Tokens]):
        self.documents, self.read = documents, 0

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, document: int) -> Tokens:
        self.read += 1
        return self.documents[document]

    def stretch(self, document: int, begin: int) -> Tokens:
        raise AssertionError(f"document {document} has nothing behind {begin}")


def documents(name: str, count: int) -> list[Tokens]:
    """Random lengths, the same each time; halves are documents of about half a row."""
    rng = np.random.default_rng(0)
    if name == "halves":
        sizes = rng.integers(430, 620, count)
    else:
        sizes = np.clip(rng.lognormal(*LENGTHS[name], count), 8, MOST_PIECES * ROW_TOKENS)
    return [Tokens(np.full(n, n % 997, np.int32), np.ones(n, np.int32)) for n in sizes.astype(int)]


def measured(texts: list[Tokens], batches: int, begin: Begin) -> Measured:
    counted = Counted(texts)
    packer, state_of = begin(counted, None)
    next(packer)  # what is made at the first one is not counted
    filled, began = 0, time.perf_counter()
    for segments in islice(packer, batches):
        filled += int((segments != 0).sum())
    took = time.perf_counter() - began
    state = json.dumps(state_of())
    following = next(packer)
    counted.read = 0
    again, _ = begin(counted, json.loads(state))
    assert np.array_equal(next(again), following), "it goes on with another batch"
    share = filled / (batches * ROWS * ROW_TOKENS)
    return Measured(share, filled / took, counted.read, len(state))


def ours(texts: Counted, state: Any) -> tuple[Iterator[np.ndarray], Callable[[], Any]]:
    position = Position.from_json(state) if state else None
    packer = Packer(texts, rows=ROWS, row_tokens=ROW_TOKENS, seed=0, position=position)
    return (batch.segment_ids_BT for batch, _ in packer), lambda: packer.position.to_json()


def grains(kind: str, bins: int) -> Begin:
    """Grain's packing of a kind: shuffled, repeated, cut, packed into so many rows at a time."""
    grain, more = import_module("grain"), import_module("grain.experimental")

    class Cut(more.FlatMapTransform):
        max_fan_out = MOST_PIECES

        def flat_map(self, element: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
            return [
                {name: each[at : at + ROW_TOKENS] for name, each in element.items()}
                for at in range(0, len(element["tokens"]), ROW_TOKENS)
            ]

    def begin(texts: Counted, state: Any) -> tuple[Iterator[np.ndarray], Callable[[], Any]]:
        data = grain.MapDataset.source(texts).shuffle(seed=0).repeat()
        data = data.map(lambda each: {"tokens": each.ids, "mask": each.loss_mask})
        alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        pieces = more.FlatMapIterDataset(data.to_iter_dataset(alone), Cut())
        packed = getattr(more, f"{kind}PackIterDataset")(
            pieces,
            length_struct={"tokens": ROW_TOKENS, "mask": ROW_TOKENS},
            num_packing_bins=bins,
            shuffle_bins=False,
        )
        rows = iter(packed.batch(ROWS))
        if state:
            rows.set_state(state)
        return (batch["tokens_segment_ids"] for batch in rows), rows.get_state

    return begin


def show_packing(count: int, batches: int) -> None:
    packers: list[tuple[str, Begin]] = [("ours", ours)]
    packers += [
        (f"Grain {kind}, {bins} rows", grains(kind, bins))
        for kind in ("BestFit", "FirstFit")
        for bins in BINS
    ]
    print("| documents | packer | filled, % | million tokens/s | read again | state, bytes |")
    print("|---|---|---|---|---|---|")
    for name in (*LENGTHS, "halves"):
        texts = documents(name, count)
        for packer, begin in packers:
            found = measured(texts, batches, begin)
            print(
                f"| {name} | {packer} | {100 * found.filled:.2f} | {found.tokens_per_s / 1e6:.1f} "
                f"| {found.read_again:,} | {found.state_bytes:,} |",
                flush=True,
            )


def show_mixing(count: int, batches: int) -> None:
    """Share of the tokens that books give of a mixture with chats, to both of which 1 is given."""
    grain = import_module("grain")
    texts = [documents("chats", count), documents("books", count // 10)]
    marked = [
        [Tokens(np.full(each.ids.size, mark, np.int32), each.loss_mask) for each in of]
        for mark, of in enumerate(texts, start=1)
    ]
    sources = [
        DataSource(range(count), 1.0),
        DataSource(range(count, count + len(texts[1])), 1.0),
    ]
    packer = Packer(
        Counted([*marked[0], *marked[1]]),
        rows=ROWS,
        row_tokens=ROW_TOKENS,
        seed=0,
        sources=sources,
    )
    found = np.concatenate([batch.tokens_BT for batch, _ in islice(packer, batches)])
    print(f"ours: books give {100 * share_of_2(found):.1f} % of the tokens")
    parts = [grain.MapDataset.source(Counted(each)).shuffle(seed=0).repeat() for each in marked]
    mixed = grain.MapDataset.mix(parts, weights=[1, 1])
    read = np.concatenate([mixed[number].ids for number in range(count // 2)])
    print(f"Grain: books give {100 * share_of_2(read):.1f} % of the tokens")


def share_of_2(tokens: np.ndarray) -> float:
    return float((tokens == 2).sum() / (tokens > 0).sum())


class One:
    """Documents of one token each: what is measured is the order alone."""

    token = Tokens(np.ones(1, np.int32), np.ones(1, np.int32))

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, document: int) -> Tokens:
        return self.token

    def stretch(self, document: int, begin: int) -> Tokens:
        raise AssertionError(f"document {document} has nothing behind {begin}")


def show_order(count: int, taken: int) -> None:
    """Documents a second in shuffled order, with nothing to read."""
    grain = import_module("grain")
    packer = Packer(One(count), rows=1, row_tokens=1, seed=0)
    shuffled = grain.MapDataset.source(One(count)).shuffle(seed=0).repeat()
    alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    for name, order in (("ours", packer), ("Grain", iter(shuffled.to_iter_dataset(alone)))):
        began = time.perf_counter()
        next(order)
        first, began = time.perf_counter() - began, time.perf_counter()
        for _ in islice(order, taken):
            pass
        rate = taken / (time.perf_counter() - began)
        print(f"{name}: {rate:,.0f} of {count:,} documents a second, the first after {first:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Packing: ours and Grain's.")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--order-of", type=int, default=10_000_000, help="documents to shuffle")
    arguments = parser.parse_args()
    show_packing(arguments.documents, arguments.batches)
    show_mixing(arguments.documents // 10, arguments.batches)
    show_order(arguments.order_of, 20_000)


if __name__ == "__main__":
    main()

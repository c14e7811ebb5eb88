"""Packing: no token lost or doubled, and going on from any position."""

import hashlib
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.packing import Batch, Packer, Position, first_rows
from finetune.data.records import DataError
from finetune.data.tokens import Tokens


def numbered_documents(lengths: list[int]) -> list[Tokens]:
    """Documents whose tokens are all different; the mask is the parity of the token."""
    ends = list(itertools.accumulate(lengths))
    spans = zip([0, *ends[:-1]], ends, strict=True)
    ids = (np.arange(begin, end, dtype=np.int32) for begin, end in spans)
    return [Tokens(each, each % 2) for each in ids]


def pack(documents, position=None, **changes):
    options = {"rows": 3, "row_tokens": 8, "seed": 1, "epochs": 1} | changes
    return Packer(documents, position=position, **options)


def segments_of(batch):
    """(tokens, positions, mask) of each segment, row by row, checking their form."""
    for row in range(batch.tokens_BT.shape[0]):
        ids = batch.segment_ids_BT[row]
        used = int((ids != 0).sum())
        assert (ids[used:] == 0).all(), "padding only at the end"
        assert (np.diff(ids[:used]) >= 0).all(), "segments contiguous"
        assert set(np.diff(np.unique(ids[:used]))) <= {1}, "numbered without gaps"
        assert used == 0 or ids[0] == 1
        for segment in np.unique(ids[:used]):
            chosen = ids == segment
            yield (
                batch.tokens_BT[row][chosen],
                batch.positions_BT[row][chosen],
                batch.loss_mask_BT[row][chosen],
            )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=60).filter(any),
    rows=st.integers(1, 4),
    row_tokens=st.integers(2, 12),
    seed=st.integers(0, 5),
)
def test_packing_keeps_every_token_once(lengths, rows, row_tokens, seed):
    documents = numbered_documents(lengths)
    packer = pack(documents, rows=rows, row_tokens=row_tokens, seed=seed)
    seen, cut = [], set()
    for batch, _ in packer:
        for tokens, positions, mask in segments_of(batch):
            assert (np.diff(tokens) == 1).all(), "a segment is a stretch of one document"
            assert positions.tolist() == list(range(len(tokens)))
            assert mask.tolist() == (tokens % 2).tolist(), "the mask stays with its token"
            seen += tokens.tolist()
            cut.add(len(tokens))
    assert sorted(seen) == list(range(sum(lengths)))
    whole = {length for length in lengths if 0 < length <= row_tokens}
    rests = {length % row_tokens for length in lengths if length > row_tokens}
    assert cut <= whole | rests | {row_tokens}, "what fits in a row is not cut"


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=30).filter(any),
    stop=st.integers(0, 8),
    epochs=st.sampled_from([1, 3, None]),
)
def test_packing_goes_on_from_any_position(lengths, stop, epochs):
    documents = numbered_documents(lengths)
    whole = list(itertools.islice(pack(documents, epochs=epochs), 20))
    if stop >= len(whole):
        return
    saved = json.loads(json.dumps(whole[stop][1].to_json()))
    again = pack(documents, epochs=epochs, position=Position.from_json(saved))
    rest = list(itertools.islice(again, len(whole) - stop - 1))
    assert len(rest) == len(whole) - stop - 1
    for (batch, position), (expected, where) in zip(rest, whole[stop + 1 :], strict=True):
        assert position == where
        assert all(np.array_equal(a, b) for a, b in zip(batch, expected, strict=True))


def tokens_of(packer, count):
    batches = [batch.tokens_BT for batch, _ in itertools.islice(packer, count)]
    return np.concatenate(batches).tolist()


def test_epochs_go_on_in_another_order():
    documents = numbered_documents([4] * 30)  # two to a row, six to a batch: five batches an epoch
    endless = [batch.tokens_BT for batch, _ in itertools.islice(pack(documents, epochs=None), 10)]
    first, second = np.concatenate(endless[:5]), np.concatenate(endless[5:])
    assert sorted(first.reshape(-1)) == sorted(second.reshape(-1)) == list(range(120))
    assert first.tolist() != second.tolist()


def test_the_seed_decides_the_order():
    documents = numbered_documents([4] * 30)
    assert tokens_of(pack(documents), 5) == tokens_of(pack(documents), 5)
    assert tokens_of(pack(documents), 5) != tokens_of(pack(documents, seed=2), 5)


def test_short_documents_fill_rows_well():
    lengths = np.random.default_rng(0).integers(5, 60, 400).tolist()
    packer = pack(numbered_documents(lengths), rows=4, row_tokens=64, epochs=None)
    batches = [batch for batch, _ in itertools.islice(packer, 20)]
    filled = np.mean([batch.segment_ids_BT != 0 for batch in batches])
    assert filled > 0.95, f"{filled:.1%} of the rows are filled"


def test_documents_without_tokens_are_an_error_not_a_hang():
    with pytest.raises(DataError, match="no document has a token"):
        next(pack(numbered_documents([0, 0]), epochs=None))


def test_a_batch_of_long_documents_is_of_several():
    documents = numbered_documents([200] * 6)
    batch, _ = next(pack(documents, rows=3, row_tokens=8))
    assert len({int(row[0]) // 200 for row in batch.tokens_BT}) == 3


@pytest.mark.parametrize("lengths", [[1000], [1000, 600], [400, 300, 1500]])
@pytest.mark.parametrize("rows", [4, 8])
def test_of_fewer_documents_than_rows_no_row_repeats_another(lengths, rows):
    """Rows are pieces that follow each other, and each token still comes once in an epoch."""
    options = {"rows": rows, "row_tokens": 8, "epochs": 3}
    seen = []
    for batch, _ in pack(numbered_documents(lengths), **options):
        found = batch.tokens_BT[batch.segment_ids_BT != 0].tolist()
        assert len(set(found)) == len(found)
        seen += found
    assert sorted(seen) == sorted(3 * [*range(sum(lengths))])


def test_positions_of_earlier_versions_with_one_document_go_on():
    """They read it as often as there are rows, in step; once those are read it is begun anew."""
    document = numbered_documents([100])
    copies = [[epoch, 0, 16] for epoch in range(3)]
    saved = {"next": [3, 0], "reading": copies, "waiting": []}
    batches = list(pack(document, epochs=5, position=Position.from_json(saved)))
    found = [batch.tokens_BT[batch.segment_ids_BT != 0].tolist() for batch, _ in batches]
    counts = np.bincount(np.concatenate(found))
    assert set(counts[:16]) == {2}
    assert set(counts[16:]) == {5}
    assert len(set(found[-2])) == len(found[-2]) == 24


def test_batches_of_enough_documents_are_those_of_earlier_versions():
    """Some of them long; a run that was begun before goes on with the same text."""
    digest = hashlib.sha256()
    packer = pack(
        numbered_documents([5, 40, 0, 200, 16, 3] * 3), rows=4, row_tokens=16, epochs=None
    )
    for batch, _ in itertools.islice(packer, 60):
        for each_BT in batch[:4]:
            digest.update(each_BT.astype("<i4").tobytes())
    assert digest.hexdigest() == (
        "cc681585833e617c32b42ad94abc0518364f9788dcaabcb024705a3bbe7f19e7"
    )


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8])
def test_first_rows_are_exactly_so_many(num_rows: int):
    """Of batches of three rows; the others are padding."""
    batches = [
        (Batch(*np.full((4, 3, 5), number + 1, np.int32)), Position()) for number in range(4)
    ]
    found = [batch for batch, _ in first_rows(batches, num_rows)]
    rows = np.concatenate([batch.segment_ids_BT for batch in found])
    assert (rows.any(axis=1)).sum() == num_rows
    wanted = np.repeat(np.arange(1, 5), 3)[:num_rows]
    assert rows[rows.any(axis=1)][:, 0].tolist() == wanted.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_the_only_document_with_tokens_is_found_in_every_epoch(seed: int):
    documents = numbered_documents([0, 0, 1])
    packer = Packer(documents, rows=1, row_tokens=1, seed=seed, epochs=9)
    assert len(list(packer)) == 9

"""Mixing: each source gives its share of the tokens, at epochs of its own, and goes on exactly."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.order import DataSource
from finetune.data.packing import Packer, Position
from finetune.data.records import DataError
from finetune.data.run_text import open_run_text
from finetune.data.tokens import Tokens
from finetune.inspecting.inspect_data import InspectDataSettings, inspect_data
from finetune.settings import EvaluationSettings, RunSettings, SettingsError
from finetune.settings_rules import check
from mtp_model.checkpoint.directory import open_checkpoint

SIZES = ([5] * 40, [90, 70, 400], [7, 3] * 30)  # of the documents of each source


def documents(sizes=SIZES) -> list[Tokens]:
    """Each filled with its own number."""
    lengths = list(itertools.chain(*sizes))
    return [Tokens(np.full(n, i, np.int32), np.ones(n, np.int32)) for i, n in enumerate(lengths)]


def sources(weights, sizes=SIZES) -> list[DataSource]:
    ends = np.cumsum([len(each) for each in sizes])
    numbers = (np.arange(end - len(each), end) for end, each in zip(ends, sizes, strict=True))
    named = zip(numbers, weights, "abc", strict=False)
    return [DataSource(documents, weight, name) for documents, weight, name in named]


def packer(weights, sizes=SIZES, position=None, **changes) -> Packer:
    of = sources(weights, sizes) if weights else ()
    options = {"rows": 3, "row_tokens": 32, "seed": 1, "sources": of} | changes
    return Packer(documents(sizes), position=position, **options)


def tokens_by_source(batches: int, weights, **changes) -> np.ndarray:
    ends = np.cumsum([len(each) for each in SIZES])
    counts = np.zeros(len(SIZES), int)
    for batch, _ in itertools.islice(packer(weights, **changes), batches):
        found = batch.tokens_BT[batch.segment_ids_BT != 0]
        counts += np.bincount(np.searchsorted(ends, found, side="right"), minlength=len(SIZES))
    return counts


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 4, 2), (0.7, 0.05, 0.25)])
@pytest.mark.parametrize("rows", [1, 6])
def test_each_source_gives_its_share_of_the_tokens(weights, rows: int):
    """However many and however long its documents are."""
    counts = tokens_by_source(900 // rows, weights, rows=rows)
    shares = counts / counts.sum()
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), atol=0.015)
    plain = tokens_by_source(900 // rows, (), rows=rows)
    assert abs(plain / plain.sum() - shares).max() > 0.03, "without weights it is as they are"


def test_the_shares_are_right_from_the_beginning_on():
    """Of sources of one long document each, rows are shared out at once."""
    sizes = ([100_000], [100_000])
    batch, _ = next(packer((3, 1), sizes, rows=8, row_tokens=16))
    assert Counter(batch.tokens_BT[:, 0].tolist()) == {0: 6, 1: 2}


@pytest.mark.parametrize("weights", [(1, 9), (1, 1), (9, 1)])
def test_a_document_longer_than_the_run_gives_no_more_than_its_share(weights):
    """Beside short ones; it is read in pieces that follow each other, whatever its weight."""
    long, short, rows = 400_000, 100, 8
    ids = np.arange(long, dtype=np.int32)
    found = [Tokens(ids, np.ones_like(ids))]
    found += [Tokens(np.full(short, -1, np.int32), np.ones(short, np.int32))] * 4_000
    of = [DataSource(range(1), weights[0]), DataSource(range(1, 4_001), weights[1])]
    packer = Packer(found, rows=rows, row_tokens=1024, seed=0, sources=of)
    counts, read = np.zeros(2), []
    for batch, _ in itertools.islice(packer, 30):
        tokens = batch.tokens_BT[batch.segment_ids_BT != 0]
        read += tokens[tokens >= 0].tolist()
        counts += (tokens >= 0).sum(), (tokens < 0).sum()
        assert abs((tokens >= 0).mean() - weights[0] / sum(weights)) < 1.5 / rows, "a row or so"
    assert abs(counts[0] / counts.sum() - weights[0] / sum(weights)) < 0.02
    assert len(set(read)) == len(read)


def test_a_source_begins_its_own_epochs_anew():
    """In each, every document once; a small source with a large share is at a later one."""
    read, batches = Counter(), packer((1, 5, 1), rows=1, row_tokens=400)
    position = next(position for _, position in batches if position.next[1].epoch >= 6)
    assert position.next[0].epoch < 6
    for batch, _ in packer((1,), ([2, 3, 4, 5],), rows=1, row_tokens=5, epochs=7):
        read.update(np.unique(batch.tokens_BT[batch.segment_ids_BT > 0]).tolist())
    assert read == dict.fromkeys(range(4), 7)


def test_with_epochs_every_source_is_read_that_often_and_no_more():
    found = Counter()
    for batch, _ in packer((1, 9, 2), epochs=2):
        found.update(batch.tokens_BT[batch.segment_ids_BT != 0].tolist())
    lengths = list(itertools.chain(*SIZES))
    assert found == {number: 2 * length for number, length in enumerate(lengths)}


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(
        st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any), min_size=1, max_size=3
    ),
    stop=st.integers(0, 8),
    seed=st.integers(0, 9),
    weights=st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
)
def test_a_mixture_goes_on_from_any_position(sizes, stop, seed, weights):
    options = {"rows": 2, "row_tokens": 8, "seed": seed}
    whole = list(itertools.islice(packer(weights, sizes, **options), 14))
    saved = json.loads(json.dumps(whole[stop][1].to_json()))
    again = packer(weights, sizes, position=Position.from_json(saved), **options)
    for (batch, where), (expected, position) in zip(again, whole[stop + 1 :], strict=False):
        assert where == position
        assert all(np.array_equal(a, b) for a, b in zip(batch, expected, strict=True))


def test_positions_of_earlier_versions_go_on():
    """They have one source and counted nothing; orders are what numpy makes of seed and epoch."""
    sizes = ([5] * 7,)
    whole = list(itertools.islice(packer((), sizes, rows=1, row_tokens=7), 12))
    order = [np.random.default_rng((1, epoch)).permutation(7) for epoch in (0, 1)]
    assert [batch.tokens_BT[0, 0] for batch, _ in whole] == np.concatenate(order)[:12].tolist()
    saved = whole[3][1].to_json()
    (following,) = saved["next"]
    saved["next"] = following[:2]
    saved |= {name: [place[:4] for place in saved[name]] for name in ("reading", "waiting")}
    again = packer((), sizes, rows=1, row_tokens=7, position=Position.from_json(saved))
    for (batch, _), (expected, _) in zip(again, whole[4:], strict=False):
        assert np.array_equal(batch.tokens_BT, expected.tokens_BT)


def test_a_source_without_a_token_is_named():
    with pytest.raises(DataError, match="no document of b has a token"):
        for _ in itertools.islice(packer((1, 1), ([5, 6], [0, 0])), 9):
            pass


# --- a run


@pytest.fixture
def mixed(checkpoint, tmp_path) -> RunSettings:
    """Many short documents and a few, three parts to one."""
    for name, first, count in (("a", 100, 30), ("b", 200, 2)):
        records = ({"input_ids": [first, *range(number, number + 9)]} for number in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return RunSettings(
        checkpoint=str(checkpoint),
        data=(tmp_path / "a.jsonl", tmp_path / "b.jsonl"),
        data_weights=(1.0, 3.0),
        out=tmp_path / "unused",
        evaluation=EvaluationSettings(holdout_every=4),
    )


def changed(run: RunSettings, **changes) -> RunSettings:
    return RunSettings(**(vars(run) | changes))


def test_paths_of_a_run_are_its_sources(mixed: RunSettings):
    config = open_checkpoint(mixed.checkpoint).config
    text = open_run_text(mixed, config)
    assert [len(source.documents) for source in text.sources] == [23, 1]
    firsts = [{int(text.train[n].ids[0]) for n in source.documents} for source in text.sources]
    assert firsts == [{100}, {200}]
    said = (
        "; mixed: 25 % of the tokens from a.jsonl (23 documents), 75 % of the tokens from b.jsonl"
    )
    assert said in text.description
    assert not open_run_text(changed(mixed, data_weights=()), config).sources


def test_a_document_that_changed_its_source_is_other_data(mixed: RunSettings):
    """Though all documents, in their order, are the same."""
    config = open_checkpoint(mixed.checkpoint).config
    before = open_run_text(mixed, config)
    a, b = mixed.data
    lines = a.read_text().splitlines(keepends=True)
    a.write_text("".join(lines[:-1]))
    b.write_text(lines[-1] + b.read_text())
    assert open_run_text(mixed, config).digest != before.digest
    plain = changed(mixed, data_weights=())
    assert open_run_text(plain, config).digest not in (before.digest, "")


def test_a_source_that_is_held_out_whole_is_an_error_whose_advice_helps(mixed: RunSettings):
    config = open_checkpoint(mixed.checkpoint).config
    run = changed(mixed, evaluation=EvaluationSettings(holdout_every=2))
    mixed.data[0].write_text('{"input_ids": [1, 2]}\n')
    mixed.data[1].write_text('{"input_ids": [3, 4]}\n')
    with pytest.raises(DataError, match=r"b\.jsonl has a weight, but no document that is not held"):
        open_run_text(run, config)
    for helped in (
        changed(run, evaluation=EvaluationSettings(holdout_every=0)),
        changed(run, eval_data=mixed.data[:1]),
    ):
        assert len(open_run_text(helped, config).sources) == 2


def test_inspect_data_shows_the_rows_of_a_mixture(mixed: RunSettings):
    shown = InspectDataSettings(
        checkpoint=mixed.checkpoint,
        data=mixed.data,
        data_weights=mixed.data_weights,
        holdout_every=4,
        rows=2,
        row_tokens=20,
        batches=10,
    )
    rows = inspect_data(shown).rows
    text = open_run_text(mixed, open_checkpoint(mixed.checkpoint).config)
    batches = Packer(text.train, rows=2, row_tokens=20, seed=0, sources=text.sources)
    wanted = np.concatenate([batch.tokens_BT for batch, _ in itertools.islice(batches, 10)])
    assert np.array_equal([row.token_ids_T for row in rows], wanted)
    from_b = [where for row in rows for where in row.documents if "b.jsonl" in where]
    assert len(from_b) == 30, "three of four documents, which are of one length"


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ((1.0,), "--data-weights has 1 numbers, needed one for each of the 2 paths of --data"),
        ((1.0, 0.0), "--data-weights has 0.0, needed numbers of more than 0"),
        ((float("nan"), 1.0), "--data-weights has nan, needed numbers of more than 0"),
        ((1.0, float("inf")), "--data-weights has inf, needed numbers of more than 0"),
    ],
)
def test_weights_that_cannot_be_used_are_said(mixed: RunSettings, weights, told: str):
    with pytest.raises(SettingsError) as caught:
        check(changed(mixed, data_weights=weights))
    assert caught.value.faults == [told]
    check(mixed)

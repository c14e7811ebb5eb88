"""Text on disk, tokens, packing: nothing lost, nothing doubled, every fault named by its line."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config import EvaluationSettings, RunSettings
from finetune.corpus import PIECE_BYTES, DataError, Exchange, Text, TokenIds, scan
from finetune.data import open_run_text
from finetune.packing import Packer, Position
from finetune.tokens import Documents, Encoder, Tokens
from mtp_model import ModelConfig
from tools.make_tiny_checkpoint import make_tiny_checkpoint

VOCAB = 384


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    make_tiny_checkpoint(folder, num_files=1, sizes={"num_hidden_layers": 1})
    return folder


def write_jsonl(path: Path, *records) -> Path:
    lines = (each if isinstance(each, str) else json.dumps(each) for each in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


# --- corpus


def test_a_folder_is_read_in_a_fixed_order_without_what_is_no_text(tmp_path):
    (tmp_path / "b.py").write_text("b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("az")
    write_jsonl(tmp_path / "c.jsonl", {"text": "c1"}, {"prompt": "p", "completion": "q"})
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / ".hidden").write_text("hidden")
    corpus = scan([tmp_path], VOCAB)
    assert [corpus.read(i) for i in range(len(corpus))] == [
        Text(text="az"),
        Text(text="b"),
        Text(text="c1"),
        Exchange(prompt="p", completion="q"),
    ]
    assert [path.name for path in corpus.left_out] == ["picture.png"]


def test_digest_is_of_the_contents(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = scan([file], VOCAB).digest
    file.write_text("two")
    assert scan([file], VOCAB).digest != before


@pytest.mark.parametrize(
    "text",
    [
        "one line\n" * (3 * PIECE_BYTES // 9 + 5),
        "é" * PIECE_BYTES + "\N{GRINNING FACE}" * PIECE_BYTES,  # no line end to cut at
        "x" * PIECE_BYTES,  # exactly a piece
    ],
)
def test_a_long_text_is_read_in_pieces_that_make_it_up(tmp_path, text):
    file = tmp_path / "long.txt"
    file.write_text(text, encoding="utf-8")
    corpus = scan([file], VOCAB)
    pieces = [corpus.read(i) for i in range(len(corpus))]
    assert "".join(piece.text for piece in pieces) == text
    assert max(corpus.nbytes_N) <= PIECE_BYTES
    assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_every_malformed_line_is_reported_at_once(tmp_path):
    bad = write_jsonl(
        tmp_path / "bad.jsonl",
        {"text": "good"},
        '{"text": ',
        [1, 2],
        {"txt": "typo"},
        {"text": "a", "prompt": "b", "completion": "c"},
        {"text": 3},
        {"prompt": "no completion"},
        {"input_ids": [1, "2"]},
        {"input_ids": [1, VOCAB]},
        {"input_ids": [1, 2], "loss_mask": [1]},
        {"input_ids": [1, 2], "loss_mask": [1, 2]},
        "[" * 100_000,
    )
    (tmp_path / "broken.txt").write_bytes(b"abc\xff")
    missing = tmp_path / "missing.txt"
    with pytest.raises(DataError) as caught:
        scan([bad, tmp_path / "broken.txt", missing], VOCAB)
    report = str(caught.value)
    for line, reason in {
        2: "is not JSON: Expecting value at column",
        3: "is list, needed an object",
        4: 'has the keys txt, needed {"text"}',
        5: "has the keys completion, prompt, text",
        6: "text is int, needed a string",
        7: "completion is missing, needed a string",
        8: "input_ids is not a list of whole numbers",
        9: f"input_ids has {VOCAB}, the vocabulary is 0 to {VOCAB - 1}",
        10: "loss_mask has 1 entries for 2 input_ids",
        11: "loss_mask is not a list of 0 and 1",
        12: "",
    }.items():
        assert f"{bad}:{line} {reason}" in report
    assert f"{tmp_path / 'broken.txt'} is not UTF-8 text" in report
    assert f"{missing} cannot be read: No such file" in report
    assert report.startswith("13 problems in the data:")


def test_a_long_report_is_cut(tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", *["{"] * 100)
    with pytest.raises(DataError, match="and 60 more"):
        scan([bad], VOCAB)


def test_no_document_is_an_error(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no document in"):
        scan([tmp_path], VOCAB)


# --- tokens


def test_text_becomes_tokens_with_bos_and_eos(checkpoint):
    encoder = Encoder(checkpoint)
    assert (encoder.bos, encoder.eos) == ((0,), (1,))
    whole = encoder.encode(Text(text="def first(items):"))
    middle = encoder.encode(Text(text="def first(items):", starts=False, ends=False))
    assert whole.ids.tolist() == [0, *middle.ids.tolist(), 1]
    assert encoder.tokenizer is not None
    assert encoder.tokenizer.decode(middle.ids.tolist()) == "def first(items):"
    assert whole.loss_mask.tolist() == [1] * len(whole.ids)


def test_only_the_completion_is_learnt(checkpoint):
    encoder = Encoder(checkpoint)
    tokens = encoder.encode(Exchange(prompt="import", completion="return"))
    prompt = encoder.encode(Text(text="import", ends=False)).ids
    completion = encoder.encode(Text(text="return", starts=False)).ids
    assert tokens.ids.tolist() == [*prompt, *completion]
    assert tokens.loss_mask.tolist() == [0] * len(prompt) + [1] * len(completion)


def test_input_ids_stay_as_they_are(checkpoint):
    encoder = Encoder(checkpoint)
    assert encoder.encode(TokenIds(input_ids=[5, 6])).loss_mask.tolist() == [1, 1]
    masked = encoder.encode(TokenIds(input_ids=[5, 6], loss_mask=[0, 1]))
    assert (masked.ids.tolist(), masked.loss_mask.tolist()) == ([5, 6], [0, 1])


def test_bos_only_where_the_checkpoint_wants_it(checkpoint, tmp_path):
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").symlink_to(checkpoint / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"add_bos_token": False, "eos_token": {"content": "no such token"}})
    )
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    encoder = Encoder(tmp_path)
    assert (encoder.bos, encoder.eos) == ((), (2,))


def test_without_tokenizer_text_is_refused_and_tokens_are_not(tmp_path):
    ids = write_jsonl(tmp_path / "ids.jsonl", {"input_ids": [1, 2, 3]})
    text = write_jsonl(tmp_path / "text.jsonl", {"text": "words"})
    encoder = Encoder(tmp_path)
    assert Documents(scan([ids], VOCAB), encoder, VOCAB)[0].ids.tolist() == [1, 2, 3]
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        Documents(scan([text], VOCAB), encoder, VOCAB)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_named(tmp_path, name):
    (tmp_path / name).write_text("{")
    with pytest.raises(DataError, match=rf"{name} is not "):
        Encoder(tmp_path)


def test_a_token_outside_the_vocabulary_names_its_line(checkpoint, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", {"input_ids": [1]}, {"text": "\x7f"})
    documents = Documents(scan([file], VOCAB), Encoder(checkpoint), vocab_size=3)
    with pytest.raises(DataError, match=r"a\.jsonl:2 gives token \d+, .* is 0 to 2"):
        documents[1]


# --- what is held out


def run_settings(checkpoint, data, **changes):
    return RunSettings(checkpoint=checkpoint, data=(data,), out=Path("unused"), **changes)


def model_config(checkpoint):
    return ModelConfig.from_dict(json.loads((checkpoint / "config.json").read_text()))


def test_every_nth_document_is_held_out(checkpoint, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", *({"input_ids": [i]} for i in range(10)))
    settings = run_settings(checkpoint, file, evaluation=EvaluationSettings(holdout_every=4))
    text = open_run_text(settings, model_config(checkpoint))
    assert text.held_out is not None
    assert [int(text.held_out[i].ids[0]) for i in range(2)] == [3, 7]
    assert [int(text.train[i].ids[0]) for i in range(8)] == [0, 1, 2, 4, 5, 6, 8, 9]
    assert text.description.startswith("8 documents to train on, 2 held out (1 of every 4")


def test_held_out_text_can_be_named_or_left_out(checkpoint, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", {"input_ids": [1]})
    other = write_jsonl(tmp_path / "other.jsonl", {"input_ids": [2]})
    config = model_config(checkpoint)
    named = open_run_text(run_settings(checkpoint, one, eval_data=(other,)), config)
    assert (len(named.train), named.held_out and len(named.held_out)) == (1, 1)
    without = EvaluationSettings(holdout_every=0)
    assert open_run_text(run_settings(checkpoint, one, evaluation=without), config).held_out is None
    with pytest.raises(DataError, match="one document only"):
        open_run_text(run_settings(checkpoint, one), config)


# --- packing


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

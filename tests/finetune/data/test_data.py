"""Text on disk and its tokens: every fault named by its line, nothing else left out."""

import dataclasses
import json
from pathlib import Path

import pytest

from finetune.data.corpus import scan
from finetune.data.records import DataError, Exchange, Text, TokenIds
from finetune.data.run_text import open_run_text
from finetune.data.tokens import TextEncoder, TokenDocuments
from finetune.settings import EvaluationSettings, RunSettings
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
    (tmp_path / "b.md").write_text("b")
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
    assert corpus.kinds == {".jsonl": 1, ".md": 1, ".txt": 1}


def test_digest_is_of_the_contents(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = scan([file], VOCAB).digest
    file.write_text("two")
    assert scan([file], VOCAB).digest != before


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
        {"input_ids": [1, 2], "lables": [1, 2]},
        {"input_ids": [1, 2], "labels": [-100, 3]},
        {"input_ids": [1, 2], "labels": [-100, 2], "loss_mask": [0, 1]},
        {"input_ids": [1, 2], "labels": [2]},
        {"prompt": "a", "completion": "b", "response": "c"},
    )
    (tmp_path / "broken.txt").write_bytes(b"abc\xff")
    (wide := tmp_path / "wide.jsonl").write_text('{"text": "abc"}', encoding="utf-16")
    missing = tmp_path / "missing.txt"
    with pytest.raises(DataError) as caught:
        scan([bad, tmp_path / "broken.txt", wide, missing], VOCAB)
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
        13: "has lables beside input_ids, known there are attention_mask, labels, loss_mask",
        14: "labels has 3 at 1, where input_ids has 2; needed that token, or -100",
        15: "has both loss_mask and labels",
        16: "labels has 1 entries for 2 input_ids",
        17: "has both completion and response",
    }.items():
        assert f"{bad}:{line} {reason}" in report
    assert f"{tmp_path / 'broken.txt'} is not UTF-8 text" in report
    assert f"{missing} cannot be read: No such file" in report
    assert f"{wide}:1 is not UTF-8: invalid start byte" in report
    assert report.startswith("19 problems in the data:")


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
    encoder = TextEncoder(checkpoint)
    assert (encoder.bos, encoder.eos) == ((0,), (1,))
    whole = encoder.encode(Text(text="def first(items):"))
    assert encoder.tokenizer is not None
    first, *middle, last = whole.ids.tolist()
    assert (first, last) == (0, 1)
    assert encoder.tokenizer.decode(middle) == "def first(items):"
    assert whole.loss_mask.tolist() == [1] * len(whole.ids)


def test_only_the_completion_is_learnt(checkpoint):
    encoder = TextEncoder(checkpoint)
    tokens = encoder.encode(Exchange(prompt="import", completion="return"))
    prompt = encoder.encode(Text(text="import")).ids[:-1]
    completion = encoder.encode(Text(text="return")).ids[1:]
    assert tokens.ids.tolist() == [*prompt, *completion]
    assert tokens.loss_mask.tolist() == [0] * len(prompt) + [1] * len(completion)


def test_input_ids_stay_as_they_are(checkpoint):
    encoder = TextEncoder(checkpoint)
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
    encoder = TextEncoder(tmp_path)
    assert (encoder.bos, encoder.eos) == ((), (2,))


def test_without_tokenizer_text_is_refused_and_tokens_are_not(tmp_path):
    ids = write_jsonl(tmp_path / "ids.jsonl", {"input_ids": [1, 2, 3]})
    text = write_jsonl(tmp_path / "text.jsonl", {"text": "words"})
    encoder = TextEncoder(tmp_path)
    assert TokenDocuments(scan([ids], VOCAB), encoder, VOCAB)[0].ids.tolist() == [1, 2, 3]
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        TokenDocuments(scan([text], VOCAB), encoder, VOCAB)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_named(tmp_path, name):
    (tmp_path / name).write_text("{")
    with pytest.raises(DataError, match=rf"{name} is not "):
        TextEncoder(tmp_path)


def test_a_token_outside_the_vocabulary_names_its_line(checkpoint, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", {"input_ids": [1]}, {"text": "\x7f"})
    documents = TokenDocuments(scan([file], VOCAB), TextEncoder(checkpoint), vocab_size=3)
    with pytest.raises(DataError, match=r"a\.jsonl:2 gives token \d+, .* is 0 to 2"):
        documents[1]


def test_labels_are_a_loss_mask_and_padding_is_dropped(tmp_path):
    masked = {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 1]}
    labelled = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "attention_mask": [1, 1, 1]}
    padded = {
        "input_ids": [5, 6, 7, 0, 0],
        "labels": [-100, -100, 7, -100, -100],
        "attention_mask": [1, 1, 1, 0, 0],
    }
    corpus = scan([write_jsonl(tmp_path / "a.jsonl", masked, labelled, padded)], VOCAB)
    assert corpus.read(0) == corpus.read(1) == corpus.read(2)


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"prompt": "p", "response": "r"}, "p", "r"),
        ({"instruction": "i", "output": "o"}, "i", "o"),
        ({"instruction": "i", "input": "", "output": "o"}, "i", "o"),
        ({"instruction": "i", "input": "n", "output": "o"}, "i\n\nn", "o"),
    ],
)
def test_other_names_of_prompt_and_completion(tmp_path, record, prompt, completion):
    corpus = scan([write_jsonl(tmp_path / "a.jsonl", record)], VOCAB)
    assert corpus.read(0) == Exchange(prompt=prompt, completion=completion)


def test_bos_and_eos_are_not_doubled_and_a_byte_order_mark_is_no_token(checkpoint, tmp_path):
    encoder = TextEncoder(checkpoint)
    assert encoder.tokenizer is not None
    bos, eos = (encoder.tokenizer.id_to_token(number) for number in (0, 1))
    plain = encoder.encode(Text(text="def first"))
    for text in (f"{bos}def first", f"def first{eos}", f"{bos}def first{eos}"):
        assert encoder.encode(Text(text=text)).ids.tolist() == plain.ids.tolist()
    exchange = encoder.encode(Exchange(prompt=f"{bos}import", completion=f"return{eos}"))
    wanted = encoder.encode(Exchange(prompt="import", completion="return"))
    assert exchange.ids.tolist() == wanted.ids.tolist()
    (tmp_path / "a.txt").write_text("def first", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "def first"}\n', encoding="utf-8-sig")
    corpus = scan([tmp_path], VOCAB)
    assert [corpus.read(i) for i in range(2)] == [Text(text="def first")] * 2


@pytest.mark.parametrize(
    "record",
    [
        {"input_ids": [3, 4, 5], "loss_mask": [0, 0, 0]},
        {"input_ids": [3, 4, 5], "labels": [-100, -100, -100]},
        {"input_ids": [3, 4, 5], "loss_mask": [1, 0, 0]},  # the first token is no target
        {"input_ids": [3]},
        {"prompt": "words", "completion": ""},
    ],
)
def test_nothing_to_learn_is_an_error_and_some_of_it_a_warning(checkpoint, tmp_path, record):
    idle = write_jsonl(tmp_path / "idle.jsonl", *[record] * 3)
    with pytest.raises(DataError, match="nothing to learn in any of 3 documents"):
        scan([idle], VOCAB)
    mixed = write_jsonl(tmp_path / "mixed.jsonl", *[record] * 3, *[{"input_ids": [3, 4]}] * 40)
    text = open_run_text(run_settings(checkpoint, mixed), model_config(checkpoint))
    assert "warning: 3 documents have nothing to learn" in text.description
    learnt = [text.train[number].loss_mask[1:].sum() for number in range(len(text.train))]
    assert learnt.count(0) == 3, "nor is the end of an empty answer"


# --- what is held out


def run_settings(checkpoint, data, **changes):
    return RunSettings(checkpoint=str(checkpoint), data=(data,), out=Path("unused"), **changes)


def model_config(checkpoint):
    return ModelConfig.from_dict(json.loads((checkpoint / "config.json").read_text()))


def test_held_out_documents_that_are_trained_on_are_warned_of(checkpoint, tmp_path):
    def said(*data: Path, **changes) -> str:
        settings = dataclasses.replace(run_settings(checkpoint, tmp_path), data=data, **changes)
        return open_run_text(settings, model_config(checkpoint)).description

    records = [{"input_ids": [i, 1]} for i in range(10)]
    first = write_jsonl(tmp_path / "a.jsonl", *records)
    other = write_jsonl(tmp_path / "b.jsonl", *records)
    every = EvaluationSettings(holdout_every=4)
    warning = "; warning: {} documents held out are trained on too"
    assert said(first, tmp_path, evaluation=every).endswith(warning.format(5))
    assert said(tmp_path, eval_data=(first,)).endswith(warning.format(10))
    assert "warning" not in said(first, other, evaluation=every)
    assert "warning" not in said(first, eval_data=(other,))


def test_every_nth_document_is_held_out(checkpoint, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", *({"input_ids": [i, 1]} for i in range(10)))
    settings = run_settings(checkpoint, file, evaluation=EvaluationSettings(holdout_every=4))
    text = open_run_text(settings, model_config(checkpoint))
    assert text.held_out is not None
    assert [int(text.held_out[i].ids[0]) for i in range(2)] == [3, 7]
    assert [int(text.train[i].ids[0]) for i in range(8)] == [0, 1, 2, 4, 5, 6, 8, 9]
    assert text.description.startswith("8 documents to train on, 2 held out (1 of every 4")


def test_held_out_text_can_be_named_or_left_out(checkpoint, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", {"input_ids": [1, 2]})
    other = write_jsonl(tmp_path / "other.jsonl", {"input_ids": [2, 3]})
    config = model_config(checkpoint)
    named = open_run_text(run_settings(checkpoint, one, eval_data=(other,)), config)
    assert (len(named.train), named.held_out and len(named.held_out)) == (1, 1)
    without = EvaluationSettings(holdout_every=0)
    assert open_run_text(run_settings(checkpoint, one, evaluation=without), config).held_out is None
    with pytest.raises(DataError, match="one document only"):
        open_run_text(run_settings(checkpoint, one), config)

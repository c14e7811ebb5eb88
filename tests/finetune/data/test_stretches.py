"""A long text tokenised stretch by stretch: exactly the tokens of the whole, by tokenizers' own."""

import itertools
import random

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from finetune.data import stretches
from finetune.data.corpus import scan
from finetune.data.packing import Packer
from finetune.data.records import DataError
from finetune.data.stretches import UncuttableError, read_stretch
from finetune.data.tokens import TextEncoder, TokenDocuments
from tools.make_tiny_checkpoint import BOS, EOS, make_tiny_checkpoint

LEARNT_FROM = [
    "The quick brown foxes don't jump over 12345 lazy dogs; x = 3.14159, foo_bar(y) == None",
    "日本語のテキスト、それは長いです。中文文本测试 émigré naïve مرحبا 67890123 \n\n  \t x",
] * 3


def deepseek_words():
    """The pre-tokenizer of DeepSeek-V3's tokenizer.json."""
    expressions = (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ\u30a0-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    )
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in expressions]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


def bpe(words, normalizer=None, **options) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    if words is not None:
        tokenizer.pre_tokenizer = words
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LEARNT_FROM, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    """As T5 and XLM-R have it, with a normalizer that takes spaces away."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=300, unk_token="<unk>", special_tokens=["<unk>", "<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(LEARNT_FROM, trainer)
    return tokenizer


TOKENIZERS = {
    "deepseek": lambda: bpe(deepseek_words()),
    "gpt2": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2 prefix": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "nfc": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC()),
    "metaspace": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace first": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "unigram": unigram,
}


def mixed(seed: int, count: int) -> str:
    rng = random.Random(seed)
    words = [
        *"the quick, 12345 日本語 naïve e\u0301 مرحبا foo_bar() <s> </s> 🙂🙂 x=3.14;".split(),
        "\n",
    ]
    spaces = [" ", "", "  ", "\n", "\r\n", "\t", "\u3000"]
    return "".join(rng.choice(words) + rng.choice(spaces) for _ in range(count))


TEXTS = {
    "mixed": mixed(0, 30_000),
    "spaces": ("w" + " " * 3000 + "\n" + " " * 9000 + "x" + "\n" * 7000 + " " * 70_000 + "\ny ") * 2
    + mixed(1, 9000),
    "digits": "12345678901" * 12_000 + " end " * 200 + "7" * 70_000 + mixed(2, 9000),
    "one line": " ".join(["abc", "déf", "日本"][number % 3] for number in range(40_000)),
    "no space": "日本語のテキスト、それは長いです。" * 5000,
    "emoji": "🙂👩‍👩‍👧‍👦é" * 6000,
    "marks": "e\u0301\u0300\u0302 a\u030a" * 12_000,
    "special tokens": "a <s>  b</s>c\n" * 12_000,
    "white": " \n\t \n" * 30_000 + "z",
}


def in_stretches(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    data = text.encode()
    found, begin = [], 0
    while begin is not None:
        ids, begin = read_stretch(tokenizer, lambda a, b: data[a:b], len(data), begin)
        found.append(ids)
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stretches_give_the_tokens_of_the_whole(name):
    tokenizer = TOKENIZERS[name]()
    for kind, text in TEXTS.items():
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        found = in_stretches(tokenizer, text)
        assert list(itertools.chain.from_iterable(found)) == whole, kind
        if kind == "mixed":
            assert len(found) >= 3


def test_cutting_anywhere_does_not():
    """The control: of the same text in pieces of 64 KiB, some border has other tokens."""
    tokenizer = TOKENIZERS["deepseek"]()
    wrong = 0
    for text in TEXTS.values():
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        pieces = [text[at : at + (1 << 16)] for at in range(0, len(text), 1 << 16)]
        found = [tokenizer.encode(each, add_special_tokens=False).ids for each in pieces]
        wrong += list(itertools.chain.from_iterable(found)) != whole
    assert wrong >= 5


def test_a_cut_that_changes_what_follows_is_not_made():
    """To this tokenizer a word ends at the 64th character, and the next is 1,500 long."""
    words = Regex(r"\A[\s\S]{64}|(?<=\A[\s\S]{64})[\s\S]{1500}|\S+|\s+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(words, "isolated")
    tokenizer = bpe(pre_tokenizers.Sequence([split, byte_level]))
    text = "words that are many " * 9000
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    found = in_stretches(tokenizer, text)
    assert list(itertools.chain.from_iterable(found)) == whole
    assert len(found) == 1, "no cut is good"


@pytest.fixture
def _small_most(monkeypatch):
    monkeypatch.setattr(stretches, "MOST_BYTES", 1 << 18)


@pytest.mark.usefixtures("_small_most")
def test_a_text_that_is_one_word_is_tokenised_whole_up_to_a_size():
    """Llama 2's tokenizer has no words: spaces are letters to it."""
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer = bpe(None, normalizers.Sequence(spaces), byte_fallback=True)
    text = "words and words " * 10_000
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert in_stretches(tokenizer, text) == [whole]
    with pytest.raises(UncuttableError, match="one word in 0 MiB"):
        in_stretches(tokenizer, text * 3)


def test_a_long_file_is_one_document_with_one_beginning_and_one_end(tmp_path):
    make_tiny_checkpoint(tmp_path / "source", num_files=1, sizes={"num_hidden_layers": 1})
    encoder = TextEncoder(tmp_path / "source")
    assert encoder.tokenizer is not None
    text = "def first(items):\n    return items[0]\n\n" * 9000
    file = tmp_path / "long.txt"
    file.write_text(text, encoding="utf-8-sig")
    documents = TokenDocuments(scan([file], 384), encoder, 384)
    assert len(documents) == 1
    packer = Packer(documents, rows=2, row_tokens=1000, seed=0, epochs=1)
    rows = [row for batch, _ in packer for row in batch.tokens_BT[batch.segment_ids_BT.any(axis=1)]]
    whole = encoder.tokenizer.encode(BOS + text + EOS, add_special_tokens=False).ids
    found = np.concatenate(rows)
    assert found[: len(whole)].tolist() == whole
    assert not found[len(whole) :].any()
    assert len(rows) == -(-len(whole) // 1000), "every row but the last is full"


@pytest.mark.usefixtures("_small_most")
def test_a_text_without_a_place_to_cut_names_its_file(tmp_path):
    make_tiny_checkpoint(tmp_path / "source", num_files=1, sizes={"num_hidden_layers": 1})
    file = tmp_path / "one word.txt"
    file.write_text("x" * (1 << 19))
    documents = TokenDocuments(scan([file], 384), TextEncoder(tmp_path / "source"), 384)
    with pytest.raises(DataError, match=r"one word\.txt cannot be cut.*Split the text"):
        documents[0]
    lines = tmp_path / "split.jsonl"
    lines.write_text('{"text": "%s"}\n' % ("x" * (1 << 18)) * 2)
    split = TokenDocuments(scan([lines], 384), TextEncoder(tmp_path / "source"), 384)
    assert split[0].ids.size

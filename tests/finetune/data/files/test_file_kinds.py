"""Kinds of data files: each gives the same documents, whatever holds them, in bounded memory."""

import base64
import csv
import errno
import gzip
import io
import json
import sys
import tempfile
import tracemalloc
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tf_examples import as_example

from finetune.data.corpus import scan
from finetune.data.files import kinds, stored
from finetune.data.packing import Packer, Position
from finetune.data.records import DataError, Exchange, Text, TokenIds
from finetune.data.tokens import TextEncoder, TokenDocuments
from tools.make_tiny_checkpoint import make_tiny_checkpoint

parquet = pytest.importorskip("pyarrow.parquet")
arrow = pytest.importorskip("pyarrow")
array_record: Any = None  # without it nothing of its kind is tried
with suppress(ImportError):
    array_record = import_module("array_record.python.array_record_module")

VOCAB = 384
TEXTS = [
    'plain "quoted", with\nlines\r\n',
    "émigré 日本語 \N{GRINNING FACE}",
    " spaces ",
    "\\ back\x0bslash\u2028",
    "0",
]
RECORDS = [{"prompt": f"p {text}", "completion": text} for text in TEXTS * 7]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    make_tiny_checkpoint(folder, num_files=1, sizes={"num_hidden_layers": 1})
    return folder


def as_lines(records, **options) -> str:
    return "".join(json.dumps(each, **options) + "\n" for each in records)


def as_csv(records) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(records[0]), quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def as_parquet(records, **options) -> bytes:
    return table_bytes(arrow.Table.from_pylist(records), **options)


def table_bytes(table, **options) -> bytes:
    out = io.BytesIO()
    parquet.write_table(table, out, **options)
    return out.getvalue()


def as_arrow(records, is_stream=True, rows=4) -> bytes:
    """In batches of some rows, as `datasets` writes a stream and Feather a file."""
    table, out = arrow.Table.from_pylist(records), io.BytesIO()
    begin = arrow.ipc.new_stream if is_stream else arrow.ipc.new_file
    with begin(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return out.getvalue()


def as_array_record(records: list[bytes]) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        writer = array_record.ArrayRecordWriter(file.name, "group_size:3")
        for record in records:
            writer.write(record)
        writer.close()
        return file.read()


def as_zstd(content: str | bytes) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return arrow.Codec("zstd").compress(raw, asbytes=True)


# Of the program `zstd`, whose files have a checksum, as pyarrow's have not.
ZSTD_LINE = "words that were packed by another program, and are packed here\n"
ZSTD_TEXT = base64.b64decode(
    "KLUv/WT4AM0BAFJDCxGwuQFHsUEhQXJZspNko+miIOD08LZzB3Mlqch6uHnuJWxXxpFPT3mP62SaKgIAtkJQGgysoF0k4hA="
)
WRITTEN = {
    "a.jsonl": as_lines(RECORDS),
    "b.ndjson": as_lines(RECORDS, ensure_ascii=False),
    "c.json": json.dumps(RECORDS),
    "d.json": json.dumps(RECORDS, indent=2, ensure_ascii=False),
    "e.JSON": as_lines(RECORDS),
    "f.json": as_lines(RECORDS, indent=1),  # one after the other, over several lines
    "g.csv": as_csv(RECORDS),
    "h.jsonl.gz": gzip.compress(as_lines(RECORDS).encode()),
    "i.json.gz": gzip.compress(json.dumps(RECORDS).encode()),
    "j.csv.gz": gzip.compress(as_csv(RECORDS).encode()),
    "k.parquet": as_parquet(RECORDS, row_group_size=4),
    "l.json": "\ufeff" + json.dumps(RECORDS),
    "m.csv": "\ufeff" + as_csv(RECORDS),
    "n.jsonl.gz": gzip.compress(as_lines(RECORDS[:9]).encode())
    + gzip.compress(as_lines(RECORDS[9:]).encode()),
    "t.jsonl.zst": as_zstd(as_lines(RECORDS)),
    "u.json.zst": as_zstd(json.dumps(RECORDS)),
    "v.csv.zst": as_zstd(as_csv(RECORDS)),
    "w.jsonl.ZST": as_zstd(as_lines(RECORDS[:9])) + as_zstd(as_lines(RECORDS[9:])),
    "o.arrow": as_arrow(RECORDS),
    "p.feather": as_arrow(RECORDS, is_stream=False),
}
if array_record:
    indented = [json.dumps(each, indent=1).encode() for each in RECORDS]
    examples = [as_example({key: [text] for key, text in each.items()}) for each in RECORDS]
    WRITTEN |= {
        "q.array_record": as_array_record([json.dumps(each).encode() for each in RECORDS]),
        "r.arrayrecord": as_array_record(indented),
        "s.array_record": as_array_record(examples),
    }


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_all(corpus):
    return [corpus.read(number) for number in range(len(corpus))]


@pytest.mark.parametrize("name", WRITTEN)
def test_every_kind_gives_the_same_documents(tmp_path, name):
    corpus = scan([write(tmp_path, name, WRITTEN[name])], VOCAB)
    assert read_all(corpus) == [Exchange(**record) for record in RECORDS]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.md.gz", "a.txt.zst", "a.md.zst"])
def test_prose_is_one_document(tmp_path, name):
    text = "\n".join(TEXTS * 5000)
    content = text.encode("utf-8-sig")
    packed = {".gz": gzip.compress, ".zst": as_zstd}.get(Path(name).suffix, bytes)(content)
    corpus = scan([write(tmp_path, name, packed)], VOCAB)
    assert read_all(corpus) == [Text(text=text)]


@pytest.mark.parametrize("name", [*WRITTEN, "prose.txt", "prose.txt.gz"])
def test_training_goes_on_in_the_middle_of_every_kind(checkpoint, tmp_path, name):
    """Bit for bit, from a corpus that is scanned anew."""
    text = "".join(f"{number} {TEXTS[number % 5]}" for number in range(6_000)).encode()
    content = {"prose.txt": text, "prose.txt.gz": gzip.compress(text)} | WRITTEN
    path = write(tmp_path, name, content[name])
    encoder = TextEncoder(checkpoint)
    row_tokens = 700 if "prose" in name else 70

    def packer(position=None):
        documents = TokenDocuments(scan([path], VOCAB), encoder, VOCAB)
        return Packer(documents, rows=3, row_tokens=row_tokens, seed=1, epochs=3, position=position)

    whole = list(packer())
    assert len(whole) >= 3
    for stop in range(0, len(whole) - 1, max(1, len(whole) // 5)):
        saved = json.loads(json.dumps(whole[stop][1].to_json()))
        rest = list(packer(Position.from_json(saved)))
        assert len(rest) == len(whole) - stop - 1
        for (batch, _), (expected, _) in zip(rest, whole[stop + 1 :], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(batch, expected, strict=True))


def test_other_columns_hold_json(tmp_path):
    rows = [{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}]
    table = as_csv([{key: json.dumps(each) for key, each in row.items()} for row in rows])
    wanted = [TokenIds(input_ids=[1, 2, 3], loss_mask=[0, 1, 1])]
    assert read_all(scan([write(tmp_path, "a.csv", table)], VOCAB)) == wanted
    assert read_all(scan([write(tmp_path, "a.parquet", as_parquet(rows))], VOCAB)) == wanted


def test_columns_that_are_no_tokens_hold_text(tmp_path):
    """Labels of a text are a data set's own."""
    corpus = scan([write(tmp_path, "a.csv", "text,labels\n1,spam\n[,\n")], VOCAB)
    assert read_all(corpus) == [Text(text="1"), Text(text="[")]


def test_the_index_that_pandas_writes_is_no_key(tmp_path):
    rows = as_parquet([{"input_ids": [1, 2], "__index_level_0__": 3}])
    corpus = scan([write(tmp_path, "a.parquet", rows)], VOCAB)
    assert read_all(corpus) == [TokenIds(input_ids=[1, 2])]


def test_columns_without_values_are_as_if_missing(tmp_path):
    rows = [{"text": "a", "prompt": None, "completion": None, "id": b"1"}]
    rows += [{"text": None, "prompt": "p", "completion": "c", "id": None}]
    corpus = scan([write(tmp_path, "a.parquet", as_parquet(rows))], VOCAB)
    assert read_all(corpus) == [Text(text="a"), Exchange(prompt="p", completion="c")]


def with_tools(tools: str) -> str:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return json.dumps({"messages": turns, "tools": tools})


GOOD = json.dumps({"text": "good"})
FAULTS = {
    "text.json": ("once upon a time", "record 1 is not JSON: Expecting value"),
    "list.json": ("[1, 2]", "record 1 is int, needed an object"),
    "cut.json": (f"[{GOOD}, {GOOD}", "ends after record 2, where an array goes on"),
    "comma.json": (f"[{GOOD} {GOOD}]", "has '{' after record 1"),
    "last.json": (f"[{GOOD},]", "record 2 is not JSON"),
    "after.json": (f"[{GOOD}] {GOOD}", "goes on after its array"),
    "half.json": (f'[{GOOD}, {{"text": "a', "record 2 is not JSON: Unterminated string"),
    "deep.json": ("[" * 100_000, "record 1 "),
    "object.json": ('{"data": []}', "record 1 has the keys data, needed"),
    "surrogate.json": (r'[{"text": "a\ud800"}]', "record 1 text has half a character at 1"),
    "array.jsonl": (f"[\n{GOOD}\n]", "begins with an array: name it .json"),
    "columns.csv": ("text,a\nb\n", ":2 has 1 columns, the header has 2"),
    "twice.csv": ("text,text\na,b\n", "has a column twice in its header: text, text"),
    "quote.csv": ('text\n"a', "line 2 is not CSV: unexpected end of data"),
    "nothing.csv": ("a,b\n1,2\n", ":2 has the keys a, b, needed"),
    "key.jsonl": ('{"text": "a", "text": "b"}', ":1 has the key text twice"),
    "key.json": ('[{"text": "a", "text": "b"}]', "record 1 has the key text twice"),
    "key.csv": (
        'messages\n"[{""role"": ""user"", ""role"": ""x""}]"\n',
        ":2 has the key role twice",
    ),
    "key.jsonl.gz": (gzip.compress(b'{"a": {"b": 1, "b": 2}}'), ":1 has the key b twice"),
    "tools.jsonl": (with_tools('[{"name": "f", "name": "g"}]'), ":1 tools has the key name twice"),
    "half.jsonl": (with_tools("[{"), ":1 tools is text that is not JSON: Expecting property"),
    "cell.csv": ("input_ids\n[1\n", ":2 has a cell that is not JSON"),
    "short.txt.gz": (gzip.compress(b"abc" * 999)[:-9], "is not a whole gzip file"),
    "plain.txt.gz": ("abc", "is not a whole gzip file"),
    "short.txt.zst": (as_zstd(b"abc" * 999)[:-1], "is not a whole zstd file"),
    "second.txt.zst": (as_zstd(b"abc") + as_zstd(b"abc")[:-1], "is not a whole zstd file"),
    "plain.txt.zst": ("abc", "is not a whole zstd file"),
    "flipped.txt.zst": (ZSTD_TEXT[:40] + b"\x00" + ZSTD_TEXT[41:], "is not a whole zstd file"),
    "key.jsonl.zst": (as_zstd(b'{"text": 1, "text": 2}'), ":1 has the key text twice"),
    "plain.parquet": ("abc", "is not a parquet file that can be read"),
    "columns.parquet": (as_parquet([{"a": 1, "b": 2}]), "has the columns a, b, needed one of"),
    "bytes.parquet": (as_parquet([{"text": b"a"}]), "record 1 text is dict, needed a string"),
    "beside.parquet": (as_parquet([{"input_ids": [1], "lables": [1]}]), "has lables beside"),
    "plain.arrow": ("abc", "is not an Arrow file that can be read"),
    "cut.arrow": (as_arrow(RECORDS)[:-400], "is not an Arrow file that can be read"),
    "columns.arrow": (as_arrow([{"a": 1}]), "has the columns a, needed one of"),
    "latin.csv": ("text\ncaf\xe9\n".encode("latin-1"), "is not UTF-8 text"),
    "latin.json": ('[{"text": "caf\xe9"}]'.encode("latin-1"), "is not UTF-8 text"),
    "code.py": ("print()", "is of no kind that is read: .jsonl, .ndjson"),
    "words": ("words", "is of no kind that is read"),
    "a.gz": ("words", "is of no kind that is read"),
    "a.parquet.gz": ("words", "is of no kind that is read"),
    "a.zst": ("words", "is of no kind that is read"),
    "a.npy.zst": ("words", "is of no kind that is read"),
    "a.jsonl.zst.gz": ("words", "is of no kind that is read"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_with_a_named_file_is_said(tmp_path, name):
    content, wanted = FAULTS[name]
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        scan([path], VOCAB)
    assert wanted in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_folder_says_what_it_reads_and_leaves_out(tmp_path):
    write(tmp_path, "data.jsonl", GOOD)
    write(tmp_path, "more.md", "words")
    about = ("README.md", "LICENSE.txt", "dataset_info.json", "run.sh", "x.gz")
    for name in about:
        write(tmp_path, name, '{"features": {}}')
    corpus = scan([tmp_path], VOCAB)
    assert corpus.kinds == {".jsonl": 1, ".md": 1}
    assert sorted(path.name for path in corpus.left_out) == sorted(about)
    named = scan([tmp_path / "README.md"], VOCAB)
    assert read_all(named) == [Text(text='{"features": {}}')]


def test_a_wrong_record_in_a_folder_is_no_reason_to_leave_its_file_out(tmp_path):
    write(tmp_path, "data.jsonl", GOOD)
    write(tmp_path, "one.json", '{"text": 3}')
    write(tmp_path, "array.json", '[{"words": "a"}]')
    with pytest.raises(DataError, match="2 problems"):
        scan([tmp_path], VOCAB)


# --- bounds


def repeated(values: list[str], rows: int):
    """A column of so many rows, each of which refers to the same values."""
    indices = arrow.array(np.arange(rows) % len(values), arrow.int32())
    return arrow.DictionaryArray.from_arrays(indices, arrow.array(values))


def as_stream(columns) -> bytes:
    table, out = arrow.table(columns), io.BytesIO()
    with arrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def as_view(text: str, rows: int) -> bytes:
    return as_stream({"text": arrow.array([text] * rows, arrow.string_view())})


HUGE = "a" * (17 << 20)  # one more byte than MiB that a record may have
TURN = arrow.array([{"role": "user"}] * 64)
BOMBS = {
    "a.parquet": lambda: table_bytes(arrow.table({"text": [HUGE] * 64}), compression="zstd"),
    "b.parquet": lambda: table_bytes(
        arrow.table({"messages": [[{"role": "user", "content": HUGE}]] * 64}), compression="zstd"
    ),
    "c.parquet": lambda: table_bytes(
        arrow.table({"input_ids": [np.zeros(20_000_000, np.int32)]}), compression="zstd"
    ),
    "d.arrow": lambda: as_stream({"text": repeated([HUGE], 64)}),
    "e.arrow": lambda: as_stream({"text": arrow.array(["a"] * 5 + [HUGE, "b"])}),
    "f.feather": lambda: as_view("a" * (17 << 20), 3),
}


@pytest.mark.parametrize("name", BOMBS)
def test_rows_that_are_too_long_are_refused_before_they_are_held(tmp_path, name):
    """Some kilobytes of file, of which a batch of rows would be a gigabyte."""
    path = write(tmp_path, name, BOMBS[name]())
    usual = arrow.default_memory_pool()
    counted = arrow.proxy_memory_pool(usual)
    arrow.set_memory_pool(counted)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"\.[a-z]+ has a row longer than 16 MiB"):
            scan([path], VOCAB)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        arrow.set_memory_pool(usual)
    assert most < 16e6
    assert counted.max_memory() < 300e6


@pytest.mark.parametrize(
    "column",
    [
        arrow.array([[1, 2]] * 9, arrow.list_view(arrow.int8())),
        arrow.DictionaryArray.from_arrays(arrow.array([0] * 9), arrow.array([[1, 2]])),
        arrow.RunEndEncodedArray.from_arrays([9], ["a"]),
    ],
    ids=["list_view", "dictionary of lists", "run ends"],
)
def test_columns_whose_size_is_not_known_are_refused(tmp_path, column):
    path = write(tmp_path, "a.arrow", as_stream({"text": column}))
    with pytest.raises(DataError, match=r"has a column of .*, which is not read: write it as text"):
        scan([path], VOCAB)


def test_values_that_are_stored_once_are_read_in_every_row(tmp_path):
    """Dictionaries, views and values of some MiB, of which few rows are decoded at a time."""
    wanted = [Text(text=each) for each in ("b" * 3_000_000, "c") * 40]
    texts = [each.text for each in wanted]
    of_kinds = {
        "a.parquet": table_bytes(arrow.table({"text": texts}), compression="zstd"),
        "b.parquet": table_bytes(arrow.table({"text": texts}), use_dictionary=False),
        "c.arrow": as_stream({"text": repeated(texts[:2], 80)}),
        "d.arrow": as_stream({"text": arrow.array(texts, arrow.string_view())}),
    }
    for name, content in of_kinds.items():
        assert read_all(scan([write(tmp_path, name, content)], VOCAB)) == wanted, name


def test_rows_that_unpack_without_end_are_refused(tmp_path, monkeypatch):
    """By the same limit as what is packed by gzip; doing what is said helps."""
    records = [{"text": "word " * 2_000}] * 300
    path = write(tmp_path, "a.parquet", as_parquet(records, compression="zstd"))
    assert len(scan([path], VOCAB)) == 300
    monkeypatch.setattr(stored, "_ALWAYS_UNPACKED_BYTES", 1_000_000)
    with pytest.raises(DataError, match=r"200 times larger unpacked.*\(rows as \.jsonl\)"):
        scan([path], VOCAB)
    assert len(scan([write(tmp_path, "a.jsonl", as_lines(records))], VOCAB)) == 300


@pytest.mark.parametrize("kind", ["between batches", "no end", "in a batch", "twice"])
def test_an_arrow_stream_that_is_not_whole_is_refused(tmp_path, kind):
    whole = as_arrow(RECORDS)
    batches = as_arrow(RECORDS[:8])  # two of the nine, as if the writer were killed after them
    contents = {
        "between batches": (batches[:-8], "a.arrow is an Arrow stream without its end: it was cut"),
        "no end": (whole[:-8], "is an Arrow stream without its end: it was cut"),
        "in a batch": (whole[:-100], "is not an Arrow file that can be read"),
        "twice": (whole * 2, f"has {len(whole):,} bytes behind the end of its Arrow stream"),
    }
    content, told = contents[kind]
    with pytest.raises(DataError, match=told):
        scan([write(tmp_path, "a.arrow", content)], VOCAB)
    assert len(scan([write(tmp_path, "a.arrow", whole)], VOCAB)) == len(RECORDS)


LONG = {
    "a.jsonl": as_lines([{"text": "a" * 200}]),
    "a.json": json.dumps([{"text": "a" * 200}]),
    "a.csv": as_csv([{"text": "a" * 200}]),
    "b.csv": as_csv([{"text": "a\n" * 100}]),
    "a.parquet": as_parquet([{"text": "a" * 200}]),
    "a.arrow": as_arrow([{"text": "a" * 200}]),
}
if array_record:
    LONG["a.array_record"] = as_array_record([json.dumps({"text": "a" * 200}).encode()])
    FAULTS |= {
        "plain.array_record": ("abc", "is not an ArrayRecord file that can be read"),
        "cut.array_record": (
            WRITTEN["q.array_record"][:40_000],
            "is not an ArrayRecord file that can be read",
        ),
        "words.array_record": (as_array_record([b'{"text": "a"}', b"b"]), "record 2 is not JSON"),
        "lines.array_record": (as_array_record([b"{\n]"]), "has a record 1 that is not JSON"),
        "twice.array_record": (
            as_array_record([b'{"text": "a",\n"text": "b"}']),
            "has a record 1 that is not JSON: has the key text twice",
        ),
        "features.array_record": (
            as_array_record([as_example({"inputs": [1, 2]})]),
            "has the keys inputs, needed",
        ),
    }


@pytest.mark.parametrize("name", LONG)
def test_a_record_has_a_largest_size(tmp_path, monkeypatch, name):
    path = write(tmp_path, name, LONG[name])
    assert len(scan([path], VOCAB)) == 1
    for module in (kinds,):
        monkeypatch.setattr(module, "RECORD_BYTES", 100)
    with pytest.raises(DataError, match="longer than"):
        scan([path], VOCAB)


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.csv", "a.txt", "a.json.gz", "a.txt.zst", "a.parquet"]
)
def test_a_large_file_is_not_held_in_memory(tmp_path, name):
    """96 MB of records, and what Python holds at most while it indexes and reads them."""
    records = [{"text": "a word or two " * 6_000}] * 1_200
    written = {
        "a.json": lambda: json.dumps(records),
        "a.jsonl": lambda: as_lines(records),
        "a.csv": lambda: as_csv(records),
        "a.txt": lambda: "a word or two " * 7_200_000,
        "a.json.gz": lambda: gzip.compress(json.dumps(records).encode(), 1),
        "a.txt.zst": lambda: as_zstd("a word or two " * 7_200_000),
        "a.parquet": lambda: as_parquet(records, row_group_size=50),
    }
    path = write(tmp_path, name, written[name]())
    del records
    tracemalloc.start()
    try:
        corpus = scan([path], VOCAB)
        assert corpus.content(0, 0, 100)
        assert corpus.content(len(corpus) - 1, 0, 100)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert corpus.nbytes_N.sum() > 90e6
    assert most < 24e6


def test_what_the_program_zstd_packed_is_read_and_its_checksum_compared(tmp_path):
    path = write(tmp_path, "a.txt.zst", ZSTD_TEXT)
    assert read_all(scan([path], VOCAB)) == [Text(text=ZSTD_LINE * 8)]
    write(tmp_path, "a.txt.zst", ZSTD_TEXT[:-1] + bytes([ZSTD_TEXT[-1] ^ 1]))
    with pytest.raises(DataError, match=r"a.txt.zst is not a whole zstd file: .*checksum"):
        scan([path], VOCAB)


@pytest.mark.parametrize(("name", "pack"), [(".gz", gzip.compress), (".zst", as_zstd)])
def test_what_unpacks_without_end_is_refused_before_it_fills_the_disk(
    tmp_path, monkeypatch, name, pack
):
    path = write(tmp_path, f"zeros.txt{name}", pack(bytes(3_000_000)))
    assert len(scan([path], VOCAB)) == 1
    monkeypatch.setattr(stored, "_ALWAYS_UNPACKED_BYTES", 1_000_000)
    with pytest.raises(DataError, match=r"200 times larger unpacked.*unpack it yourself"):
        scan([path], VOCAB)
    unpacked = write(tmp_path, "zeros.txt", bytes(3_000_000))
    assert len(scan([unpacked], VOCAB)) == 1


def test_no_room_to_unpack_is_said(tmp_path, monkeypatch):
    path = write(tmp_path, "a.txt.gz", gzip.compress(b"words"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(stored._UNPACKING, ".gz", full)
    with pytest.raises(DataError, match=r"does not fit unpacked into .* or set TMPDIR"):
        scan([path], VOCAB)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        *(("a.parquet", "pyarrow"), ("a.arrow", "pyarrow"), ("a.array_record", "array-record")),
        ("a.jsonl.zst", "pyarrow"),
    ],
)
def test_what_a_package_is_missing_for_says_how_to_get_it(tmp_path, monkeypatch, name, package):
    path = write(tmp_path, name, b"anything")
    records = ("array_record", "array_record.python", "array_record.python.array_record_module")
    for module in ("pyarrow", "compression.zstd", *records):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"needs {package}.*pip install 'deepseek-mtp\[data\]'"):
        scan([path], VOCAB)


@pytest.mark.skipif(not array_record, reason="needs array-record")
def test_every_feature_of_an_example_is_a_key(tmp_path):
    """Of those that are none, as images, only the name is looked at."""
    ids = {"input_ids": [3, 300, 4], "loss_mask": [0, 1, 1]}
    records = [as_example(ids), as_example({"text": ["a"], "image": [b"\xff"], "score": [0.5]})]
    corpus = scan([write(tmp_path, "a.array_record", as_array_record(records))], VOCAB)
    assert read_all(corpus) == [TokenIds(**ids), Text(text="a")]


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


@pytest.mark.parametrize("name", ["o.arrow", "p.feather", "k.parquet", "q.array_record"])
def test_damaged_rows_are_an_error_or_text_and_nothing_else(tmp_path, name):
    """Sizes and offsets that point anywhere; a bit of the text itself may be another."""
    if name not in WRITTEN:
        pytest.skip("needs array-record")
    content = WRITTEN[name]
    used = len(content.rstrip(b"\0"))
    for place in np.random.default_rng(0).integers(0, used, 60):
        path = write(tmp_path, name, flipped(content, int(place)))
        with suppress(DataError):
            read_all(scan([path], VOCAB))


DAY = arrow.table({"text": arrow.array([2**60], arrow.date64())})


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", f"messages\n{'[' * 100_000}\n", ":2 has a cell that is not JSON: maximum rec"),
        ("a.jsonl", '{"\\u001b[2J\\ud800": 1}', r":1 has the keys '\x1b[2J\ud800', needed"),
        ("a.jsonl", '{"conversations": [{"from": [], "value": ""}]}', "[0] is from [], known are"),
        ("a.jsonl", f'{{"input_ids": [1], "labels": ["{"x" * 9999}"]}}', "x... (10001 characters)"),
        ("a.parquet", table_bytes(DAY), " is not a parquet file that can be read: date value"),
    ],
    ids=["nested", "control codes", "a list", "long", "year"],
)
def test_what_nobody_expects_is_a_printable_line(tmp_path, name, content, told):
    with pytest.raises(DataError) as error:
        scan([write(tmp_path, name, content)], VOCAB)
    assert told in str(error.value)
    assert all(line.isprintable() and len(line) < 1200 for line in str(error.value).splitlines())

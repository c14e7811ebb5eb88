"""Throw malformed training data at its readers; must not know how they read.

`python -m tools.fuzz_data --seconds 600`, as tools/fuzz_inputs.py does it for checkpoints. A file
is either read, then its documents are tokens of the vocabulary and batches hold every one of them;
or it is refused by one error that can be printed. A sound file is read as what was written to it.
"""

import argparse
import csv
import functools
import gzip
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from pyarrow import parquet

from finetune.data.corpus import scan
from finetune.data.packing import Packer
from finetune.data.records import parse_record
from finetune.data.tokens import TextEncoder, TokenDocuments
from mtp_model.files.local import LocalPlace
from mtp_model.problems import UserError
from tools.fuzz_inputs import INSERTED, JUNK, check_refusal, rounds, spoilt, spoilt_text
from tools.make_tiny_checkpoint import make_tiny_checkpoint

VOCAB = 384
EXAMPLES = 300
TEMPLATE = """{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.name or m.tool_calls -}}
{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""

TEXTS = st.sampled_from(["a", "def f():\n    pass\r\n", "", "émigré 日本", "\x1b[2J", "\0", "﻿x"])
SWITCHES = st.fixed_dictionaries({}, optional={"weight": st.integers(0, 1), "train": st.booleans()})
ANSWERS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.sampled_from("xy")},
    optional={"name": st.just("name"), "tool_calls": st.just([{"function": {"name": "f"}}])},
)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "tool"]), "content": st.just([{"type": "text", "text": "q"}])}
)
SHAREGPT = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": TEXTS})
IDS = st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=3)
BITS = st.lists(st.integers(0, 1), min_size=3, max_size=3)
SOUND = st.one_of(
    st.fixed_dictionaries({"text": TEXTS}),
    st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}),
    st.fixed_dictionaries({"instruction": TEXTS, "output": TEXTS}, optional={"input": TEXTS}),
    st.fixed_dictionaries({"input_ids": IDS}, optional={"loss_mask": BITS, "attention_mask": BITS}),
    IDS.map(lambda ids: {"input_ids": ids, "labels": [ids[0], -100, ids[2]]}),
    st.tuples(TURNS, ANSWERS).map(lambda turns: {"messages": list(turns)}),
    st.lists(SHAREGPT, min_size=1, max_size=3).map(lambda turns: {"conversations": turns}),
    st.tuples(TURNS, ANSWERS, SWITCHES).map(
        lambda made: {"prompt": [made[0]], "completion": [made[1] | made[2]]}
    ),
)
WRONG_BYTES = [b"\xff", b"\xed\xa0\x80", b"\xc3", b"\xfe\xff", b"\0", b"\r", b'"']
FIRST = {"text": "something to learn"}
ROWS: list[dict[str, Any]] = [
    {"text": "a"},
    {"prompt": "a", "completion": 'b,\n"c"'},
    {"messages": [{"role": "assistant", "content": "x"}]},
    {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]},
]
# What no reader expects in a column: times beyond Python's, nested and binary values, no UTF-8.
CELLS = st.sampled_from(
    [
        pyarrow.array([2**52], pyarrow.timestamp("s")),
        pyarrow.array([1], pyarrow.timestamp("ns")),
        pyarrow.array([2**62], pyarrow.date64()),
        pyarrow.array([b"\xff"], pyarrow.binary()),
        pyarrow.array([b"\xff"], pyarrow.binary()).view(pyarrow.string()),
        pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        pyarrow.array([float("nan")]),
        pyarrow.array([[{"role": "user", "content": b"\xff"}]]),
        pyarrow.nulls(1),
    ]
)
TEXT_COLUMN = pyarrow.array(["text"])
COLUMNS = st.sampled_from(["text", "messages", "input_ids", "prompt", "completion", "other", "\0"])


class DataFile(NamedTuple):
    """A file, and what is in it; None: whatever the readers say, as long as they say it well."""

    name: str
    content: bytes
    values: list[Any] | None


def as_lines(values: list[Any]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def as_indented(values: list[Any]) -> bytes:
    return "\n".join(json.dumps(v, indent=1, ensure_ascii=False) for v in values).encode(
        errors="surrogatepass"
    )


def as_table(values: list[Any]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, dict.fromkeys(key for value in values for key in value))
    writer.writeheader()
    for value in values:
        json_in = {k: v if isinstance(v, str) else json.dumps(v) for k, v in value.items()}
        writer.writerow(json_in)
    return out.getvalue().encode(errors="surrogatepass")


def as_parquet(columns: list[tuple[str, pyarrow.Array]]) -> bytes:
    out = io.BytesIO()
    names, arrays = [name for name, _ in columns], [array for _, array in columns]
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names), out)
    return out.getvalue()


WRITERS: dict[str, Callable[[list[Any]], bytes]] = {
    "a.jsonl": as_lines,
    "b.json": lambda values: json.dumps(values, indent=1).encode(),
    "c.json": as_indented,
    "d.ndjson.gz": lambda values: gzip.compress(as_lines(values), mtime=0),
}


@st.composite
def json_files(draw: st.DrawFn) -> DataFile:
    """Records, of which one may be spoilt, in a file whose text may be."""
    values: list[Any] = [FIRST, *draw(st.lists(SOUND, max_size=3))]
    fault = draw(st.sampled_from(["", "record", "records", "text", "bytes", "half"]))
    if fault == "record":
        values[-1] = draw(spoilt(draw(spoilt(values[-1]))))
    elif fault == "records":
        values = draw(st.lists(JUNK, max_size=3))
    name = draw(st.sampled_from(list(WRITERS)))
    content = WRITERS[name](values)
    return DataFile(name, draw(damaged(content, fault)), None if fault else values)


@st.composite
def tables(draw: st.DrawFn) -> DataFile:
    """Rows of one kind of record; cells of other kinds, other keys, and text that is no table."""
    first = draw(st.sampled_from(ROWS))
    values: list[Any] = [first]
    fault = draw(st.sampled_from(["", "record", "text", "bytes", "cell"]))
    if fault == "record":
        found = draw(spoilt(first))
        values.append(found if isinstance(found, dict) else {str(found): found})
    elif fault == "cell":
        cell = draw(st.sampled_from(INSERTED)).decode()
        values.append({**first, draw(st.sampled_from(list(first))): cell})
    content = as_table(values)
    return DataFile("t.csv", draw(damaged(content, fault)), None if fault else values)


@st.composite
def parquets(draw: st.DrawFn) -> DataFile:
    """Columns of the wrong types, names twice, and files that are none."""
    columns = draw(st.lists(st.tuples(COLUMNS, CELLS), max_size=3))
    columns.append((draw(COLUMNS), TEXT_COLUMN))
    content = as_parquet(columns)
    return DataFile("p.parquet", draw(damaged(content, draw(st.sampled_from(["", "bytes"])))), None)


@st.composite
def arrows(draw: st.DrawFn) -> DataFile:
    """The same columns, as a stream or a file, whose sizes and offsets may be any."""
    columns = [*draw(st.lists(st.tuples(COLUMNS, CELLS), max_size=3)), ("text", TEXT_COLUMN)]
    table = pyarrow.Table.from_arrays([each for _, each in columns], [name for name, _ in columns])
    out, begin = io.BytesIO(), draw(st.sampled_from([pyarrow.ipc.new_stream, pyarrow.ipc.new_file]))
    with begin(out, table.schema) as writer:
        writer.write_table(table)
    fault = draw(st.sampled_from(["", "bytes"]))
    return DataFile("a.arrow", draw(damaged(out.getvalue(), fault)), None)


@st.composite
def token_files(draw: st.DrawFn) -> DataFile:
    """Token ids of several kinds, each with a header of its own or none."""
    ids = np.array(draw(st.lists(st.integers(2, VOCAB - 1), min_size=2, max_size=9)))
    name, content = draw(
        st.sampled_from(
            [
                ("a.npy", as_npy(ids)),
                ("a.npy", as_npy(ids.astype(">u2"))),
                ("a.uint16.bin", ids.astype("<u2").tobytes()),
                ("a.int32.bin", ids.astype("<i4").tobytes()),
                ("a.bin", np.array([20240520, 1, ids.size] + [0] * 253, "<i4").tobytes()),
            ]
        )
    )
    content += ids.astype("<u2").tobytes() if name == "a.bin" else b""
    fault = draw(st.sampled_from(["", "bytes"]))
    values = None if fault else [{"input_ids": ids.tolist()}]
    return DataFile(name, draw(damaged(content, fault)), values)


def as_npy(ids: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, ids)
    return out.getvalue()


@st.composite
def proses(draw: st.DrawFn) -> DataFile:
    """Text, in UTF-8 or not, and packed or not."""
    content = draw(TEXTS).encode() * draw(st.sampled_from([1, 40, 20_000]))
    content = draw(damaged(content, draw(st.sampled_from(["", "text", "bytes"]))))
    if draw(st.booleans()):
        fault = draw(st.sampled_from(["", "bytes"]))
        return DataFile("p.md.gz", draw(damaged(gzip.compress(content, mtime=0), fault)), None)
    return DataFile("p.txt", content, None)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, fault: str) -> bytes:
    """The bytes with some of them replaced, repeated or left out, as the fault says.

    half: a string of JSON begins with half of a UTF-16 pair.
    """
    if fault == "text":
        return draw(spoilt_text(content))
    if fault == "half" and len(parts := content.split(b'": "')) > 1:
        at = draw(st.integers(1, len(parts) - 1))
        return b'": "'.join([*parts[:at], b"\\ud800" + parts[at], *parts[at + 1 :]])
    if fault != "bytes":
        return content
    at = draw(st.integers(0, len(content)))
    wrong = draw(st.sampled_from(WRONG_BYTES))
    return content[:at] + wrong + content[at + draw(st.integers(0, 3)) :]


def check_data(folder: Path, encoder: TextEncoder, made: DataFile) -> None:
    """Scan it, read every document of it, and pack them."""
    path = folder / made.name
    path.write_bytes(made.content)
    try:
        corpus = scan([path], VOCAB, encoder.chats)
        documents = TokenDocuments(corpus, encoder, VOCAB)
        batches = [batch for batch, _ in Packer(documents, rows=2, row_tokens=64, seed=0, epochs=1)]
    except UserError as error:
        check_refusal(error, made.values is not None)
        return
    count = 0
    for number in range(len(documents)):
        tokens = documents[number]
        while True:
            count += tokens.ids.size
            assert tokens.ids.shape == tokens.loss_mask.shape
            assert ((tokens.ids >= 0) & (tokens.ids < VOCAB)).all()
            assert np.isin(tokens.loss_mask, (0, 1)).all()
            if tokens.following is None:
                break
            tokens = documents.stretch(number, tokens.following)
    assert count == sum(int((batch.segment_ids_BT > 0).sum()) for batch in batches)
    if made.values is not None:
        read = [corpus.read(number) for number in range(len(corpus))]
        days = [getattr(record, "day", None) for record in read]
        written = [parse_record(value, VOCAB) for value in made.values]
        assert [as_plain(r) for r in read] == [as_plain(w) for w in written], days


def as_plain(record: Any) -> dict[str, Any]:
    """A record without the day of its file."""
    return {key: value for key, value in vars(record).items() if key != "day"}


@functools.cache
def make_encoder() -> TextEncoder:
    """A tiny model's tokenizer with a chat template."""
    with tempfile.TemporaryDirectory() as temporary:
        make_tiny_checkpoint(Path(temporary, "m"), num_files=1, sizes={"num_hidden_layers": 1})
        Path(temporary, "m", "chat_template.jinja").write_text(TEMPLATE)
        return TextEncoder(LocalPlace(Path(temporary, "m")))


FILES = {
    **{"json": json_files(), "table": tables(), "parquet": parquets(), "prose": proses()},
    **{"arrow": arrows(), "tokens": token_files()},
}


def run(name: str, examples: int, seed_number: int) -> None:
    """One round of files of a kind, the same for the same seed; raises what it finds."""
    encoder = make_encoder()
    with tempfile.TemporaryDirectory() as temporary:
        bounded = settings(max_examples=examples, deadline=None, database=None)
        check = given(FILES[name])(lambda made: check_data(Path(temporary), encoder, made))
        bounded(seed(seed_number)(check))()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz what reads training data.")
    parser.add_argument("--seconds", type=float, default=60, help="how long; 60 by default")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    args = parser.parse_args()
    for count in rounds(args.seconds):
        for name in FILES:
            run(name, EXAMPLES, args.seed + count)
        print(f"\rround {count + 1}, seed {args.seed + count}", end="", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Files of token ids: the same documents from each kind, and no header believed."""

import io
import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from finetune.data import corpus as corpus_module
from finetune.data.corpus import scan
from finetune.data.files import arrays
from finetune.data.packing import Packer, Position
from finetune.data.records import DataError, TokenIds
from finetune.data.tokens import TextEncoder, TokenDocuments
from tools.make_tiny_checkpoint import make_tiny_checkpoint

VOCAB, EOS = 384, 1
DOCUMENTS = [[5, 6, 7, EOS], [8, EOS], [300, 301, 302, 303, EOS], [9, 10]]  # the last has no end
TOKENS = list(itertools.chain(*DOCUMENTS))


def npy(values, version=None) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, values, version)
    return out.getvalue()


def index(documents, code=8, size=2, **changes) -> bytes:
    """As Megatron describes it; documents of four tokens have two sequences."""
    halves = [[len(d)] if len(d) != 4 else [1, 3] for d in documents]
    lengths = list(itertools.chain(*halves))
    pointers = [size * sum(lengths[:n]) for n in range(len(lengths))]
    firsts = [0, *itertools.accumulate(map(len, halves))]
    given = {"magic": b"MMIDIDX\0\0", "version": 1, "code": code} | changes
    counts = given.get("counts", (len(lengths), len(firsts)))
    header = struct.pack("<9sQBQQ", given["magic"], given["version"], given["code"], *counts)
    parts = ("<i4", given.get("lengths", lengths)), ("<i8", given.get("pointers", pointers))
    parts += (("<i8", given.get("firsts", firsts)),)
    return header + b"".join(np.array(each, kind).tobytes() for kind, each in parts)


def llmc(magic: int, kind: str, values=TOKENS) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(TOKENS)
    return header.tobytes() + np.array(values, kind).tobytes()


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def numbers(kind: str, values=TOKENS) -> bytes:
    return np.array(values, kind).tobytes()


WRITTEN = {
    "int64.npy": {"a.npy": npy(np.array(TOKENS))},
    "big-endian.npy": {"a.npy": npy(np.array(TOKENS, ">u2"))},
    "uint16": {"a.uint16.bin": numbers("<u2")},
    "uint32": {"a.b.UINT32.bin": numbers("<u4")},
    "int32": {"a.int32.bin": numbers("<i4")},
    "Megatron": {"a.bin": numbers("<u2"), "a.idx": index(DOCUMENTS)},
    "Megatron, int32": {"a.bin": numbers("<i4"), "a.idx": index(DOCUMENTS, 4, 4)},
    "llm.c, GPT-2": {"a.bin": llmc(20240520, "<u2")},
    "llm.c, Llama 3": {"a.bin": llmc(20240801, "<u4")},
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """The files; the first, which is the one that is named."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / next(iter(files))


@pytest.mark.parametrize("kind", WRITTEN)
def test_every_kind_gives_the_same_documents(tmp_path, kind):
    path = write(tmp_path, WRITTEN[kind])
    for data in (path, tmp_path):  # a folder too
        corpus = scan([data], VOCAB, eos=(EOS,))
        found = [corpus.read(number) for number in range(len(corpus))]
        assert found == [TokenIds(input_ids=each) for each in DOCUMENTS]
        assert not corpus.has_text
    assert corpus.where(1) == f"{path}, record 2"
    assert corpus.num_idle == 0


def test_without_eos_a_file_is_one_document_but_with_an_index(tmp_path):
    plain = scan([write(tmp_path, {"a.uint16.bin": numbers("<u2")})], VOCAB)
    assert plain.read(0) == TokenIds(input_ids=TOKENS)
    assert len(scan([write(tmp_path, WRITTEN["Megatron"])], VOCAB)) == len(DOCUMENTS)


def test_two_ends_in_a_row_and_empty_documents_are_no_documents_of_nothing(tmp_path):
    doubled = [3, 4, EOS, EOS, 5, 6, EOS]
    corpus = scan([write(tmp_path, {"a.uint16.bin": numbers("<u2", doubled)})], VOCAB, eos=(EOS,))
    assert [len(corpus.read(n).input_ids) for n in range(len(corpus))] == [3, 1, 3]
    assert corpus.num_idle == 1, "an end alone has no target"
    with_gap = [DOCUMENTS[0], [], DOCUMENTS[1]]
    files = {"b.bin": numbers("<u2", DOCUMENTS[0] + DOCUMENTS[1]), "b.idx": index(with_gap)}
    assert len(scan([write(tmp_path, files)], VOCAB)) == 2


def test_blocks_are_no_boundaries(tmp_path, monkeypatch):
    path = write(tmp_path, WRITTEN["uint16"])
    indexed = write(tmp_path, WRITTEN["Megatron"])
    for size in range(1, len(TOKENS) + 2):
        monkeypatch.setattr(arrays, "_BLOCK_TOKENS", size)
        for each in (path, indexed):
            corpus = scan([each], VOCAB, eos=(EOS,))
            found = [corpus.read(number) for number in range(len(corpus))]
            assert found == [TokenIds(input_ids=each) for each in DOCUMENTS]


def test_training_reads_long_documents_in_stretches_and_goes_on_in_one(tmp_path, monkeypatch):
    """No token is lost or doubled, and any position goes on with the same bits."""
    make_tiny_checkpoint(tmp_path, num_files=1, sizes={"num_hidden_layers": 1})
    monkeypatch.setattr(corpus_module, "LONG_BYTES", 64)  # 32 tokens
    ids = np.random.default_rng(0).integers(2, VOCAB, 1000).astype("<u2")
    ids[[99, 100, 700]] = EOS
    path = write(tmp_path, {"a.uint16.bin": ids.tobytes()})
    encoder = TextEncoder(tmp_path)

    def packer(position=None):
        documents = TokenDocuments(scan([path], VOCAB, eos=(EOS,)), encoder, VOCAB)
        return Packer(documents, rows=2, row_tokens=50, seed=1, epochs=1, position=position)

    whole = list(packer())
    seen = np.concatenate([batch.tokens_BT[batch.segment_ids_BT != 0] for batch, _ in whole])
    assert sorted(seen) == sorted(ids)
    assert all((batch.loss_mask_BT == (batch.segment_ids_BT != 0)).all() for batch, _ in whole)
    for stop in range(len(whole) - 1):
        saved = json.loads(json.dumps(whole[stop][1].to_json()))
        rest = list(packer(Position.from_json(saved)))
        for (batch, _), (expected, _) in zip(rest, whole[stop + 1 :], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(batch, expected, strict=True))


def test_what_decides_the_documents_is_part_of_the_data(tmp_path):
    """Other numbers, or other boundaries, of the same bytes."""
    one = {"a.bin": numbers("<u2"), "a.idx": index(DOCUMENTS)}
    other = {"a.bin": numbers("<u2"), "a.idx": index([TOKENS[:5], TOKENS[5:]])}
    small = [3, 0, 4, 0]
    both = [one, other]
    both += [{f"{name}.bin": numbers("<u2", small)} for name in ("a.uint16", "a.uint32")]
    digests = {scan([write(tmp_path, files)], VOCAB).digest for files in both}
    assert len(digests) == 4


TWO = np.array([[1, 2], [3, 4]])
CUT = WRITTEN["int64.npy"]["a.npy"][:-8]
FAULTS = {
    "no type": ({"a.bin": numbers("<u2")}, "rename it to a.uint16.bin or a.uint32.bin or"),
    "half": (
        {"a.uint32.bin": numbers("<u2", [1])},
        "is 2 bytes, which is no whole number",
    ),
    "wrong type": (
        {"a.uint16.bin": numbers("<u4", [7, 70_000])},
        "has token 4464 at 2, read as uint16; the vocabulary is 0 to 383",
    ),
    "outside": (
        {"a.uint16.bin": numbers("<u2", [1, 2, 400])},
        "has token 400 at 2, read as",
    ),
    "below": (
        {"a.npy": npy(np.array([3, -1]))},
        "has token -1 at 1, read as int64",
    ),
    "2-D": (
        {"a.npy": npy(TWO)},
        "has '<i8' of shape (2, 2), needed whole numbers in one",
    ),
    "float": ({"a.npy": npy(np.ones(3))}, "has '<f8' of shape (3,), needed whole numbers"),
    "objects": ({"a.npy": npy(np.array([{}]))}, "has '|O' of shape (1,), needed whole numbers"),
    "cut": ({"a.npy": CUT}, "it is cut, or damaged"),
    "no npy": ({"a.npy": b"words"}, "is not a .npy file of version 1.0"),
    "version": ({"a.npy": npy(np.array(TOKENS), (2, 0))}, "is not a .npy file of version 1.0"),
    "huge": (
        {"a.npy": npy(np.array(TOKENS)).replace(b"(13,), ", b"(1<<60)")},
        "has a header that is none of NumPy's",
    ),
    "long": ({"a.npy": npy(np.array(TOKENS)).replace(b"(13,), ", b"(99,), ")}, "needed 920 for 99"),
    "more digits than Python writes": (
        {"a.npy": npy_header(f"{{'descr': '<i4', 'shape': (0x{'f' * 5000},)}}")},
        "bytes, too few for the tokens that its header tells of (a number of thousands of digits)",
    ),
    "a type of such digits": (
        {"a.npy": npy_header(f"{{'descr': 0x{'f' * 5000}, 'shape': (1,)}}")},
        "has a number of thousands of digits of shape (1,), needed whole numbers",
    ),
    "below nothing": (
        {"a.npy": npy_header("{'descr': '<i4', 'shape': (-2,)}") + bytes(8)},
        "bytes, too few for the tokens that its header tells of (-2)",
    ),
    "a deep header": (
        {"a.npy": npy_header("-" * 60_000)},
        "has a header that is none of NumPy's: it cannot be parsed",
    ),
    "no index": ({"a.bin": b"", "a.idx": b"words"}, "a.idx, that is none of Megatron's: remove it"),
    "index version": ({"a.bin": b"", "a.idx": index([], version=2)}, "has version 2 and type 8"),
    "floats": ({"a.bin": b"", "a.idx": index([], code=6)}, "has version 1 and type 6, needed"),
    "counts": (
        {"a.bin": b"", "a.idx": index([[1]], counts=(1 << 62, 2))},
        "is 62 bytes, needed 55,340,232,221,128,654,898 for 4,611,686,018,427,387,904 sequences",
    ),
    "modes": ({"a.bin": numbers("<u2"), "a.idx": index(DOCUMENTS) + b"\0" * 5}, "needed"),
    "gap": ({"a.bin": b"", "a.idx": index([[1]], pointers=[2])}, "follow each other without gaps"),
    "negative": ({"a.bin": b"", "a.idx": index([[1]], lengths=[-1])}, "follow each other without"),
    "order": (
        {"a.bin": numbers("<u2"), "a.idx": index(DOCUMENTS, firsts=[0, 3, 2, 4, 5])},
        "has documents that are not all of its sequences",
    ),
    "other data": (
        {"a.bin": numbers("<u2")[:-2], "a.idx": index(DOCUMENTS)},
        "tells of 26 bytes of tokens, not of 24",
    ),
    "llm.c": ({"a.bin": llmc(20240520, "<u4")}, "needed 1,050 for 13 tokens of uint16"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_file_is_said(tmp_path, fault):
    files, wanted = FAULTS[fault]
    path = write(tmp_path, files)
    with pytest.raises(DataError) as caught:
        scan([path], VOCAB)
    assert wanted in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_advice_of_a_file_without_a_type_helps(tmp_path):
    path = write(tmp_path, FAULTS["no type"][0])
    path.rename(tmp_path / "a.uint16.bin")
    assert len(scan([tmp_path], VOCAB, eos=(EOS,))) == len(DOCUMENTS)


def test_an_index_beside_its_data_is_not_left_out(tmp_path):
    write(tmp_path, WRITTEN["Megatron"] | {"other.idx": b""})
    assert [path.name for path in scan([tmp_path], VOCAB).left_out] == ["other.idx"]

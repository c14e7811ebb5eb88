"""The checkpoint directory: chunk grid, raw chunks, plain Orbax on top, derived checkpoints."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest

from mtp_model.checkpoint.chunks import MIB, ChunkPolicy, Leaf, chunk_file_name, chunk_shape
from mtp_model.checkpoint.claim import claim
from mtp_model.checkpoint.derived import ChangedLeaf, write_derived
from mtp_model.checkpoint.directory import Checkpoint, CheckpointError, open_checkpoint
from mtp_model.checkpoint.writer import ParamsWriter
from mtp_model.files.memory import AlignedBuffer

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
SMALL = ChunkPolicy(max_bytes=600, gather_below_bytes=300, row_multiple=4)

# Small tensors are gathered, 20 rows are cut evenly, 25 rows into 12 + 12 + 1 (an edge chunk).
LEAVES = {
    "embed_tokens.weight": ((20, 24), BF16, 0),
    "moe_layers.input_layernorm.weight": ((3, 24), BF16, 1),
    "moe_layers.mlp.experts.up_proj.weight": ((3, 4, 22, 24), FP8, 2),
    "moe_layers.mlp.experts.up_proj.weight_scale_inv": ((3, 4, 3, 2), F32, 2),
    "moe_layers.self_attn.o_proj.weight": ((3, 25, 40), FP8, 1),
    "norm.weight": ((24,), BF16, 0),
}


PROVENANCE = {
    "source": {
        "name": "here",
        "files": {"model.safetensors": {"size": 18, "header": "0" * 32, "tensors": [None]}},
    },
    "scope": "all",
    "dtype": "keep",
    "copies": "check",
    "mtp_hidden_state": "post_norm",
    "stale_copies": [],
    "tools": {"python": "3"},
}


def random_values(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        path: rng.standard_normal(shape).astype(F32).astype(dtype)
        for path, (shape, dtype, _) in LEAVES.items()
    }


def write_checkpoint(path: Path, values: dict[str, np.ndarray]) -> Checkpoint:
    """A complete checkpoint directory of these values, written the way the importer does it."""
    leaves = {
        name: Leaf.make(value.shape, value.dtype, LEAVES[name][2], SMALL)
        for name, value in values.items()
    }
    with claim(path):
        writer = ParamsWriter(path, leaves)
        digests = {name: write_leaf(writer, name, value) for name, value in values.items()}
        side = {"config.json": writer.write_side_file("config.json", [b'{"a": ', b"1}"])}
        side["sub/README.md"] = writer.write_side_file("sub/README.md", [b"hello"])
        writer.finish(
            provenance=PROVENANCE,
            digests=digests,
            headers={"model.safetensors": '{"x":{}}  '},
            side_files=side,
        )
    return open_checkpoint(path)


def write_leaf(writer: ParamsWriter, name: str, value: np.ndarray) -> dict[str, str]:
    leaf = writer.leaves[name]
    buffer = AlignedBuffer(leaf.chunk_bytes)
    digests = {}
    for coord in leaf.coords():
        box = tuple(slice(c * k, (c + 1) * k) for c, k in zip(coord, leaf.chunk, strict=True))
        chunk = np.zeros(leaf.chunk, leaf.dtype)
        part = value[box]
        chunk[tuple(map(slice, part.shape))] = part
        buffer.bytes[: leaf.chunk_bytes] = chunk.reshape(-1).view(np.uint8)
        digests[chunk_file_name(coord)] = writer.write_chunk(name, coord, buffer)
    return digests


@pytest.fixture
def values() -> dict[str, np.ndarray]:
    return random_values()


@pytest.fixture
def checkpoint(tmp_path: Path, values: dict[str, np.ndarray]) -> Checkpoint:
    return write_checkpoint(tmp_path / "ckpt", values)


def assert_same_bits(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("shape", "stack", "dtype", "chunk"),
    [
        ((129280, 7168), 0, BF16, (1280, 7168)),  # 1280 divides the vocabulary
        ((58, 256, 2048, 7168), 2, FP8, (1, 1, 2048, 7168)),  # an expert is one file
        ((58, 256, 7168, 2048), 2, F32, (1, 1, 3584, 2048)),
        ((58, 256, 16, 56), 2, F32, (1, 256, 16, 56)),  # scales: one file a layer
        ((58, 7168), 1, BF16, (1, 7168)),
        ((58, 576, 7168), 1, FP8, (1, 576, 7168)),
        ((58, 256), 1, F32, (1, 256)),
        ((129281, 7168), 0, BF16, (2304, 7168)),  # no divisor: nearly equal parts
        ((4, 1000, 500, 400), 2, FP8, (1, 125, 500, 400)),  # gathered, but not above the limit
    ],
)
def test_chunk_shape(shape: tuple[int, ...], stack: int, dtype: np.dtype, chunk: tuple[int, ...]):
    assert chunk_shape(shape, stack, dtype) == chunk
    assert math.prod(chunk) * dtype.itemsize <= 32 * MIB


def test_rows_of_a_chunk_are_a_multiple_of_the_block_height():
    policy = ChunkPolicy().with_block_rows(96)
    rows = chunk_shape((3, 18432, 7168), 1, BF16, policy)[1]
    assert rows % 96 == 0
    assert rows % 128 == 0


def test_every_element_is_in_exactly_one_span(values: dict[str, np.ndarray]):
    for name, value in values.items():
        leaf = Leaf.make(value.shape, value.dtype, LEAVES[name][2], SMALL)
        rows = leaf.tensor_shape[0]
        spans = [
            (coord, offset, nbytes)
            for index in np.ndindex(*leaf.shape[: leaf.num_stack_dims])
            for start in range(0, rows, 7)
            for coord, offset, nbytes in leaf.row_spans(index, start, min(start + 7, rows))
        ]
        assert sum(nbytes for *_, nbytes in spans) == value.nbytes
        assert {coord for coord, *_ in spans} == set(leaf.coords())
        touched = {(coord, b) for coord, at, n in spans for b in range(at, at + n)}
        assert len(touched) == value.nbytes


def test_reads_any_rows(checkpoint: Checkpoint, values: dict[str, np.ndarray]):
    for name, value in values.items():
        leaf = checkpoint.leaves[name]
        for index in np.ndindex(*leaf.shape[: leaf.num_stack_dims]):
            rows = leaf.tensor_shape[0]
            for start, stop in ((0, rows), (1, rows), (rows // 2, rows // 2 + 1), (0, 0)):
                got = checkpoint.read_rows(name, index, start, stop)
                assert_same_bits(got, value[index][start:stop])


def test_the_cases_are_what_they_claim_to_be(checkpoint: Checkpoint):
    chunks = {name: leaf.chunk for name, leaf in checkpoint.leaves.items()}
    assert chunks["moe_layers.mlp.experts.up_proj.weight_scale_inv"] == (1, 4, 3, 2)
    assert chunks["moe_layers.mlp.experts.up_proj.weight"] == (1, 1, 22, 24)
    assert chunks["moe_layers.self_attn.o_proj.weight"] == (1, 12, 40)  # 25 rows: an edge chunk
    assert chunks["embed_tokens.weight"] == (4, 24)


def test_large_chunks_are_written_past_the_page_cache(tmp_path: Path):
    value = np.random.default_rng(0).standard_normal((1031, 600)).astype(F32)  # 2.4 MB, odd
    leaf = Leaf.make(value.shape, value.dtype, 0)
    assert leaf.chunk_bytes % 4096
    writer = ParamsWriter(tmp_path, {"w": leaf})
    write_leaf(writer, "w", value)
    assert (tmp_path / "params/w/0.0").read_bytes() == value.tobytes()


def nested(values: dict[str, np.ndarray]) -> dict:
    tree: dict = {}
    for path, value in values.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def assert_same_tree(got: dict, wanted: dict) -> None:
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, dict):
            assert_same_tree(got[key], value)
        else:
            assert_same_bits(np.asarray(got[key]), value)


def test_orbax_alone_restores_params(checkpoint: Checkpoint, values: dict[str, np.ndarray]):
    tree, params = nested(values), checkpoint.params
    with ocp.StandardCheckpointer() as checkpointer:
        assert_same_tree(checkpointer.restore(params), tree)
        assert_same_tree(checkpointer.restore(params, tree), tree)
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert_same_tree(checkpointer.restore(params), tree)
    assert_same_tree(ocp_v1.load(str(params)), tree)


def test_orbax_alone_restores_params_onto_a_mesh(checkpoint: Checkpoint, values: dict):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tree, params = nested(values), checkpoint.params

    def halves(value: np.ndarray) -> jax.ShapeDtypeStruct:
        even = next((d for d, size in enumerate(value.shape) if size % 2 == 0), None)
        spec = jax.P(*("x" if d == even else None for d in range(value.ndim)))
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    abstract = jax.tree.map(halves, tree)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(params, abstract)
    for got in (restored, ocp_v1.load(str(params), abstract)):
        assert_same_tree(got, tree)
        for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(abstract), strict=True):
            assert leaf.sharding == wanted.sharding


def test_knows_its_side_files_and_layout(checkpoint: Checkpoint):
    assert checkpoint.config_dict == {"a": 1}
    assert checkpoint.side_files() == ("config.json", "sub/README.md")
    assert checkpoint.layout() == {"model.safetensors": '{"x":{}}  '}
    assert not (checkpoint.path / ".unfinished").exists()


def test_digests_are_those_of_the_files(checkpoint: Checkpoint):
    pieces = list(checkpoint.pieces())
    assert len(pieces) == sum(len(list(leaf.coords())) for leaf in checkpoint.leaves.values())
    assert all(piece.file.digest() == piece.digest for piece in pieces)
    assert checkpoint.damaged_files() == []
    (checkpoint.path / "sub/README.md").write_text("hullo")
    assert checkpoint.damaged_files() == ["sub/README.md"]


def test_derived_links_what_did_not_change(checkpoint: Checkpoint, values: dict, tmp_path: Path):
    changed = "moe_layers.self_attn.o_proj.weight"
    new = random_values(1)[changed].astype(F32).astype(BF16)  # another dtype than in base
    asked = []

    def rows(index: tuple[int, ...], start: int, stop: int) -> Callable[[], np.ndarray]:
        asked.append((stop - start) * new[0, 0].nbytes)
        return lambda: new[index][start:stop]

    derived = write_derived(
        checkpoint,
        tmp_path / "final",
        {changed: ChangedLeaf(dtype=BF16, rows=rows)},
        {"steps": 3},
        policy=SMALL,
    )
    assert max(asked) <= SMALL.max_bytes
    for name, value in (values | {changed: new}).items():
        for index in np.ndindex(*value.shape[: LEAVES[name][2]]):
            assert_same_bits(derived.read_rows(name, index, 0, value[index].shape[0]), value[index])
    for piece in derived.pieces():
        assert piece.file.digest() == piece.digest
        links = 1 if piece.path == changed else 2
        assert piece.file.stat().st_nlink == links, piece.file
    record = derived.provenance["derived"][0]
    assert record["changed"] == [changed]
    assert record["steps"] == 3
    assert derived.layout() == checkpoint.layout()
    assert derived.damaged_files() == []


def test_derived_copies_where_links_fail(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    derived = write_derived(checkpoint, tmp_path / "final", {}, {})
    for piece in derived.pieces():
        assert piece.file.digest() == piece.digest
        assert piece.file.stat().st_nlink == 1


def test_derived_that_fails_is_visibly_unfinished(checkpoint: Checkpoint, tmp_path: Path):
    def fail(*_: object) -> np.ndarray:
        raise RuntimeError("device lost")

    final = tmp_path / "final"
    change = {"norm.weight": ChangedLeaf(dtype=BF16, rows=fail)}
    with pytest.raises(RuntimeError, match="device lost"):
        write_derived(checkpoint, final, change, {})
    with pytest.raises(CheckpointError, match="is unfinished"):
        open_checkpoint(final)
    assert write_derived(checkpoint, final, {}, {}).path == final  # an unfinished one is replaced
    with pytest.raises(CheckpointError, match="is a complete checkpoint"):
        write_derived(checkpoint, final, {}, {})
    assert open_checkpoint(final).damaged_files() == []
    assert write_derived(checkpoint, final, {}, {}, overwrite=True).damaged_files() == []


def test_derived_refuses_wrong_requests(checkpoint: Checkpoint, tmp_path: Path):
    def one_row(*_: object) -> Callable[[], np.ndarray]:
        return lambda: np.zeros((1,), BF16)

    with pytest.raises(CheckpointError, match=r"has no leaf no\.such\.leaf to change"):
        write_derived(
            checkpoint, tmp_path / "a", {"no.such.leaf": ChangedLeaf(dtype=BF16, rows=one_row)}, {}
        )
    with pytest.raises(ValueError, match=r"norm.weight.* needed bfloat16\(24,\)"):
        write_derived(
            checkpoint, tmp_path / "b", {"norm.weight": ChangedLeaf(dtype=BF16, rows=one_row)}, {}
        )
    with pytest.raises(CheckpointError, match="is the checkpoint itself"):
        write_derived(checkpoint, checkpoint.path, {}, {}, overwrite=True)
    assert checkpoint.damaged_files() == []


def test_foreign_folders_are_never_touched(checkpoint: Checkpoint, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("mine", "file"):
        with pytest.raises(CheckpointError, match="not empty and no checkpoint directory"):
            write_derived(checkpoint, tmp_path / name, {}, {}, overwrite=True)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_one_writer_at_a_time(checkpoint: Checkpoint, tmp_path: Path):
    with (
        claim(tmp_path / "final"),
        pytest.raises(CheckpointError, match="another process is writing"),
    ):
        write_derived(checkpoint, tmp_path / "final", {}, {})


def test_every_other_folder_is_told_what_it_is(checkpoint: Checkpoint, tmp_path: Path):
    empty, tensors = tmp_path / "empty", tmp_path / "tensors"
    empty.mkdir()
    tensors.mkdir()
    (tensors / "model.safetensors").write_bytes(b"")
    cases = {
        tmp_path / "absent": "does not exist; name a checkpoint directory",
        tensors / "model.safetensors": "is a file",
        empty: "is no checkpoint directory",
        tensors: "is a safetensors checkpoint.*convert-deepseek import",
    }
    for path, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
    (checkpoint.path / "COMPLETE").rename(checkpoint.path / "elsewhere")
    with pytest.raises(CheckpointError, match="has no COMPLETE file"):
        open_checkpoint(checkpoint.path)


def test_damage_is_told(checkpoint: Checkpoint):
    (checkpoint.params / "norm.weight/0").unlink()
    with pytest.raises(CheckpointError, match=r"norm\.weight/0 is missing"):
        checkpoint.read_rows("norm.weight", (), 0, 24)
    chunk = checkpoint.params / "embed_tokens.weight/0.0"
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(ValueError, match="ends at byte 100, 192 were needed"):
        checkpoint.read_rows("embed_tokens.weight", (), 0, 12)
    zarray = checkpoint.params / "norm.weight/.zarray"
    metadata = json.loads(zarray.read_text())
    zarray.write_text(json.dumps(metadata | {"compressor": {"id": "zstd", "level": 1}}))
    with pytest.raises(CheckpointError, match=r"norm\.weight was not written by this toolkit"):
        open_checkpoint(checkpoint.path)
    (checkpoint.path / "config.json").unlink()
    (checkpoint.path / "COMPLETE").write_text('{"format_version": 7}')
    with pytest.raises(CheckpointError, match="format version 7"):
        open_checkpoint(checkpoint.path)


def test_unwritten_chunks_and_reserved_names_are_refused(tmp_path: Path):
    leaves = {"norm.weight": Leaf.make((24,), BF16, 0)}
    writer = ParamsWriter(tmp_path, leaves)
    with pytest.raises(CheckpointError, match=r"1 chunks of norm\.weight were not written"):
        writer.finish(provenance={}, digests={}, headers={}, side_files={})
    with pytest.raises(CheckpointError, match="needs for itself"):
        writer.write_side_file("params/readme", [b""])
    assert not (tmp_path / "COMPLETE").exists()

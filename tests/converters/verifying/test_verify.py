"""Verify says yes only where bytes, digests and logits are right, and names what is not."""

import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from changed import leaf_of_rows
from imported import import_folder, import_tiny
from verified import Pair, opened, storage

import converters.verifying.logits
from converters.exporting.encode import EncodedRows
from converters.exporting.exporter import export_checkpoint
from converters.verifying.digests import check_digests
from converters.verifying.logits.check import (
    DOCUMENTS,
    LENGTH,
    LogitsCheck,
    check_logits,
    seeded_batch,
)
from converters.verifying.logits.depths import TOLERANCE
from converters.verifying.verify import StorageCheck
from mtp_model.checkpoint.derived import write_derived
from mtp_model.checkpoint.directory import Checkpoint, CheckpointError, open_checkpoint
from mtp_model.problems import ProblemsError, UserError
from mtp_model.reporting import to_json
from tools.make_tiny_checkpoint import make_tiny_checkpoint

MTP = "model.layers.4."
SCALES = ("", "_scale_inv")
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """An FP8 source and its import; tests copy what they change."""
    folder = tmp_path_factory.mktemp("kept")
    return folder / "source", import_tiny(folder, dtype="fp8")


@pytest.fixture
def copied(kept: Pair, tmp_path: Path) -> Pair:
    """The same, to be changed."""
    source, checkpoint = (tmp_path / path.name for path in kept)
    shutil.copytree(kept[0], source)
    shutil.copytree(kept[1], checkpoint)
    return source, checkpoint


def differing(found: StorageCheck) -> set[str]:
    assert found.holds == all(difference.replaced for difference in found.differences)
    return {difference.name for difference in found.differences if not difference.replaced}


def logits(source: Path, checkpoint: Path) -> LogitsCheck:
    return check_logits(opened(source), open_checkpoint(checkpoint))


def edit(source: Path, name: str, change: Callable[[np.ndarray], object]) -> None:
    """Change the bytes (uint8) of a tensor of a safetensors checkpoint."""
    tensor = opened(source).tensors[name]
    content = np.fromfile(source / tensor.file, np.uint8)
    change(content[tensor.begin : tensor.begin + tensor.nbytes])
    content.tofile(source / tensor.file)


def swap(source: Path, first: str, second: str) -> None:
    """Exchange the bytes of two tensors of one shape."""
    parts: list[np.ndarray] = []
    edit(source, first, lambda raw: parts.append(raw.copy()))
    edit(source, second, lambda raw: parts.append(raw.copy()))
    assert parts[0].size == parts[1].size
    for name, part in zip((first, second), reversed(parts), strict=True):
        edit(source, name, lambda raw, part=part: raw.__setitem__(slice(None), part))


def trained(base: Path, dst: Path, leaves: list[str], dtype: np.dtype = BF16) -> Checkpoint:
    """A checkpoint whose leaves got new random weights, as training leaves them."""
    checkpoint = open_checkpoint(base)
    rng = np.random.default_rng(3)

    def rows(path: str):
        shape = checkpoint.leaves[path].tensor_shape[1:]
        gain = shape[-1] ** -0.5 if shape else 1.0
        return lambda _index, start, stop: (
            gain * rng.standard_normal((stop - start, *shape))
        ).astype(dtype)

    changed = {path: leaf_of_rows(dtype, rows(path)) for path in leaves}
    return write_derived(checkpoint, dst, changed, {"by": "test"})


@pytest.mark.parametrize(
    ("flavour", "dtype"),
    [("fp8", "bf16"), ("fp8", "f32"), ("bf16", "keep"), ("bf16", "f32"), ("f32", "keep")],
)
def test_every_lossless_import_holds(tmp_path: Path, flavour: str, dtype: str):
    checkpoint = import_tiny(tmp_path, dtype=flavour, import_options={"dtype": dtype})
    found = storage(tmp_path / "source", checkpoint)
    assert found.holds
    assert not found.differences
    tensors = opened(tmp_path / "source").tensors.values()
    assert found.total.tensors == len(tensors)
    assert found.total.bytes == sum(tensor.nbytes for tensor in tensors)


def test_groups_are_the_parts_of_the_network(kept: Pair):
    found = storage(*kept)
    counts = {group: part.tensors for group, part in found.parts.items()}
    assert counts == {
        "embedding and head": 2,
        "attention": 40,
        "dense MLP": 12,
        "routed experts": 144,
        "shared experts": 12,
        "router": 4,
        "norms": 17,
        "MTP modules": 98,
        "copies": 2,
    }


def test_two_modules_without_copies_hold(tmp_path: Path):
    checkpoint = import_tiny(tmp_path, dtype="fp8", num_mtp=2, copies=False)
    found = storage(tmp_path / "source", checkpoint)
    assert found.holds
    assert "copies" not in found.parts


def test_import_that_rounds_is_told(tmp_path: Path):
    checkpoint = import_tiny(tmp_path, dtype="f32", import_options={"dtype": "bf16"})
    found = storage(tmp_path / "source", checkpoint)
    assert not found.holds
    assert 2**-9 < found.parts["dense MLP"].worst < 2**-7  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("scope", ["main", "mtp"])
def test_scope_of_the_checkpoint_is_what_is_compared(kept: Pair, tmp_path: Path, scope: str):
    source = kept[0]
    import_folder(source, tmp_path / "part", scope=scope)
    assert storage(source, tmp_path / "part").total.tensors == {"main": 231, "mtp": 103}[scope]
    other = {"main": "mtp", "mtp": "main"}[scope]
    with pytest.raises(ProblemsError, match=f"imported with --scope {scope}; it cannot"):
        storage(source, tmp_path / "part", scope=other)


def test_what_quantising_a_weight_left_in_memory_goes_once_it_was_compared(tmp_path: Path):
    checkpoint = import_tiny(tmp_path, dtype="fp8", import_options={"dtype": "bf16"})
    remembered: list[int] = []

    def count(done: int, total: int) -> None:
        if done > len(remembered) * total / 5:
            remembered.append(sum(type(found) is EncodedRows for found in gc.get_objects()))

    assert storage(tmp_path / "source", checkpoint, workers=1, progress=count).holds
    assert len(remembered) == 5
    assert max(remembered) <= 1


def test_swapped_tensors_of_the_source_are_both_named(copied: Pair):
    names = [f"model.layers.3.mlp.experts.{expert}.up_proj.weight" for expert in (2, 9)]
    swap(copied[0], *names)
    found = storage(*copied)
    assert differing(found) == set(names)
    assert found.parts["routed experts"].differing == 2
    assert found.parts["routed experts"].worst > 0.5
    assert not found.parts["attention"].differing


def test_swapped_tensors_of_the_checkpoint_are_both_named(kept: Pair, tmp_path: Path):
    checkpoint = open_checkpoint(kept[1])
    leaves = "moe_layers.input_layernorm.weight", "moe_layers.post_attention_layernorm.weight"

    def rows_of(path: str):
        return lambda index, start, stop: checkpoint.read_rows(path, index, start, stop)

    pairs = zip(leaves, reversed(leaves), strict=True)
    changed = {path: leaf_of_rows(BF16, rows_of(other)) for path, other in pairs}
    write_derived(checkpoint, tmp_path / "swapped", changed, {})
    assert differing(storage(kept[0], tmp_path / "swapped")) == {
        f"model.layers.{layer}.{norm}_layernorm.weight"
        for layer in (2, 3)
        for norm in ("input", "post_attention")
    }


def test_one_bit_is_a_difference_and_its_size_is_told(copied: Pair):
    name = "model.layers.0.input_layernorm.weight"
    values = np.frombuffer(stored(copied[0], name).tobytes(), ml_dtypes.bfloat16).astype(np.float32)
    edit(copied[0], name, lambda raw: raw.view(ml_dtypes.bfloat16).__setitem__(5, 0))
    [difference] = storage(*copied).differences
    assert difference.name == name
    rest = np.delete(values, 5)
    assert difference.worst == pytest.approx(values[5] / np.abs(rest).max(), rel=1e-6)


def stored(source: Path, name: str) -> np.ndarray:
    tensor = opened(source).tensors[name]
    content = np.fromfile(source / tensor.file, np.uint8)
    return content[tensor.begin : tensor.begin + tensor.nbytes]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("model.norm.weight", np.array([np.nan], ml_dtypes.bfloat16)),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", np.array([np.inf], np.float32)),
    ],
)
def test_values_that_are_no_numbers_differ_infinitely(copied: Pair, name: str, bad: np.ndarray):
    edit(copied[0], name, lambda raw: raw.view(bad.dtype).__setitem__(0, bad[0]))
    found = storage(*copied)
    assert differing(found) == {name}
    assert found.total.worst == float("inf")
    assert json.loads(to_json({"worst": found.total.worst})) == {"worst": None}


def test_trained_weights_verify_against_their_export(kept: Pair, tmp_path: Path):
    leaves = ["mtp.eh_proj.weight", "mtp.block.mlp.experts.up_proj.weight"]
    checkpoint = trained(kept[1], tmp_path / "trained", leaves)
    export_checkpoint(checkpoint, tmp_path / "exported")
    assert storage(tmp_path / "exported", checkpoint.path).holds
    assert storage(kept[0], checkpoint.path, scope="main").holds
    found = storage(kept[0], checkpoint.path)
    experts = {f"{MTP}mlp.experts.{e}.up_proj.weight{s}" for e in range(12) for s in SCALES}
    assert differing(found) == {MTP + "eh_proj.weight", *experts}


def test_bf16_export_verifies(kept: Pair, tmp_path: Path):
    export_checkpoint(open_checkpoint(kept[1]), tmp_path / "exported", dtype="bf16")
    found = storage(tmp_path / "exported", kept[1])
    assert found.holds
    assert found.total.tensors == 183


def test_stale_copies_that_were_replaced_are_told_and_hold(tmp_path: Path):
    source, checkpoint = tmp_path / "source", tmp_path / "checkpoint"
    make_tiny_checkpoint(source)
    head = MTP + "shared_head.head.weight"
    edit(source, head, lambda raw: raw.__setitem__(slice(80), 0))
    import_folder(source, checkpoint, copies="main")
    found = storage(source, checkpoint)
    assert found.holds
    assert [(d.name, d.replaced) for d in found.differences] == [(head, True)]
    assert not found.parts["copies"].differing


def test_copy_that_became_stale_later_is_a_difference(copied: Pair):
    head = MTP + "shared_head.head.weight"
    edit(copied[0], head, lambda raw: raw.__setitem__(slice(80), 0))
    assert differing(storage(*copied)) == {head}


def test_another_network_is_refused(kept: Pair, tmp_path: Path):
    make_tiny_checkpoint(tmp_path / "other", sizes={"rope_theta": 5000, "hidden_size": 48})
    with pytest.raises(ProblemsError) as caught:
        storage(tmp_path / "other", kept[1])
    lines = sorted(" ".join(str(problem).split()) for problem in caught.value.problems)
    assert lines == [
        "config hidden_size is 48, the checkpoint's is 40",
        "config rope_theta is 5000.0, the checkpoint's is 1000.0",
    ]


def test_other_blocks_are_refused(kept: Pair, tmp_path: Path):
    make_tiny_checkpoint(tmp_path / "other", sizes={"weight_block_size": (16, 16)})
    with pytest.raises(ProblemsError, match=r"weight_block_size is \(16, 16\)"):
        storage(tmp_path / "other", kept[1])


def test_digests_of_an_untouched_checkpoint_hold(kept: Pair):
    told: list[tuple[int, int]] = []
    found = check_digests(
        open_checkpoint(kept[1]), progress=lambda done, total: told.append((done, total))
    )
    assert found.holds
    assert found.files == len(told)
    assert told[-1] == (found.bytes, found.bytes)


def test_every_damaged_file_is_named(copied: Pair):
    checkpoint = copied[1]
    flipped = checkpoint / "params" / "mtp.eh_proj.weight" / "0.0.0"
    flipped.write_bytes(bytes([flipped.read_bytes()[0] ^ 1]) + flipped.read_bytes()[1:])
    (checkpoint / "params" / "norm.weight" / "0").unlink()
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "params" / "_METADATA").write_text("{}")
    (checkpoint / "params" / "_CHECKPOINT_METADATA").write_text("{")
    (checkpoint / "params" / "array_metadatas" / "process_0").unlink()
    problems = check_digests(open_checkpoint(checkpoint)).problems
    assert {problem.subject: problem.detail.split(" (")[0] for problem in problems} == {
        "params/mtp.eh_proj.weight/0.0.0": "has other bytes than were written",
        "params/norm.weight/0": "cannot be read: No such file or directory",
        "tokenizer.json": "is gone or has other bytes than were written",
        "params/_METADATA": "is gone or is not what was written",
        "params/_CHECKPOINT_METADATA": "is gone or is not what was written",
        "params/array_metadatas/process_0": "is gone or is not what was written",
    }


@pytest.fixture(scope="module")
def kept_logits(kept: Pair, _torch: None) -> LogitsCheck:
    return logits(*kept)


def test_logits_of_an_import_agree(kept_logits: LogitsCheck):
    assert_agreement(kept_logits)


@pytest.mark.usefixtures("_torch")
def test_logits_of_an_import_to_bfloat16_agree(kept: Pair, tmp_path: Path):
    import_folder(kept[0], tmp_path / "checkpoint", dtype="bf16")
    assert_agreement(logits(kept[0], tmp_path / "checkpoint"))


def assert_agreement(found: LogitsCheck) -> None:
    assert found.holds
    assert [(d.depth, d.rows) for d in found.depths] == [(0, 90), (1, 86)]
    assert all(depth.argmax_agreement == 1 for depth in found.depths)
    assert all(0 < depth.relative_difference <= TOLERANCE for depth in found.depths)


@pytest.mark.usefixtures("_torch")
def test_logits_of_the_mtp_module_alone_agree(kept: Pair, tmp_path: Path):
    options = {"scope": "mtp", "mtp_hidden_state": "pre_norm"}
    import_folder(kept[0], tmp_path / "checkpoint", **options)
    [depth] = logits(kept[0], tmp_path / "checkpoint").depths
    assert depth.depth == 1
    assert depth.holds


@pytest.mark.usefixtures("_torch")
def test_logits_of_swapped_tensors_differ(copied: Pair):
    norms = MTP + "enorm.weight", MTP + "hnorm.weight"
    swap(copied[0], *norms)
    main, mtp = logits(*copied).depths
    assert main.holds
    assert mtp.relative_difference > 100 * TOLERANCE


@pytest.mark.usefixtures("_torch")
def test_logits_of_trained_weights_agree_with_their_export(kept: Pair, tmp_path: Path):
    paths = open_checkpoint(kept[1]).leaves
    leaves = [p for p in paths if p.startswith("mtp.") and p.endswith(".weight")]
    checkpoint = trained(kept[1], tmp_path / "trained", leaves, np.dtype(np.float32))
    export_checkpoint(checkpoint, tmp_path / "exported")
    found = logits(tmp_path / "exported", checkpoint.path)
    assert_agreement(found)
    assert found.rounded_leaves == tuple(sorted(leaves))
    main, mtp = logits(kept[0], checkpoint.path).depths
    assert main.holds
    assert mtp.relative_difference > 100 * TOLERANCE


def test_positions_without_a_defined_input_are_not_compared(kept_logits: LogitsCheck):
    depth = kept_logits.depths[1]
    assert len(depth.by_position) == LENGTH
    assert depth.by_position[-1] is None  # what follows the last token is unknown
    _, segments = seeded_batch(384)
    assert [(row > 0).sum() for row in segments] == [sum(lengths) for lengths in DOCUMENTS]


@pytest.mark.usefixtures("_torch")
def test_logits_that_do_not_fit_into_memory_say_so(kept: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("converters.verifying.logits.check.os.sysconf", lambda _: 100)
    with pytest.raises(CheckpointError, match=r"need 537.06 MB of memory, .* has 10.00 kB"):
        logits(*kept)


def test_logits_without_torch_say_what_to_install(kept: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "converters.verifying.logits.torch_reference", raising=False)
    monkeypatch.delattr(converters.verifying.logits, "torch_reference", raising=False)
    with pytest.raises(UserError, match=r"pip install 'deepseek-mtp\[verify\]'"):
        logits(*kept)

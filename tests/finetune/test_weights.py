"""Trained weights are written from the devices that hold them, row block by row block."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from imported import import_tiny
from jax._src.array import ArrayImpl
from jax.sharding import NamedSharding, PartitionSpec

from finetune.settings import BatchSettings, LoraSettings
from finetune.state import TrainState
from finetune.weights import (
    changed_leaf,
    load_for_training,
    open_trainable,
    recomputes_layers,
    write_final,
)
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.model import leaf_name
from mtp_model.sharding import collected, make_mesh, placement

SHAPE = (3, 8, 24, 16)  # layers, experts, rows, columns
MESH_AXES = {"fsdp": 2, "expert": 2, "tensor": 2}
SPREADS = {
    "on one device": None,
    "on all devices alike": PartitionSpec(),
    "experts apart": PartitionSpec(None, "expert"),
    "rows and columns apart": PartitionSpec(None, None, "tensor", "fsdp"),
    "cut in every way": PartitionSpec(None, "expert", ("fsdp",), "tensor"),
    "rows over all devices": PartitionSpec(None, None, ("fsdp", "expert", "tensor")),
}
ROW_BLOCKS = ((0, 7), (7, 8), (8, 24))  # across the shards' edges too


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each array that is copied from a device to the host."""
    sizes: list[int] = []
    value_of = ArrayImpl._value.fget

    def recorded(array):
        sizes.append(array.nbytes)
        return value_of(array)

    monkeypatch.setattr(ArrayImpl, "_value", property(recorded))
    return sizes


def values_with_signed_zeros(shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    values[values > 1] = -0.0
    values[values < -1] = 0.0
    return values


def spread(values: np.ndarray, spec: PartitionSpec | None) -> jax.Array:
    if spec is None:
        return jax.device_put(values)
    return jax.device_put(values, NamedSharding(make_mesh(**MESH_AXES), spec))


def test_layers_are_kept_where_they_are_small(settings, checkpoint, monkeypatch):
    """`--remat auto`: on CPU, and from captured states; what is asked for holds everywhere."""
    config = open_trainable(str(checkpoint))[1]
    full = dataclasses.replace(settings, train="all", batch=BatchSettings(rows=4096))

    def again(run, **changes) -> bool:
        return recomputes_layers(dataclasses.replace(run, **changes), config, "float32")

    assert not again(settings)
    assert again(full)
    assert [again(full, remat="none"), again(settings, remat="layer")] == [False, True]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    captured = dataclasses.replace(settings, states=(Path("states"),))
    many = dataclasses.replace(captured, batch=BatchSettings(rows=1 << 16))
    assert [again(settings), again(captured), again(many)] == [True, False, True]


@pytest.mark.parametrize("spec", SPREADS.values(), ids=SPREADS)
def test_rows_keep_their_bytes_and_come_block_by_block(spec, copied):
    values = values_with_signed_zeros(SHAPE)
    changed = changed_leaf(spread(values, spec))
    for index in np.ndindex(SHAPE[:2]):
        for start, stop in ROW_BLOCKS:
            copied.clear()
            rows = changed.rows(index, start, stop)()
            assert rows.tobytes() == values[index][start:stop].tobytes()
            assert sum(copied) == rows.nbytes
    assert (values + 0.0).tobytes() != values.tobytes()  # negative control: the zeros have signs


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
@pytest.mark.parametrize("spec", [s for s in SPREADS.values() if s is not None], ids=str)
def test_rows_on_several_hosts_devices_keep_their_bytes(spec, dtype):
    """What a process of a cluster asks for, where a part of the rows is on other hosts."""
    values = values_with_signed_zeros(SHAPE).view(np.uint32).astype(np.uint32)
    values = values.view(np.float32) if dtype == np.float32 else values.astype(np.int16)
    leaf = spread(values, spec)
    for index in np.ndindex(SHAPE[:2]):
        for start, stop in ROW_BLOCKS:
            begin, shape = (*index, start, 0), (1, 1, stop - start, SHAPE[-1])
            rows = np.asarray(collected(leaf, begin, shape))
            assert rows.tobytes() == values[index][start:stop].tobytes()


def test_a_whole_array_on_the_host_would_be_noticed(copied):
    leaf = spread(values_with_signed_zeros(SHAPE), SPREADS["experts apart"])
    np.asarray(leaf)[0, 0][:7]
    assert max(copied) == leaf.nbytes


def test_a_state_on_a_mesh_is_written_as_it_is(tmp_path):
    base = import_tiny(tmp_path, dtype="fp8", num_mtp=2)
    split, mesh = load_for_training(str(base), "mtp", "float32"), make_mesh(**MESH_AXES)

    def placed(_, variable: nnx.Variable) -> nnx.Variable:
        where = placement(variable.get_metadata("out_sharding"), variable.shape, mesh)
        values = values_with_signed_zeros(variable.shape)
        return variable.replace(jax.device_put(values, where))

    trained, biases = (nnx.map_state(placed, part) for part in (split.trainable, split.biases))
    record = {"by": "a test"}
    state = TrainState(trained, biases, opt_state=())
    final = write_final(open_checkpoint(base), tmp_path / "final", state, record, LoraSettings())
    flat = [*nnx.to_flat_state(trained), *nnx.to_flat_state(biases)]
    assert any(not leaf[...].is_fully_replicated for _, leaf in flat)
    for path, leaf in flat:
        name, values = leaf_name(path), np.asarray(leaf[...])
        stored = final.leaves[name]
        for index in np.ndindex(stored.shape[: stored.num_stack_dims]):
            rows = final.read_rows(name, index, 0, stored.tensor_shape[0])
            assert rows.tobytes() == values[index].tobytes(), (name, index)

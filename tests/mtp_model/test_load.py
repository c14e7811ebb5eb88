"""Loading a checkpoint directory: scopes, dtypes, meshes, layers, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from imported import assert_close, assert_far, import_tiny, load_float32, random_tokens
from jax.sharding import AxisType

import mtp_model
from mtp_model.block import take_layer
from mtp_model.checkpoint.directory import CheckpointError, open_checkpoint
from mtp_model.context import make_context
from mtp_model.files.local import LocalPlace
from mtp_model.load import cast_weights, load, load_layer
from mtp_model.model import abstract_model, leaves_by_name
from mtp_model.sharding import MESH_AXES, make_mesh


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return import_tiny(tmp_path_factory.mktemp("load"), dtype="fp8", num_mtp=2)


def test_leaves_are_as_stored(checkpoint):
    stored = open_checkpoint(checkpoint)
    loaded = leaves_by_name(load(checkpoint))
    assert loaded.keys() == stored.leaves.keys()
    for path, leaf in loaded.items():
        assert (leaf.shape, leaf.dtype) == (stored.leaves[path].shape, stored.leaves[path].dtype)
    weight = loaded["mtp.block.mlp.experts.up_proj.weight"][...]
    rows = stored.read_rows("mtp.block.mlp.experts.up_proj.weight", (1, 7), 0, weight.shape[-2])
    assert np.asarray(weight)[1, 7].tobytes() == rows.tobytes()


def test_a_dtype_leaves_scales_and_router_biases_alone(checkpoint):
    loaded = leaves_by_name(load(checkpoint, dtype=jnp.bfloat16))
    for path, leaf in loaded.items():
        kept = isinstance(leaf, mtp_model.BlockScale | mtp_model.RouterBias)
        assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16), path


def test_casting_a_part_dequantises_that_part(checkpoint):
    model = load(checkpoint)
    cast_weights(model, jnp.float32, only=nnx.PathContains("mtp"))
    whole, part = leaves_by_name(load_float32(checkpoint)), leaves_by_name(model)
    path = "block.mlp.experts.down_proj.weight"
    np.testing.assert_array_equal(part["mtp." + path][...], whole["mtp." + path][...])
    assert part["moe_layers.mlp.experts.down_proj.weight"].dtype == jnp.float8_e4m3fn


@pytest.mark.parametrize(
    ("scope", "absent"), [("main", {"mtp"}), ("mtp", {"dense_layers", "moe_layers"})]
)
def test_scopes_of_a_whole_checkpoint(checkpoint, scope, absent):
    everything = {path.split(".")[0] for path in leaves_by_name(load(checkpoint))}
    loaded = {path.split(".")[0] for path in leaves_by_name(load(checkpoint, scope=scope))}
    assert everything - loaded == absent


def test_the_mtp_modules_alone_draft_the_same(checkpoint):
    tokens = random_tokens(384)
    where = (tokens, make_context(np.ones_like(tokens)))
    whole, alone = load_float32(checkpoint), load_float32(checkpoint, scope="mtp")
    state = jax.jit(lambda model: model.main(*where).state_BTD)(whole)
    draft = jax.jit(lambda model: model.draft(state, *where).hidden)
    for ours, theirs in zip(draft(alone), draft(whole), strict=True):
        assert_close(ours, theirs, "drafts")
    with pytest.raises(ValueError, match="scope='mtp': it has no main layers"):
        alone.main(*where)


def test_a_part_cannot_be_loaded_as_a_whole(tmp_path):
    part = import_tiny(tmp_path, "f32", import_options={"scope": "mtp"})
    assert load(part, scope="mtp").scope == "mtp"
    with pytest.raises(ValueError, match=r"leaf dense_layers.*nothing is stored \(scope 'mtp'\)"):
        load(part)


@pytest.mark.parametrize("stack", ["dense_layers", "moe_layers", "mtp"])
def test_a_layer_alone_is_that_of_the_whole_model(checkpoint, stack):
    whole = take_layer(getattr(load(checkpoint, compute_dtype=np.float32), stack), 1)
    alone = load_layer(open_checkpoint(checkpoint), stack, 1)
    theirs, ours = leaves_by_name(whole), leaves_by_name(alone)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert np.asarray(leaf[...]).tobytes() == np.asarray(theirs[path][...]).tobytes(), path
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 24, 40)), np.float32)
    context = make_context(np.tile(np.repeat(np.array([1, 2, 0], np.int32), 8), (2, 1)))
    inputs = (x, x, context) if stack == "mtp" else (x, context)
    run = jax.jit(lambda layer, *inputs: layer(*inputs)[0])
    np.testing.assert_array_equal(run(alone, *inputs), run(whole, *inputs))


def test_a_layer_alone_reads_its_own_bytes_only(checkpoint, monkeypatch):
    stored, read = open_checkpoint(checkpoint), []

    def recorded(place, begin, out):
        read.append(len(out))
        return read_range_into(place, begin, out)

    read_range_into = LocalPlace.read_range_into
    monkeypatch.setattr(LocalPlace, "read_range_into", recorded)
    load_layer(stored, "moe_layers", 1)
    in_layer = [leaf for name, leaf in stored.leaves.items() if name.startswith("moe_layers.")]
    sizes = [math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in in_layer]
    assert sum(read) == sum(sizes)
    assert max(read) <= max(leaf.tensor_bytes for leaf in in_layer)


@pytest.mark.parametrize("index", [-1, 2])
def test_a_layer_that_is_not_there(checkpoint, index):
    with pytest.raises(ValueError, match=f"mtp has 2 layers, no {index}"):
        load_layer(open_checkpoint(checkpoint), "mtp", index)


def test_an_abstract_model_says_what_loading_gives(checkpoint):
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    stored = open_checkpoint(checkpoint)
    dtypes = {name: leaf.dtype for name, leaf in stored.leaves.items()}
    abstract = leaves_by_name(abstract_model(stored.config, "all", dtypes, mesh))
    loaded = leaves_by_name(load(checkpoint, mesh=mesh))
    assert abstract.keys() == loaded.keys()
    for name, leaf in abstract.items():
        found, said = loaded[name][...], leaf.get_value()
        assert isinstance(said, jax.ShapeDtypeStruct)
        assert (said.shape, said.dtype) == (found.shape, found.dtype), name
        assert said.sharding is not None
        assert said.sharding.is_equivalent_to(found.sharding, found.ndim), name


def test_an_unfinished_directory_is_refused(tmp_path):
    part = import_tiny(tmp_path, "f32")
    (part / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="COMPLETE"):
        load(part)


MESHES = {"experts": {"data": 2, "expert": 4}, "all axes": {"fsdp": 2, "expert": 2, "tensor": 2}}


@jax.jit
def logits_and_gradients(model):
    tokens = np.tile(random_tokens(384), (4, 1))
    segments = np.tile(np.repeat(np.array([1, 2, 0], np.int32), 8), (8, 1))

    def loss(trained, rest):
        out = nnx.merge(graph, trained, rest)(tokens, segments)
        logits = [out.logits_BTV, *out.mtp_logits]
        return sum(jnp.mean(jnp.square(x)) for x in logits), logits

    graph, trained, rest = nnx.split(model, nnx.Param, ...)
    gradients, logits = jax.grad(loss, has_aux=True)(trained, rest)
    return logits, jax.tree.leaves(gradients)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_a_mesh_changes_where_weights_are_and_nothing_else(checkpoint, axes):
    logits, gradients = logits_and_gradients(load_float32(checkpoint))
    mesh = make_mesh(**axes)
    with jax.set_mesh(mesh):
        model = load_float32(checkpoint, mesh=mesh)
        spread = model.moe_layers.mlp.experts.gate_proj.weight[...]
        assert spread.addressable_shards[0].data.shape[1] == 12 // axes["expert"]
        sharded_logits, sharded_gradients = logits_and_gradients(model)
    for index, (ours, theirs) in enumerate(zip(sharded_logits, logits, strict=True)):
        assert_close(ours, theirs, f"logits {index}")
    for index, (ours, theirs) in enumerate(zip(sharded_gradients, gradients, strict=True)):
        if np.any(np.asarray(theirs)):
            assert_close(ours, theirs, f"gradient {index}")
    assert_far(sharded_logits[0], np.roll(logits[0], 1, axis=0), "rows of the batch exchanged")


def test_a_foreign_mesh_is_refused(checkpoint):
    explicit = jax.make_mesh((1, 1, 8, 1), MESH_AXES, (AxisType.Explicit,) * 4)
    other = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    for mesh in (explicit, other):
        with pytest.raises(ValueError, match=r"make it with mtp_model\.make_mesh"):
            load(checkpoint, mesh=mesh)

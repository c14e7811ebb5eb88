"""What devices send each other is read from compiled programs: each kind, in loops, by groups."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from finetune.planning.collectives import Sent, collectives_of
from mtp_model import make_mesh

ROWS, COLUMNS = 8, 24  # of float32: of 768 bytes
ALONG = PartitionSpec(("data", "expert"))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, expert=4)


def sent(mesh, function, *, spec=ALONG) -> dict[str, Sent]:
    """What the compiled `shard_map` of it sends."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, sharding=NamedSharding(mesh, spec))
    return collectives_of(jax.jit(mapped).lower(x).compile().as_text() or "")


def gathered(x):
    return lax.all_gather(x, "expert", axis=0, tiled=True)[: x.shape[0]] * 2


def looped(x):
    return lax.scan(lambda x, _: (gathered(x), None), x, length=5)[0]


def until_it_is_large(x):
    return lax.while_loop(lambda x: lax.psum(x, "expert").sum() < 9, lambda x: x + 1, x)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x + 1, {}),
        # A device has a row of 96 bytes, and gets those of three others.
        (gathered, {"all-gather": Sent(1, 3 * 96)}),
        (looped, {"all-gather": Sent(5, 5 * 3 * 96)}),
        (lambda x: lax.psum(x, "expert"), {"all-reduce": Sent(1, 2 * 3 * 96 // 4)}),
        (lambda x: lax.psum(x, ("data", "expert")), {"all-reduce": Sent(1, 2 * 7 * 96 // 8)}),
        (lambda x: lax.psum(x, "data"), {"all-reduce": Sent(1, 96)}),
        (
            lambda x: lax.all_to_all(x, "expert", 1, 1, tiled=True),
            {"all-to-all": Sent(1, 3 * 96 // 4)},
        ),
        (
            lambda x: jnp.tile(lax.psum_scatter(x, "expert", scatter_dimension=1, tiled=True), 4),
            {"reduce-scatter": Sent(1, 3 * 96 // 4)},
        ),
        (
            lambda x: lax.ppermute(x, "expert", [(0, 1), (1, 2), (2, 3), (3, 0)]),
            {"collective-permute": Sent(1, 96)},
        ),
    ],
)
def test_each_kind_is_counted_with_its_bytes(mesh, function, expected):
    assert sent(mesh, function) == expected


def test_a_loop_whose_rounds_depend_on_the_data_counts_once(mesh):
    """With the sum that decides whether there is another round."""
    assert sent(mesh, until_it_is_large)["all-reduce"].count == 1


def test_the_compilers_own_are_counted(mesh):
    """Of a matrix that is stored in parts and used whole."""
    stored = NamedSharding(mesh, PartitionSpec("expert"))
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, sharding=stored)
    program = jax.jit(lambda x: x * 2, out_shardings=whole).lower(x).compile()
    nbytes = ROWS * COLUMNS * 4
    assert collectives_of(program.as_text() or "") == {"all-gather": Sent(1, nbytes * 3 // 4)}


def test_what_is_begun_and_awaited_counts_once():
    """As TPU's programs write it: the operands stand before the results."""
    text = """HloModule step, num_partitions=8

%body (p: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %ag = (bf16[2,8]{1,0:T(2,128)(2,1)}, bf16[8,8]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%x), \
channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %done = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} all-gather-done(%ag)
  %ar = f8e4m3fn[16]{0} all-reduce-start(%y), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %all = bf16[8]{0} all-reduce-start(%y), replica_groups={}, to_apply=%sum
  %none = bf16[8]{0} all-reduce-start(%y), replica_groups={{0},{1}}, to_apply=%sum
  %cp = (pred[4]{0}, pred[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%z), \
source_target_pairs={{0,1}}
}

ENTRY %main.1 (a: bf16[2,8]) -> bf16[2,8] {
  %loop = (s32[], bf16[2,8]{1,0}) while(%t), condition=%cond, body=%body
  %a2a = f32[6]{0} all-to-all(%v), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, dimensions={0}
}

%cond (p: (s32[], bf16[2,8])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(58)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.3 = pred[]{:T(512)} compare(%counter, %limit.1), direction=LT, metadata={}
}

%sum (x: f8e4m3fn[], y: f8e4m3fn[]) -> f8e4m3fn[] {
}
"""
    assert collectives_of(text) == {
        "all-gather": Sent(58, 58 * 8 * 8 * 2 * 3 // 4),
        "all-reduce": Sent(2 * 58, 58 * (16 + 8 * 2 * 2 * 7 // 8)),
        "all-to-all": Sent(1, 6 * 4 * 3 // 4),
        "collective-permute": Sent(58, 58 * 4),
    }

"""Does the orientation [out, in] of expert weights cost anything on TPU? Compiled, not run.

Compiles the grouped product of 32,768 rows with 16 experts of DeepSeek-V3's size, forward and
backward, ahead of time for a TPU v5p (needs `libtpu`, no TPU), and prints what XLA says of each:
temporary memory, and transpositions and copies in the compiled program.

    ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu \
        python -m tools.bench_ragged_dot
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from mtp_model.grouped import _FORWARD, _ragged_product

EXPERTS, HIDDEN, INNER, ROWS = 16, 7168, 2048, 32_768


def in_out(rows, weight, sizes):
    return lax.ragged_dot(rows, weight, sizes)


def out_in_gradient_of_xla(rows, weight, sizes):
    return lax.ragged_dot_general(rows, weight, sizes, _FORWARD)


PRODUCTS = {
    "in x out, ragged_dot": (in_out, (EXPERTS, HIDDEN, INNER)),
    "out x in, XLA's gradient": (out_in_gradient_of_xla, (EXPERTS, INNER, HIDDEN)),
    "out x in, our gradient": (_ragged_product, (EXPERTS, INNER, HIDDEN)),
}


def gradient(product):
    def loss(rows, weight, sizes):
        return product(rows, weight, sizes).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1))


def main() -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    place = SingleDeviceSharding(topology.devices[0])
    table = Table("weights", "pass", "temporary MB", "transpose", "copy")
    for name, (product, shape) in PRODUCTS.items():
        arguments = [
            jax.ShapeDtypeStruct((ROWS, HIDDEN), jnp.bfloat16, sharding=place),
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place),
            jax.ShapeDtypeStruct((EXPERTS,), jnp.int32, sharding=place),
        ]
        for label, function in (("forward", product), ("gradient", gradient(product))):
            compiled = jax.jit(function).lower(*arguments).compile()
            memory, text = compiled.memory_analysis(), compiled.as_text()
            assert memory is not None
            assert text is not None
            counts = (str(text.count(f"{word}(")) for word in ("transpose", "copy"))
            table.add_row(name, label, f"{memory.temp_size_in_bytes / 1e6:.1f}", *counts)
    Console().print(table)


if __name__ == "__main__":
    main()

"""Every product of float32 arrays is made in float32, on accelerators too.

Seen in the traced program, for a CPU computes the same whatever the precision.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from imported import import_tiny
from stepping import SMOOTH, make_batches
from trained import SIZES

from finetune.optimizer import make_optimizer
from finetune.planning import flops
from finetune.settings import LoraSettings, RunSettings
from finetune.state import make_train_step, start
from finetune.weights import load_for_training
from mtp_model.decode import draft, empty_caches, feed
from mtp_model.load import load
from mtp_model.products import float32_product

VOCABULARY = 384  # of the tiny checkpoint; no other size is that
EXACT = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


@pytest.fixture(scope="module", params=["fp8", "bf16"])
def checkpoint(request, tmp_path_factory):
    return import_tiny(tmp_path_factory.mktemp("tiny"), dtype=request.param, sizes=SIZES)


def products(program: Any) -> Iterator[Any]:
    """The equations that multiply matrices, of what a program calls too."""
    for equation in program.eqns:
        if equation.primitive.name in ("dot_general", *flops._RAGGED):
            yield equation
        for inner in flops._inner(equation.params):
            yield from products(inner)


def rounded(program: Any) -> list[str]:
    """Products of float32 arrays whose values an accelerator would round."""
    return [
        str(equation)
        for equation in products(program)
        if all(x.aval.dtype == jnp.float32 for x in equation.invars[:2])
        and equation.params["precision"] != EXACT
    ]


def training_step(checkpoint: Path, mode: Any, compute_dtype: str) -> Any:
    """What a step of `train` computes."""
    settings = RunSettings(
        checkpoint=str(checkpoint), data=(), out=checkpoint, train=mode, draft_tokens=2, **SMOOTH
    )
    optimizer = make_optimizer(settings.optimizer, 10, lambda _: True)
    everywhere = LoraSettings(part="all")
    split = load_for_training(str(checkpoint), mode, compute_dtype, lora=everywhere)
    step = make_train_step(split.graphdef, optimizer, settings)
    return step.trace(start(split, optimizer), split.frozen, make_batches()[0]).jaxpr.jaxpr


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["mtp", "all", "lora"])
def test_a_training_step_rounds_nothing(checkpoint, mode, compute_dtype):
    program = training_step(checkpoint, mode, compute_dtype)
    assert len(list(products(program))) > 50
    assert rounded(program) == []


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_decoding_rounds_nothing(checkpoint, compute_dtype):
    model = load(checkpoint, compute_dtype=compute_dtype)
    tokens = jnp.ones((2, 1), jnp.int32)

    def decode(tokens):
        fed = feed(model, tokens, tokens, empty_caches(model, 2, 8))
        drafted = draft(model, fed.state_BTD, tokens, tokens, fed.caches)
        return model.lm_head.logits(fed.hidden_BTD), model.lm_head.logits(drafted.state_BTD)

    program = jax.make_jaxpr(decode)(tokens).jaxpr
    assert len(list(products(program))) > 20
    assert rounded(program) == []


@pytest.mark.parametrize("mode", ["mtp", "all"])
def test_a_training_step_in_bfloat16_does_not_widen_the_head(checkpoint, mode):
    """The gradient of float32 logits is rounded before it is multiplied."""
    program = training_step(checkpoint, mode, "bfloat16")
    with_logits = [
        {x.aval.dtype for x in equation.invars[:2]}
        for equation in products(program)
        if any(VOCABULARY in x.aval.shape for x in (*equation.invars[:2], *equation.outvars))
    ]
    assert len(with_logits) > 3
    assert all(each == {jnp.dtype("bfloat16")} for each in with_logits)


def test_a_gradient_of_wider_results_is_that_of_plain_products():
    rng = np.random.default_rng(0)
    x, y, given = (jnp.asarray(rng.normal(size=(4, 4)), jnp.bfloat16) for _ in range(3))

    def gradients(make):
        return jax.vjp(make, x, y)[1](given.astype(jnp.float32))

    got = gradients(lambda x, y: float32_product("ab,cb->ac", x, y))
    want = gradients(lambda x, y: jnp.einsum("ab,cb->ac", *(z.astype(jnp.float32) for z in (x, y))))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(*(z.astype(jnp.float32) for z in (a, b)), rtol=2**-7, atol=1e-2)


def test_a_product_without_a_precision_is_seen():
    """Negative control: also inside of what a program calls."""

    def careless(x):
        return jax.lax.map(lambda row: jnp.einsum("i,oi->o", row, x), x)

    (found,) = rounded(jax.make_jaxpr(jax.jit(careless))(jnp.ones((3, 3))).jaxpr)
    assert "dot_general" in found

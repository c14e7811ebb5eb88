"""Floating point operations of a step: those of the model by formula, and those of its program.

A multiplication and an addition are two. Only products of matrices count: the rest is below 1 %.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend import core

from finetune.settings import Part
from mtp_model import ModelConfig

_RAGGED = ("ragged_dot_general", "ragged_dot")


def model_flops(
    config: ModelConfig,
    part: Part,
    rows: int,
    row_tokens: int,
    depths: int,
    captured: bool = False,
) -> float:
    """What a step has to compute, recomputation not counted.

    Rows are one document each. A trained weight takes three times its forward pass (the product,
    the gradient of its input, that of the weight), a frozen main model one, a frozen head two.
    captured: the states of the main model are there, and need no pass.
    """
    layers, drafts, head = _parts(config, row_tokens, depths)
    if part == "all":
        a_token = 3 * (layers + drafts + (1 + depths) * head)
    else:
        a_token = (not captured) * layers + 3 * drafts + (1 + 2 * depths) * head
    return 2.0 * a_token * rows * row_tokens


def adapted_flops(
    config: ModelConfig,
    part: Part,
    adapters: Mapping[str, int],
    rows: int,
    row_tokens: int,
    depths: int,
    captured: bool = False,
) -> float:
    """The same where weights are frozen, and adapters beside them learn.

    A frozen weight that a gradient passes takes twice its forward pass, an adapter three times.
    adapters: parameters by leaf; of those of routed experts a token meets a few. captured: as in
    model_flops.
    """
    c = config
    layers, drafts, head = _parts(config, row_tokens, depths)
    passed = 2 if part == "all" else 1
    a_token = passed * ((not captured) * layers + head) + 2 * (drafts + depths * head)
    for name, size in adapters.items():
        met = c.num_experts_per_tok / c.n_routed_experts if ".experts." in name else 1.0
        used = depths / c.num_nextn_predict_layers if name.startswith("mtp.") else 1.0
        a_token += 3 * size * met * used
    return 2.0 * a_token * rows * row_tokens


def _parts(c: ModelConfig, row_tokens: int, depths: int) -> tuple[float, float, float]:
    """Multiplications of a token in all main layers, in all drafts, and in the head once."""
    layers = c.num_dense_layers * (_attention(c, row_tokens) + _dense(c))
    layers += c.num_moe_layers * (_attention(c, row_tokens) + _experts(c))
    drafts = depths * (2 * c.hidden_size**2 + _attention(c, row_tokens) + _experts(c))
    return layers, drafts, c.hidden_size * c.vocab_size


def _attention(c: ModelConfig, row_tokens: int) -> float:
    """Multiplications of a token: projections, and scores over the half of a row before it."""
    queries = c.num_attention_heads * c.qk_head_dim
    if c.q_lora_rank is None:
        into = c.hidden_size * queries
    else:
        into = c.q_lora_rank * (c.hidden_size + queries)
    heads = c.num_attention_heads
    latent = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim)
    up = c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    out = heads * c.v_head_dim * c.hidden_size
    scores = heads * (c.qk_head_dim + c.v_head_dim) * row_tokens / 2
    return into + latent + up + out + scores


def _dense(c: ModelConfig) -> float:
    return 3 * c.hidden_size * c.intermediate_size


def _experts(c: ModelConfig) -> float:
    used = c.num_experts_per_tok + c.n_shared_experts
    return c.hidden_size * (3 * c.moe_intermediate_size * used + c.n_routed_experts)


def program_flops(jaxpr: Any) -> float:
    """Of all devices together, recomputation too; loops as often as they run.

    Of the rounds in which tokens are brought to experts the first counts and one of the small ones
    after it, as under a load whose fullest peer has an eighth more than a balanced one. Where a
    platform has a choice the grouped product counts (TPU's); the loop over experts of the others
    computes as much, and some rows of padding. What nobody reads is not computed.
    """
    return sum(map(_of_equation, _read(jaxpr)))


def _read(jaxpr: Any) -> Iterator[Any]:
    """The equations whose results are used, last one first."""
    used = set(filter(_is_variable, jaxpr.outvars))
    for equation in reversed(jaxpr.eqns):
        if equation.effects or used.intersection(equation.outvars):
            used.update(filter(_is_variable, equation.invars))
            yield equation


def _is_variable(value: Any) -> bool:
    return isinstance(value, core.Var)


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _of_product(equation)
    if name in _RAGGED:
        return _of_ragged_product(equation)
    if name == "cond":
        return _of_choice(params["branches"])
    inner = sum(map(program_flops, _inner(params)))
    if name == "scan":
        return inner * params["length"]
    if name == "shard_map":
        return inner * params["mesh"].size
    return inner


def _of_choice(branches: Any) -> float:
    """The largest of those that have the grouped product, where some have, else of all."""
    grouped = [branch for branch in branches if _has_ragged(branch.jaxpr)]
    return max(program_flops(branch.jaxpr) for branch in grouped or branches)


def _has_ragged(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name in _RAGGED or any(map(_has_ragged, _inner(equation.params)))
        for equation in jaxpr.eqns
    )


def _of_product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _of_ragged_product(equation: Any) -> float:
    """Rows times the matrix of their group; each row belongs to one group at most."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    rows, out = (equation.invars[0].aval.shape, equation.outvars[0].aval.shape)
    product = math.prod(out) * math.prod(rows[i] for i in contracted)
    if numbers.lhs_ragged_dimensions[0] in contracted:  # a result for each group
        product /= out[0]
    return 2.0 * product


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The programs inside an equation."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each

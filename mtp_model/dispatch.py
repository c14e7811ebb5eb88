"""Bringing each token to its experts and back: dropless, static shapes, with or without a mesh.

Tokens are sorted by expert. The experts of a device are served in groups, one after the other, so
that the rows that peers send, and weights once they are dequantised, exist for a group at a time.
Under an expert axis every peer is sent a fixed number of rows by one all-to-all: as many as a
balanced load has, and then in small rounds what busy peers have beyond those. The caller chooses
the experts of each token, and says what an expert computes (`Served`).

The gradient is written out: no round's rows and weights are kept for it, and rows are moved by
gathers only, which a scatter is slower than.

T tokens, K choices a token, N = T K rows, P peers, G groups of experts a peer, C slots a peer,
M = P C slots, D hidden.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mtp_model.narrow import scan_parts
from mtp_model.products import product
from mtp_model.rows import gather_or_zero, inverse_permutation

FIRST_ROUND = 1.0  # slots a peer, relative to a balanced load
LATER_ROUNDS = 0.125  # slots a peer, relative to the first round's
FEWEST_SLOTS = 8
# Balanced rows of a group of experts on one device, about. Fewer take less memory, and more trips.
GROUP_ROWS = 4096
# Rows [N, D] of all experts up to this are served at once where a group would be a copy of weights
# that are there already; 131,072 tokens on a device have 15 GB of them.
ROWS_AT_ONCE_BYTES = 2 << 30
TOKENS_AT_A_TIME = 512  # tokens whose K rows are brought together at a time


class Served(NamedTuple):
    """What the experts of a group compute of rows [M, D], given each row's expert [M].

    A row of expert `size of the group` is empty and must give zeros. weights: arrays whose leading
    dimension is the group's experts.
    """

    run: Callable[[jax.Array, jax.Array, Any], jax.Array]  # rows, expert, weights -> [M, D]
    # d_out, rows, scale [M], expert, weights -> of scale times what `run` gives, gradients of rows,
    # of scale and of weights (None for those that have none)
    gradient: Callable[..., tuple[jax.Array, jax.Array, Any]]


class _Shape(NamedTuple):
    """What is known before any token is."""

    num_tokens: int
    num_choices: int
    num_peers: int
    num_groups: int  # of each peer
    group: int  # experts in one
    slots: int  # of a peer, in this round
    axis: str | None

    @property
    def num_slots(self) -> int:
        return self.num_peers * self.slots

    @property
    def most_slots(self) -> int:
        """Of a peer, for any load."""
        return self.num_tokens * min(self.num_choices, self.group)

    def later(self) -> "_Shape":
        """That of the rounds after the first."""
        return self._replace(slots=max(FEWEST_SLOTS, math.ceil(self.slots * LATER_ROUNDS)))


class _Plan(NamedTuple):
    """How the rows of one device are spread over peers, groups and rounds."""

    choice_N: jax.Array  # expert of each row
    order_N: jax.Array  # rows sorted by expert
    position_N: jax.Array  # where each row stands in that order
    start_PG1: jax.Array  # first sorted row of each group of each peer, and the end of its last
    fullest_G: jax.Array  # rows of each group, of the peer that has most


class _Seats(NamedTuple):
    """Who sits where in one round. N, T, the group's size and M stand for nobody."""

    row_of_slot_M: jax.Array
    token_of_slot_M: jax.Array
    expert_of_slot_M: jax.Array  # within the group
    slot_of_row_TK: jax.Array


def _make_shape(
    choices_TK, num_experts: int, num_peers: int, axis: str | None, in_groups: bool
) -> _Shape:
    num_tokens, num_choices = choices_TK.shape
    per_peer = num_experts // num_peers
    wanted = min(max(1, num_tokens * num_choices // GROUP_ROWS), per_peer) if in_groups else 1
    num_groups = next(count for count in range(wanted, 0, -1) if per_peer % count == 0)
    group = per_peer // num_groups
    balanced = num_tokens * num_choices / (num_peers * num_groups)
    slots = max(FEWEST_SLOTS, math.ceil(balanced * FIRST_ROUND))
    shape = _Shape(num_tokens, num_choices, num_peers, num_groups, group, slots, axis)
    return shape._replace(slots=min(slots, shape.most_slots))


def _make_plan(shape: _Shape, choices_TK) -> _Plan:
    choice_N = choices_TK.reshape(-1)
    order_N = jnp.argsort(choice_N)
    count = shape.num_peers * shape.num_groups
    first = jnp.arange(count + 1, dtype=choice_N.dtype) * shape.group
    start = jnp.searchsorted(choice_N[order_N], first)
    fullest_G = jnp.max(jnp.diff(start).reshape(shape.num_peers, shape.num_groups), axis=0)
    if shape.axis:
        fullest_G = lax.pmax(fullest_G, shape.axis)  # peers take the same rounds
    of_peer = jnp.arange(shape.num_peers)[:, None] * shape.num_groups
    start_PG1 = start[of_peer + jnp.arange(shape.num_groups + 1)[None]]
    return _Plan(choice_N, order_N, inverse_permutation(order_N), start_PG1, fullest_G)


def _take_seats(shape: _Shape, plan: _Plan, group, served) -> _Seats:
    """A round of a group, of whose rows each peer has so many `served`."""
    num_rows = plan.order_N.shape[0]
    first_P = plan.start_PG1[:, group] + served
    sorted_PC = first_P[:, None] + jnp.arange(shape.slots)[None]
    filled = (sorted_PC < plan.start_PG1[:, group + 1][:, None]).reshape(-1)
    row = plan.order_N[jnp.where(filled, sorted_PC.reshape(-1), 0)]
    group_N = plan.choice_N // shape.group  # counted over all peers
    peer_N = group_N // shape.num_groups
    offset_N = plan.position_N - first_P[peer_N]
    inside = (group_N % shape.num_groups == group) & (offset_N >= 0) & (offset_N < shape.slots)
    slot_of_row = jnp.where(inside, peer_N * shape.slots + offset_N, shape.num_slots)
    return _Seats(
        row_of_slot_M=jnp.where(filled, row, num_rows),
        token_of_slot_M=jnp.where(filled, row // shape.num_choices, shape.num_tokens),
        expert_of_slot_M=jnp.where(filled, plan.choice_N[row] % shape.group, shape.group),
        slot_of_row_TK=slot_of_row.reshape(shape.num_tokens, shape.num_choices),
    )


def _exchange(shape: _Shape, x_M):
    """Each peer's slots go to it; the same again brings them back."""
    if not shape.axis:
        return x_M
    split = x_M.reshape(shape.num_peers, -1, *x_M.shape[1:])
    return lax.all_to_all(split, shape.axis, 0, 0, tiled=True).reshape(x_M.shape)


def _sum_choices(x_MD, slot_of_row_TK, weights_TK) -> jax.Array:
    """sum over k of weights[t, k] * x[slot[t, k]], float32, some tokens at a time."""

    def of_tokens(args):
        slots_CK, weights_CK = args
        rows_CKD = gather_or_zero(x_MD, slots_CK)
        return product("tkd,tk->td", rows_CKD, weights_CK.astype(x_MD.dtype), jnp.float32)

    num_tokens = slot_of_row_TK.shape[0]
    if num_tokens <= TOKENS_AT_A_TIME or num_tokens % TOKENS_AT_A_TIME:
        return of_tokens((slot_of_row_TK, weights_TK))
    parts = (x.reshape(-1, TOKENS_AT_A_TIME, x.shape[1]) for x in (slot_of_row_TK, weights_TK))
    return lax.map(of_tokens, tuple(parts)).reshape(num_tokens, -1)


def _send(shape: _Shape, seats: _Seats, x_TD) -> tuple[jax.Array, jax.Array]:
    """The rows that this device serves, and the expert of each."""
    sent_MD = gather_or_zero(x_TD, seats.token_of_slot_M)
    return _exchange(shape, sent_MD), _exchange(shape, seats.expert_of_slot_M)


def _round(shape: _Shape, served: Served, seats: _Seats, x_TD, weights_TK, own) -> jax.Array:
    out_MD = _exchange(shape, served.run(*_send(shape, seats, x_TD), own))
    return _sum_choices(out_MD, seats.slot_of_row_TK, weights_TK)


def _round_gradient(shape: _Shape, served: Served, seats: _Seats, inputs, own, d_out_TD):
    """Gradients of x and weights [T, K], float32, and of the experts' weights."""
    x_TD, weights_TK = inputs
    d_rows_MD = gather_or_zero(d_out_TD, seats.token_of_slot_M)
    weight_M1 = gather_or_zero(weights_TK.reshape(-1, 1), seats.row_of_slot_M)
    rows_MD, expert_M = _send(shape, seats, x_TD)
    d_received_MD, d_weight_M, d_own = served.gradient(
        _exchange(shape, d_rows_MD), rows_MD, _exchange(shape, weight_M1[:, 0]), expert_M, own
    )
    d_weight_M1 = _exchange(shape, d_weight_M)[:, None]
    d_weights_TK = gather_or_zero(d_weight_M1, seats.slot_of_row_TK)[..., 0]
    ones = jnp.ones_like(weights_TK)
    d_x_TD = _sum_choices(_exchange(shape, d_received_MD), seats.slot_of_row_TK, ones)
    return (d_x_TD, d_weights_TK), d_own


def _over_rounds(shape: _Shape, plan: _Plan, group, step, start):
    """`start` after step(shape, seats, total) for each round of a group."""
    total = step(shape, _take_seats(shape, plan, group, 0), start)
    if shape.slots == shape.most_slots:
        return total
    later = shape.later()

    def body(state):
        served, total = state
        return served + later.slots, step(later, _take_seats(later, plan, group, served), total)

    first = jnp.asarray(shape.slots, plan.fullest_G.dtype)
    return lax.while_loop(lambda state: state[0] < plan.fullest_G[group], body, (first, total))[1]


def _over_groups(shape: _Shape, step, start, weights):
    """step(total, group, weights of the group) -> total, result; for each group."""
    if shape.num_groups == 1:
        return step(start, 0, weights)

    def split(x):
        return x.reshape(shape.num_groups, shape.group, *x.shape[1:])

    def of_group(total, args):
        return step(total, *args)

    groups = jnp.arange(shape.num_groups), jax.tree.map(split, weights)
    total, results = scan_parts(of_group, start, groups)
    return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _through(shape: _Shape, served: Served, plan: _Plan, x_TD, weights_TK, weights):
    def of_group(total_TD, group, own):
        def step(shape, seats, total_TD):
            return total_TD + _round(shape, served, seats, x_TD, weights_TK, own)

        return _over_rounds(shape, plan, group, step, total_TD), None

    start = jnp.zeros(x_TD.shape, jnp.float32)
    return _over_groups(shape, of_group, start, weights)[0].astype(x_TD.dtype)


def _through_forward(shape, served, plan, x_TD, weights_TK, weights):
    out = _through(shape, served, plan, x_TD, weights_TK, weights)
    return out, (plan, x_TD, weights_TK, weights)


def _through_backward(shape, served, residuals, d_out_TD):
    plan, x_TD, weights_TK, weights = residuals

    def gradient(shape, seats, own):
        return _round_gradient(shape, served, seats, (x_TD, weights_TK), own, d_out_TD)

    def of_group(total, group, own):
        def step(shape, seats, totals):
            return jax.tree.map(jnp.add, totals, gradient(shape, seats, own))

        def of_own():
            return gradient(shape, _take_seats(shape, plan, group, 0), own)[1]

        none = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_own))
        return _over_rounds(shape, plan, group, step, (total, none))

    start = jnp.zeros(x_TD.shape, jnp.float32), jnp.zeros(weights_TK.shape, jnp.float32)
    (d_x, d_weights), d_own = _over_groups(shape, of_group, start, weights)
    return None, d_x.astype(x_TD.dtype), d_weights.astype(weights_TK.dtype), d_own


_through.defvjp(_through_forward, _through_backward)


def through_experts(
    x_TD: Float[Array, "T D"],
    choices_TK: Int[Array, "T K"],
    weights_TK: Float[Array, "T K"],
    served: Served,
    weights: Any,
    num_experts: int,
    num_peers: int = 1,
    axis: str | None = None,
) -> Float[Array, "T D"]:
    """sum over k of weights[t, k] * expert choices[t, k] of x[t], exact for any load.

    weights: what `served` needs of the experts of this device, their number the leading dimension
    of each array. With `axis`, call inside shard_map over that axis of `num_peers`.
    """
    # Without peers and with nothing to dequantise a group would be a copy of its weights.
    nbytes = choices_TK.size * x_TD.shape[1] * x_TD.dtype.itemsize
    in_groups = num_peers > 1 or any(x.dtype != x_TD.dtype for x in jax.tree.leaves(weights))
    in_groups |= nbytes > ROWS_AT_ONCE_BYTES
    shape = _make_shape(choices_TK, num_experts, num_peers, axis, in_groups)
    return _through(shape, served, _make_plan(shape, choices_TK), x_TD, weights_TK, weights)

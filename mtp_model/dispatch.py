"""Bringing each token to its experts and back: dropless, static shapes, with or without a mesh.

Tokens are sorted by expert; under an expert axis every peer is sent a fixed number of rows by
one all-to-all, and rounds are repeated until the fullest peer is served. The caller chooses the
experts of each token, and says what an expert computes by a function (`serve`).

T tokens, K choices a token, N = T K rows, P peers, C slots a peer, M = P C slots, D hidden.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mtp_model.rows import inverse_permutation, move_rows

CAPACITY = 1.25  # slots a peer in one round, relative to a balanced load

Serve = Callable[[jax.Array, jax.Array], jax.Array]  # rows [M, D], local expert [M] -> [M, D]


class _Plan(NamedTuple):
    """How the rows of one device are spread over peers and rounds."""

    choice_N: jax.Array  # expert of each row
    order_N: jax.Array  # rows sorted by expert
    position_N: jax.Array  # where each row stands in that order
    start_P1: jax.Array  # first sorted row of each peer, and the end
    num_choices: int
    experts_per_peer: int
    slots: int

    @property
    def num_slots(self) -> int:
        return (self.start_P1.shape[0] - 1) * self.slots


def _make_plan(choices_TK, num_experts: int, num_peers: int) -> tuple[_Plan, int]:
    """The plan and the largest number of rounds it can need."""
    num_tokens, num_choices = choices_TK.shape
    per_peer = num_experts // num_peers
    fullest = num_tokens * min(num_choices, per_peer)
    balanced = math.ceil(num_tokens * num_choices / num_peers * CAPACITY)
    slots = min(max(8, balanced), fullest)
    choice_N = choices_TK.reshape(-1)
    order_N = jnp.argsort(choice_N)
    edges = jnp.arange(num_peers + 1, dtype=choice_N.dtype) * per_peer
    start_P1 = jnp.searchsorted(choice_N[order_N], edges)
    position_N = inverse_permutation(order_N)
    plan = _Plan(choice_N, order_N, position_N, start_P1, num_choices, per_peer, slots)
    return plan, math.ceil(fullest / slots)


def _round_slots(plan: _Plan, round_index) -> tuple[jax.Array, jax.Array]:
    """The row in each slot (N in an empty one), and the slot of each row (M outside this round)."""
    num_rows = plan.order_N.shape[0]
    first_P = plan.start_P1[:-1] + round_index * plan.slots
    sorted_PC = first_P[:, None] + jnp.arange(plan.slots)[None]
    filled = (sorted_PC < plan.start_P1[1:, None]).reshape(-1)
    sorted_M = jnp.where(filled, sorted_PC.reshape(-1), 0)
    row_of_slot_M = jnp.where(filled, plan.order_N[sorted_M], num_rows)
    peer_N = plan.choice_N // plan.experts_per_peer
    offset_N = plan.position_N - first_P[peer_N]
    inside = (offset_N >= 0) & (offset_N < plan.slots)
    slot_of_row_N = jnp.where(inside, peer_N * plan.slots + offset_N, plan.num_slots)
    return row_of_slot_M, slot_of_row_N


def _serve_round(plan: _Plan, round_index, x_TD, weights_TK, serve: Serve, exchange):
    """Send one round of rows to their experts, bring the results back, sum them weighted."""
    num_tokens, num_rows = x_TD.shape[0], plan.order_N.shape[0]
    row_of_slot_M, slot_of_row_N = _round_slots(plan, round_index)
    filled = row_of_slot_M < num_rows
    row = jnp.minimum(row_of_slot_M, num_rows - 1)
    token_of_slot_M = jnp.where(filled, row // plan.num_choices, num_tokens)
    local_expert_M = plan.choice_N[row] % plan.experts_per_peer
    local_expert_M = jnp.where(filled, local_expert_M, plan.experts_per_peer)
    slots_TK = slot_of_row_N.reshape(num_tokens, plan.num_choices)
    sent_MD = move_rows(x_TD, token_of_slot_M, slots_TK)
    served_MD = serve(exchange(sent_MD), exchange(local_expert_M))
    rows_ND = move_rows(exchange(served_MD), slot_of_row_N, row_of_slot_M[:, None])
    rows_TKD = rows_ND.reshape(num_tokens, plan.num_choices, -1)
    return jnp.einsum("tkd,tk->td", rows_TKD, weights_TK.astype(rows_TKD.dtype))


def _exchange_over(axis: str | None, num_peers: int):
    def exchange(x_M):
        split = x_M.reshape(num_peers, -1, *x_M.shape[1:])
        received = lax.all_to_all(split, axis, 0, 0, tiled=True)
        return received.reshape(x_M.shape)

    return exchange if axis else lambda x_M: x_M


def through_experts(
    x_TD: Float[Array, "T D"],
    choices_TK: Int[Array, "T K"],
    weights_TK: Float[Array, "T K"],
    serve: Serve,
    num_experts: int,
    num_peers: int = 1,
    axis: str | None = None,
) -> Float[Array, "T D"]:
    """sum over k of weights[t, k] * expert choices[t, k] of x[t], exact for any load.

    serve computes the local experts of this device (a row of local expert `num_local` is empty
    and must give zeros). With `axis`, call inside shard_map over that axis of `num_peers`.
    """
    plan, num_rounds = _make_plan(choices_TK, num_experts, num_peers)
    exchange = _exchange_over(axis, num_peers)

    def serve_round(index):
        return _serve_round(plan, index, x_TD, weights_TK, serve, exchange)

    first = serve_round(0)
    if num_rounds == 1:
        return first
    fullest = jnp.max(jnp.diff(plan.start_P1))
    if axis:
        fullest = lax.pmax(fullest, axis)  # peers take the same rounds

    def guarded(index, work):
        # checkpoint outside the cond: residuals of a round that is hardly ever taken are not kept
        needed = fullest > index * plan.slots
        return jax.checkpoint(lambda: lax.cond(needed, work, lambda: jnp.zeros_like(first)))()

    def step(total, index):
        return total + guarded(index, lambda: serve_round(index)), None

    def remaining():
        return lax.scan(step, jnp.zeros_like(first), jnp.arange(1, num_rounds))[0]

    return first + guarded(1, remaining)

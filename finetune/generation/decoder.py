"""A batch of texts continued by the main model, with drafts of the MTP module or without.

One round for all texts at a time: K tokens are drafted, the main model is fed the last known token
and the drafts, and what it accepts and its own next token are added. K = 0 is plain decoding. What
comes out is what the main model alone would write: greedily the same tokens (temperature 0), else
tokens of the same distribution (speculative sampling, arXiv 2211.17192).

In a round at row i of a text the main model has been fed t[0..i], and t[i+1] is known. The first
is at the prompt's last row, when the main model has written one token: as serving engines do.
Module k is fed t[j+k] in row j, which for the last rows before i is a draft: it is fed these rows
again when the token is known. B texts, S slots, K drafts, P = K + 1 rows that a round adds at most,
W rows up to row i that modules are fed in each round, D hidden, V vocab.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from finetune.devices import on_mesh, spread, whole
from mtp_model import DeepSeekV3
from mtp_model.decode import Caches, draft, empty_caches, feed, spread_caches
from mtp_model.sharding import spread_batch

PREFILL = 64  # tokens of each prompt that are fed at a time
ROUNDS = 16  # between two looks of the host


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How texts are continued."""

    num_drafts: int = 0
    temperature: float = 1.0  # 0: greedy
    end_ids: tuple[int, ...] = ()  # tokens that end a text


class Prompts(NamedTuple):
    """Prompts of a batch, at least a token each."""

    tokens_BS: np.ndarray  # int32, any number behind each prompt; S is room for the whole text
    length_B: np.ndarray  # int32
    end_B: np.ndarray  # int32: tokens at which a text ends if no token ended it before
    seed_B: np.ndarray  # uint32: the texts' own random numbers, whatever they are batched with


class Texts(NamedTuple):
    """Continued texts, and what became of the drafts."""

    tokens_BS: Int[Array, "B S"]
    length_B: Int[Array, "B"]  # with the token that ended it
    rounds_B: Int[Array, "B"]
    accepted_BK: Int[Array, "B K"]  # rounds in which draft k was accepted


class _State(NamedTuple):
    """Between two rounds."""

    texts: Texts
    ended_B: Bool[Array, "B"]
    caches: Caches
    state_BWD: Float[Array, "B W D"]  # of the main model, in the rows up to row i

    def spread(self) -> "_State":
        """On a mesh each text is on the devices that compute it, from one round to the next."""
        texts, ended_B, state_BWD = jax.tree.map(
            spread_batch, (self.texts, self.ended_B, self.state_BWD)
        )
        return _State(texts, ended_B, spread_caches(self.caches), state_BWD)


def room_for(length: int, num_drafts: int) -> int:
    """Slots that texts of up to `length` tokens need, S.

    Prompts are a power of two of pieces, so that few shapes are compiled.
    """
    pieces = -(-length // PREFILL)
    return PREFILL * (1 << (pieces - 1).bit_length()) + num_drafts + 1


def decode(
    model: DeepSeekV3,
    prompts: Prompts,
    how: Decoding,
    report: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
) -> Texts:
    """Continue all prompts to their ends; the result is on the host, of a cluster on each.

    report: hears how many tokens were written so far. mesh: that the model is on.
    """
    with on_mesh(mesh):
        tokens_BS, length_B, end_B, seed_B = jax.tree.map(jnp.asarray, spread(prompts, mesh))
        state = _start(model, tokens_BS, length_B, end_B, seed_B, how)
        while not bool(state.ended_B.all()):
            state = _rounds(model, state, end_B, seed_B, how)
            if report is not None:
                report(int(jnp.sum(state.texts.length_B - length_B)))
        return jax.device_get(whole(state.texts, mesh))


def _first_uses(model: DeepSeekV3, num_drafts: int) -> int:
    """Depths of a round in which a module is used that was not used in it before."""
    return min(num_drafts, model.config.num_nextn_predict_layers) if num_drafts else 0


def _window(last_B, model: DeepSeekV3, num_drafts: int) -> Int[Array, "B W"]:
    """The rows up to row i that modules are fed: those that a round may have added, and those
    before them whose tokens were drafts. Below 0 before a text's beginning."""
    size = num_drafts + max(_first_uses(model, num_drafts), 1)
    return last_B[:, None] - size + 1 + jnp.arange(size)[None]


@partial(jax.jit, static_argnames="how")
def _start(model: DeepSeekV3, tokens_BS, length_B, end_B, seed_B, how: Decoding) -> _State:
    """Feed the prompts, and write the first token of each answer, which no draft comes before."""
    rows, slots = tokens_BS.shape
    last_B = length_B - 1
    window_BW = _window(last_B, model, how.num_drafts)

    def nothing(count: int):
        return jnp.zeros((rows, count, model.config.hidden_size), model.compute_dtype)

    def piece(number, carry):
        caches, *kept = carry
        begin = number * PREFILL
        fed_BT = jax.lax.dynamic_slice_in_dim(tokens_BS, begin, PREFILL, axis=1)
        places_BT = jnp.broadcast_to(begin + jnp.arange(PREFILL)[None], fed_BT.shape)
        fed = feed(model, fed_BT, places_BT, caches)
        caches, state_BTD = fed.caches, fed.state_BTD
        for k in range(1, _first_uses(model, how.num_drafts) + 1):
            # What is behind the last row is no token yet: the first round feeds these rows again.
            next_BT = jnp.take(tokens_BS, begin + k + jnp.arange(PREFILL), axis=1, mode="clip")
            step = draft(model, state_BTD, next_BT, places_BT, caches, k - 1)
            caches, state_BTD = step.caches, step.state_BTD
        found = []
        wanted = ((last_B[:, None], fed.hidden_BTD), (window_BW, fed.state_BTD))
        for (rows_BW, new_BTD), old_BWD in zip(wanted, kept, strict=True):
            here_BW = (rows_BW >= begin) & (rows_BW < begin + PREFILL)
            taken_BWD = _rows(new_BTD, jnp.clip(rows_BW - begin, 0, PREFILL - 1))
            found.append(jnp.where(here_BW[..., None], taken_BWD, old_BWD))
        return caches, *found

    caches = spread_caches(empty_caches(model, rows, slots))
    pieces = (jnp.max(last_B) + PREFILL) // PREFILL
    begun = (caches, nothing(1), nothing(window_BW.shape[1]))
    caches, hidden_B1D, state_BWD = jax.lax.fori_loop(0, pieces, piece, begun)
    chance = _Chance(seed_B, how.temperature)
    log_p_BV = chance.log_p(model.lm_head.logits(hidden_B1D[:, 0]))
    token_B = chance.token(log_p_BV, length_B, NEXT)
    begun_B = length_B < end_B  # the others were at their end before
    place_B = jnp.where(begun_B, length_B, slots)
    tokens_BS = tokens_BS.at[jnp.arange(rows), place_B].set(token_B, mode="drop")
    length_B = length_B + begun_B.astype(jnp.int32)
    is_end_B = jnp.isin(token_B, jnp.array(how.end_ids, jnp.int32))
    texts = Texts(
        tokens_BS,
        length_B,
        rounds_B=jnp.zeros_like(length_B),
        accepted_BK=jnp.zeros((rows, how.num_drafts), jnp.int32),
    )
    return _State(texts, is_end_B | (length_B >= end_B), caches, state_BWD).spread()


@partial(jax.jit, static_argnames="how", donate_argnums=1)
def _rounds(model: DeepSeekV3, state: _State, end_B, seed_B, how: Decoding) -> _State:
    """Some rounds, fewer where all texts end."""

    def goes_on(carry):
        state, count = carry
        return (count < ROUNDS) & ~jnp.all(state.ended_B)

    def body(carry):
        state, count = carry
        return _round(model, state, end_B, seed_B, how), count + 1

    return jax.lax.while_loop(goes_on, body, (state, jnp.int32(0)))[0]


def _round(model: DeepSeekV3, state: _State, end_B, seed_B, how: Decoding) -> _State:
    texts = state.texts
    last_B = texts.length_B - 2  # row i
    chance = _Chance(seed_B, how.temperature)
    drafted, log_q, caches = _drafts(model, state, chance, how.num_drafts)
    known_B1 = jnp.take_along_axis(texts.tokens_BS, last_B[:, None] + 1, axis=1)
    places_BP = last_B[:, None] + 1 + jnp.arange(how.num_drafts + 1)[None]
    fed = feed(model, jnp.concatenate([known_B1, *drafted], axis=1), places_BP, caches)
    logits_BPV = model.lm_head.logits(fed.hidden_BTD)
    accepted_B, token_B = _accept(logits_BPV, drafted, log_q, chance, places_BP + 1)

    new_BP = jnp.concatenate([*drafted, token_B[:, None]], axis=1)
    index_P = jnp.arange(how.num_drafts + 1)[None]
    new_BP = jnp.where(index_P == accepted_B[:, None], token_B[:, None], new_BP)
    ends_BP = jnp.isin(new_BP, jnp.array(how.end_ids, jnp.int32)) & (index_P <= accepted_B[:, None])
    ended_B = jnp.any(ends_BP, axis=1)
    count_B = jnp.where(ended_B, jnp.argmax(ends_BP, axis=1).astype(jnp.int32), accepted_B) + 1
    count_B = jnp.where(state.ended_B, 0, jnp.minimum(count_B, end_B - texts.length_B))
    places_BP = jnp.where(index_P < count_B[:, None], places_BP + 1, texts.tokens_BS.shape[1])
    row_B1 = jnp.arange(len(count_B))[:, None]
    length_B = texts.length_B + count_B
    in_text_BK = index_P[:, :-1] < jnp.minimum(accepted_B, count_B)[:, None]
    texts = Texts(
        texts.tokens_BS.at[row_B1, places_BP].set(new_BP, mode="drop"),
        length_B,
        texts.rounds_B + (~state.ended_B).astype(jnp.int32),
        texts.accepted_BK + in_text_BK.astype(jnp.int32),
    )
    ended_B = state.ended_B | ended_B | (length_B >= end_B)
    # The rows up to the new row i, of those that were there and those that came.
    both = jnp.concatenate([state.state_BWD, fed.state_BTD], axis=1)
    moved_BW = count_B[:, None] + jnp.arange(state.state_BWD.shape[1])[None]
    return _State(texts, ended_B, fed.caches, _rows(both, moved_BW)).spread()


class _Chance(NamedTuple):
    """The random numbers of a batch: of each text, by position and by what they are for."""

    seed_B: jax.Array
    temperature: float

    def keys(self, place_B, use: int) -> jax.Array:
        def key(seed, place):
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), place), use)

        return jax.vmap(key)(self.seed_B, place_B)

    def token(self, log_p_BV, place_B, use: int) -> Int[Array, "B"]:
        """A token of this distribution, with temperature 0 the likeliest."""
        if self.temperature == 0:
            return jnp.argmax(log_p_BV, axis=-1).astype(jnp.int32)
        drawn_B = jax.vmap(jax.random.categorical)(self.keys(place_B, use), log_p_BV)
        return drawn_B.astype(jnp.int32)

    def log_p(self, logits) -> jax.Array:
        scaled = logits / self.temperature if self.temperature else logits
        return jax.nn.log_softmax(scaled, axis=-1)


NEXT, DRAFT, ACCEPT = range(3)  # what random numbers are for


def _drafts(model: DeepSeekV3, state: _State, chance: _Chance, num_drafts: int):
    """Tokens [B, 1] and log-distributions [B, V] of each draft, and the caches."""
    drafted, log_q, caches = [], [], state.caches
    tokens_BS, last_B = state.texts.tokens_BS, state.texts.length_B - 2
    modules = model.config.num_nextn_predict_layers
    rows_BW = _window(last_B, model, num_drafts)
    places_BW = jnp.where(rows_BW < 0, tokens_BS.shape[1], rows_BW)  # none is kept of what is not
    state_BTD = state.state_BWD
    for k in range(1, num_drafts + 1):
        again, module = divmod(k - 1, modules)
        if again:  # one row more, of the token that was drafted last
            places_BT, slots_BT = (last_B[:, None] + again * n for n in (modules, 1))
            fed_BT, state_BTD = drafted[-1], state_BTD[:, -1:]
            step = draft(model, state_BTD, fed_BT, places_BT, caches, module, slots_BT)
        else:
            fed_BT = jnp.take_along_axis(tokens_BS, jnp.maximum(rows_BW + k, 0), axis=1)
            step = draft(model, state_BTD, fed_BT, places_BW, caches, module)
        caches, state_BTD = step.caches, step.state_BTD
        log_q.append(chance.log_p(model.lm_head.logits(state_BTD[:, -1])))
        drafted.append(chance.token(log_q[-1], last_B + 1 + k, DRAFT)[:, None])
        place_B1 = last_B[:, None] + 1 + k
        row_B1 = jnp.arange(len(last_B))[:, None]
        tokens_BS = tokens_BS.at[row_B1, place_B1].set(drafted[-1], mode="drop")
    return drafted, log_q, caches


def _accept(logits_BPV, drafted, log_q, chance: _Chance, places_BP):
    """How many drafts are accepted, and the main model's own token behind them.

    places: of the tokens that the logits are for.
    """
    log_p_BPV = chance.log_p(logits_BPV)
    chain_B = jnp.ones(logits_BPV.shape[:1], jnp.bool_)
    accepted_B = jnp.zeros(logits_BPV.shape[:1], jnp.int32)
    token_B = chance.token(log_p_BPV[:, -1], places_BP[:, -1], NEXT)
    refused = []  # the token instead of draft k
    for k, (draft_B1, log_q_BV) in enumerate(zip(drafted, log_q, strict=True)):
        log_p_BV, place_B = log_p_BPV[:, k], places_BP[:, k]
        if chance.temperature == 0:
            refused.append(chance.token(log_p_BV, place_B, NEXT))
            good_B = refused[-1] == draft_B1[:, 0]
        else:
            at = partial(jnp.take_along_axis, indices=draft_B1, axis=1)
            ratio_B = jnp.exp(at(log_p_BV) - at(log_q_BV))[:, 0]
            good_B = jax.vmap(jax.random.uniform)(chance.keys(place_B, ACCEPT)) < ratio_B
            left_BV = jnp.log(jnp.maximum(jnp.exp(log_p_BV) - jnp.exp(log_q_BV), 0.0))
            refused.append(chance.token(left_BV, place_B, NEXT))
        chain_B &= good_B
        accepted_B += chain_B.astype(jnp.int32)
    for k, other_B in enumerate(refused):
        token_B = jnp.where(accepted_B == k, other_B, token_B)
    return accepted_B, token_B


def _rows(x_BTD: Float[Array, "B T D"], index_BW) -> Float[Array, "B W D"]:
    return jnp.take_along_axis(x_BTD, index_BW[..., None], axis=1)

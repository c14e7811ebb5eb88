"""What a text says of a decoder that samples, against such decoders that are run."""

import jax.numpy as jnp
import numpy as np
import pytest
from packed import packed

from finetune.data.tokens import Tokens
from finetune.objective.acceptance import Choices, count_acceptance

LENGTH = 11
NUM_TEXTS = 6000
DEPTHS = 3
VOCAB = 5


@pytest.fixture(scope="module")
def tables():
    """[1 + K, V, V]: the main model's distribution after a token, and those of its drafters.

    Drafter k reads the last known token of its chain, as the main model does, and is worse.
    """
    rng = np.random.default_rng(2)
    logits_VV = 1.5 * rng.normal(size=(VOCAB, VOCAB))
    logits = [logits_VV + 0.7 * k * rng.normal(size=(VOCAB, VOCAB)) for k in range(DEPTHS + 1)]
    odds = np.exp(np.stack(logits))
    return odds / odds.sum(-1, keepdims=True)


def decode(tables, rule: str, rng) -> np.ndarray:
    """[reached or accepted, K] of one text that a decoder writes, token by token.

    Source: arXiv 2211.17192, algorithm 1, for `rejection`.
    """
    p_VV, *q = tables
    text = [0, int(rng.choice(VOCAB, p=p_VV[0]))]
    counts = np.zeros((2, DEPTHS))
    while len(text) < LENGTH:
        for k, q_VV in enumerate(q):
            if len(text) == LENGTH:
                break
            p, q_V = p_VV[text[-1]], q_VV[text[-1]]
            counts[0, k] += 1
            if rule == "target":
                drafted, token = q_V.argmax(), rng.choice(VOCAB, p=p)
                accepted = drafted == token
            else:
                token = rng.choice(VOCAB, p=q_V)
                accepted = rng.random() < min(1.0, p[token] / q_V[token])
                if not accepted:
                    left = np.maximum(p - q_V, 0)
                    token = rng.choice(VOCAB, p=left / left.sum())
            text.append(int(token))
            counts[1, k] += accepted
            if not accepted:
                break
        else:  # all accepted: the main model gives one more
            if len(text) < LENGTH:
                text.append(int(rng.choice(VOCAB, p=p_VV[text[-1]])))
    return counts


def sampled_texts(p_VV, rng) -> np.ndarray:
    """Texts that the main model samples alone, [N, T]."""
    texts = np.zeros((NUM_TEXTS, LENGTH), np.int32)
    for place in range(1, LENGTH):
        drawn = rng.random((NUM_TEXTS, 1))
        texts[:, place] = (p_VV[texts[:, place - 1]].cumsum(-1) < drawn).sum(-1)
    return texts


def counted(tables, texts, rule: str) -> np.ndarray:
    """[reached or accepted, K] of the product, on these texts."""
    documents = [Tokens(text, np.ones(LENGTH, np.int32)) for text in texts]
    batch = packed(documents, rows=len(documents), row_tokens=LENGTH)
    tokens = np.asarray(batch.tokens_BT)
    greedy, log_prob = [], []
    for k, table in enumerate(tables):
        fed = np.pad(tokens, [(0, 0), (0, k)])[:, k:]  # t[i+k], before the target t[i+k+1]
        aim = np.pad(tokens, [(0, 0), (0, k + 1)])[:, k + 1 :]
        greedy.append(jnp.asarray(table[fed].argmax(-1), jnp.int32))
        log_prob.append(jnp.asarray(np.log(table[fed, aim]), jnp.float32))
    counts, rounds = count_acceptance(batch, Choices(tuple(greedy), tuple(log_prob)), rule)
    assert np.allclose(np.asarray(rounds.reached_KBT).sum((1, 2)), counts.reached_K, rtol=1e-4)
    return np.array([counts.reached_K, counts.accepted_K])


@pytest.mark.parametrize("rule", ["target", "rejection"])
def test_a_text_says_what_a_decoder_that_samples_accepts(tables, rule):
    rng = np.random.default_rng(4)
    each = np.array([decode(tables, rule, rng) for _ in range(NUM_TEXTS)])
    found = counted(tables, sampled_texts(tables[0], rng), rule) / NUM_TEXTS
    error = 4 * np.sqrt(2) * each.std(0) / np.sqrt(NUM_TEXTS)  # of both, four deviations
    assert (np.abs(found - each.mean(0)) < error).all(), (found, each.mean(0), error)
    assert found[1, 2] > 10 * error[1, 2]
    # negative controls: the other rule, and text that the main model would not write
    other = {"target": "rejection", "rejection": "target"}[rule]
    wrong = counted(tables, sampled_texts(tables[0], rng), other) / NUM_TEXTS
    assert np.abs(wrong - found).max() > 3 * error.max()
    foreign = counted(tables, sampled_texts(tables[3], rng), rule) / NUM_TEXTS
    assert (np.abs(foreign - found) > error).any()

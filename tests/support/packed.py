"""Small packed batches of random documents, and sums as if measured on one."""

import jax
import jax.numpy as jnp
import numpy as np

from finetune.data.packing import Batch, Packer
from finetune.data.tokens import Tokens
from finetune.objective.acceptance import Choices, count_acceptance
from finetune.objective.losses import Measured

VOCAB = 384


def document(seed: int, length: int, masked: int = 0) -> Tokens:
    """Random tokens, the first `masked` of them not learnt."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(length) >= masked).astype(np.int32)
    return Tokens(rng.integers(0, VOCAB, length).astype(np.int32), mask)


DOCUMENTS = [document(1, 5), document(2, 11, masked=4), document(3, 3), document(4, 8, masked=7)]


def packed(documents, rows=2, row_tokens=16) -> Batch:
    """All of the documents in one batch."""
    packer = Packer(documents, rows=rows, row_tokens=row_tokens, seed=0, epochs=1)
    (batch, _), *more = packer
    assert not more
    return jax.tree.map(jnp.asarray, batch)


def measured_of(nll_sums, counts) -> Measured:
    """Sums with these losses and nothing drafted."""
    nothing = Choices((jnp.zeros((2, 16), jnp.int32),), (jnp.zeros((2, 16)),))
    empty = count_acceptance(packed(DOCUMENTS), nothing)[0]
    zeros = jnp.zeros((len(counts) - 1,))
    of_distributions = (zeros, zeros, jnp.float32(0), jnp.int32(0), jnp.float32(0), jnp.float32(0))
    sums = (jnp.array(nll_sums), jnp.array(counts), empty, jnp.int32(0))
    return Measured(*sums, *of_distributions)


def choices_of(greedy, drafted) -> Choices:
    """The main model's greedy choices and each depth's, where the rule needs nothing else."""
    all_choices = tuple(map(jnp.asarray, (greedy, *drafted)))
    return Choices(all_choices, tuple(jnp.zeros(each.shape) for each in all_choices))

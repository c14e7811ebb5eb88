"""The learning rate, and what weight decay is for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from imported import import_tiny

from finetune.optimizer import learning_rates, make_optimizer
from finetune.settings import OptimizerSettings
from finetune.weights import load_for_training, matrices
from mtp_model.checkpoint.directory import open_checkpoint


def test_learning_rate_warms_up_and_falls_to_its_last_value():
    settings = OptimizerSettings(learning_rate=2.0, warmup_fraction=0.25, final_fraction=0.1)
    rate = learning_rates(settings, steps=8)
    rates = [float(rate(step)) for step in range(1, 9)]
    assert rates[:2] == [1.0, 2.0]
    assert all(a > b for a, b in itertools.pairwise(rates[1:]))
    assert rates[-1] == pytest.approx(0.2)
    assert float(learning_rates(OptimizerSettings(warmup_fraction=0), 1)(1)) > 0


def test_weight_decay_is_for_matrices_only(tmp_path):
    """With gradients of zero, decay is all that moves."""
    sizes = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    checkpoint = import_tiny(tmp_path, dtype="fp8", sizes=sizes, num_files=1)
    names = matrices(open_checkpoint(checkpoint))
    split = load_for_training(checkpoint, "mtp", "float32")
    settings = OptimizerSettings(learning_rate=0.1, warmup_fraction=0, weight_decay=0.5)
    optimizer = make_optimizer(settings, 10, names.__contains__)

    @jax.jit
    def updates_of(trainable):
        zeros = jax.tree.map(jnp.zeros_like, trainable)
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(zeros, optimizer.init(trainable), trainable)[0]

    updates = updates_of(split.trainable)
    decayed = {
        ".".join(name) for name, leaf in nnx.to_flat_state(updates) if np.asarray(leaf[...]).any()
    }
    norms = {name for name in map(".".join, dict(nnx.to_flat_state(updates))) if "norm" in name}
    assert len(norms) == 7
    assert not decayed & norms
    assert decayed | norms == {".".join(name) for name in dict(nnx.to_flat_state(updates))}

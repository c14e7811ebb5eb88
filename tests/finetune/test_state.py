"""One step of training: which loss moves which part, and how lambda goes over the steps."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from finetune.data.packing import Batch
from finetune.objective.objectives import lambdas
from finetune.settings import ObjectiveSettings, RunSettings
from finetune.state import Split, TrainState, asked_by, make_measure_step, make_train_step, start
from finetune.weights import load_for_training


@pytest.fixture(scope="module")
def batch() -> Batch:
    tokens = np.random.default_rng(0).integers(3, 300, (2, 16)).astype(np.int32)
    ones = np.ones_like(tokens)
    return Batch(tokens, ones, np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16)), ones)


@functools.cache
def loaded(checkpoint: Path, remat: bool) -> Split:
    return load_for_training(str(checkpoint), "all", "float32", remat)


def gradients(
    settings: RunSettings, checkpoint: Path, *batches: Batch, remat: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """Of each batch, by leaf, read off a step of gradient descent of rate 1 that starts from
    nothing moved."""
    split = loaded(checkpoint, remat)
    rate = optax.chain(optax.scale_by_schedule(lambda _: -1.0))
    step = make_train_step(split.graphdef, rate, settings)
    before = jax.tree_util.tree_leaves_with_path(jax.device_get(split.trainable))
    for batch in batches:
        begun = jax.tree.map(jnp.copy, start(split, rate))  # the step writes over what it is given
        state, _ = step(begun, split.frozen, batch)
        assert isinstance(state, TrainState)
        pairs = zip(before, jax.tree.leaves(jax.device_get(state.trainable)), strict=True)
        yield {jax.tree_util.keystr(path): old - new for (path, old), new in pairs}


def test_a_detached_main_model_learns_from_its_own_loss_only(settings, checkpoint, batch):
    """Its gradient is that without MTP, and the modules' is that of training together."""
    every = dataclasses.replace(
        settings, train="all", objective=ObjectiveSettings(ce=1.0), mtp_lambda=0.5
    )
    (together,) = gradients(every, checkpoint, batch)
    (detached,) = gradients(dataclasses.replace(every, detach_main=True), checkpoint, batch)
    (alone,) = gradients(dataclasses.replace(every, mtp_lambda=0.0), checkpoint, batch)
    modules = {name for name in together if "mtp" in name}
    assert modules
    for name, expected in alone.items():
        wanted = together[name] if name in modules else expected
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(detached[name], wanted, atol=2e-5 * scale + 1e-9, err_msg=name)
    differs = [n for n in alone if not np.allclose(together[n], detached[n], rtol=1e-3, atol=1e-7)]
    assert {name for name in differs if "lm_head" in name or "embed_tokens" in name}
    assert not modules & set(differs)


def test_a_batch_in_parts_has_the_gradients_of_the_whole(settings, checkpoint, batch, monkeypatch):
    """Each sum is divided by the targets of all rows, of which one has few. All objectives but lk,
    whose share is that of the part."""
    few_BT = batch.loss_mask_BT.copy()
    few_BT[0, 4:] = 0
    uneven = batch._replace(loss_mask_BT=few_BT)
    every = dataclasses.replace(
        settings,
        train="all",
        detach_main=True,
        objective=ObjectiveSettings(ce=0.5, kl=0.2, tv=0.2, e2e_tv=0.3),
        batch=dataclasses.replace(settings.batch, rows=2),
    )
    in_parts = dataclasses.replace(every, batch=dataclasses.replace(every.batch, accumulation=2))
    (whole,), (parts,) = (gradients(run, checkpoint, uneven) for run in (every, in_parts))
    for name, wanted in whole.items():
        atol = 1e-5 * np.abs(wanted).max() + 2e-7
        np.testing.assert_allclose(parts[name], wanted, atol=atol, err_msg=name)
    monkeypatch.setattr("finetune.state.counts_of", lambda *_: None)  # each divides by its own
    (means,) = gradients(in_parts, checkpoint, uneven)
    name = max(whole, key=lambda each: np.abs(whole[each]).max())
    assert not np.allclose(means[name] / 2, whole[name], rtol=1e-2)


def test_parts_that_are_alike_learn_by_lk_as_the_whole_does(settings, checkpoint, batch):
    """A part weighs by its own acceptance: not by its share of the whole batch's, which falls with
    the number of parts, and with it lk to kl."""
    alike = jax.tree.map(lambda x: np.repeat(x[:1], 4, axis=0), batch)
    every = dataclasses.replace(
        settings,
        train="all",
        mtp_lambda=1.0,
        objective=ObjectiveSettings(lk=1.0),
        batch=dataclasses.replace(settings.batch, rows=4),
    )
    in_parts = dataclasses.replace(every, batch=dataclasses.replace(every.batch, accumulation=4))
    by_kl = dataclasses.replace(every, objective=ObjectiveSettings(kl=1.0))
    (whole,), (parts,), (kl,) = (
        gradients(run, checkpoint, alike) for run in (every, in_parts, by_kl)
    )
    modules = [name for name in whole if "mtp" in name]
    assert modules
    for name in modules:
        largest = np.abs(whole[name]).max()
        atol = 1e-5 * largest + 2e-7
        np.testing.assert_allclose(parts[name], whole[name], atol=atol, err_msg=name)
    assert any(
        np.abs(kl[name] - whole[name]).max() > 0.1 * np.abs(whole[name]).max() for name in modules
    )


def test_what_is_computed_again_changes_no_gradient(settings, checkpoint, batch, monkeypatch):
    """Whether layers, and whether scores of attention, are kept or computed again."""
    every = dataclasses.replace(settings, train="all", draft_tokens=2, mtp_lambda=0.5)
    other_BT = batch.tokens_BT.copy()
    other_BT[0, 0] += 1  # negative control: one token
    kept, other = gradients(every, checkpoint, batch, batch._replace(tokens_BT=other_BT))
    (layers_again,) = gradients(every, checkpoint, batch, remat=True)
    monkeypatch.setattr("mtp_model.attention.KEPT_SCORES_BYTES", 0)
    (scores_again,) = gradients(every, checkpoint, batch)
    for name, wanted in kept.items():
        atol = (
            1e-5 * np.abs(wanted).max() + 2e-7
        )  # weights of norms are 1, and so is their rounding
        for found in (layers_again[name], scores_again[name]):
            np.testing.assert_allclose(found, wanted, atol=atol, err_msg=name)
    worst = max(np.abs(other[n] - kept[n]).max() / max(np.abs(kept[n]).max(), 1e-9) for n in kept)
    assert worst > 1e-3


def test_remat_decides_what_the_step_computes_again(settings, checkpoint, batch):
    """As the traced step says: it marks what it computes again."""

    def marks(remat: bool) -> int:
        split = load_for_training(str(checkpoint), "all", "float32", remat)
        rate = optax.chain(optax.scale_by_schedule(lambda _: -1.0))
        step = make_train_step(split.graphdef, rate, dataclasses.replace(settings, train="all"))
        traced = step.trace(start(split, rate), split.frozen, batch)
        return str(traced.jaxpr).count("prevent_cse")

    assert marks(remat=True) > 0
    assert marks(remat=False) == 0


def test_a_step_of_training_alone_feeds_own_drafts(settings, checkpoint, batch, monkeypatch):
    """Where it is asked for; evaluations feed the text, whose places they count."""
    asked = []
    monkeypatch.setattr("finetune.state.measure", lambda *args: asked.append(args[-1]) or 1 / 0)
    split = load_for_training(str(checkpoint), "mtp", "float32")
    rate = optax.scale_by_schedule(lambda _: 0.0)
    for run in (settings, dataclasses.replace(settings, draft_input="own", draft_tokens=3)):
        step = make_train_step(split.graphdef, rate, run)
        measured = make_measure_step(split.graphdef, asked_by(run))
        with pytest.raises(ZeroDivisionError):
            step.trace(start(split, rate), split.frozen, batch)
        with pytest.raises(ZeroDivisionError):
            measured(split.trainable, split.biases, split.frozen, batch)
    assert [each.own_tokens for each in asked] == [False, False, True, False]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.3] * 6),
        ("linear", [0.3, 0.26, 0.22, 0.18, 0.14, 0.1]),
        ("step", [0.3, 0.3, 0.3, 0.3, 0.1, 0.1]),
    ],
)
def test_lambda_follows_its_schedule(settings, checkpoint, batch, schedule, expected):
    """By its definition, and in the loss of each step."""
    run = dataclasses.replace(
        settings, train="all", steps=6, mtp_lambda=0.3, mtp_lambda_schedule=schedule
    )
    of_step = lambdas(run)
    found = [float(of_step(jax.numpy.int32(step))) for step in range(1, 7)]
    assert found == pytest.approx(expected, rel=1e-6)
    if schedule != "step":
        return
    split = load_for_training(str(checkpoint), "all", "float32")
    still = optax.scale_by_schedule(lambda _: 0.0)
    step = make_train_step(split.graphdef, still, run)
    state = start(split, still)
    for weight in expected:  # the router biases move all the same, and what is measured with them
        state, result = step(state, split.frozen, batch)
        sums, counts = map(np.asarray, (result.measured.nll_sum_K1, result.measured.num_targets_K1))
        main, mtp = sums / counts
        assert float(result.loss) == pytest.approx(main + weight * mtp, rel=1e-6)

"""Losses of packed batches, against plain loops and against documents alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packed import DOCUMENTS, VOCAB, document, measured_of, packed

from finetune.data.packing import Batch
from finetune.data.tokens import Tokens
from finetune.objective import head
from finetune.objective.head import Asked, through_head
from finetune.objective.losses import ExpertLoad, context_of, mean_losses, measure, targets
from finetune.objective.objectives import objective
from finetune.run.metrics import add_up, summarise
from finetune.settings import ObjectiveSettings
from finetune.state import balance
from mtp_model import DeepSeekV3, ModelConfig, RouterBias
from mtp_model.model import abstract_model
from tools.make_tiny_checkpoint import tiny_config

DEPTHS = 2
SIZES = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
# Float32 sums in another order; far below what a wrong mask moves.
RELATIVE = 2e-6


@pytest.fixture(scope="module")
def model():
    config = ModelConfig.from_dict(tiny_config("f32", num_mtp=DEPTHS, q_lora=True, sizes=SIZES))
    graphdef, abstract = nnx.split(abstract_model(config))
    rng = np.random.default_rng(0)

    def random(path, leaf):
        deviation = 1.0 if path[0] == "lm_head" else 0.2  # losses that differ from token to token
        values = rng.normal(0.0 if len(leaf.shape) > 1 else 1.0, deviation, leaf.shape)
        return leaf.replace(jnp.asarray(values, leaf.dtype))

    return nnx.merge(graphdef, nnx.map_state(random, abstract))


def measure_whole(model: DeepSeekV3, batch: Batch):
    return measure(model, batch, model.main(batch.tokens_BT, context_of(batch)))


measured_jit = jax.jit(lambda model, batch: measure_whole(model, batch)[0])


# --- valid targets


def targets_by_loop(batch: Batch, k: int):
    tokens, segments, _, mask = map(np.asarray, batch[:4])
    found = {}
    for row, length in enumerate([tokens.shape[1]] * tokens.shape[0]):
        for i in range(length):
            j = i + k + 1
            if j < length and segments[row, i] == segments[row, j] != 0 and mask[row, j] == 1:
                found[row, i] = int(tokens[row, j])
    return found


@pytest.mark.parametrize("k", [0, 1, 2, 30])
def test_targets_are_the_later_tokens_of_the_same_document(k):
    batch = packed(DOCUMENTS)
    target = targets(batch, k)
    valid = np.argwhere(np.asarray(target.valid_BT))
    found = {(r, i): int(target.tokens_BT[r, i]) for r, i in map(tuple, valid.tolist())}
    assert found == targets_by_loop(batch, k)
    assert (len(found) > 0) == (k < 30)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_mask_is_the_target_tokens(k):
    """A document with one learnt token, number 6: only position 6 - (k + 1) has a target."""
    learnt = Tokens(np.arange(10, dtype=np.int32), (np.arange(10) == 6).astype(np.int32))
    batch = packed([learnt], rows=1, row_tokens=12)
    valid = np.flatnonzero(np.asarray(targets(batch, k).valid_BT[0]))
    assert valid.tolist() == [6 - (k + 1)]
    for shift in (-1, 1):  # negative control: the mask of the token before or after
        wrong = batch._replace(loss_mask_BT=jnp.roll(batch.loss_mask_BT, shift, axis=1))
        assert np.flatnonzero(np.asarray(targets(wrong, k).valid_BT[0])).tolist() != valid.tolist()


def test_a_shifted_mask_changes_the_loss(model):
    batch = packed(DOCUMENTS)
    right = mean_losses(measured_jit(model, batch))
    shifted = batch._replace(loss_mask_BT=jnp.roll(batch.loss_mask_BT, 1, axis=1))
    wrong = mean_losses(measured_jit(model, shifted))
    assert (np.abs(np.asarray(wrong / right) - 1) > 100 * RELATIVE).all()


# --- packed batch = its documents


def test_a_packed_batch_is_the_sum_of_its_documents(model):
    """Main loss and the loss of every depth, each document alone in a row."""
    whole = measured_jit(model, packed(DOCUMENTS))
    alone = [measured_jit(model, packed([each], rows=1, row_tokens=12)) for each in DOCUMENTS]
    assert packed(DOCUMENTS).segment_ids_BT.max() > 1
    total = add_up(alone)
    assert total.num_targets_K1.tolist() == whole.num_targets_K1.tolist()
    np.testing.assert_allclose(whole.nll_sum_K1, total.nll_sum_K1, rtol=RELATIVE)
    for counted, expected in zip(whole.acceptance, total.acceptance, strict=True):
        assert counted.tolist() == expected.tolist()
    assert int(whole.num_tokens) == sum(each.ids.size for each in DOCUMENTS)


def test_without_segments_documents_see_each_other(model):
    """Negative control: the same row as one document has another loss at every depth."""
    batch = packed(DOCUMENTS)
    one = batch._replace(segment_ids_BT=(batch.segment_ids_BT != 0).astype(jnp.int32))
    difference = mean_losses(measured_jit(model, one)) / mean_losses(measured_jit(model, batch)) - 1
    assert (np.abs(np.asarray(difference)) > 100 * RELATIVE).all(), difference


def test_padding_tokens_do_not_matter(model):
    batch = packed(DOCUMENTS)
    padding = batch.segment_ids_BT == 0
    assert padding.any()
    other = batch._replace(tokens_BT=jnp.where(padding, 7, batch.tokens_BT))
    first, second = measured_jit(model, batch), measured_jit(model, other)
    np.testing.assert_allclose(first.nll_sum_K1, second.nll_sum_K1, rtol=RELATIVE)


def test_the_whole_network_agrees_with_its_logits(model):
    """The loss is the cross entropy of the logits that the model's plain call gives."""
    batch = packed(DOCUMENTS)
    out = jax.jit(model)(batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT)
    whole = measured_jit(model, batch)
    for k, logits_BTV in enumerate((out.logits_BTV, *out.mtp_logits)):
        log_p = np.asarray(jax.nn.log_softmax(logits_BTV, axis=-1), np.float64)
        nll = -sum(log_p[r, i, token] for (r, i), token in targets_by_loop(batch, k).items())
        assert float(whole.nll_sum_K1[k]) == pytest.approx(nll, rel=RELATIVE)


# --- chunks


def set_chunk(monkeypatch: pytest.MonkeyPatch, rows: int, chunk: int) -> None:
    """Room for the logits of this many positions."""
    monkeypatch.setattr(head, "LOGITS_BYTES", 4 * rows * VOCAB * chunk)


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
def test_chunks_do_not_change_loss_or_gradient(model, chunk, monkeypatch):
    set_chunk(monkeypatch, 2, chunk)
    batch = packed(DOCUMENTS)
    h_BTD = jax.random.normal(jax.random.key(0), (2, 16, model.config.hidden_size))

    @jax.jit
    def loss_of(h_BTD, lm_head):
        sums, choices = through_head(lm_head, (h_BTD,), (targets(batch, 0),), Asked())
        return sums.nll_K1[0], choices.greedy[0]

    @jax.jit
    def plain(h_BTD, lm_head):
        logits_BTV = lm_head.logits(h_BTD)
        target = targets(batch, 0)
        log_p = jax.nn.log_softmax(logits_BTV)
        nll = -jnp.take_along_axis(log_p, target.tokens_BT[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(target.valid_BT, nll, 0.0)), jnp.argmax(logits_BTV, axis=-1)

    gradients = [
        jax.value_and_grad(each, argnums=(0, 1), has_aux=True)(h_BTD, model.lm_head)
        for each in (loss_of, plain)
    ]
    (found, found_gradient), (expected, expected_gradient) = gradients
    np.testing.assert_allclose(found[0], expected[0], rtol=RELATIVE)
    np.testing.assert_array_equal(found[1], expected[1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found_gradient,
        expected_gradient,
    )


def test_whole_logits_never_exist(model, monkeypatch):
    """No array of the traced loss and gradient holds [B, T, V] float32."""
    rows, length, chunk = 2, 64, 8
    set_chunk(monkeypatch, rows, chunk)
    batch = packed([document(1, 60), document(2, 50)], rows=rows, row_tokens=length)

    def loss_of(h_BTD, lm_head):
        return through_head(lm_head, (h_BTD,), (targets(batch, 0),), Asked())[0].nll_K1[0]

    h_BTD = jnp.ones((rows, length, model.config.hidden_size))
    traced = jax.make_jaxpr(jax.grad(loss_of, argnums=(0, 1)))(h_BTD, model.lm_head)
    sizes = {v.aval.size for equation in equations(traced.jaxpr) for v in equation.outvars}
    assert rows * chunk * VOCAB in sizes
    assert max(sizes) < rows * length * VOCAB


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# --- objective


def test_values_of_tokens_and_largest_are_those_of_jax():
    """With ties and NaN; and the gradient of the values at tokens."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.integers(-3, 3, (2, 5, 7)), jnp.float32)  # with ties
    tokens = jnp.asarray(rng.integers(0, 7, (2, 5)))
    weight = jnp.asarray(rng.standard_normal((2, 5)), jnp.float32)

    def taken(x):
        return jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]

    assert jnp.array_equal(head.largest(values), jnp.argmax(values, axis=-1))
    assert jnp.array_equal(head.at_tokens(values, tokens), taken(values))
    found, wanted = (
        jax.grad(lambda x, of=of: jnp.sum(weight * of(x)))(values)
        for of in (lambda x: head.at_tokens(x, tokens), taken)
    )
    assert jnp.array_equal(found, wanted)
    assert jnp.any(wanted)
    broken = values.at[0, 0, 3].set(jnp.nan)
    assert 0 <= head.largest(broken)[0, 0] < 7


def test_objective_is_main_plus_lambda_over_depths():
    measured = measured_of([8.0, 9.0, 10.0], [4, 3, 2])
    assert mean_losses(measured).tolist() == [2.0, 3.0, 5.0]
    text = ObjectiveSettings(ce=1.0)
    found = [float(objective(measured, mode, text, 0.3)) for mode in ("all", "mtp")]
    assert found == pytest.approx([2.0 + 0.3 / 2 * (3.0 + 5.0), (3.0 + 5.0) / 2])


def test_a_depth_without_targets_has_loss_zero_and_no_number():
    measured = measured_of([8.0, 0.0], [4, 0])
    assert mean_losses(measured).tolist() == [2.0, 0.0]
    assert summarise(jax.device_get(measured)).mtp_loss == [None]


# --- router balancing


def test_router_biases_move_towards_the_mean_load():
    state = nnx.State(
        {
            "moe_layers": {"bias": RouterBias(jnp.zeros((2, 4)))},
            "mtp": {"bias": RouterBias(jnp.ones((1, 4)))},
        }
    )
    load = ExpertLoad(
        moe_layers_LE=jnp.array([[4.0, 2.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]]),
        mtp_ME=jnp.array([[0.0, 8.0, 0.0, 0.0]]),
    )
    moved = balance(state, load, rate=0.5)
    assert moved["moe_layers"]["bias"][...].tolist() == [[-0.5, 0, 0.5, 0.5], [0, 0, 0, 0]]
    assert moved["mtp"]["bias"][...].tolist() == [[1.5, 0.5, 1.5, 1.5]]


def test_only_real_tokens_are_counted_as_load(model):
    load = jax.jit(lambda model, batch: measure_whole(model, batch)[1])(model, packed(DOCUMENTS))
    num_tokens = sum(each.ids.size for each in DOCUMENTS)
    choices = model.config.num_experts_per_tok
    assert load.moe_layers_LE.sum(axis=1).tolist() == [choices * num_tokens]
    inside = [num_tokens - k * len(DOCUMENTS) for k in (1, 2)]  # depth k ends k tokens earlier
    assert load.mtp_ME.sum(axis=1).tolist() == [choices * each for each in inside]

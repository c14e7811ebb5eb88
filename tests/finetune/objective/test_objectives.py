"""Each objective against its plain formula, its gradient against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import DOCUMENTS, VOCAB, measured_of, packed
from test_losses import SIZES, set_chunk

from finetune.objective.head import Asked, is_anchor, likeliest, through_head
from finetune.objective.losses import context_of, measure, targets
from finetune.objective.objectives import (
    _accepted,
    _by_depth,
    forgets,
    mtp_objective,
    sums_of,
)
from finetune.planning.flops import program_flops
from finetune.settings import ObjectiveSettings
from mtp_model import DeepSeekV3, ModelConfig
from tools.make_tiny_checkpoint import tiny_config

NAMES = ("ce", "kl", "tv", "lk", "e2e_tv")
DEPTHS = 3  # of one module, which is reused
RELATIVE = 1e-5


def mixture(name: str, **more: float) -> ObjectiveSettings:
    return ObjectiveSettings(**({name: 1.0} | more))


@pytest.fixture(scope="module")
def batch():
    return packed(DOCUMENTS)


@pytest.fixture(scope="module")
def states(model):
    """Hidden states of main model and depths that agree to some extent, as trained ones do."""
    rng = np.random.default_rng(3)
    main = rng.normal(size=(2, 16, model.config.hidden_size))
    ahead = [np.roll(main, -k, axis=1) for k in range(1, DEPTHS + 1)]
    drafts = [h + 0.7 * k * rng.normal(size=h.shape) for k, h in enumerate(ahead, start=1)]
    return tuple(jnp.asarray(h, jnp.float32) for h in (main, *drafts))


@pytest.fixture(scope="module")
def model():
    from flax import nnx

    config = ModelConfig.from_dict(tiny_config("f32", num_mtp=1, q_lora=True, sizes=SIZES))
    model = DeepSeekV3(config, nnx.Rngs(0))
    head = np.random.default_rng(0).normal(0, 0.25, model.lm_head.weight[...].shape)
    model.lm_head.weight[...] = jnp.asarray(head, jnp.float32)
    return model


def loss_of(
    model: DeepSeekV3, batch, states, settings: ObjectiveSettings, learnt: tuple[str, ...] = ()
):
    """The objective of these states, through the product's pass over the head."""
    target = tuple(targets(batch, k) for k in range(DEPTHS + 1))
    asked = Asked(distributions=settings.compares_distributions, learnt=learnt)
    sums, _ = through_head(model.lm_head, states, target, asked)
    nothing = [0] * (DEPTHS + 1)
    measured = measured_of([0.0] * (DEPTHS + 1), nothing)._replace(
        nll_sum_K1=sums.nll_K1,
        num_targets_K1=jnp.stack([jnp.sum(each.valid_BT) for each in target]),
        kl_sum_K=sums.kl_K,
        overlap_sum_K=sums.overlap_K,
        joint_sum=sums.joint,
        num_anchors=jnp.sum(is_anchor(target)),
    )
    return mtp_objective(measured, settings)


def plain(head, batch, states, name: str, decay: float = 1.0) -> float:
    """The formulas of objectives.py in float64, position by position."""
    logits = [np.asarray(h, np.float64) @ np.asarray(head, np.float64).T for h in states]
    shifted = [z - z.max(-1, keepdims=True) for z in logits]
    log_p, *log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in shifted)
    valid = [np.asarray(targets(batch, k).valid_BT) for k in range(1, DEPTHS + 1)]
    tokens = np.asarray(batch.tokens_BT)
    per_depth, overlaps = [], np.zeros((DEPTHS, *tokens.shape))
    for k in range(1, DEPTHS + 1):
        values = []
        for row, i in np.argwhere(valid[k - 1]):
            lp, lq = log_p[row, i + k], log_q[k - 1][row, i]
            overlaps[k - 1, row, i] = np.minimum(np.exp(lp), np.exp(lq)).sum()
            kl = (np.exp(lp) * (lp - lq)).sum()
            values.append((-lq[tokens[row, i + k + 1]], kl, 1 - overlaps[k - 1, row, i]))
        ce, kl, tv = np.mean(values, axis=0)
        share = np.exp(-3 * (1 - tv))
        per_depth.append({"ce": ce, "kl": kl, "tv": tv, "lk": share * kl + (1 - share) * tv})
    if name == "e2e_tv":
        products = np.cumprod(overlaps, axis=0).mean(axis=0)
        return float(1 - products[np.all(valid, axis=0)].mean())
    weights = decay ** np.arange(DEPTHS)
    return float(np.dot(weights / weights.sum(), [each[name] for each in per_depth]))


@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize("name", NAMES)
def test_objectives_are_their_formulas(name, chunk, model, batch, states, monkeypatch):
    set_chunk(monkeypatch, 2, chunk * (DEPTHS + 3))
    found = loss_of(model, batch, states, mixture(name))
    head = model.lm_head.weight[...]
    assert float(found) == pytest.approx(plain(head, batch, states, name), rel=RELATIVE)
    others = [plain(head, batch, states, other) for other in NAMES if other != name]
    assert min(abs(float(found) - other) for other in others) > 100 * RELATIVE


def test_the_likeliest_tokens_are_found_chunk_by_chunk(model, states, monkeypatch):
    set_chunk(monkeypatch, 2, 5)
    found = likeliest(model.lm_head, states[0])
    assert np.array_equal(found, np.argmax(model.lm_head.logits(states[0]), axis=-1))
    assert len(np.unique(found)) > 9


def test_depths_have_weights_that_decay(model, batch, states):
    found = loss_of(model, batch, states, mixture("kl", depth_decay=0.6))
    head = model.lm_head.weight[...]
    assert float(found) == pytest.approx(plain(head, batch, states, "kl", 0.6), rel=RELATIVE)
    even = plain(head, batch, states, "kl")
    assert abs(float(found) - even) > 100 * RELATIVE


def test_a_mixture_is_the_weighted_sum(model, batch, states):
    settings = ObjectiveSettings(ce=0.3, kl=2.0, e2e_tv=0.5)
    parts = [w * plain(model.lm_head.weight[...], batch, states, n) for n, w in
             settings.weights().items()]  # fmt: skip
    assert float(loss_of(model, batch, states, settings)) == pytest.approx(sum(parts), rel=RELATIVE)


@pytest.mark.parametrize("chunk", [5, 16])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "lk"])
def test_gradients_are_those_of_the_formulas(name, chunk, model, batch, states, monkeypatch):
    """Central differences of the plain formula, in random directions of a depth's states."""
    set_chunk(monkeypatch, 2, chunk * (DEPTHS + 3))
    gradient = gradient_of(model, batch, states, mixture(name))
    head = model.lm_head.weight[...]
    rng = np.random.default_rng(1)
    step = 1e-5
    for k in range(1, DEPTHS + 1):
        direction = rng.normal(size=states[k].shape)

        def moved(by, k=k, direction=direction):
            changed = np.asarray(states[k], np.float64) + by * direction
            return plain(head, batch, (*states[:k], changed, *states[k + 1 :]), name)

        slope = (moved(step) - moved(-step)) / (2 * step)
        found = float(np.vdot(np.asarray(gradient[k], np.float64), direction))
        assert found == pytest.approx(slope, rel=2e-3, abs=1e-6), f"depth {k}"
    if name != "ce":
        assert not np.asarray(gradient[0]).any(), "the main model's states are a target only"


def test_the_gradient_of_lk_holds_its_share_fixed(model, batch, states):
    """lk's weight of kl is no function to be lowered: the gradient is that of a mixture."""
    settings = mixture("lk")
    gradient = jax.grad(lambda states: loss_of(model, batch, states, settings))(states)
    head = model.lm_head.weight[...]
    tv = [plain_depth(head, batch, states, k) for k in range(DEPTHS)]
    shares = np.exp(-3 * (1 - np.array(tv)))

    def by_depth(states, k):
        one = jnp.zeros(DEPTHS).at[k].set(1.0)
        return sum(
            share * jnp.sum(one * part)
            for share, part in zip((shares[k], 1 - shares[k]), parts(model, batch, states),
                                   strict=True)
        ) / DEPTHS  # fmt: skip

    for k in range(DEPTHS):
        expected = jax.grad(by_depth)(states, k)[k + 1]
        np.testing.assert_allclose(gradient[k + 1], expected, rtol=1e-3, atol=1e-7)


def gradient_of(model, batch, states, settings: ObjectiveSettings, learnt: tuple[str, ...] = ()):
    return jax.grad(lambda states: loss_of(model, batch, states, settings, learnt))(states)


MIXTURES = {name: mixture(name, depth_decay=0.6) for name in NAMES} | {
    "several": ObjectiveSettings(ce=0.3, tv=2.0, e2e_tv=0.5, depth_decay=0.6)
}


@pytest.mark.parametrize("chunk", [5, 16])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_gradient_made_beside_the_sums_is_that_of_a_pass_back(
    name, chunk, model, batch, states, monkeypatch
):
    set_chunk(monkeypatch, 2, chunk * (DEPTHS + 3))
    settings = MIXTURES[name]
    found = gradient_of(model, batch, states, settings, sums_of(settings))
    passed_back = gradient_of(model, batch, states, settings)
    others = {"kl_K", "joint"} - set(sums_of(settings))  # control: by a sum that it is not made of
    none = gradient_of(model, batch, states, settings, tuple(others)[:1])
    for k in range(1, DEPTHS + 1):
        largest = float(jnp.max(jnp.abs(passed_back[k])))
        np.testing.assert_allclose(found[k], passed_back[k], rtol=1e-5, atol=1e-6 * largest)
        assert not np.any(none[k])
    assert not np.any(found[0])  # nothing but the drafts learns


@pytest.mark.parametrize("name", NAMES)
def test_no_logits_are_computed_twice(name, model, batch, states, monkeypatch):
    """Those of the main model and of each depth once, and each depth's gradient."""
    chunk, settings = 5, mixture(name)
    set_chunk(monkeypatch, 2, chunk * (DEPTHS + 1 + 2 * settings.compares_distributions))

    def products(learnt: tuple[str, ...]) -> float:
        """Of a position with the head."""

        def value(states):
            return loss_of(model, batch, states, settings, learnt)

        traced = jax.make_jaxpr(jax.value_and_grad(value))(states)
        positions = 2 * chunk * -(-16 // chunk)
        return program_flops(traced.jaxpr) / (2.0 * VOCAB * model.config.hidden_size * positions)

    sums = sums_of(settings)
    behind = DEPTHS / chunk if settings.compares_distributions else 0
    once = (1 + behind) + DEPTHS
    assert products(sums) == pytest.approx(once + len(sums) * DEPTHS)
    assert products(()) >= once + 2 * DEPTHS  # control: by a pass back


def plain_depth(head, batch, states, k: int) -> float:
    """tv of one depth: of a decay so strong, or so weak, that it alone counts."""
    values = [plain(head, batch, states, "tv", decay) for decay in (1.0, 2.0, 3.0)]
    rows = [np.array([1.0, d, d * d]) / (1 + d + d * d) for d in (1.0, 2.0, 3.0)]
    return float(np.linalg.solve(np.array(rows), values)[k])


def parts(model, batch, states):
    """kl and tv by depth, from the product's own sums (their values are tested above)."""
    target = tuple(targets(batch, k) for k in range(DEPTHS + 1))
    sums, _ = through_head(model.lm_head, states, target, Asked(distributions=True))
    measured = measured_of([0.0] * (DEPTHS + 1), [0] * (DEPTHS + 1))._replace(
        num_targets_K1=jnp.stack([jnp.sum(each.valid_BT) for each in target]),
        kl_sum_K=sums.kl_K,
        overlap_sum_K=sums.overlap_K,
    )
    found = _by_depth(measured, _accepted(measured))
    return found["kl"], found["tv"]


def test_perfect_drafts_cost_nothing(model, batch, states):
    """Depths whose distribution is the main model's: kl, tv and e2e_tv are 0, ce is not."""
    same = (states[0], *(jnp.roll(states[0], -k, axis=1) for k in range(1, DEPTHS + 1)))
    found = {name: float(loss_of(model, batch, same, mixture(name))) for name in NAMES}
    assert found["ce"] > 1.0
    assert max(abs(found[name]) for name in NAMES if name != "ce") < 1e-5
    shifted = (states[0],) * (DEPTHS + 1)  # negative control: p of the wrong place
    assert float(loss_of(model, batch, shifted, mixture("tv"))) > 0.1


def test_a_batch_without_a_whole_round_costs_nothing(model, states):
    """e2e_tv has no anchor in a document that is shorter than a round."""
    short = packed([DOCUMENTS[2]], rows=2, row_tokens=16)
    assert float(loss_of(model, short, states, mixture("e2e_tv"))) == 0.0
    assert np.isfinite(float(loss_of(model, short, states, mixture("lk"))))


def test_reused_depths_load_their_module(model, batch):
    """Three depths of one module: its expert load is the sum of theirs."""
    main = model.main(batch.tokens_BT, context_of(batch))
    found = jax.jit(lambda: measure(model, batch, main, Asked(DEPTHS)))()
    assert found.load.mtp_ME.shape == (1, model.config.n_routed_experts)
    tokens = sum(each.ids.size for each in DOCUMENTS)
    inside = sum(max(each.ids.size - k, 0) for each in DOCUMENTS for k in range(1, DEPTHS + 1))
    assert inside < 3 * tokens
    assert float(found.load.mtp_ME.sum()) == model.config.num_experts_per_tok * inside
    assert model.config.vocab_size == VOCAB


def test_hard_labels_after_a_distribution_are_warned_of():
    def after(*trained):
        entries = [{"by": "x", "settings": {"objective": dict.fromkeys(t, 1.0)}} for t in trained]
        return {"derived": [*entries, {"by": "something else"}]}

    ce = mixture("ce")
    assert "ce takes back what e2e_tv taught" in (forgets(ce, after(["ce"], ["e2e_tv"])) or "")
    assert "what tv and lk taught" in (forgets(mixture("kl", ce=0.1), after(["tv", "lk"])) or "")
    for silent in (after(["e2e_tv"], ["ce"]), after(["kl"]), after(), {}):
        assert forgets(ce, silent) is None
    assert forgets(mixture("kl"), after(["tv"])) is None
    assert forgets(ce, {"derived": [{"settings": {"train": "mtp"}}]}) is None  # an earlier version

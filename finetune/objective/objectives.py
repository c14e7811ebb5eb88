"""What training lowers, a file of its own for its formulas: objectives by name, with weights.

p is the main model's distribution at the place of a draft (no gradient goes through it), q_k that
of depth k. K depths.

* ce: the negative log-likelihood of the text, DeepSeek's own (arXiv 2412.19437, section 2.2).
* kl: KL(p || q_k).
* tv: 1 - sum over v of min(p, q_k), the share of drafts that rejection sampling refuses.
* lk: exp(-3 a) kl + (1 - exp(-3 a)) tv, where a is the mean of sum min(p, q_k) over what is
  computed at a time: KL where hardly anything is accepted, and TV has no gradient, TV later
  (arXiv 2602.23881).
* e2e_tv: one minus the accepted share of whole rounds of K drafts,
  1 - mean over anchors of (1/K) sum over j of product over k <= j of sum min(p, q_k)
  (arXiv 2606.12370). Depths are joined in it, so it has no weights by depth.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from finetune.objective.losses import Measured, TargetCounts, mean_losses
from finetune.settings import ObjectiveSettings, Part, RunSettings

LK_ETA = 3.0
# What each is made of, fields of HeadSums.
_SUMS = {
    "ce": ("nll_K1",),
    "kl": ("kl_K",),
    "tv": ("overlap_K",),
    "lk": ("kl_K", "overlap_K"),
    "e2e_tv": ("joint",),
}


def objective(
    measured: Measured,
    part: Part,
    mixture: ObjectiveSettings,
    mtp_lambda: jax.Array | float,
    main_nll: jax.Array | None = None,
    whole: TargetCounts | None = None,
) -> jax.Array:
    """L_main + lambda * the mixture; with the main model frozen, the mixture alone.

    A frozen main model's loss is a constant, and lambda would only be a factor. main_nll: instead
    of the measured sum, where gradients of the two go to different parts of the model. whole: what
    sums are divided by, where a part of a batch was measured.
    """
    mtp = mtp_objective(measured, mixture, whole)
    if part == "mtp":
        return mtp
    divided = _divided(measured, whole)
    if main_nll is not None:
        sums_K1 = divided.nll_sum_K1.at[0].set(main_nll)
        divided = divided._replace(nll_sum_K1=sums_K1)
    return mean_losses(divided)[0] + mtp_lambda * mtp


def lambdas(settings: RunSettings) -> Callable[[jax.Array], jax.Array]:
    """Lambda of a step, counted from 1."""
    first, last, steps = settings.mtp_lambda, settings.mtp_lambda_end, settings.steps

    def linear(step: jax.Array) -> jax.Array:
        done = jnp.minimum((step.astype(jnp.float32) - 1) / max(steps - 1, 1), 1)
        return first + (last - first) * done

    def at_once(step: jax.Array) -> jax.Array:
        return jnp.where(3 * step <= 2 * steps, first, last)

    def constant(step: jax.Array) -> jax.Array:
        return jnp.full_like(step, first, jnp.float32)

    return {"linear": linear, "step": at_once, "constant": constant}[settings.mtp_lambda_schedule]


def mtp_objective(
    measured: Measured, mixture: ObjectiveSettings, whole: TargetCounts | None = None
) -> jax.Array:
    """The weighted sum of the objectives that the mixture names; whole: as of `objective`."""
    accepted_K, measured = _accepted(measured), _divided(measured, whole)
    by_depth = _by_depth(measured, accepted_K)
    decay_K = mixture.depth_decay ** jnp.arange(len(measured.kl_sum_K), dtype=jnp.float32)
    weight_K = decay_K / jnp.sum(decay_K)
    total = jnp.zeros((), jnp.float32)
    for name, weight in mixture.weights().items():
        if name == "e2e_tv":
            total += weight * _refused(measured.joint_sum, measured.num_anchors)
        else:
            total += weight * jnp.sum(weight_K * by_depth[name])
    return total


def sums_of(mixture: ObjectiveSettings) -> tuple[str, ...]:
    """Which of HeadSums the MTP modules learn by."""
    return tuple(sorted({each for name in mixture.weights() for each in _SUMS[name]}))


def forgets(mixture: ObjectiveSettings, provenance: Mapping[str, Any]) -> str | None:
    """A warning where hard labels follow what taught the modules the main model's distribution.

    provenance: of the checkpoint that is trained; its last training says what its modules learnt.
    """
    trained = _trainings(provenance)
    learnt = trained[-1]["settings"].get("objective", {}) if trained else {}
    before = [name for name in ("tv", "lk", "e2e_tv") if learnt.get(name)]
    if not mixture.ce or not before:
        return None
    return (
        f"warning: ce takes back what {' and '.join(before)} taught these MTP modules (acceptance "
        "by rejection sampling); without --objective.ce they go on learning what servers accept"
    )


def are_new(provenance: Mapping[str, Any]) -> bool:
    """Whether `new-mtp` made MTP modules of a checkpoint, and nothing was trained since."""
    return bool(provenance.get("mtp_new_layers")) and not _trainings(provenance)


def _trainings(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a checkpoint was trained by, first to last."""
    return [each for each in provenance.get("derived", ()) if "settings" in each]


def _divided(measured: Measured, whole: TargetCounts | None) -> Measured:
    """With the counts that its sums are divided by."""
    return measured if whole is None else measured._replace(**whole._asdict())


def _by_depth(measured: Measured, accepted_K: Float[Array, "K"]) -> dict[str, Float[Array, "K"]]:
    """Each objective that goes depth by depth; 0 for a depth without a target.

    accepted: the part of drafts that lk weighs by, which is a mean over what was measured whatever
    sums are divided by.
    """
    counts_K = measured.num_targets_K1[1:]
    kl_K = measured.kl_sum_K / jnp.maximum(counts_K, 1).astype(jnp.float32)
    tv_K = _refused(measured.overlap_sum_K, counts_K)
    share_K = jnp.exp(-LK_ETA * accepted_K)
    lk_K = share_K * kl_K + (1.0 - share_K) * tv_K
    return {"ce": mean_losses(measured)[1:], "kl": kl_K, "tv": tv_K, "lk": lk_K}


def _accepted(measured: Measured) -> Float[Array, "K"]:
    """The mean of sum min(p, q_k) over the targets of what was measured; no gradient goes in."""
    tv_K = _refused(measured.overlap_sum_K, measured.num_targets_K1[1:])
    return 1.0 - jax.lax.stop_gradient(tv_K)


def _refused(accepted_sum: jax.Array, count: jax.Array) -> jax.Array:
    """One minus a mean; 0 where there is nothing to take it over."""
    mean = accepted_sum / jnp.maximum(count, 1).astype(jnp.float32)
    return jnp.where(count > 0, 1.0 - mean, 0.0)

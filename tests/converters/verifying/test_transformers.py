"""The network against Transformers' own classes: main logits and MTP logits, one and two modules.

`tests/transformers_pair.py` tells what a comparison with Transformers' `MtpModel` has to know.
"""

import jax
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from imported import assert_close, assert_far, import_folder, load_float32
from transformers_pair import Pair, pair_of, transformers_mtp

from mtp_model.model import DeepSeekV3
from tools.make_tiny_checkpoint import make_tiny_checkpoint

VARIANTS = {
    "one module": {"num_mtp": 1},
    "two modules": {"num_mtp": 2},
    "plain queries": {"num_mtp": 1, "q_lora": False},
    "layer 61": {
        "num_mtp": 1,
        "sizes": {"num_hidden_layers": 61, "first_k_dense_replace": 59},
    },
}


@pytest.fixture(scope="module", params=VARIANTS)
def both(request, tmp_path_factory) -> tuple[DeepSeekV3, Pair]:
    folder = tmp_path_factory.mktemp("transformers")
    make_tiny_checkpoint(folder / "source", dtype="f32", **VARIANTS[request.param])
    import_folder(folder / "source", folder / "checkpoint")
    return load_float32(folder / "checkpoint"), pair_of(folder / "source")


@jax.jit
def run(model, tokens_BT):
    out = model(tokens_BT)
    return out.logits_BTV, out.mtp_logits, out.hidden_BTD


@torch.no_grad()
def test_main_and_mtp_logits(both):
    model, pair = both
    is_deep = model.config.num_hidden_layers == 61
    logits, mtp_logits, hidden = run(model, pair.tokens.numpy())
    if not is_deep:  # rounding alone takes 61 tiny layers near the tolerance
        assert_close(logits, pair.main.lm_head(pair.hidden).numpy(), "main logits")
    assert len(mtp_logits) == model.config.num_nextn_predict_layers
    h0 = torch.tensor(jax.device_get(hidden)) if is_deep else pair.hidden
    states = transformers_mtp(pair, h0, list(range(len(mtp_logits))))
    for k, (ours, state) in enumerate(zip(mtp_logits, states, strict=True), start=1):
        theirs = pair.main.lm_head(state).numpy()
        # past the end Transformers drafts where we feed token 0
        assert_close(ours[:, :-k], theirs[:, :-k], f"MTP logits, depth {k}")
        assert_far(ours[:, : -k - 1], theirs[:, 1:-k], f"depth {k}, shifted by one position")


@torch.no_grad()
def test_the_state_before_the_norm_is_not_what_transformers_feeds(both):
    model, pair = both
    _, mtp_logits, _ = run(model, pair.tokens.numpy())
    state = transformers_mtp(pair, pair.before_norm, [0])[0]
    assert_far(mtp_logits[0][:, :-1], pair.main.lm_head(state).numpy()[:, :-1], "pre-norm state")

"""One tiny checkpoint in Transformers' classes and in our torch reference, and how to compare them.

What Transformers 5.23 does that a comparison has to know:

* `MtpModel.from_pretrained` finds MTP weights through the main class's
  `_keys_to_ignore_on_load_unexpected`, which for DeepSeek-V3 is the literal layer 61. Other depths
  and other numbers of layers load when a subclass names their layers there (`load_transformers`).
* `MtpModel.forward` gives the logits of the last position only and fails when it is given labels;
  `forward_layer` gives every position of one depth, and is used here depth by depth.
* It rotates by position i+k where we rotate by i: RoPE is relative, so the results are equal.
* Past the end it drafts, where we feed token 0: only rows i with i+k < T can be compared.
* The norms inside its attention use eps 1e-6 whatever `rms_norm_eps` says.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from converters.verifying.logits.torch_reference import TorchReference, open_reference

TOLERANCE = 1e-5  # max |a - b| / max |b|
CONTROL = 100 * TOLERANCE  # what every deliberate mistake has to exceed
NUM_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One checkpoint in both implementations, and what Transformers computes from it."""

    main: Any
    mtp: Any
    reference: TorchReference
    tokens: Tensor
    hidden: Tensor  # [B, T, D] after model.norm
    before_norm: Tensor  # [B, T, D]


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    error = relative_error(got, want)
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}, allowed {TOLERANCE:.0e}"


def random_tokens(vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(vocab_size, (2, NUM_TOKENS), generator=generator)


def load_transformers(folder: Path, num_layers: int, num_mtp: int) -> tuple[Any, Any]:
    """Load the main model and all its MTP modules, whatever their layer numbers are."""
    mtp_layers = range(num_layers, num_layers + num_mtp)

    patterns = [rf"model\.layers\.{layer}\..*" for layer in mtp_layers]
    attributes = {"_keys_to_ignore_on_load_unexpected": patterns}
    main_class: Any = type("Main", (DeepseekV3ForCausalLM,), attributes)
    main = main_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return main, MtpModel.from_pretrained(main)


@torch.no_grad()
def pair_of(folder: Path) -> Pair:
    reference = open_reference(folder)
    config = reference.config
    main, mtp = load_transformers(
        folder, config["num_hidden_layers"], config["num_nextn_predict_layers"]
    )
    tokens = random_tokens(config["vocab_size"])
    before_norm = []
    hook = main.model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    hidden = main.model(tokens).last_hidden_state
    hook.remove()
    return Pair(
        main=main,
        mtp=mtp,
        reference=reference,
        tokens=tokens,
        hidden=hidden,
        before_norm=before_norm[0],
    )


@torch.no_grad()
def transformers_mtp(pair: Pair, h: Tensor, modules: list[int]) -> list[Tensor]:
    """Return h_1.. of Transformers on the text itself; depth k uses `modules[k - 1]`."""
    states = []
    for k, module in enumerate(modules, start=1):
        ahead = torch.nn.functional.pad(pair.tokens[:, k:], (0, k))
        positions = torch.arange(NUM_TOKENS)[None] + k
        h = pair.mtp.forward_layer(module, h, positions, None, input_ids=ahead)
        states.append(h)
    return states

"""The MTP module of DeepSeek-V3 trained on one GPU from captured states, beside torch.

    XLA_PYTHON_CLIENT_MEM_FRACTION=.95 python -m tools.bench_gpu config.json --rows 1 4

The step of `train --states` with `--objective.ce 1`, parameters and moments bfloat16: 11.6 billion
parameters of DeepSeek-V3's module, weights random. Beside it Transformers' module of the same sizes
with the same loss, gradients clipped, fused AdamW, run eagerly with its grouped product of experts.
Each in a process of its own, whose memory the other then has. Tokens a second, and the operations
of the model by formula (no recomputation) relative to the highest speed stated for the card.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, by NVIDIA
SIDES = ("ours", "ours, layers kept", "torch")
Step = Callable[[], float]


def our_step(values: Mapping[str, Any], rows: int, row_tokens: int, remat: bool) -> Step:
    """`train --states` of a module with random weights."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from finetune.data.packing import Batch, PostNorm
    from finetune.optimizer import make_optimizer
    from finetune.settings import ObjectiveSettings, OptimizerSettings, RunSettings
    from finetune.state import TrainState, num_parameters, traced_step
    from finetune.weights import abstract_for_training
    from mtp_model import ModelConfig
    from mtp_model.model import abstract_model, leaf_name

    config = ModelConfig.from_dict(values)
    weights = nnx.to_flat_state(nnx.state(abstract_model(config, "mtp"), nnx.Param))
    stored = {leaf_name(path): jnp.dtype("bfloat16") for path, _ in weights}
    split = abstract_for_training(config, stored, "mtp", "bfloat16", remat, scope="mtp")
    optimizer = OptimizerSettings(
        schedule="constant", warmup_fraction=0.0, parameters="bfloat16", moments="bfloat16"
    )
    run = RunSettings(
        checkpoint="",
        data=(),
        out=Path(),
        objective=ObjectiveSettings(ce=1.0),
        optimizer=optimizer,
        router_bias_rate=0.0,
    )
    moved = make_optimizer(optimizer, run.steps, lambda name: "norm" not in name)
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    make = jax.jit(
        lambda key, shape, dtype: jax.random.normal(key, shape, dtype) * 0.02,
        static_argnums=(1, 2),
    )

    def filled(leaf: Any) -> jax.Array:
        if leaf.ndim < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        return make(next(keys), leaf.shape, leaf.dtype)

    def nothing(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    rng = np.random.default_rng(0)
    shape = rows, row_tokens
    ones = np.ones(shape, np.int32)
    batch = Batch(
        rng.integers(2, config.vocab_size, shape).astype(np.int32),
        ones,
        np.broadcast_to(np.arange(row_tokens, dtype=np.int32), shape),
        ones,
        PostNorm(make(jax.random.key(1), (*shape, config.hidden_size), jnp.bfloat16) * 50),
    )
    print(f"{num_parameters(split.trainable):,} parameters are trained")
    began = time.perf_counter()
    shapes, traced = traced_step(split, moved, run, batch)
    step = traced.lower().compile()
    print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)
    weights = jax.tree.map(filled, shapes.trainable)
    state = TrainState(weights, nothing(shapes.biases), nothing(shapes.opt_state))
    frozen = jax.tree.map(filled, split.frozen)

    def once() -> float:
        nonlocal state
        state, result = step(state, frozen, batch)
        return float(result.loss)

    return once


def their_step(values: Mapping[str, Any], rows: int, row_tokens: int) -> Step:
    """Transformers' module beside a main model of one layer, which it takes embedding, head and
    rotation from."""
    import torch
    import transformers
    from torch.nn.functional import cross_entropy
    from transformers.modeling_layers import MtpModel

    known: Any = {key: value for key, value in values.items() if key != "quantization_config"}
    config = transformers.DeepseekV3Config(**known | {"num_hidden_layers": 1})
    config._experts_implementation = "grouped_mm"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_dtype(torch.bfloat16)
    with device:
        main: Any = transformers.DeepseekV3ForCausalLM(config)
        main.model.layers[0].mlp = None  # the module alone is trained
        mtp = MtpModel(main, 1)
    mtp.config._experts_implementation = "grouped_mm"
    trained = [x for name, x in mtp.named_parameters() if name.startswith("layers.")]
    assert any(x.ndim == 3 for x in trained), "the module has no experts"
    for parameter in mtp.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.02)
    print(f"{sum(x.numel() for x in trained):,} parameters are trained", flush=True)
    adamw = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.1, fused=device.type == "cuda")
    text = torch.randint(2, config.vocab_size, (rows, row_tokens), device=device)
    states = torch.randn(rows, row_tokens, config.hidden_size, device=device)
    positions = torch.arange(row_tokens, device=device)[None]
    ahead = torch.nn.functional.pad(text[:, 1:], (0, 1))

    def once() -> float:
        adamw.zero_grad()
        drafted = mtp.forward_layer(0, states, positions, None, input_ids=ahead)
        logits = main.lm_head(drafted[:, :-2]).float()
        loss = cross_entropy(logits.flatten(0, 1), text[:, 2:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        return loss.item()

    return once


def run_side(side: str, values: Mapping[str, Any], rows: int, row_tokens: int, steps: int) -> None:
    """Seconds of each step, as JSON in the last line."""
    if side == "torch":
        step = their_step(values, rows, row_tokens)
    else:
        step = our_step(values, rows, row_tokens, remat=side == SIDES[0])
    losses, seconds = [step(), step()], []
    for _ in range(steps):
        began = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds, "losses": losses, "bytes": bytes_used(side)}))


def bytes_used(side: str) -> int:
    """The most that arrays took of the card."""
    if side == "torch":
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path, help="config.json of DeepSeek-V3, or R1")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--side", choices=SIDES, help="measure this one here, and print JSON")
    arguments = parser.parse_args()
    values = json.loads(arguments.config.read_text())
    size = arguments.row_tokens, arguments.steps
    if arguments.side:
        run_side(arguments.side, values, arguments.rows[0], *size)
        return
    from finetune.planning.flops import model_flops
    from mtp_model import ModelConfig

    config = ModelConfig.from_dict(values)
    card = "a machine without a GPU"
    if shutil.which("nvidia-smi"):
        card = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
    print(card.partition(" (")[0])
    print("| rows | side | s a step | tokens/s | of the card's FLOP/s | most memory, GB |")
    print("|---|---|---|---|---|---|")
    for rows in arguments.rows:
        flops = model_flops(config, "mtp", rows, arguments.row_tokens, 1, captured=True)
        # Cross entropy alone asks nothing of the main model's head.
        flops -= 2.0 * rows * arguments.row_tokens * config.hidden_size * config.vocab_size
        for side in arguments.sides:
            found = measured(arguments, side, rows)
            if found is None:
                continue
            second = statistics.median(found["seconds"])
            share = f"{flops / second / peak:.3f}" if peak else "-"
            speed = rows * arguments.row_tokens / second
            cells = rows, side, f"{second:.4f}", f"{speed:,.0f}", share, found["bytes"] / 1e9
            print("| {} | {} | {} | {} | {} | {:.1f} |".format(*cells), flush=True)


def measured(arguments: argparse.Namespace, side: str, rows: int) -> dict[str, Any] | None:
    """What a process of its own found; None where it failed, which is shown."""
    words = [sys.executable, "-m", "tools.bench_gpu", str(arguments.config), "--side", side]
    words += ["--rows", str(rows), "--row-tokens", str(arguments.row_tokens)]
    words += ["--steps", str(arguments.steps)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    print(done.stderr[-2000:] if done.returncode else "", end="", file=sys.stderr)
    if done.returncode:
        print(f"| {rows} | {side} | failed | | | |", flush=True)
        return None
    *said, last = done.stdout.splitlines()
    found = json.loads(last)
    losses = ", ".join(f"{loss:.3f}" for loss in (found["losses"][0], found["losses"][-1]))
    print("; ".join([side, *said, f"losses {losses}"]), file=sys.stderr)
    return found


if __name__ == "__main__":
    main()

"""Our training step beside the same model in Transformers and torch, on CPU, in turn.

    taskset -c 0 python -m tools.bench_step SCRATCH --size 12M --rounds 5

Main model and MTP module, every parameter trained, float32: losses, gradients, clipping, AdamW. The
weights are the same, and the losses of the first batch must be equal. torch runs eagerly, with the
faster of Transformers' ways to run experts. taskset gives both the same processors.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers.modeling_layers import MtpModel

from converters.format.listing import open_safetensors
from converters.importing.importer import import_checkpoint
from converters.sources.open import open_source
from finetune.data.packing import Batch
from finetune.optimizer import make_optimizer
from finetune.settings import BatchSettings, ObjectiveSettings, OptimizerSettings, RunSettings
from finetune.state import make_train_step, start
from finetune.weights import load_for_training, matrices, recomputes_layers
from mtp_model.checkpoint.directory import open_checkpoint
from tools.make_tiny_checkpoint import make_tiny_checkpoint

EXPERTS = "eager", "grouped_mm", "batched_mm"  # Transformers' ways
HEADS = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "num_attention_heads": 8}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "12M": {"hidden_size": 256, "intermediate_size": 1024, "moe_intermediate_size": 128},
    "35M": {"hidden_size": 384, "intermediate_size": 1536, "moe_intermediate_size": 256},
    "100M": {"hidden_size": 640, "intermediate_size": 2560, "moe_intermediate_size": 384},
}
SHARED = {
    **HEADS,
    "num_key_value_heads": 8,
    "kv_lora_rank": 128,
    "q_lora_rank": 192,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "vocab_size": 8192,
}
MTP_WEIGHT = 0.1
Step = Callable[[], float]  # one training step; its loss


def make_checkpoint(scratch: Path, size: str) -> tuple[Path, Path]:
    """The same weights for both sides: safetensors, and our directory."""
    source, directory = scratch / f"source-{size}", scratch / f"directory-{size}"
    if not directory.exists():
        make_tiny_checkpoint(source, dtype="f32", sizes={**SHARED, **SIZES[size]})
        import_checkpoint(open_safetensors(open_source(str(source))), directory)
    return source, directory


def our_step(directory: Path, tokens: np.ndarray, optimizer: OptimizerSettings) -> Step:
    """`train --train all`, one document a row."""
    rows, row_tokens = tokens.shape
    settings = RunSettings(
        checkpoint=str(directory),
        data=(),
        out=directory,
        train="all",
        objective=ObjectiveSettings(ce=1.0),
        optimizer=optimizer,
        batch=BatchSettings(rows=rows, row_tokens=row_tokens),
        router_bias_rate=0.0,
        mtp_lambda=MTP_WEIGHT,
    )
    checkpoint = open_checkpoint(directory)
    remat = recomputes_layers(settings, checkpoint.config, "float32")
    split = load_for_training(settings.checkpoint, "all", "float32", remat)
    weighed = make_optimizer(settings.optimizer, settings.steps, matrices(checkpoint))
    state, step = start(split, weighed), make_train_step(split.graphdef, weighed, settings)
    ones = np.ones_like(tokens)
    places = np.broadcast_to(np.arange(row_tokens, dtype=np.int32), tokens.shape)
    batch = Batch(tokens, ones, places, ones)
    compiled = step.lower(state, split.frozen, batch).compile()

    def run() -> float:
        nonlocal state
        state, result = compiled(state, split.frozen, batch)
        return float(result.loss)

    return run


def their_step(
    source: Path, tokens: np.ndarray, optimizer: OptimizerSettings, experts: str
) -> Step:
    """Transformers' main model and its MTP module, as one would train them."""
    config = json.loads((source / "config.json").read_text())
    pattern = rf"model\.layers\.{config['num_hidden_layers']}\..*"
    base = transformers.DeepseekV3ForCausalLM
    # Transformers reads the module's text to see whether experts can be run in several ways.
    attributes = {"__module__": base.__module__, "_keys_to_ignore_on_load_unexpected": [pattern]}
    main_class: Any = type("Main", (base,), attributes)
    main = main_class.from_pretrained(source, dtype=torch.float32, experts_implementation=experts)
    mtp = MtpModel.from_pretrained(main)
    mtp.config._experts_implementation = experts
    parameters = list({id(p): p for p in [*main.parameters(), *mtp.parameters()]}.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    matrix = [p for p in parameters if p.ndim > 1]
    vector = [p for p in parameters if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrix}, {"params": vector, "weight_decay": 0.0}],
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
    text = torch.from_numpy(tokens.astype(np.int64))
    ahead = torch.nn.functional.pad(text[:, 1:], (0, 1))
    positions = torch.arange(text.shape[1])[None]

    def loss_of(hidden: Any, shift: int) -> Any:
        logits = main.lm_head(hidden[:, : text.shape[1] - shift])
        return cross_entropy(logits.flatten(0, 1), text[:, shift:].flatten())

    def run() -> float:
        adamw.zero_grad()
        hidden = main.model(text, use_cache=False).last_hidden_state
        drafted = mtp.forward_layer(0, hidden, positions, None, input_ids=ahead)
        loss = loss_of(hidden, 1) + MTP_WEIGHT * loss_of(drafted, 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, optimizer.clip_norm)
        adamw.step()
        return loss.item()

    print(f"{sum(p.numel() for p in parameters):,} parameters")
    return run


def timed(step: Step) -> tuple[float, float]:
    """Seconds and processor seconds of a step."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    step()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime - before.ru_utime
    return seconds, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--size", choices=SIZES, default="12M")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--row-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=EXPERTS[:2])
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shape = arguments.rows, arguments.row_tokens
    tokens = np.random.default_rng(0).integers(2, 8192, shape).astype(np.int32)
    optimizer = OptimizerSettings(schedule="constant", warmup_fraction=0.0, learning_rate=1e-5)
    source, directory = make_checkpoint(arguments.scratch, arguments.size)
    steps: dict[str, Step] = {"ours": our_step(directory, tokens, optimizer)}
    for experts in arguments.experts:
        steps[experts] = their_step(source, tokens, optimizer, experts)
    losses = {name: (step(), step()) for name, step in steps.items()}
    print(f"losses {losses}")
    for name, loss in losses.items():
        np.testing.assert_allclose(loss, losses["ours"], rtol=1e-5, err_msg=name)
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            took[name].append(timed(step))
    ours = [statistics.median(each) for each in zip(*took["ours"], strict=True)]
    for name, each in took.items():
        wall, cpu = (statistics.median(x) for x in zip(*each, strict=True))
        least = min(cpu for _, cpu in each)
        ratio = f"ours to it {ours[0] / wall:.2f} wall, {ours[1] / cpu:.2f} processor"
        print(f"{name:12} {wall:.3f} s, {cpu:.3f} s of a processor (least {least:.3f}); {ratio}")


if __name__ == "__main__":
    main()

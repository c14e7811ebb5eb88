"""The whole way on a small model, with the product's own commands: `make demo`.

A small DeepSeek-V3-architecture model with an MTP module is trained from random on the standard
library's code. Then it meets what befalls such models: somebody fine-tunes the main model on other
text (the documentation strings) and forgets the MTP module, whose drafts are accepted less often.
That is written as an FP8 checkpoint in the released format, and from there on it is a user's way:
inspect, import, verify, fine-tune the MTP module, export, verify again.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tools.demo_text import Domain, train_tokenizer, write_domains
from tools.make_tiny_checkpoint import stored_tensors, tiny_config, weight_shapes, write_weights

MINUTES = 4  # what the whole demo may take on two quiet cores
SIZES = {
    "hidden_size": 192,
    "vocab_size": 2048,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "intermediate_size": 512,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 112,
    "kv_lora_rank": 80,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "routed_scaling_factor": 1.5,
    "weight_block_size": [128, 128],
}
NUM_FILES = 5
PRETRAIN_STEPS, MAIN_STEPS, MTP_STEPS = 90, 35, 24
EVALUATION_ROWS = 96
DRAFTS = 3  # tokens that a server drafts with the one module, again and again
BATCH = ["--batch.rows", "16", "--batch.row-tokens", "128"]
NO_EVALUATION = ["--evaluation.holdout-every", "0"]

# XLA's last passes take a third of the time in which it compiles, and speed nothing up here. Each
# step gets its memory anew from the system: in pages of 2 MiB that takes a fifth of the time.
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_llvm_disable_expensive_passes=true",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="The whole way on a small model.")
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="folder for all files")
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="of all training and evaluation"
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    console.print(
        f"This takes at most {MINUTES} minutes on two quiet cores; files go to {arguments.out}/.\n"
        "Steps a to c make a checkpoint such as people find; 1 to 5 are what its user does."
    )
    shutil.rmtree(arguments.out, ignore_errors=True)
    code, prose = prepare(arguments.out)
    steps, main_steps, mtp_steps, rows = (
        max(1, round(number * arguments.steps_scale))
        for number in (PRETRAIN_STEPS, MAIN_STEPS, MTP_STEPS, EVALUATION_ROWS)
    )
    with tempfile.TemporaryDirectory() as compiled:  # what two commands run is compiled once
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled)
        on_code = make_released(arguments.out, code, prose, steps, main_steps, rows)
        results = use_the_product(arguments.out, prose, mtp_steps, rows)
    report(arguments.out, on_code, results, time.monotonic() - began)


def prepare(out: Path) -> tuple[Domain, Domain]:
    """Text, tokenizer, and a checkpoint of random weights in the released format."""
    with step("a. Text of two domains, a tokenizer, and random weights"):
        code, prose = write_domains(out / "text")
        folder = out / "random"
        write_random_checkpoint(folder)
        tokenizer = train_tokenizer([code.train, prose.train], SIZES["vocab_size"])
        tokenizer.save(str(folder / "tokenizer.json"))
    return code, prose


def write_random_checkpoint(folder: Path) -> None:
    """Weights as a fresh model has them: normal with deviation 0.02, norms 1, router biases 0."""
    folder.mkdir(parents=True)
    config = tiny_config("fp8", num_mtp=1, q_lora=True, sizes=SIZES)
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in weight_shapes(config, copies=True):
        if name.endswith("norm.weight"):
            weights[name] = np.ones(shape, np.float32)
        elif name.endswith("e_score_correction_bias"):
            weights[name] = np.zeros(shape, np.float32)
        else:
            weights[name] = rng.normal(0, 0.02, shape).astype(np.float32)
    mtp = f"model.layers.{config['num_hidden_layers']}."
    weights[mtp + "embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    weights[mtp + "shared_head.head.weight"] = weights["lm_head.weight"]
    tensors = {}
    for name, value in weights.items():
        tensors |= stored_tensors(name, value, config)
    write_weights(folder, tensors, NUM_FILES)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def make_released(
    out: Path, code: Domain, prose: Domain, steps: int, main_steps: int, rows: int
) -> dict[str, Any]:
    """The checkpoint that the user gets; returns acceptance on code before the main model moved."""
    train_all = ("train", "--train", "all", *BATCH)
    with step("b. A small model trained from random on code, main model and MTP module together"):
        convert("import", out / "random", out / "random-checkpoint")
        finetune(
            *(*train_all, "--checkpoint", out / "random-checkpoint", "--data", code.train),
            *("--out", out / "pretraining", "--steps", steps, "--checkpoints.every", steps),
            *("--optimizer.learning-rate", "3e-3", "--mtp-lambda", "0.3"),
            *("--eval-data", code.held_out, *evaluated(rows, every=steps)),
        )
        on_code = evaluations(out / "pretraining")[-1]
    with step("c. Somebody fine-tunes its main model on prose, and forgets the MTP module"):
        finetune(
            *(*train_all, "--checkpoint", out / "pretraining" / "final", "--data", prose.train),
            *("--out", out / "forgetting", "--steps", main_steps),
            *("--checkpoints.every", main_steps, "--mtp-lambda", "0"),
            *("--optimizer.learning-rate", "1e-3", "--optimizer.weight-decay", "0"),
            *NO_EVALUATION,
        )
        convert("export", out / "forgetting" / "final", out / "released", "--no-verify")
    return on_code


def use_the_product(out: Path, prose: Domain, steps: int, rows: int) -> dict[str, Any]:
    """What a user does with a released checkpoint; returns what was measured."""
    released, checkpoint, run = out / "released", out / "checkpoint", out / "finetuning"
    with step("1. What is in the checkpoint?"):
        convert("inspect", released)
    with step("2. Import it"):
        convert("import", released, checkpoint)
    with step("3. Is every tensor and every logit the same?"):
        convert("verify", released, checkpoint, "--logits", "--report", out / "report-import")
    with step("4. Fine-tune the MTP module on prose; the main model is frozen"):
        sampled = [evaluate(checkpoint, prose, rows, "rejection")]
        finetune(
            *("train", "--checkpoint", checkpoint, "--data", prose.train),
            *("--eval-data", prose.held_out, "--out", run, "--steps", steps, *BATCH),
            *("--optimizer.learning-rate", "2e-3", "--draft-tokens", DRAFTS),
            *evaluated(rows, every=max(1, steps // 2)),
        )
        greedy = evaluations(run)
        sampled.append(evaluate(run / "final", prose, rows, "rejection"))
    with step("5. Export it in the format it came in, and verify again"):
        convert("export", run / "final", out / "exported", "--no-verify")  # which comes next
        convert(
            *("verify", out / "exported", run / "final", "--logits"),
            *("--report", out / "report-export"),
        )
    return {
        "before": greedy[0],
        "after": greedy[-1],
        "sampled": sampled,
        "logits": [worst_difference(out / name) for name in ("report-import", "report-export")],
        "bytes": compare_bytes(released, out / "exported"),
    }


def evaluated(rows: int, every: int) -> tuple[object, ...]:
    """Options with which a run measures on its held-out text: at first and every so many steps."""
    return ("--evaluation.rows", rows, "--evaluation.every", every)


def evaluations(run: Path) -> list[dict[str, Any]]:
    """What a run measured on its held-out text, as a decoder drafts at temperature 0."""
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def evaluate(checkpoint: Path, domain: Domain, rows: int, sampling: str) -> dict[str, Any]:
    """The same of any checkpoint, by another rule of acceptance."""
    command = ("evaluate", "--checkpoint", checkpoint, "--data", domain.held_out, "--json")
    shape = ("--draft-tokens", DRAFTS, "--rows", 16, "--row-tokens", 128, "--max-rows", rows)
    rule = ("--sampling", sampling)
    return json.loads(run_command("finetune-deepseek", *command, *shape, *rule, capture=True))


def compare_bytes(before: Path, after: Path) -> dict[str, dict[str, int]]:
    """Bytes of tensors that are the same and that differ, of the main model and the MTP module."""
    config = json.loads((before / "config.json").read_text())
    mtp = f"model.layers.{config['num_hidden_layers']}."
    counts = {part: {"unchanged": 0, "changed": 0} for part in ("main model", "MTP module")}
    for file in sorted(before.glob("*.safetensors")):
        old, new = tensor_bytes(file), tensor_bytes(after / file.name)
        assert old.keys() == new.keys(), file
        for name, data in old.items():
            part = "MTP module" if name.startswith(mtp) else "main model"
            counts[part]["unchanged" if data == new[name] else "changed"] += len(data)
    if counts["main model"]["changed"]:
        raise SystemExit(f"the frozen main model changed: {counts}")
    return counts


def tensor_bytes(file: Path) -> dict[str, bytes]:
    content = file.read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: content[data + begin : data + end] for name, (begin, end) in spans.items()}


def report(out: Path, on_code: dict, results: dict[str, Any], seconds: float) -> None:
    """The closing table."""
    console.print("\n[bold]The result[/bold]")
    before, after = results["before"], results["after"]
    table = Table(title="The MTP module on held-out prose", title_justify="left")
    for column in ("", "as it was released", "after fine-tuning"):
        table.add_column(column, justify="right" if column else "left")
    for k, (old, new) in enumerate(zip(before["acceptance"], after["acceptance"], strict=True)):
        table.add_row(f"draft {k + 1} accepted", percent(old), percent(new))
    greedy = [number(each["mean_accepted_length"]) for each in (before, after)]
    table.add_row("mean accepted length, greedy", *greedy)
    lengths = [number(each["mean_accepted_length"]) for each in results["sampled"]]
    table.add_row("mean accepted length, sampled", *lengths)
    for name in ("main_loss", "mtp_loss"):
        table.add_row(name.replace("_", " "), number(before[name]), number(after[name]))
    table.add_row("logits against plain torch", *(f"{d:.1e}" for d in results["logits"]))
    for part, counts in results["bytes"].items():
        total = sum(counts.values())
        table.add_row(f"{part}, bytes changed", "", f"{counts['changed']:,} of {total:,}")
    console.print(table)
    first, chance = on_code["acceptance"][0], 1 / SIZES["vocab_size"]
    console.print(
        f"Before the main model was fine-tuned, draft 1 was accepted {percent(first)} of the "
        f"time, on code (chance: {chance:.2%}).\n"
        f"curves: {out / 'finetuning' / 'curves.png'}\n"
        f"exported checkpoint: {out / 'exported'}\n"
        f"took {seconds / 60:.1f} minutes"
    )


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def number(value: float | list[float] | None) -> str:
    first = value[0] if isinstance(value, list) else value
    return "-" if first is None else f"{first:.3f}"


def worst_difference(folder: Path) -> float:
    depths = json.loads((folder / "report.json").read_text())["logits"]["depths"]
    return max(depth["relative_difference"] for depth in depths)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Say what happens now, and at its end how long it took."""
    console.print(f"\n[bold]{text}[/bold]")
    began = time.monotonic()
    yield
    console.print(f"[dim]this step took {time.monotonic() - began:.0f} s[/dim]")


def convert(*arguments: object) -> None:
    run_command("convert-deepseek", *arguments)


def finetune(*arguments: object) -> None:
    run_command("finetune-deepseek", *arguments)


def run_command(program: str, *arguments: object, capture: bool = False) -> str:
    """Run one of the installed commands; stops the demo where it fails."""
    words = [program, *map(str, arguments)]
    console.print(f"[dim]$ {' '.join(words)}[/dim]")
    installed = Path(sys.executable).parent / program
    output = subprocess.PIPE if capture else None
    environment = SETTINGS | os.environ
    done = subprocess.run(
        [str(installed), *words[1:]], stdout=output, text=True, check=False, env=environment
    )
    if done.returncode:
        raise SystemExit(f"`{' '.join(words)}` failed with exit status {done.returncode}")
    return done.stdout or ""


if __name__ == "__main__":
    main()

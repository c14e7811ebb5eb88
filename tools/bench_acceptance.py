"""Which objective raises acceptance most: the demo's model, tuned by each, measured as a decoder.

    make demo                                       # or any other checkpoint with its text
    python -m tools.bench_acceptance --demo demo-run --out acceptance-run

The main model writes its own answers to prompts out of the demo's prose: sampled ones to train on,
and greedy and sampled ones to held-out prompts to measure on. Each variant tunes the module of the
same checkpoint. One seed: differences below about 0.05 say little. What is there is not done again.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from tools.demo import run_command

console = Console(highlight=False, soft_wrap=True)


class Variant(NamedTuple):
    """What a module is tuned by."""

    objective: str
    drafts: int
    own_answers: bool  # else the text that the prompts are from


VARIANTS = (
    Variant("ce", 1, own_answers=False),
    Variant("ce", 1, own_answers=True),
    Variant("kl", 1, own_answers=True),
    Variant("tv", 1, own_answers=True),
    Variant("e2e_tv", 1, own_answers=True),
    Variant("e2e_tv", 5, own_answers=False),
    Variant("e2e_tv", 5, own_answers=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Acceptance by objective.")
    parser.add_argument("--demo", type=Path, default=Path("demo-run"), help="a finished demo")
    parser.add_argument("--out", type=Path, default=Path("acceptance-run"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--answers", type=int, default=2500, help="to train on")
    arguments = parser.parse_args()
    checkpoint, text = arguments.demo / "checkpoint", arguments.demo / "text"
    out, foreign = arguments.out, text / "prose.jsonl"
    answers = generate(checkpoint, foreign, out / "answers.jsonl", 1.0, arguments.answers)
    asked = text / "prose-held-out.jsonl"
    greedy = generate(checkpoint, asked, out / "greedy.jsonl", 0.0, 400)
    sampled = generate(checkpoint, asked, out / "sampled.jsonl", 1.0, 400)
    rows = [row("nothing", checkpoint, greedy, sampled, None)]
    for each in VARIANTS:
        name = f"{each.objective}-{each.drafts}-{'own' if each.own_answers else 'foreign'}"
        run = out / name
        if not (run / "final" / "COMPLETE").exists():
            finetune(
                *("train", "--checkpoint", checkpoint, "--out", run, "--steps", arguments.steps),
                *("--data", answers if each.own_answers else foreign),
                *("--batch.rows", 16, "--batch.row-tokens", 128, "--draft-tokens", each.drafts),
                *(f"--objective.{each.objective.replace('_', '-')}", 1),
                *("--optimizer.learning-rate", arguments.learning_rate),
                *("--evaluation.holdout-every", 0, "--checkpoints.every", arguments.steps),
            )
        lines = (run / "metrics.jsonl").read_text().splitlines()
        seconds = statistics.median(json.loads(line)["step_s"] for line in lines)
        text_of = "own answers" if each.own_answers else "foreign text"
        named = f"{each.objective}, {each.drafts} draft{'s' * (each.drafts > 1)}, {text_of}"
        rows.append(row(named, run / "final", greedy, sampled, seconds))
    columns = ("greedy, K = 3", "greedy, K = 5", "target, K = 5", "rejection, K = 3")
    table = [("tuned by", *columns, "rejection, K = 5", "s a step"), ("---",) * 7, *rows]
    print("\n".join(f"| {' | '.join(each)} |" for each in table))


def generate(checkpoint: Path, prompts: Path, out: Path, temperature: float, count: int) -> Path:
    """The main model's answers of about a row of training each."""
    if not out.exists():
        finetune(
            *("generate", "--checkpoint", checkpoint, "--data", prompts, "--out", out),
            *("--temperature", temperature, "--max-new-tokens", 96, "--prompt-tokens", 16),
            *("--max-documents", count, "--rows", 64),
        )
    return out


def row(
    name: str, checkpoint: Path, greedy: Path, sampled: Path, seconds: float | None
) -> tuple[str, ...]:
    """Mean accepted length by rule and number of drafts."""
    measured = [
        length(checkpoint, greedy, "greedy", 3),
        length(checkpoint, greedy, "greedy", 5),
        length(checkpoint, sampled, "target", 5),
        length(checkpoint, sampled, "rejection", 3),
        length(checkpoint, sampled, "rejection", 5),
    ]
    return (name, *(f"{x:.2f}" for x in measured), "" if seconds is None else f"{seconds:.2f}")


def length(checkpoint: Path, data: Path, rule: str, drafts: int) -> float:
    found: dict[str, Any] = json.loads(
        finetune(
            *("evaluate", "--checkpoint", checkpoint, "--data", data, "--json"),
            *("--sampling", rule, "--draft-tokens", drafts, "--rows", 16, "--row-tokens", 128),
        )
    )
    console.print(f"{checkpoint} {rule} K={drafts}: {found['mean_accepted_length']:.3f}")
    return found["mean_accepted_length"]


def finetune(*words: object) -> str:
    """What the command prints."""
    return run_command("finetune-deepseek", *words, capture=True)


if __name__ == "__main__":
    main()

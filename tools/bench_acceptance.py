"""Which objective raises acceptance most: the demo's model, tuned by each, measured as a decoder.

    python -m tools.demo --steps-scale 2.8 --out demo-run     # or any checkpoint with its text
    python -m tools.bench_acceptance --demo demo-run --out acceptance-run

The main model writes its own answers to prompts out of the demo's prose: sampled ones to train on,
and greedy and sampled ones to held-out prompts to measure on, of prose and of the code that it was
pretrained on. Each variant tunes the module of the same checkpoint, once for each seed (another
order of the same documents). What was measured is in OUT/results.jsonl and is not done again; it is
printed as tables, and drawn in OUT/acceptance.svg.
"""

import argparse
import itertools
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from mtp_model.reporting import drawing
from tools.demo import run_command

console = Console(highlight=False, soft_wrap=True)

# Student's t: 95 % of means of so many values lie within t standard errors.
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}

SMOOTHED = 10  # steps that are one point of a curve


class Variant(NamedTuple):
    """What a module is tuned by."""

    objective: str
    drafts: int
    own_answers: bool = True  # else the text that the prompts are from

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.drafts}-{'own' if self.own_answers else 'foreign'}"

    @property
    def title(self) -> str:
        text = "own answers" if self.own_answers else "foreign text"
        return f"`{self.objective}`, {self.drafts} draft{'s' * (self.drafts > 1)}, {text}"


# What is compared most comes first, for it takes hours.
VARIANTS = (
    Variant("kl", 5),
    Variant("e2e_tv", 5),
    Variant("e2e_tv", 1),
    Variant("e2e_tv", 1, own_answers=False),
    Variant("kl", 1),
    Variant("ce", 1),
    Variant("ce", 1, own_answers=False),
    Variant("e2e_tv", 5, own_answers=False),
    *(Variant(objective, 1) for objective in ("tv", "lk")),
    *(Variant(objective, 3) for objective in ("e2e_tv", "kl", "tv", "lk", "ce")),
    *(Variant(objective, 5) for objective in ("tv", "lk", "ce")),
)


class Measure(NamedTuple):
    """Mean accepted length of the main model's own answers, by a rule and a number of drafts."""

    title: str
    answers: str
    rule: str
    drafts: int


MEASURES = (
    Measure("greedy, K = 3", "greedy", "greedy", 3),
    Measure("greedy, K = 5", "greedy", "greedy", 5),
    Measure("target, K = 5", "sampled", "target", 5),
    Measure("rejection, K = 5", "sampled", "rejection", 5),
    Measure("rejection, K = 5, code", "sampled-code", "rejection", 5),
    Measure("greedy, K = 3, code", "greedy-code", "greedy", 3),
)
# (this one, less that one): are they apart?
PAIRS = (
    (Variant("e2e_tv", 5), Variant("kl", 5)),
    (Variant("e2e_tv", 1), Variant("kl", 1)),
    (Variant("e2e_tv", 5), Variant("e2e_tv", 1)),
    (Variant("kl", 5), Variant("kl", 1)),
    (Variant("e2e_tv", 1), Variant("e2e_tv", 1, own_answers=False)),
    (Variant("e2e_tv", 5), Variant("e2e_tv", 5, own_answers=False)),
    (Variant("ce", 1), Variant("ce", 1, own_answers=False)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Acceptance by objective.")
    parser.add_argument("--demo", type=Path, default=Path("demo-run"), help="a finished demo")
    parser.add_argument("--out", type=Path, default=Path("acceptance-run"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--answers", type=int, default=2500, help="to train on")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6))
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="the first so many")
    parser.add_argument("--table", action="store_true", help="only print what was measured so far")
    arguments = parser.parse_args()
    measured = Measured(arguments.out / "results.jsonl")
    if not arguments.table:
        # Commands that are alike but for the seed are compiled once.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(arguments.out / "compiled"))
        measure_all(arguments, measured)
    print_tables(measured)
    picture = drawing("acceptance", lambda axes: draw(axes, arguments.out, measured), (9.0, 4.5))
    # Seen on light and on dark, in a page that is not ours.
    (arguments.out / "acceptance.svg").write_text(picture.svg.replace("currentColor", "#808080"))


class Measured:
    """Results by variant and seed, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._of = {(row["variant"], row["seed"]): row for row in map(json.loads, lines)}

    def lacks(self, name: str, seed: int) -> list[Measure]:
        """What is still to be measured."""
        done = self._of.get((name, seed), {"lengths": {}})["lengths"]
        return [each for each in MEASURES if each.title not in done]

    def add(self, name: str, seed: int, lengths: dict[str, float], step_s: float | None) -> None:
        """Put beside what was measured earlier of the same."""
        lengths = self._of.get((name, seed), {"lengths": {}})["lengths"] | lengths
        row = {"variant": name, "seed": seed, "lengths": lengths, "step_s": step_s}
        self._of[name, seed] = row
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def lengths(self, name: str, title: str) -> dict[int, float]:
        """By seed."""
        rows = {seed: row["lengths"] for (of, seed), row in self._of.items() if of == name}
        return {seed: lengths[title] for seed, lengths in rows.items() if title in lengths}

    def seeds(self, name: str) -> list[int]:
        return sorted(seed for of, seed in self._of if of == name)

    def step_s(self, name: str) -> float | None:
        found = [row["step_s"] for (of, _), row in self._of.items() if of == name]
        return statistics.median(found) if found and found[0] else None


def measure_all(arguments: argparse.Namespace, measured: Measured) -> None:
    checkpoint, text, out = (
        arguments.demo / "checkpoint",
        arguments.demo / "text",
        arguments.out,
    )
    foreign = text / "prose.jsonl"
    answers = generate(checkpoint, foreign, out / "answers.jsonl", 1.0, arguments.answers)
    for name, asked, temperature in (
        ("greedy", "prose-held-out", 0.0),
        ("sampled", "prose-held-out", 1.0),
        ("sampled-code", "code-held-out", 1.0),
        ("greedy-code", "code-held-out", 0.0),
    ):
        generate(checkpoint, text / f"{asked}.jsonl", out / f"{name}.jsonl", temperature, 400)
    if lacking := measured.lacks("nothing", 0):
        measured.add("nothing", 0, lengths_of(checkpoint, out, lacking), None)
    for each, seed in itertools.product(VARIANTS[: arguments.variants], range(arguments.seeds)):
        if not (lacking := measured.lacks(each.name, seed)):
            continue
        run = out / f"{each.name}-{seed}"
        if not (run / "final").exists():
            tune(arguments, checkpoint, answers if each.own_answers else foreign, each, seed, run)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        seconds = statistics.median(json.loads(line)["step_s"] for line in lines)
        measured.add(each.name, seed, lengths_of(run / "final", out, lacking), seconds)


def tune(
    arguments: argparse.Namespace,
    checkpoint: Path,
    data: Path,
    variant: Variant,
    seed: int,
    run: Path,
) -> None:
    finetune(
        *("train", "--checkpoint", checkpoint, "--out", run, "--steps", arguments.steps),
        *("--data", data, "--seed", seed),
        *("--batch.rows", 16, "--batch.row-tokens", 128, "--draft-tokens", variant.drafts),
        *(f"--objective.{variant.objective.replace('_', '-')}", 1),
        *("--optimizer.learning-rate", arguments.learning_rate),
        *("--evaluation.holdout-every", 0, "--checkpoints.every", arguments.steps),
    )


def generate(checkpoint: Path, prompts: Path, out: Path, temperature: float, count: int) -> Path:
    """The main model's answers of about a row of training each."""
    if not out.exists():
        finetune(
            *("generate", "--checkpoint", checkpoint, "--data", prompts, "--out", out),
            *("--temperature", temperature, "--max-new-tokens", 96, "--prompt-tokens", 16),
            *("--max-documents", count, "--rows", 64),
        )
    return out


def lengths_of(checkpoint: Path, out: Path, measures: list[Measure]) -> dict[str, float]:
    return {
        each.title: length(checkpoint, out / f"{each.answers}.jsonl", each.rule, each.drafts)
        for each in measures
    }


def length(checkpoint: Path, data: Path, rule: str, drafts: int) -> float:
    found: dict[str, Any] = json.loads(
        finetune(
            *("evaluate", "--checkpoint", checkpoint, "--data", data, "--json"),
            *("--sampling", rule, "--draft-tokens", drafts, "--rows", 16, "--row-tokens", 128),
        )
    )
    console.print(f"{checkpoint} {rule} K={drafts}: {found['mean_accepted_length']}")
    return found["mean_accepted_length"]


def print_tables(measured: Measured) -> None:
    """Means over seeds with intervals of 95 %; then differences, seed by seed."""
    titles = [each.title for each in MEASURES]
    table = [("tuned by", *titles, "s a step"), ("---",) * (len(titles) + 2)]
    for name, title in (("nothing", "nothing"), *((each.name, each.title) for each in VARIANTS)):
        if measured.seeds(name):
            cells = (mean_with_interval(measured.lengths(name, each).values()) for each in titles)
            seconds = measured.step_s(name)
            table.append((title, *cells, f"{seconds:.2f}" if seconds else ""))
    print_table(table)
    table = [("difference in points of acceptance a draft", *titles), ("---",) * (len(titles) + 1)]
    for this, that in PAIRS:
        cells = [points(measured, this, that, each) for each in MEASURES]
        if all(cells):
            table.append((f"{this.title} - {that.title}", *cells))
    print_table(table)


def points(measured: Measured, this: Variant, that: Variant, measure: Measure) -> str:
    """By how much more of the drafts is accepted, seed by seed."""
    of_this, of_that = (measured.lengths(each.name, measure.title) for each in (this, that))
    return mean_with_interval(
        100 * (of_this[seed] - of_that[seed]) / measure.drafts
        for seed in sorted(of_this.keys() & of_that.keys())
    )


def mean_with_interval(values: Any) -> str:
    values = list(values)
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.2f}"


def draw(axes: Any, out: Path, measured: Measured) -> None:
    """By step, how much of the main model's distribution draft 1 has on its own answers: means of
    ten steps and of all seeds, and what lies between the least and the greatest of the seeds."""
    for each in filter(lambda each: each.own_answers, VARIANTS):
        found = (overlaps(out / f"{each.name}-{seed}") for seed in measured.seeds(each.name))
        if not (runs := [run for run in found if run.size]):
            continue
        steps = np.arange(runs[0].size) * SMOOTHED + SMOOTHED
        (line,) = axes.plot(steps, np.mean(runs, axis=0), label=each.title.replace("`", ""))
        axes.fill_between(
            steps, np.min(runs, axis=0), np.max(runs, axis=0), alpha=0.2, color=line.get_color()
        )
    axes.set_xlabel("step")
    axes.set_ylabel("overlap of draft 1, training batches")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()


def overlaps(run: Path) -> np.ndarray:
    """Sum of min(p, q) of draft 1, in groups of steps; of `ce`, which sees no p, none."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    values = np.array([row["overlap"][0] for row in rows if "overlap" in row])
    return values[: len(values) // SMOOTHED * SMOOTHED].reshape(-1, SMOOTHED).mean(axis=1)


def print_table(rows: list[tuple[str, ...]]) -> None:
    print("\n".join(f"| {' | '.join(each)} |" for each in rows) + "\n")


def finetune(*words: object) -> str:
    """What the command prints."""
    return run_command("finetune-deepseek", *words, capture=True)


if __name__ == "__main__":
    main()

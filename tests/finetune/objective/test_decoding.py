"""`evaluate` says what a decoder gets that drafts by brute force, on text of the model itself."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from drafting import BruteForce, greedy_texts, make_drafting_checkpoint
from imported import import_folder

from converters.verifying.logits.torch_reference import open_reference
from finetune.evaluate import EvaluateSettings, evaluate
from finetune.generate import GenerateSettings, generate

PROMPT, LENGTH, NUM_TEXTS = 6, 72, 40
EOS = 1


class Case:
    """A checkpoint with its reference, and texts that its main model wrote greedily."""

    def __init__(self, folder: Path, num_mtp: int):
        make_drafting_checkpoint(folder / "source", num_mtp)
        import_folder(folder / "source", folder / "checkpoint")
        self.checkpoint, self.data = folder / "checkpoint", folder / "texts.jsonl"
        self.reference = open_reference(folder / "source")
        self.reference.get = functools.cache(self.reference.get)
        prompts = torch.randint(4, 384, (NUM_TEXTS, PROMPT), generator=torch.Generator())
        self.texts = greedy_texts(self.reference, prompts, LENGTH)
        self.decoders = [BruteForce(self.reference, text) for text in self.texts]
        mask = [0] * PROMPT + [1] * (LENGTH - PROMPT)
        rows = [{"input_ids": text, "loss_mask": mask} for text in self.texts.tolist()]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluate(self, num_drafts: int, data: Path | None = None):
        return evaluate(
            EvaluateSettings(
                checkpoint=str(self.checkpoint),
                data=(data or self.data,),
                draft_tokens=num_drafts,
                row_tokens=LENGTH,
            )
        ).summary


@pytest.fixture(scope="module", params=[1, 2], ids=["one module", "two modules"])
def case(request, tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("drafting"), request.param)


@pytest.mark.parametrize("num_drafts", [1, 2, 4])  # fewer than modules, to twice as many
def test_evaluate_counts_what_a_decoder_gets(case: Case, num_drafts):
    decoded = [decoder.decode(PROMPT, num_drafts) for decoder in case.decoders]
    rounds = [each for rounds_of_text in decoded for each in rounds_of_text]
    reached = [sum(len(each) > k for each in rounds) for k in range(num_drafts)]
    accepted = [sum(len(each) > k and each[k] for each in rounds) for k in range(num_drafts)]
    summary = case.evaluate(num_drafts)
    assert (summary.reached, summary.accepted) == (reached, accepted)
    assert summary.greedy_share == 1.0
    assert 0.2 < accepted[0] / reached[0] < 0.9, "the test would not see a mistake"

    # As a server counts: each round gives its accepted tokens and one more. A round that begins
    # less than K drafts before the end of the text is left out, of which evaluate knows a part.
    whole = [each for text in decoded for each in _with_room(text, num_drafts)]
    assert len(rounds) >= 1000
    served = 1 + np.mean([sum(each) for each in whole])
    length = summary.mean_accepted_length_interval
    assert length is not None
    assert length.low < served < length.high
    assert summary.mean_accepted_length == pytest.approx(served, abs=0.02)


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_evaluate_counts_what_generate_counted(case: Case, num_drafts, tmp_path):
    """Exactly, on the text that it wrote greedily."""
    made = GenerateSettings(
        checkpoint=str(case.checkpoint),
        data=(case.data,),
        out=tmp_path / "answers.jsonl",
        max_new_tokens=LENGTH - PROMPT,
        temperature=0,
        speculate=num_drafts,
    )
    counts = generate(made)
    written = [json.loads(line)["input_ids"] for line in made.out.read_text().splitlines()]
    for text, found in zip(case.texts.tolist(), written, strict=True):
        assert found == text[: len(found)]
        assert len(found) == LENGTH or found[-1] == EOS
    summary = case.evaluate(num_drafts, made.out)
    assert summary.to_json()["num_drafts"] == counts.num_drafts
    assert summary.accepted == counts.num_accepted_tokens_per_pos
    assert summary.accepted[-1] > 0


def _with_room(rounds: list[list[bool]], num_drafts: int) -> Iterator[list[bool]]:
    """The rounds of a text whose drafts all have a place in it."""
    i = PROMPT - 1
    for each in rounds:
        if i + num_drafts + 1 < LENGTH:
            yield each
        i += sum(each) + 1

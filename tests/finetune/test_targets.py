"""What nothing can be learnt from is told, and moves nothing."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from finetune.captured.documents import open_text
from finetune.data.packing import Batch
from finetune.data.records import DataError
from finetune.data.run_text import RunText
from finetune.optimizer import make_optimizer
from finetune.settings import EvaluationSettings, ObjectiveSettings, OptimizerSettings, RunSettings
from finetune.state import make_train_step, start
from finetune.weights import load_for_training, matrices, open_trainable
from mtp_model.checkpoint.directory import open_checkpoint

SHORT = {
    "two tokens": (
        {"input_ids": [3, 4]},
        "e2e_tv",
        1,
        "needed a token that is learnt behind",
    ),
    "answers of two": (
        {"input_ids": [3, 4, 5, 6, 7], "loss_mask": [0, 0, 0, 1, 1]},
        "e2e_tv",
        3,
        "needed 3 tokens that are learnt behind two others; give longer documents or fewer --draft",
    ),
    "second tokens": (
        {"input_ids": [3, 4, 5], "loss_mask": [0, 1, 0]},
        "kl",
        3,
        "needed a token that is learnt behind two others; give longer documents",
    ),
}


@pytest.mark.parametrize(("record", "objective", "drafts", "told"), SHORT.values(), ids=SHORT)
def test_documents_that_teach_the_modules_nothing_are_no_data(
    settings, checkpoint, tmp_path, record, objective, drafts, told
):
    """A run on them ended well, with a loss of 0 and modules as they were."""
    base = open_trainable(str(checkpoint))[0]
    short = tmp_path / "short.jsonl"
    settings = dataclasses.replace(
        settings,
        data=(short,),
        draft_tokens=drafts,
        objective=ObjectiveSettings(**{objective: 1.0}),
        evaluation=EvaluationSettings(holdout_every=0),
    )

    def opened(settings: RunSettings, *records: dict) -> RunText:
        short.write_text("".join(json.dumps(each) + "\n" for each in records))
        return open_text(settings, base, "float32", lambda _: None)

    with pytest.raises(DataError, match=told) as caught:
        opened(settings, *[record] * 50)
    assert opened(settings, *[record] * 50, {"input_ids": [3, 4, 5, 6, 7, 8]})
    if "fewer --draft-tokens" in str(caught.value):
        assert opened(dataclasses.replace(settings, draft_tokens=2), *[record] * 50)
    assert opened(dataclasses.replace(settings, train="all"), *[record] * 50)


@pytest.mark.parametrize("objective", ["e2e_tv", "kl"])
def test_a_step_without_a_target_moves_nothing(settings, checkpoint, objective):
    """By weight decay neither. e2e_tv learns from whole rounds only: here there are none."""
    tokens_BT, ones_BT = np.full((2, 16), 3, np.int32), np.ones((2, 16), np.int32)
    mask_BT = np.zeros_like(ones_BT)
    mask_BT[:, 5] = 1
    batch = Batch(tokens_BT, ones_BT, np.cumsum(ones_BT, 1, np.int32) - 1, mask_BT)
    only = dataclasses.replace(
        settings,
        draft_tokens=2,
        objective=ObjectiveSettings(**{objective: 1.0}),
        optimizer=OptimizerSettings(weight_decay=0.5, learning_rate=0.1, warmup_fraction=0.0),
    )
    split = load_for_training(str(checkpoint), "mtp", "float32", False)
    optimizer = make_optimizer(only.optimizer, only.steps, matrices(open_checkpoint(checkpoint)))
    before = [np.array(leaf) for leaf in jax.tree.leaves(split.trainable)]
    step = make_train_step(split.graphdef, optimizer, only)
    state, result = step(start(split, optimizer), split.frozen, batch)
    assert (result.loss == 0) == (objective == "e2e_tv")
    moved = [
        (old != np.asarray(new)).any()
        for old, new in zip(before, jax.tree.leaves(state.trainable), strict=True)
    ]
    assert any(moved) == (objective == "kl")

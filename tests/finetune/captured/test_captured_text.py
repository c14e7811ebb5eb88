"""Captured states beside text: the same figures, mixed by weight, learnt by adapters too."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from advice import follows
from captures import SIZE, capture_of, run_settings
from trained import QUIET, read_rows

from finetune import cli
from finetune.captured.documents import open_states
from finetune.captured.sample import Content, open_sample, write_sample
from finetune.data.packing import Packer
from finetune.data.records import DataError
from finetune.evaluate import EvaluateSettings, Evaluation, evaluate
from finetune.run.metrics import Summary
from finetune.settings import EvaluationSettings, LoraSettings, RunSettings, SettingsError
from finetune.settings_rules import check
from finetune.train import train
from finetune.weights import open_trainable
from mtp_model.checkpoint.directory import open_checkpoint

CLOSE = 2e-6  # sums in another order: documents are packed into other rows
FAR = 1e-3
COUNTED = ("acceptance_interval", "mean_accepted_length_interval")  # by documents, which rows cut


def asked(checkpoint: Path, **changes) -> EvaluateSettings:
    return EvaluateSettings(
        checkpoint=str(checkpoint), compute_dtype="float32", draft_tokens=2, **SIZE, **changes
    )


def figures(summary: Summary) -> dict[str, np.ndarray]:
    found = {k: v for k, v in dataclasses.asdict(summary).items() if k not in COUNTED}
    words = [found.pop(name) for name in ("sampling", "temperature")]
    assert words
    return {name: np.array(value, np.float64) for name, value in found.items()}


def difference(got: Summary, want: Summary) -> dict[str, float]:
    pairs = figures(got), figures(want)
    return {n: float(np.abs(pairs[0][n] - x).max() / np.abs(x).max()) for n, x in pairs[1].items()}


def all_summaries(found: Evaluation) -> list[Summary]:
    assert found.reduced
    return [found.summary, *found.controls.values(), found.reduced.summary]


@pytest.mark.parametrize("rule", ["greedy", "rejection"])
def test_states_give_the_figures_of_text_with_the_whole_model(
    rule, checkpoint, mtp_only, records, states, tmp_path
):
    """With its controls, and with drafts from fewer tokens; not with states of other tokens."""
    how = {"sampling": rule, "controls": True, "draft_vocab": 60}
    text = evaluate(asked(checkpoint, data=(records,), **how))
    measured = evaluate(asked(mtp_only, states=(states,), **how))
    assert measured.captured == ("float32",)
    assert not text.captured
    for got, want in zip(all_summaries(measured), all_summaries(text), strict=True):
        assert max(difference(got, want).values()) < CLOSE
    assert measured.reduced
    assert text.reduced
    assert measured.reduced.coverage == text.reduced.coverage
    assert text.summary.reached[0] > 20

    shutil.copytree(states, tmp_path / "wrong")
    for path in (tmp_path / "wrong").glob("*.safetensors"):
        sample = open_sample(path)
        rolled = np.roll(sample.states(0, sample.num_tokens), 1, axis=0)
        content = Content(sample.token_ids(), sample.loss_mask(), rolled)
        write_sample(path, content, sample.state, str(sample.main_model), "float32")
    wrong = evaluate(asked(mtp_only, states=(tmp_path / "wrong",), sampling=rule))
    far = difference(wrong.summary, text.summary)
    assert min(far[name] for name in ("main_loss", "mtp_loss", "overlap", "entropy")) > 10 * CLOSE
    assert max(far.values()) > FAR


def test_folders_are_told_apart_and_how_states_were_kept(
    checkpoint, mtp_only, records, states, tmp_path, capsys
):
    """Each alone gives what is said of it beside the other."""
    short = capture_of(checkpoint, records, tmp_path / "short", stored="bfloat16")
    command = ["evaluate", "--checkpoint", str(mtp_only), "--row-tokens", "32", "--rows", "2"]
    command += ["--states"]
    assert cli.run([*command, str(states), str(short), "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["captured"] == ["bfloat16", "float32"]
    assert [each["source"] for each in both["sources"]] == [str(states), str(short)]
    for source, folder in zip(both["sources"], (states, short), strict=True):
        assert cli.run([*command, str(folder), "--json"]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert source["acceptance"] == alone["acceptance"]
        assert source["num_drafts"] == alone["num_drafts"]
    assert cli.run([*command, str(short)]) == 0
    assert "greedy drafts; from captured states (bfloat16)" in capsys.readouterr().out


def test_what_is_given_twice_is_measured_once(checkpoint, mtp_only, records, states):
    """Twice the documents would have narrower intervals, and nothing more was measured."""
    records_again = (records, records.parent)
    for place, again, what in ((checkpoint, records_again, "data"), (mtp_only, None, "states")):
        once = records if what == "data" else states
        folders = again or (states.parent, states)
        measured = [asked(place, **{what: each}) for each in ((once,), folders, (once, once))]
        first, *others = map(evaluate, measured)
        for other in others:
            assert other.summary.reached == first.summary.reached
            assert other.summary.acceptance_interval == first.summary.acceptance_interval
        inner = {each.source: each.documents for each in others[0].sources}
        assert sorted(inner.values())[0] == 0
        assert inner[str(once)] > 0


@follows("a sample has so many, and the states of a part of it would be of the whole")
def test_what_cannot_be_measured_from_states_is_said(mtp_only, states, tmp_path, capsys):
    longest = max(open_sample(path).num_tokens for path in states.glob("*.safetensors"))
    how = asked(mtp_only, states=(states,))
    with pytest.raises(SettingsError, match=f"--row-tokens is 9, needed {longest} or more: a samp"):
        evaluate(dataclasses.replace(how, row_tokens=9))
    assert evaluate(dataclasses.replace(how, row_tokens=longest)).summary.main_loss
    for changes, said in (
        ({"data": (tmp_path,)}, "both are given: needed --data, or --states"),
        ({"states": ()}, "--data is empty, needed at least one path: needed --data, or --states"),
    ):
        with pytest.raises(SettingsError) as caught:
            evaluate(dataclasses.replace(how, **changes))
        assert caught.value.faults == [said]
    copy = tmp_path / "copy"
    shutil.copytree(states, copy)
    broken = sorted(copy.glob("*.safetensors"))[1]
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"(?s)was cut short.*--skip-unusable"):
        evaluate(dataclasses.replace(how, states=(copy,)))
    left = evaluate(dataclasses.replace(how, states=(copy,), skip_unusable=True))
    assert f"{broken} was cut short" in capsys.readouterr().err
    assert left.summary.tokens < evaluate(how).summary.tokens


# --- adapters


def test_adapters_are_trained_from_states(mtp_only, states, tmp_path):
    """Only the weights beside them are others in the end."""
    lora = LoraSettings(rank=2, projections=("eh_proj", "o_proj"), keep=True)
    run = run_settings(mtp_only, states, tmp_path / "run", train="lora", lora=lora)
    train(run, QUIET)
    changed = open_checkpoint(run.out / "final").provenance["derived"][0]["changed"]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {"eh_proj", "o_proj"}
    assert all(name.startswith("mtp.") for name in changed)
    rows = read_rows(run.out / "metrics.jsonl")
    assert rows[2]["grad_norm"] > 0
    assert (run.out / "adapters" / "COMPLETE").is_file()
    everywhere = dataclasses.replace(run, lora=dataclasses.replace(lora, part="all"))
    for wrong, what in (
        (everywhere, "--lora.part is all"),
        (dataclasses.replace(run, train="all", lora=LoraSettings()), "--train is all"),
    ):
        with pytest.raises(SettingsError) as caught:
            check(wrong)
        assert caught.value.faults == [f"{what}, needed mtp with --states: no main model is there"]


# --- weights


@pytest.fixture
def two(states: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Folders of a few samples, and of the others."""
    folders = tmp_path / "few", tmp_path / "many"
    for folder in folders:
        folder.mkdir()
    for number, path in enumerate(sorted(states.glob("*.safetensors"))):
        shutil.copy(path, folders[number > 2])
    return folders


def shares(settings: RunSettings, batches: int) -> tuple[float, str]:
    """The part of the tokens that are from the first folder, and the digest of the data."""
    base = open_trainable(settings.checkpoint, captured=True)[0]
    text = open_states(settings, base, "float32", lambda _: None)
    packer = Packer(text.train, **SIZE, seed=0, sources=text.sources)
    samples, tokens = text.train.samples, np.zeros(2)  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(batches):
        next(packer)
        for document in (each for row in packer.documents_of_rows for each in row):
            tokens[samples[document].source] += samples[document].num_tokens
    return tokens[0] / tokens.sum(), text.digest


def test_folders_of_states_give_their_share_of_the_tokens(mtp_only, two):
    every = EvaluationSettings(holdout_every=0)
    plain = dataclasses.replace(run_settings(mtp_only, two[0]), states=two, evaluation=every)
    found = {
        weights: shares(dataclasses.replace(plain, data_weights=weights), 60)
        for weights in ((), (3.0, 1.0), (1.0, 3.0))
    }
    assert abs(found[3.0, 1.0][0] - 0.75) < 0.02
    assert abs(found[1.0, 3.0][0] - 0.25) < 0.02
    assert min(abs(found[()][0] - share) for share in (0.25, 0.75)) > 0.05, "they are not alike"
    assert found[()][1] != found[3.0, 1.0][1]
    with pytest.raises(SettingsError) as caught:
        check(dataclasses.replace(plain, data_weights=(1.0,)))
    said = "--data-weights has 1 numbers, needed one for each of the 2 folders of --states"
    assert caught.value.faults == [said]


def test_a_mixture_of_states_goes_on(mtp_only, two, tmp_path):
    every = EvaluationSettings(every=9, holdout_every=0)
    mixed = {"states": two, "data_weights": (3.0, 1.0), "evaluation": every, "steps": 4}
    whole = dataclasses.replace(run_settings(mtp_only, two[0], tmp_path / "whole"), **mixed)
    flat = dataclasses.replace(whole.optimizer, warmup_fraction=0.0, final_fraction=1.0)
    whole = dataclasses.replace(whole, optimizer=flat)
    train(whole, QUIET)
    parts = dataclasses.replace(whole, out=tmp_path / "parts")
    train(dataclasses.replace(parts, steps=2), QUIET)
    train(parts, QUIET)
    losses = [
        [row["loss"] for row in read_rows(run.out / "metrics.jsonl")] for run in (whole, parts)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4

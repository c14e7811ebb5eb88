"""`finetune-deepseek evaluate`: its controls, and what it says of each part of the text."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packed import DOCUMENTS, packed

from finetune import cli
from finetune.data.packing import Batch
from finetune.evaluate import EvaluateSettings, evaluate, initializer_range, untrained
from finetune.objective.acceptance import Choices, Rule, count_acceptance
from finetune.objective.head import Asked
from finetune.objective.intervals import Interval
from finetune.objective.losses import context_of, measure
from finetune.run.metrics import Summary
from finetune.run.report import controls_sections
from finetune.state import Split
from mtp_model import DeepSeekV3, cluster
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.layers import FP8
from mtp_model.load import cast_weights, load
from mtp_model.model import leaf_name
from mtp_model.problems import UserError

DEPTHS = 2


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(str(checkpoint), compute_dtype="float32")


@jax.jit
def outputs(model: DeepSeekV3, batch: Batch):
    return model(batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, DEPTHS)


@functools.partial(jax.jit, static_argnums=2)
def shifted_counts(model: DeepSeekV3, batch: Batch, rule: Rule):
    main = model.main(batch.tokens_BT, context_of(batch))
    return measure(model, batch, main, Asked(DEPTHS, True, rule, shifted=True)).measured.acceptance


@pytest.mark.parametrize("rule", ["greedy", "rejection"])
def test_a_shifted_control_scores_what_was_drafted_for_the_next_place(model, rule):
    """As the network's own logits of the depths, moved by one place, and accepted otherwise."""
    batch = packed(DOCUMENTS)
    out = outputs(model, batch)
    tokens_BT = np.asarray(batch.tokens_BT)

    def counted(moved_by: int):
        logits = [out.logits_BTV, *(jnp.roll(x, -moved_by, axis=1) for x in out.mtp_logits)]
        targets = [np.roll(tokens_BT, -k - 1, axis=1) for k in range(DEPTHS + 1)]
        log_prob = tuple(
            jnp.take_along_axis(jax.nn.log_softmax(x), t[..., None], axis=-1)[..., 0]
            for x, t in zip(logits, targets, strict=True)
        )
        choices = Choices(tuple(jnp.argmax(x, axis=-1) for x in logits), log_prob)
        return jax.jit(count_acceptance, static_argnums=2)(batch, choices, rule)[0]

    found = shifted_counts(model, batch, rule)
    for got, wanted in zip(found, counted(1), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4)
    if rule == "rejection":  # control: without the move other drafts are accepted
        assert not np.allclose(found.accepted_K, counted(0).accepted_K, rtol=1e-4)


def test_an_untrained_module_has_fresh_weights_and_the_same_main_model(model, checkpoint):
    """Weights as they enter products, FP8 ones with their scales."""
    deviation = 0.05
    before = Split.of(model, "mtp")
    after = untrained(before, deviation)
    old, new = (dict(nnx.to_flat_state(each.frozen)) for each in (before, after))
    for path, leaf in old.items():
        if path[0] != "mtp":
            assert leaf[...] is new[path][...], path
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )
    assert any(leaf.dtype == FP8 for _, leaf in nnx.to_flat_state(after.trainable))
    fresh = nnx.merge(*after)
    cast_weights(fresh, jnp.float32)
    for path, leaf in nnx.to_flat_state(nnx.state(fresh, nnx.All(nnx.Param, _in_mtp))):
        values = np.asarray(leaf[...], np.float64)
        if values.ndim < 3:
            assert (values == 1).all(), path
            continue
        spread = 5 / np.sqrt(values.size)  # of the deviation, in parts of it
        assert values.std() == pytest.approx(deviation, rel=max(0.03, spread)), leaf_name(path)
        assert abs(values.mean()) < 5 * deviation / np.sqrt(values.size), leaf_name(path)
    for _, bias in nnx.to_flat_state(after.biases):
        assert not np.asarray(bias[...]).any()
    assert initializer_range(open_checkpoint(str(checkpoint))) == 0.02


def _in_mtp(path: tuple, _: object) -> bool:
    return path[0] == "mtp"


def test_sources_controls_and_speedup_stand_beside_what_was_measured(
    finished, data, tmp_path, capsys
):
    """Each source alone gives what is said of it beside others."""
    lines = data.read_text().splitlines(keepends=True)
    folder, file = tmp_path / "folder", tmp_path / "b.jsonl"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(lines[:6]))
    file.write_text("".join(lines[6:12]))

    def measured(*words: object) -> dict:
        options = ["--rows", "2", "--row-tokens", "512", "--sampling", "rejection", "--json"]
        command = ["evaluate", "--checkpoint", str(finished.run.final), *options, "--data"]
        assert cli.run([*command, *map(str, words)]) == 0
        return json.loads(capsys.readouterr().out)

    both = measured(folder, file, "--controls", "--draft-cost", "0.25")
    alone = [measured(folder), measured(file)]
    assert [each["source"] for each in both["sources"]] == [str(folder), str(file)]
    for source, each in zip(both["sources"], alone, strict=True):
        assert source["documents"] == 6
        for name in ("num_drafts", "acceptance", "mean_accepted_length"):
            assert source[name] == pytest.approx(each[name], rel=1e-4), name
    rates = [each["acceptance"][0] for each in alone]
    assert rates[0] != pytest.approx(rates[1], rel=1e-3), "the sources differ"
    assert sum(each["num_drafts"] for each in both["sources"]) == pytest.approx(both["reached"][0])
    assert both["projected_speedup"] == pytest.approx(both["mean_accepted_length"] / 1.25)
    controls = both["controls"]
    assert [*controls] == ["shifted", "untrained"]
    for each in controls.values():
        assert each["main_loss"] == pytest.approx(both["main_loss"], rel=1e-6)
        assert each["acceptance"] != pytest.approx(both["acceptance"], rel=1e-6)
    assert not {"sources", "controls", "draft_cost", "projected_speedup"} & alone[0].keys()


def summary_of(rate: float, low: float, high: float) -> Summary:
    return Summary(
        tokens=500,
        main_loss=2.0,
        mtp_loss=[3.0],
        acceptance=[rate],
        conditional=[rate],
        agreement=[rate],
        reached=[100],
        accepted=[round(100 * rate)],
        acceptance_interval=[Interval(low, high)],
    )


@pytest.mark.parametrize(("low", "warned"), [(0.30, False), (0.20, True)])
def test_a_measurement_no_better_than_its_controls_is_warned_of(low, warned):
    control = summary_of(0.25, 0.2, 0.3)
    measured = dataclasses.replace(control, acceptance=[0.4])
    measured = dataclasses.replace(measured, acceptance_interval=[Interval(low, 0.5)])
    *_, last = controls_sections(measured, {"shifted": control, "untrained": control})
    assert ("warning" in str(last)) == warned
    if warned:
        assert "than with targets shifted by one and module untrained" in str(last)


def test_rows_in_which_no_round_fits_are_refused(checkpoint, data, capsys):
    """As `train` refuses them: of nothing no acceptance can be told."""
    command = ["evaluate", "--checkpoint", str(checkpoint), "--data", str(data)]
    assert cli.run([*command, "--row-tokens", "4", "--draft-tokens", "3"]) == 2
    assert "--row-tokens is 4, needed 5 or more for this model" in capsys.readouterr().err


def test_a_cost_below_nothing_is_refused(checkpoint, data, capsys):
    words = ["--checkpoint", str(checkpoint), "--data", str(data), "--draft-cost", "-1"]
    assert cli.run(["evaluate", *words]) == 2
    assert "--draft-cost is -1.0, needed 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_temperature_is_finite(command, tmp_path, capsys):
    """JSON has no infinity, and all distributions would be the same."""
    out = ["--out", "a.jsonl"] if command == "generate" else []
    words = [command, "--checkpoint", str(tmp_path), "--data", "a.txt", *out]
    assert cli.run([*words, "--temperature", "inf"]) == 2
    assert "--temperature is inf, needed a" in capsys.readouterr().err


def test_a_cost_is_finite(tmp_path, capsys):
    words = ["evaluate", "--checkpoint", str(tmp_path), "--data", "a.txt"]
    assert cli.run([*words, "--draft-cost", "inf"]) == 2
    assert "--draft-cost is inf, needed a finite number" in capsys.readouterr().err


def test_processes_that_measure_other_things_are_named(checkpoint, data, monkeypatch):
    """Each takes its rows of a batch: of two texts the sums would be of neither."""

    def two(said: dict[str, str]) -> list[dict[str, str]]:
        return [said, said | {"data": "other text", "--row-tokens": "64"}]

    monkeypatch.setattr(cluster, "all_say", two)
    with pytest.raises(UserError) as error:
        evaluate(EvaluateSettings(checkpoint=str(checkpoint), data=(data,)))
    assert "--row-tokens: process 1 has 64, process 0 1024" in str(error.value)
    assert "data: process 1 has other text" in str(error.value)

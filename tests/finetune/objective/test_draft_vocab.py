"""Drafts from the most frequent tokens only: which these are, what is accepted, SGLang's file."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from advice import follows
from flax import nnx

from finetune import cli
from finetune.data.draft_vocab import most_frequent, write_token_map
from finetune.data.tokens import Tokens
from finetune.objective.head import Asked, Targets, through_head
from finetune.run.metrics import Summary
from finetune.run.report import reduced_sections
from mtp_model import ModelConfig
from mtp_model.layers import Embedding
from tools.make_tiny_checkpoint import tiny_config

B, T, D, V, K = 2, 9, 8, 20, 2
KEPT = (3, 17, 5, 0, 11)


class Documents:
    """Token ids with masks, the second document in two stretches."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, document: int) -> Tokens:
        return self.stretch(document, 0)

    def stretch(self, document: int, begin: int) -> Tokens:
        stretches = {
            (0, 0): Tokens(np.array([7, 3, 3, 3, 9]), np.array([0, 1, 1, 1, 1])),
            (1, 0): Tokens(np.array([2, 9, 1]), np.array([1, 1, 1]), following=4),
            (1, 4): Tokens(np.array([7, 7, 1]), np.array([0, 0, 1])),
        }
        return stretches[document, begin]


def test_the_most_frequent_tokens_that_are_learnt():
    """Of equals the first id: 3 three times, 1 and 9 twice, 2 once; 7 is never learnt."""
    documents = Documents()
    assert most_frequent(documents, V, 2) == ((3, 1), 5 / 8)
    assert most_frequent(documents, V, 3) == ((3, 1, 9), 7 / 8)
    assert most_frequent(documents, V, 6) == ((3, 1, 9, 2, 0, 4), 1.0)
    every, coverage = most_frequent(documents, V, 99)
    assert (sorted(every), coverage) == ([*range(V)], 1.0)


@pytest.fixture(scope="module")
def head() -> Any:
    """A head, states of the main model and two depths, and targets of each."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(V, D)).astype(np.float32)
    hidden = tuple(jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32) for _ in range(K + 1))
    target = tuple(
        Targets(jnp.asarray(rng.integers(V, size=(B, T)), jnp.int32), jnp.ones((B, T), bool))
        for _ in range(K + 1)
    )
    sizes = {"vocab_size": V, "hidden_size": D}
    config = ModelConfig.from_dict(tiny_config("f32", num_mtp=1, q_lora=True, sizes=sizes))
    lm_head = Embedding(config, nnx.Rngs(0))
    lm_head.weight[...] = jnp.asarray(weight)
    return lm_head, hidden, target


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_drafts_are_of_the_kept_tokens_and_losses_of_the_whole_head(head: Any, temperature: float):
    """Against float64 logits of which only some columns are left."""
    lm_head, hidden, target = head
    asked = Asked(K, True, "rejection", temperature, drafted=KEPT)
    with jax.default_matmul_precision("highest"):
        sums, choices = through_head(lm_head, hidden, target, asked)
        whole, all_choices = through_head(lm_head, hidden, target, asked._replace(drafted=()))
        every = asked._replace(drafted=tuple(range(V)))
        same = through_head(lm_head, hidden, target, every)
    for found, wanted in zip(*map(jax.tree.leaves, (same, (whole, all_choices))), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert np.array_equal(choices.greedy[0], all_choices.greedy[0])
    assert np.array_equal(choices.log_prob[0], all_choices.log_prob[0])
    for name in ("nll_K1", "kl_K", "entropy"):
        assert np.array_equal(getattr(sums, name), getattr(whole, name)), name
    kept = np.sort(np.array(KEPT))
    head_VD = np.asarray(lm_head.weight[...], np.float64)
    logits = [np.asarray(h, np.float64) @ head_VD.T for h in hidden]
    p = np.exp(logits[0] / temperature)
    p /= p.sum(-1, keepdims=True)
    for k in (1, 2):
        few = logits[k][..., kept]
        assert np.array_equal(choices.greedy[k], kept[few.argmax(-1)])
        q = np.zeros_like(logits[k])
        q[..., kept] = np.exp(few / temperature)
        q /= q.sum(-1, keepdims=True)
        at = np.take_along_axis(q, np.asarray(target[k].tokens_BT)[..., None], -1)[..., 0]
        np.testing.assert_allclose(np.exp(choices.log_prob[k]), at, rtol=1e-4, atol=1e-7)
        assert (at == 0).any()
        assert (at > 0).any()
        ahead = np.minimum(p[:, k:], q[:, : T - k]).sum()
        behind = 0.0  # the rows behind the last one are zeros, of which p is uniform
        behind += np.minimum(1 / V, q[:, T - k :]).sum()
        np.testing.assert_allclose(sums.overlap_K[k - 1], ahead + behind, rtol=1e-5)
        assert float(whole.overlap_K[k - 1]) > 1.05 * float(sums.overlap_K[k - 1])
    assert not np.array_equal(choices.greedy[1], all_choices.greedy[1])


def test_sglang_reads_the_token_map(tmp_path: Path):
    """As its `load_token_map` does: nothing but a list of integers is in the file."""
    torch = pytest.importorskip("torch")
    tokens = [129_279, 0, 7, 1 << 20]
    write_token_map(tmp_path / "hot.pt", tokens)
    found = torch.load(tmp_path / "hot.pt", weights_only=True)
    assert found == tokens
    assert torch.tensor(found, dtype=torch.int64).tolist() == tokens
    with pytest.raises(FileExistsError):
        write_token_map(tmp_path / "hot.pt", tokens)
    torch.save(tokens, tmp_path / "theirs.pt")
    assert torch.load(tmp_path / "theirs.pt", weights_only=True) == found


@follows("is there already; name another file", "is in no folder; make ")
def test_evaluate_measures_both_heads(checkpoint, data, tmp_path, capsys):
    command = ["evaluate", "--checkpoint", str(checkpoint), "--data", str(data), "--max-rows", "2"]
    command += ["--rows", "2", "--row-tokens", "32", "--json", "--token-map"]
    file = tmp_path / "hot.pt"
    file.write_text("mine")
    assert cli.run([*command, str(file), "--draft-vocab", "2"]) == 2
    assert "is there already; name another file" in capsys.readouterr().err
    assert file.read_text() == "mine"
    below = tmp_path / "below"
    assert cli.run([*command, str(below / "hot.pt"), "--draft-vocab", "2"]) == 2
    assert f"is in no folder; make {below} first" in " ".join(capsys.readouterr().err.split())
    assert cli.run([*command, "gs://bucket/hot.pt", "--draft-vocab", "2"]) == 2
    assert "gs://bucket/hot.pt needs a place on this machine" in capsys.readouterr().err
    below.mkdir()
    other = [*command, str(below / "other.pt")]
    assert cli.run(other) == 2
    assert "need --draft-vocab N" in capsys.readouterr().err
    assert cli.run([*other, "--draft-vocab", "385"]) == 2
    assert "--draft-vocab is 385, the model has 384 tokens" in capsys.readouterr().err
    assert cli.run([*other, "--draft-vocab", "2", "--draft-vocab-data", str(data)]) == 0
    found = json.loads(capsys.readouterr().out)
    fewer = found["draft_vocab"]
    assert (fewer["tokens"], fewer["data"]) == (2, found["data"])
    assert 0 < fewer["coverage"] < 0.5
    assert fewer["summary"]["mtp_loss"] == pytest.approx(found["mtp_loss"])
    assert fewer["summary"]["overlap"][0] < found["overlap"][0]
    numbers = (below / "other.pt").read_bytes().count(b"J")
    assert numbers >= 2
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert cli.run(["compare", str(tmp_path / "results.json")]) == 0

    measured, reduced = (Summary.from_json(each) for each in (found, fewer["summary"]))
    _, table, said = reduced_sections(measured, reduced, 2, 0.25, counted_here=True)
    assert [row[0] for row in table.rows] == ["all tokens", "2 tokens"]
    assert said == (
        "the most frequent of this very text, which flatters them: 25.0% of the tokens learnt there"
    )

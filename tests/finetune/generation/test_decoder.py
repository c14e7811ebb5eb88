"""Continued texts are the main model's own, with drafts and without."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from imported import import_folder
from scipy import stats

pytest.importorskip("torch")

import torch
from drafting import BruteForce, greedy_texts, make_drafting_checkpoint

from converters.verifying.logits.torch_reference import open_reference
from finetune.generation import decoder
from finetune.generation.decoder import Decoding, Prompts, Texts, decode, room_for
from mtp_model import DeepSeekV3, make_context, make_mesh
from mtp_model.load import load

LENGTH = 40
LENGTHS = np.array([3, 9, 6, 2, 5], np.int32)  # of prompts


class Case:
    """A checkpoint, and texts that the reference's main model wrote greedily after prompts."""

    def __init__(self, folder, num_mtp: int = 1):
        make_drafting_checkpoint(folder / "source", num_mtp)
        import_folder(folder / "source", folder / "checkpoint")
        self.path = folder / "checkpoint"
        self.model = load(self.path)
        self.reference = open_reference(folder / "source")
        self.reference.get = functools.cache(self.reference.get)
        generator = torch.Generator().manual_seed(2)
        prompts = [torch.randint(4, 384, (1, n), generator=generator) for n in LENGTHS.tolist()]
        self.texts = [greedy_texts(self.reference, prompt, LENGTH)[0] for prompt in prompts]

    def prompts(self, num_drafts: int, length: int = LENGTH) -> Prompts:
        tokens = np.full((len(LENGTHS), room_for(length, num_drafts)), 9, np.int32)
        for row, (text, n) in enumerate(zip(self.texts, LENGTHS, strict=True)):
            tokens[row, :n] = text[:n]
        seeds = np.arange(len(LENGTHS), dtype=np.uint32)
        return Prompts(tokens, LENGTHS, np.full(len(LENGTHS), length, np.int32), seeds)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("decoder"))


def written(texts: Texts) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(texts.tokens_BS, texts.length_B, strict=True)]


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_greedy_text_is_the_references(case: Case, num_drafts, monkeypatch):
    """Token for token, and as many rounds and accepted drafts as a decoder by brute force has."""
    monkeypatch.setattr(decoder, "ROUNDS", 5)
    told: list[int] = []
    how = Decoding(num_drafts=num_drafts, temperature=0)
    texts = decode(case.model, case.prompts(num_drafts), how, told.append)
    assert written(texts) == [text.tolist() for text in case.texts]
    assert told == sorted(told)
    assert told[-1] == len(LENGTHS) * LENGTH - LENGTHS.sum()
    if num_drafts:
        assert_drafts_are_the_references(case, texts, num_drafts)


def assert_drafts_are_the_references(case: Case, texts: Texts, num_drafts: int) -> None:
    rounds = [
        BruteForce(case.reference, text).decode(int(n), num_drafts)
        for text, n in zip(case.texts, LENGTHS, strict=True)
    ]
    assert texts.rounds_B.tolist() == [len(each) for each in rounds]
    expected = [
        [sum(len(r) > k and r[k] for r in each) for k in range(num_drafts)] for each in rounds
    ]
    assert texts.accepted_BK.tolist() == expected
    assert 0 < texts.accepted_BK[:, -1].sum() < texts.rounds_B.sum()


def test_several_modules_draft_in_turn(tmp_path):
    """More drafts than modules, after prompts that are shorter than a round."""
    case = Case(tmp_path, num_mtp=2)
    texts = decode(case.model, case.prompts(4), Decoding(num_drafts=4, temperature=0))
    assert written(texts) == [text.tolist() for text in case.texts]
    assert_drafts_are_the_references(case, texts, 4)


def test_a_module_fed_its_own_drafts_drafts_as_decoding_does(case: Case):
    """At every place of a text, though it was not decoded there; fed the text, it drafts others."""
    text = case.texts[0][None].numpy().astype(np.int32)
    context = make_context(np.ones_like(text))

    def drafted(model: DeepSeekV3, own: bool):
        def likeliest(h_BTD):
            return jnp.argmax(model.lm_head.logits(h_BTD), axis=-1)

        main = model.main(text, context)
        hidden = model.draft(main.state_BTD, text, context, 3, likeliest if own else None).hidden
        return jnp.stack([likeliest(h_BTD)[0] for h_BTD in hidden], axis=1)

    places = range(LENGTH - 4)  # further on, the text has no three tokens more
    decoder = BruteForce(case.reference, case.texts[0])
    expected = [decoder.drafts(i, 3) for i in places]
    fed = {own: jax.jit(partial(drafted, own=own))(case.model).tolist() for own in (True, False)}
    assert fed[True][: len(places)] == expected
    assert fed[False][: len(places)] != expected


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_a_token_may_end_a_text(case: Case, num_drafts):
    """The token is the last one of its text; what would follow is not there."""
    end = int(case.texts[0][20])
    how = Decoding(num_drafts=num_drafts, temperature=0, end_ids=(end, 383))
    texts = decode(case.model, case.prompts(num_drafts), how)
    for text, n, found in zip(case.texts, LENGTHS, written(texts), strict=True):
        answer = text.tolist()[n:]
        stop = answer.index(end) + 1 if end in answer else len(answer)
        assert found == text.tolist()[: n + stop]
    assert texts.length_B.min() < LENGTH


def test_sampled_text_does_not_depend_on_its_batch(case: Case):
    prompts = case.prompts(0, 12)
    how = Decoding(temperature=0.8)
    whole = written(decode(case.model, prompts, how))
    half = decode(case.model, Prompts(*(each[2:4] for each in prompts)), how)
    assert written(half) == whole[2:4]
    mesh = make_mesh(expert=2, tensor=2, devices=jax.devices()[:4])
    some = Prompts(*(each[2:4] for each in prompts))
    assert written(decode(load(case.path, mesh), some, how, mesh=mesh)) == whole[2:4]
    other = prompts._replace(seed_B=prompts.seed_B + 1)
    assert written(decode(case.model, other, how)) != whole


def sampled(case: Case, num_drafts: int, seed: int, count: int = 1500) -> tuple[np.ndarray, float]:
    """The first two of three tokens sampled after one prompt, many times, [N, 2]; and how many
    first drafts were accepted."""
    length = int(LENGTHS[0]) + 3
    one = case.prompts(num_drafts, length)
    rows = Prompts(*(np.repeat(each[:1], count, axis=0) for each in one))
    rows = rows._replace(seed_B=np.arange(count, dtype=np.uint32) + np.uint32(seed * count))
    texts = decode(case.model, rows, Decoding(num_drafts=num_drafts, temperature=0.6))
    share = texts.accepted_BK[:, :1].sum() / texts.rounds_B.sum()
    return np.asarray(texts.tokens_BS)[:, length - 3 : length - 1], float(share)


def same_distribution(one: np.ndarray, other: np.ndarray) -> float:
    """The p-value of a chi-square test that both columns' tokens are of one distribution."""
    values = []
    for x, y in zip(one.T, other.T, strict=True):
        often = np.bincount(np.concatenate([x, y]), minlength=384)
        kept = np.flatnonzero(often >= 30)
        table = [
            [*(np.sum(each == token) for token in kept), np.sum(~np.isin(each, kept))]
            for each in (x, y)
        ]
        assert len(kept) > 3
        values.append(stats.chi2_contingency(np.array(table) + 1e-9).pvalue)
    return min(values)


def test_sampled_text_has_the_main_models_distribution(case: Case, monkeypatch):
    """Two tokens, so that a draft is accepted, refused, and followed by another."""
    plain, _ = sampled(case, 0, seed=0)
    drafted, share = sampled(case, 2, seed=2)
    assert 0.1 < share < 0.9
    assert same_distribution(plain, sampled(case, 0, seed=1)[0]) > 1e-3
    assert same_distribution(plain, drafted) > 1e-3

    # negative control: every draft is accepted
    def careless(logits_BPV, drafted, log_q, chance, places_BP):
        accepted, token = real(logits_BPV, drafted, log_q, chance, places_BP)
        return jax.numpy.full_like(accepted, len(drafted)), token

    real = decoder._accept
    monkeypatch.setattr(decoder, "_accept", careless)
    # of another number of rows: what was compiled before does not accept so
    assert same_distribution(plain, sampled(case, 2, seed=3, count=1499)[0]) < 1e-6

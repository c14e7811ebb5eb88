"""A tuned checkpoint in Transformers: `generate(use_mtp=True)` drafts with the tuned module and
writes the main model's own greedy text; and what export wrote comes back with every bit."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from changed import leaf_of_rows
from drafting import make_drafting_checkpoint
from imported import load_float32
from roundtrip import patch_tensor, read_tensors
from transformers_pair import load_transformers

from converters.cli.main import main as convert
from mtp_model.checkpoint.derived import write_derived
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.model import leaves_by_name

NAME = "model.layers.2.eh_proj.weight"
LEAF = "mtp.eh_proj.weight"
PROMPT, LENGTH = [5, 17, 3, 40], 36


def run(*args: object) -> None:
    assert convert([str(arg) for arg in args]) == 0


@pytest.fixture(autouse=True)
def _one_thread():
    """Small torch products are many times faster so beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`: its module drafts nothing of use. `tuned`: a directory in which it does; `out`: its
    export."""
    folder = tmp_path_factory.mktemp("tuned")
    make_drafting_checkpoint(folder / "source", num_mtp=1)
    good = read_tensors(folder / "source")[NAME].copy()
    bad = -good
    every = {index: bad[index].tobytes() for index in np.ndindex(*bad.shape)}
    patch_tensor(folder / "source", NAME, every)
    run("import", folder / "source", folder / "ckpt")
    changed = leaf_of_rows(np.dtype(np.float32), lambda _, start, stop: good[start:stop])
    write_derived(open_checkpoint(folder / "ckpt"), folder / "tuned", {LEAF: changed}, {})
    run("export", folder / "tuned", folder / "out")
    return folder


@torch.no_grad()
def written(folder: Path, **options: Any) -> tuple[list[int], int]:
    """What Transformers writes greedily, and how often the main model ran for it."""
    model, _ = load_transformers(folder, num_layers=2, num_mtp=1)
    runs = []
    model.model.register_forward_hook(lambda *_: runs.append(1))
    prompt = torch.tensor([PROMPT])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_length=LENGTH,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return out[0].tolist(), len(runs)


def test_transformers_drafts_with_the_tuned_module(made: Path):
    plain, plain_runs = written(made / "out")
    drafted, drafted_runs = written(made / "out", use_mtp=True)
    untuned, untuned_runs = written(made / "source", use_mtp=True)
    assert len(plain) == LENGTH
    assert drafted == plain == untuned, "a draft never changes a greedy text"
    assert plain_runs == LENGTH - len(PROMPT)
    assert drafted_runs < 0.8 * untuned_runs, "the module that was exported is what drafts"


def test_it_is_the_text_that_our_network_writes(made: Path):
    text, _ = written(made / "out", use_mtp=True)
    model = load_float32(made / "tuned")
    logits = jax.jit(lambda model, tokens: model(tokens).logits_BTV)

    def next_tokens(text: list[int]) -> list[int]:
        return np.argmax(logits(model, np.array([text]))[0], axis=-1).tolist()[len(PROMPT) - 1 : -1]

    assert next_tokens(text) == text[len(PROMPT) :]
    assert next_tokens(text[::-1]) != text[::-1][len(PROMPT) :]  # the control: another text


def test_an_export_comes_back_with_every_bit(made: Path, tmp_path: Path):
    run("import", made / "out", tmp_path / "again")
    trees = [leaves_by_name(load_float32(path)) for path in (made / "tuned", tmp_path / "again")]
    bits = [{n: np.asarray(leaf).tobytes() for n, leaf in tree.items()} for tree in trees]
    assert bits[0] == bits[1]
    before = leaves_by_name(load_float32(made / "ckpt"))
    assert [n for n, leaf in before.items() if np.asarray(leaf).tobytes() != bits[1][n]] == [LEAF]
    run("verify", made / "tuned", tmp_path / "again")
    run("verify", made / "ckpt", tmp_path / "again", "--scope", "main")

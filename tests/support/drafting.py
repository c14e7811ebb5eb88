"""A small checkpoint whose MTP modules draft neither always right nor always wrong, and a decoder
that drafts by brute force with the plain-torch reference."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from converters.verifying.logits.torch_reference import (
    TorchReference,
    mtp_input,
    mtp_output,
    under,
)
from tools.make_tiny_checkpoint import make_tiny_checkpoint

SIZES = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
NOISE = {"o_proj": 0.4, "down_proj": 0.6}  # how far layers move the stream from the embedding


def make_drafting_checkpoint(folder: Path, num_mtp: int) -> None:
    """A token is followed by one that a table gives, unless attention and experts decide else."""
    make_tiny_checkpoint(folder, dtype="f32", num_mtp=num_mtp, sizes=SIZES, copies=False)
    rng = np.random.default_rng(5)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            kind = name.split(".")[-2]
            if kind in NOISE:
                tensors[name] = tensor * np.float32(NOISE[kind])
            elif kind == "eh_proj":
                size = len(tensor)
                moved = np.concatenate([np.eye(size), 0.4 * np.eye(size)], axis=1)
                tensors[name] = (moved + rng.normal(0, 0.02, moved.shape)).astype(np.float32)
            elif kind in ("embed_tokens", "lm_head"):
                table = np.random.default_rng(6).normal(size=tensor.shape).astype(np.float32)
                order = np.random.default_rng(7).permutation(len(table))
                tensors[name] = table if kind == "embed_tokens" else 0.2 * table[order]
        save_file(tensors, file)


def greedy_texts(ref: TorchReference, prompts: Tensor, length: int) -> Tensor:
    """What the main model writes after each prompt [B, P], token by token: int [B, length]."""
    tokens = prompts
    while tokens.shape[1] < length:
        last = ref.main(tokens).hidden[:, -1:]
        tokens = torch.cat([tokens, ref.logits(last).argmax(-1)], dim=1)
    return tokens


class BruteForce:
    """What is drafted in a round at each position of a text [T], each token computed anew."""

    def __init__(self, ref: TorchReference, text: Tensor):
        self.ref, self.text = ref, text
        self.h0 = ref.first_state(ref.main(text[None]))
        self._known: dict[int, tuple[Iterator[int], list[int]]] = {}

    def drafts(self, i: int, count: int) -> list[int]:
        """The first `count` tokens drafted by a decoder that has token i+1."""
        start = (self.h0[:, : i + 1], self.text[: i + 2])
        coming, known = self._known.setdefault(i, (draft(self.ref, *start), []))
        known += itertools.islice(coming, count - len(known))
        return known[:count]

    def decode(self, prompt: int, num_drafts: int) -> list[list[bool]]:
        """The rounds of a decoder that writes the text greedily and drafts `num_drafts` tokens.

        Returns for each round which drafts are accepted, up to the first that is not. Rounds whose
        drafts do not all have a place in the text come with those that have.
        """
        rounds, i = [], prompt - 1
        while places := self.text[i + 2 :][:num_drafts].tolist():
            drafts = self.drafts(i, len(places))
            right = [drafted == token for drafted, token in zip(drafts, places, strict=True)]
            accepted = right.index(False) if False in right else len(right)
            rounds.append(right[: accepted + 1])
            i += accepted + 1
        return rounds


def draft(ref: TorchReference, h0: Tensor, known: Tensor) -> Iterator[int]:
    """Tokens drafted after `known`, of which the main model has run over all but the last."""
    num_modules = ref.config["num_nextn_predict_layers"]
    embed = ref.get("model.embed_tokens.weight")
    fed: list[list[Tensor]] = [[] for _ in range(num_modules)]
    state, rows = h0, h0.shape[1]
    for k in itertools.count(1):
        module = (k - 1) % num_modules
        get = under(ref.get, f"model.layers.{ref.config['num_hidden_layers'] + module}")
        e = embed[known[k : rows + k]][None] if k <= num_modules else embed[known[-1]][None, None]
        fed[module].append(
            mtp_input(state if k <= num_modules else state[:, -1:], e, get, ref.as_read)
        )
        again = rows - 1 + num_modules * torch.arange(1, len(fed[module]))
        x = torch.cat(fed[module], dim=1)
        places = ref.places(torch.ones(x.shape[:2]), torch.cat([torch.arange(rows), again]))
        state = mtp_output(x, get, ref.as_read, places)
        token = ref.logits(state[:, -1]).argmax(-1)
        known = torch.cat([known, token])
        yield int(token)

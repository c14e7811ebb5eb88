"""Tiny models whose MTP module was trained under a convention of one's choice, in plain torch.

`python -m tools.train_conventions` trains a module under each of many conventions, asks
`convert-deepseek probe` which it was, and prints what it said of each; it fails where one was told
wrong. Main model, text and time are small: two layers, the licence of this repository, seconds.
"""

import argparse
import itertools
import math
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from converters.format.listing import open_safetensors
from converters.sources.open import open_source
from converters.verifying.logits.torch_probe import HEADS, LABELS, NORMS, ORDERS, RECYCLED, STATES
from converters.verifying.logits.torch_reference import (
    TorchReference,
    decoder_layer,
    rms_norm,
    under,
)
from converters.verifying.probe import ProbeResult, probe
from tools.make_tiny_checkpoint import (
    random_weight,
    tiny_config,
    write_json,
    write_tokenizer,
    write_weights,
)
from tools.released_format import weight_shapes

SIZES: dict[str, Any] = {
    **{"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1},
    **{"topk_group": 1, "num_experts_per_tok": 2, "num_attention_heads": 2},
    "num_key_value_heads": 2,
}
ROW = 64
BATCH = 8
MAIN_STEPS, MODULE_STEPS, RATE = 150, 120, 4e-3
TEXT = (Path(__file__).parents[1] / "LICENSE").read_text()  # it stays as it is

# Norms whose weights differ much, as trained ones do: what is fed is no matter where all are 1.
_SPREAD = ("model.norm.weight", "shared_head.norm.weight")
Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Taught:
    """How a module was trained. recycled: of two modules, what the second is fed."""

    order: str = ORDERS[0]
    state: str = STATES[0]
    label: int = LABELS[0]
    norm: str = NORMS[0]
    head: str = HEADS[0]
    recycled: str | None = None


class Trainer:
    """A main model that was trained on a text, for modules to be trained over."""

    def __init__(self, folder: Path, steps: int = MAIN_STEPS):
        self.config = tiny_config("f32", num_mtp=2, q_lora=True, sizes=SIZES)
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer(folder, self.config)
        self._tokenizer = folder / "tokenizer.json"
        ids = Tokenizer.from_file(str(self._tokenizer)).encode(TEXT).ids
        self._rows = torch.tensor(ids[: len(ids) // ROW * ROW]).view(-1, ROW)
        self._weights = {
            name: torch.from_numpy(random_weight(name, shape, 0))
            for name, shape in weight_shapes(self.config, copies=True)
        }
        for name in filter(lambda name: name.endswith(_SPREAD), self._weights):
            of_name = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            spread = torch.rand(len(self._weights[name]), generator=of_name)
            self._weights[name] = torch.exp(3 * spread - 1.5)
        self._reference = TorchReference(self.config, self._weights.__getitem__)
        self._places = self._reference.places(torch.ones(BATCH, ROW))
        self._end = self.config["num_hidden_layers"]
        main = [name for name in self._weights if not name.startswith(self._module(0))]
        main = [name for name in main if not name.startswith(self._module(1))]
        self._train(main, steps, self._main_loss)

    def _module(self, number: int) -> str:
        return f"model.layers.{self._end + number}"

    def write(self, folder: Path, taught: Taught | None, steps: int = MODULE_STEPS) -> None:
        """A checkpoint whose module was taught so; None: it was not trained."""
        before = dict(self._weights)
        config = {**self.config, "num_nextn_predict_layers": 1 + bool(taught and taught.recycled)}
        if taught:
            modules = [self._module(number) for number in range(1 + bool(taught.recycled))]
            own = [n for n in self._weights if n.startswith(tuple(f"{m}." for m in modules))]
            copies = ("embed_tokens.weight", "shared_head.head.weight")
            own = [name for name in own if not name.endswith(copies)]
            if taught.head != HEADS[0]:
                name = f"{modules[0]}.{taught.head}.weight"
                self._weights[name] = torch.randn_like(self._weights[name]) / 8
                own.append(name)
            self._train(own, steps, lambda rows: self._module_loss(rows, taught))
        names = {name for name, _ in weight_shapes(config, copies=True)}
        written = {name: self._weights[name].detach().numpy() for name in names}
        for number in range(config["num_nextn_predict_layers"]):
            prefix = self._module(number)
            written[f"{prefix}.embed_tokens.weight"] = written["model.embed_tokens.weight"]
            if number or not taught or taught.head == HEADS[0]:
                written[f"{prefix}.shared_head.head.weight"] = written["lm_head.weight"]
        folder.mkdir(parents=True)
        write_weights(folder, written, 1)
        write_json(folder / "config.json", config)
        (folder / "tokenizer.json").write_bytes(self._tokenizer.read_bytes())
        self._weights.update(before)

    def _train(self, names: list[str], steps: int, loss_of: Callable[[Tensor], Tensor]) -> None:
        torch.manual_seed(0)
        for name in names:
            self._weights[name] = self._weights[name].clone().requires_grad_()
        optimizer = torch.optim.Adam([self._weights[name] for name in names], lr=RATE)
        for _ in range(steps):
            loss = loss_of(self._rows[torch.randint(len(self._rows), (BATCH,))])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for name in names:
            self._weights[name] = self._weights[name].detach()

    def _states(self, rows: Tensor) -> dict[str, Tensor]:
        x = self._weights["model.embed_tokens.weight"][rows]
        for layer in range(self._end):
            get = under(self._weights.__getitem__, f"model.layers.{layer}")
            is_moe = layer >= self.config["first_k_dense_replace"]
            x = decoder_layer(x, get, self._reference.as_read, self._places, is_moe=is_moe)
        return {STATES[0]: rms_norm(x, self._weights["model.norm.weight"], 1e-6), STATES[1]: x}

    def _main_loss(self, rows: Tensor) -> Tensor:
        logits = self._states(rows)[STATES[0]] @ self._weights["lm_head.weight"].T
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())

    def _module_loss(self, rows: Tensor, taught: Taught) -> Tensor:
        with torch.no_grad():
            state = self._states(rows)[taught.state]
        loss = torch.zeros(())
        for number in range(1 + bool(taught.recycled)):
            prefix = f"{self._module(number)}."
            y = self._block(prefix, state, rows, number + 1, taught)
            normed = rms_norm(y, self._weights[f"{prefix}shared_head.norm.weight"], 1e-6)
            of_main = rms_norm(y, self._weights["model.norm.weight"], 1e-6)
            read = {"shared_head.norm": normed, "model.norm": of_main, "none": y}[taught.norm]
            head = f"{self._module(0)}.{HEADS[1]}" if taught.head != HEADS[0] else "lm_head"
            logits, ahead = read @ self._weights[f"{head}.weight"].T, taught.label + number
            wanted = rows[:, ahead:]
            loss = loss + functional.cross_entropy(
                logits[:, : wanted.shape[1]].flatten(0, 1), wanted.flatten()
            )
            state = normed if taught.recycled == RECYCLED[0] else y
        return loss

    def _block(
        self, prefix: str, state: Tensor, rows: Tensor, ahead: int, taught: Taught
    ) -> Tensor:
        weights = self._weights
        following = functional.pad(rows[:, ahead:], (0, ahead))
        e = rms_norm(
            weights["model.embed_tokens.weight"][following], weights[f"{prefix}enorm.weight"], 1e-6
        )
        h = rms_norm(state, weights[f"{prefix}hnorm.weight"], 1e-6)
        pair = [e, h] if taught.order == ORDERS[0] else [h, e]
        x = torch.cat(pair, dim=-1) @ weights[f"{prefix}eh_proj.weight"].T
        get = under(weights.__getitem__, prefix.removesuffix("."))
        return decoder_layer(x, get, self._reference.as_read, self._places, is_moe=True)


def told(folder: Path) -> ProbeResult:
    """What `probe` finds on the text that the model was trained on."""
    source = open_safetensors(open_source(str(folder)))
    return probe(source, TEXT, lambda *_: None)


def wrongly_told(found: ProbeResult, taught: Taught) -> list[str]:
    """What `probe` is sure of and is not so."""
    ways = {
        "concatenation": taught.order,
        "state fed": taught.state,
        "label of row i": f"token i + {taught.label}",
        "norm before the head": taught.norm,
        "head": taught.head,
        "recycled state": taught.recycled,
    }
    sure = [choice for choice in found.choices if choice.sure and ways[choice.what] is not None]
    return [choice.what for choice in sure if choice.found != ways[choice.what]]


def matrix() -> Iterator[Taught]:
    """Every convention of one module, and both ways to feed a second."""
    for order, state, label, norm, head in itertools.product(ORDERS, STATES, LABELS, NORMS, HEADS):
        yield Taught(order=order, state=state, label=label, norm=norm, head=head)
    for recycled in RECYCLED:
        yield Taught(recycled=recycled)


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # the products are small: threads would wait for each other
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(Path(scratch) / "tokenizer")
        for number, taught in enumerate(matrix()):
            trainer.write(Path(scratch) / str(number), taught)
            found = told(Path(scratch) / str(number))
            faults = wrongly_told(found, taught)
            is_right = found.is_trained and not faults
            wrong += not is_right
            ways = ", ".join(str(way) for way in astuple(taught) if way is not None)
            unsure = [choice.what for choice in found.choices if choice.other and not choice.sure]
            loss = found.conventions[0].loss
            print(f"{'right' if is_right else 'WRONG'}  loss {loss:.3f}  {ways}", flush=True)
            print(f"       wrong: {faults}; not told: {unsure}", flush=True)
        trainer.write(Path(scratch) / "untrained", None)
        found = told(Path(scratch) / "untrained")
        wrong += found.is_trained
        loss = found.conventions[0].loss
        print(f"{'WRONG' if found.is_trained else 'right'}  loss {loss:.3f}  untrained")
    print(f"{wrong} wrong; guessing has a loss of {math.log(trainer.config['vocab_size']):.3f}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

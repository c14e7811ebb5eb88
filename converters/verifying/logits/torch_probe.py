"""An MTP module under every convention that it may have been trained with, in plain torch.

The main model runs once, a layer at a time; a module once for all its inputs, one below the other,
so that its experts are read once. Weights come from any source, through the converters' own reader.

B batch, T position, D hidden, V vocab.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from converters.format import fp8
from converters.format.header import DTYPES
from converters.format.listing import SourceCheckpoint
from converters.format.mapping import SCALE_SUFFIX
from mtp_model.problems import UserError
from mtp_model.progress import OnProgress

try:
    import torch
    from torch import Tensor
    from torch.nn import functional

    from converters.verifying.logits.torch_reference import (
        Get,
        TorchReference,
        decoder_layer,
        rms_norm,
        under,
    )
except ImportError as error:
    raise UserError("needs torch, safetensors: pip install 'deepseek-mtp[verify]'") from error

ORDERS = ("embedding first", "state first")
STATES = ("after model.norm", "before model.norm")
NORMS = ("shared_head.norm", "model.norm", "none")
HEADS = ("lm_head", "shared_head.head")
LABELS = (2, 1, 3)  # row i, with the embedding of token i + 1, is to give token i + this
RECYCLED = ("after shared_head.norm", "before it")


class Losses(NamedTuple):
    """What one convention gives: the loss of every token that all conventions have, float64."""

    order: str
    state: str
    label: int
    norm: str
    head: str
    by_token: np.ndarray


class TorchProbe:
    """One checkpoint on tokens int [B, T], each row a text of its own."""

    def __init__(self, source: SourceCheckpoint, tokens: np.ndarray):
        self._source = source
        self._get = weights_of_source(source)
        self._reference = TorchReference(source.config, self._get)
        self._config = self._reference.as_read
        self._tokens = torch.as_tensor(tokens).long()
        self._places = self._reference.places(torch.ones_like(self._tokens))
        self._first = f"model.layers.{self._config['num_hidden_layers']}"
        self.heads = HEADS if self._has_own_head() else HEADS[:1]

    @torch.no_grad()
    def run_main(
        self,
        progress: OnProgress,
        after_layer: Callable[[int, np.ndarray], None],
        done: int = 0,
        state: np.ndarray | None = None,
    ) -> np.ndarray:
        """Run the main model; its loss of every token.

        after_layer: told each layer that was run, and the state [B, T, D] after it. done, state:
        layers that were run before, and the state after them.
        """
        layers = self._config["num_hidden_layers"]
        x = self._reference.embed(self._tokens) if state is None else torch.from_numpy(state)
        for index in range(done, layers):
            progress(index, layers + 2)
            x = self._reference.layer(index, x, self._places)
            after_layer(index, x.numpy())
        self._states = {STATES[0]: self._reference.norm(x), STATES[1]: x}
        progress(layers, layers + 2)
        logits = functional.linear(self._states[STATES[0]], self._get("lm_head.weight"))
        return self._losses(logits, 1, last=1)

    @torch.no_grad()
    def run_module(self) -> Iterator[Losses]:
        """The first module under every convention, fed by the main model that ran."""
        kinds = [(order, state) for order in ORDERS for state in STATES]
        fed = [self._input(self._states[state], 1, order, self._first) for order, state in kinds]
        self._outputs = dict(zip(kinds, self._block(torch.cat(fed), self._first), strict=True))
        for head in self.heads:
            weight = self._get(self._head_name(head))
            for (order, state), y in self._outputs.items():
                for norm in NORMS:
                    logits = functional.linear(self._normed(y, norm), weight)
                    for label in LABELS:
                        losses = self._losses(logits, label, last=max(LABELS))
                        yield Losses(order, state, label, norm, head, losses)

    @torch.no_grad()
    def run_next(self, chosen: Losses) -> dict[str, np.ndarray]:
        """The next depth, of the second module or the first again, by how the state is recycled."""
        second = f"model.layers.{self._config['num_hidden_layers'] + 1}"
        module = second if self._config["num_nextn_predict_layers"] > 1 else self._first
        y = self._outputs[chosen.order, chosen.state]
        states = (self._normed(y, NORMS[0]), y)
        fed = [self._input(state, 2, chosen.order, module) for state in states]
        weight = self._get(self._head_name(chosen.head))
        found = {}
        for name, out in zip(RECYCLED, self._block(torch.cat(fed), module), strict=True):
            logits = functional.linear(self._normed(out, chosen.norm, module), weight)
            found[name] = self._losses(logits, chosen.label + 1, last=max(LABELS) + 1)
        return found

    def _input(self, state: Tensor, ahead: int, order: str, module: str) -> Tensor:
        """What a module's layer reads; embeddings of tokens past the end are not used."""
        get, eps = under(self._get, module), self._config["rms_norm_eps"]
        e = self._reference.embed(self._tokens.roll(-ahead, dims=1))
        pair = [rms_norm(e, get("enorm.weight"), eps), rms_norm(state, get("hnorm.weight"), eps)]
        pair = pair if order == ORDERS[0] else pair[::-1]
        return functional.linear(torch.cat(pair, dim=-1), get("eh_proj.weight"))

    def _block(self, x: Tensor, module: str) -> tuple[Tensor, ...]:
        """The layer of a module on several batches, one below the other."""
        copies = len(x) // len(self._tokens)
        places = self._places._replace(visible=self._places.visible.repeat(copies, 1, 1, 1))
        out = decoder_layer(x, under(self._get, module), self._config, places, is_moe=True)
        return out.chunk(copies)

    def _normed(self, y: Tensor, norm: str, module: str | None = None) -> Tensor:
        if norm == "none":
            return y
        name = "model.norm" if norm == "model.norm" else f"{module or self._first}.{norm}"
        return rms_norm(y, self._get(f"{name}.weight"), self._config["rms_norm_eps"])

    def _losses(self, logits: Tensor, label: int, last: int) -> np.ndarray:
        """Of the rows whose token `last` places on is in the text, in nats."""
        rows = self._tokens.shape[1] - last
        wanted = self._tokens[:, label : label + rows]
        losses = functional.cross_entropy(
            logits[:, :rows].flatten(0, 1), wanted.flatten(), reduction="none"
        )
        return losses.double().numpy()

    def _head_name(self, head: str) -> str:
        return "lm_head.weight" if head == HEADS[0] else f"{self._first}.{head}.weight"

    def _has_own_head(self) -> bool:
        """Whether the module stores a head that is not the main model's."""
        own = self._head_name(HEADS[1])
        if own not in self._source.tensors:
            return False
        return not torch.equal(self._get(own), self._get(self._head_name(HEADS[0])))


def weights_of_source(source: SourceCheckpoint) -> Get:
    """Return `get(name)`: float32, an FP8 tensor times its block scales, of any source."""
    quantisation = source.config.get("quantization_config") or {}
    rows, columns = quantisation.get("weight_block_size") or (1, 1)

    def stored(name: str) -> np.ndarray:
        tensor = source.tensors[name]
        raw = np.empty(tensor.nbytes, np.uint8)
        source.source.read_into(tensor.file, tensor.begin, raw)
        return raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def get(name: str) -> Tensor:
        values = stored(name)
        if values.dtype == DTYPES["F8_E4M3"]:
            out = np.empty(values.shape, np.float32)
            fp8.dequantise_into(out, values, stored(name + SCALE_SUFFIX), (rows, columns))
            return torch.from_numpy(out)
        return torch.from_numpy(values.astype(np.float32))

    return get

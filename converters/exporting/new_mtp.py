"""Fresh MTP modules for a checkpoint that has none, or fewer than wanted, as a draft folder.

A new module begins as a copy: of the checkpoint's first MTP module where it has one, else of its
last main layer. Then what a layer lacks is made so that the module passes on the sum of the two
normed inputs: norms of ones, `eh_proj` of two identities, and before the head the main model's own
norm. Embedding and head are the main model's, as released checkpoints hold copies of them.

The folder holds mtp.safetensors and a config.json, which says which modules are new: what
`import --mtp-from` takes.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from converters.format.fit import checked_config
from converters.format.header import DTYPES, TensorInfo, make_header, parse_header
from converters.format.listing import (
    CONFIG_FILE,
    Listing,
    is_module_alone,
    list_checkpoint,
    read_config,
)
from converters.format.mapping import layer_of, mtp_layers
from converters.format.mtp_from import MTP_FILE, NEW_LAYERS, announcing_modules
from converters.format.writer import StreamWriter
from converters.sources.source import Source
from mtp_model.checkpoint.directory import CheckpointError
from mtp_model.config import ModelConfig
from mtp_model.files.open import as_place
from mtp_model.files.place import Place
from mtp_model.problems import Problem, raise_if_any

_PIECE_BYTES = 16 << 20
_MADE = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
# What a module has of the whole model.
_TAKEN = {
    "shared_head.norm.weight": "model.norm.weight",
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}
_BUFFER = "rotary_emb.inv_freq"  # a main layer's, which no module has


@dataclass(frozen=True, kw_only=True)
class NewTensor:
    """A tensor of the draft: bytes of the checkpoint (`of`), or made anew."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    of: TensorInfo | None = None


@dataclass(frozen=True, kw_only=True)
class NewModules:
    """What was written."""

    path: Place
    layers: tuple[int, ...]
    copied_from: int  # layer that the new modules began as
    nbytes: int


def write_new_mtp(
    source: Source,
    destination: str,
    modules: int,
    overwrite: bool,
    report: Callable[[int, int], None],
) -> NewModules:
    """Write a draft folder with `modules` MTP modules: those that the source has, and new ones.

    report: hears the bytes written and those of the whole file. Raises ProblemsError where the
    source cannot give them, CheckpointError where the destination is something else.
    """
    listing = list_checkpoint(source, may_lie_beside=is_module_alone)
    config = read_config(source)
    announcing = announcing_modules(config, modules)
    cfg, faults = checked_config(announcing)
    raise_if_any(source.name, faults)
    assert cfg
    layers = tuple(range(cfg.num_hidden_layers, cfg.num_hidden_layers + modules))
    there = sorted(mtp_layers(listing.tensors))
    raise_if_any(source.name, _problems(cfg, there, modules))
    original = there[0] if there else cfg.num_hidden_layers - 1
    tensors = [
        each
        for layer in layers
        for each in _module(listing, cfg, layer, layer if layer in there else original)
    ]
    raise_if_any(source.name, _missing(listing))
    place = as_place(destination)
    _raise_if_occupied(place, overwrite)
    place.make_folder()
    if (place / MTP_FILE).is_file():
        (place / MTP_FILE).unlink()
    new = {NEW_LAYERS: [layer for layer in layers if layer not in there]}
    text = json.dumps(announcing | new, indent=2, ensure_ascii=False) + "\n"
    (place / CONFIG_FILE).write_pieces([text.encode()])
    nbytes = _write(source, place, tensors, report)
    return NewModules(path=place, layers=layers, copied_from=original, nbytes=nbytes)


def _problems(cfg: ModelConfig, there: list[int], modules: int) -> Iterator[Problem]:
    """Why the checkpoint cannot be given so many modules."""
    last = cfg.num_hidden_layers
    if modules <= len(there):
        found = f"has {len(there)} already, asked for {modules} in all"
        yield Problem("usage", "MTP modules", f"{found}; ask for more, or use those it has")
    if there and there != list(range(last, last + len(there))):
        found = f"is numbered {there[0]} after {last} main layers"
        yield Problem("layers", f"model.layers.{there[0]}", f"{found}, needed {last}")
    if not there and not cfg.num_moe_layers:
        detail = "is dense, and a module is a layer with experts; there is nothing to begin from"
        yield Problem("layers", f"model.layers.{last - 1}", detail)


def _missing(listing: Listing) -> Iterator[Problem]:
    for name in _TAKEN.values():
        if name not in listing.tensors:
            yield Problem("missing", name, "which a module has a copy of")


def _module(listing: Listing, cfg: ModelConfig, layer: int, original: int) -> Iterator[NewTensor]:
    """The tensors of one module that is, or begins as, the layer `original`."""
    for name, tensor in listing.tensors.items():
        if layer_of(name) == original and not name.endswith(_BUFFER):
            renamed = name.replace(f".{original}.", f".{layer}.", 1)
            yield NewTensor(name=renamed, dtype=tensor.dtype, shape=tensor.shape, of=tensor)
    prefix, hidden = f"model.layers.{layer}.", cfg.hidden_size
    if f"model.layers.{original}.eh_proj.weight" in listing.tensors:
        return
    for own, whole in _TAKEN.items():
        if tensor := listing.tensors.get(whole):
            yield NewTensor(name=prefix + own, dtype=tensor.dtype, shape=tensor.shape, of=tensor)
    if norm := listing.tensors.get("model.norm.weight"):
        for name in _MADE:
            shape = (hidden, 2 * hidden) if name.startswith("eh_proj") else (hidden,)
            yield NewTensor(name=prefix + name, dtype=norm.dtype, shape=shape)


def _write(
    source: Source, place: Place, tensors: list[NewTensor], report: Callable[[int, int], None]
) -> int:
    tensors = sorted(tensors, key=lambda tensor: tensor.name)
    raw = make_header(((t.name, t.dtype, t.shape) for t in tensors), {"format": "pt"})
    header = parse_header(raw, MTP_FILE, str(place))
    written = 0
    with StreamWriter((place / MTP_FILE).appended(), header) as out:
        for tensor in tensors:
            for piece in _bytes(source, tensor):
                out.write(piece)
                written += len(piece)
                report(written, header.size)
    return header.size


def _bytes(source: Source, tensor: NewTensor) -> Iterator[np.ndarray]:
    """A tensor's bytes, piece by piece."""
    if tensor.of is not None:
        for begin in range(0, tensor.of.nbytes, _PIECE_BYTES):
            piece = np.empty(min(_PIECE_BYTES, tensor.of.nbytes - begin), np.uint8)
            source.read_into(tensor.of.file, tensor.of.begin + begin, piece)
            yield piece
        return
    dtype = DTYPES[tensor.dtype]
    if len(tensor.shape) == 1:
        yield np.ones(tensor.shape, dtype).view(np.uint8)
        return
    rows, columns = tensor.shape
    step = max(1, _PIECE_BYTES // (columns * dtype.itemsize))
    for first in range(0, rows, step):
        block = np.zeros((min(step, rows - first), columns), dtype)
        index = np.arange(len(block))
        block[index, first + index] = block[index, rows + first + index] = 1
        yield block.reshape(-1).view(np.uint8)


def _raise_if_occupied(place: Place, overwrite: bool) -> None:
    names = [entry.name for entry in place.entries()]
    foreign = [name for name in names if not name.startswith((MTP_FILE, CONFIG_FILE))]
    if foreign:
        raise CheckpointError(
            f"{place} holds other files (as {foreign[0]}); nothing in it was touched; name another "
            "place, or empty it"
        )
    if MTP_FILE in names and not overwrite:
        raise CheckpointError(f"{place} holds a module; name another place or --overwrite it")

"""Adapters in a run (`--train lora`): which projections get one, and what is left of them at the
end: weights of the checkpoint's own kind, which they are merged into."""

from collections.abc import Callable, Mapping

import numpy as np

from finetune.settings import LoraSettings, SettingsError
from mtp_model import DeepSeekV3, ModelConfig
from mtp_model.checkpoint.chunks import Index
from mtp_model.checkpoint.derived import ChangedLeaf
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.layers import FP8, num_blocks
from mtp_model.lora import Make, adapt, named_by, projections
from mtp_model.model import abstract_model


def raise_unless_there(lora: LoraSettings, config: ModelConfig) -> None:
    """SettingsError for projections that what learns of the model lacks."""
    names = _names(abstract_model(config), lora)
    found = named_by(lora.projections, names)
    lacking = [target for target in lora.projections if not found[target]]
    if lacking:
        ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
        part = "its MTP modules have" if lora.part == "mtp" else "the model has"
        raise SettingsError(
            "settings that cannot be used",
            [f"--lora.projections is {each}, {part} {', '.join(ends)}" for each in lacking],
        )


def add_adapters(model: DeepSeekV3, lora: LoraSettings, make: Make) -> None:
    """Give a model the adapters that are asked for, in place."""
    every = projections(model)
    adapt({name: every[name] for name in adapted(model, lora)}, lora.rank, lora.alpha, make)


def adapted(model: DeepSeekV3, lora: LoraSettings) -> list[str]:
    """Projections that get an adapter."""
    names = _names(model, lora)
    of_target = named_by(lora.projections, names).values()
    chosen = {name for found in of_target for name in found} if lora.projections else set(names)
    return [name for name in names if name in chosen]


def _names(model: DeepSeekV3, lora: LoraSettings) -> list[str]:
    """Projections of what learns."""
    return [n for n in projections(model) if lora.part == "all" or n.startswith("mtp.")]


def moved_leaf(name: str) -> str:
    """The stored leaf that training a leaf moves: of an adapter, the weight beside it."""
    owner, _, last = name.rpartition(".")
    return f"{owner}.weight" if last in ("lora_A", "lora_B") else name


def merged(
    base: Checkpoint, trained: Mapping[str, ChangedLeaf], lora: LoraSettings
) -> dict[str, ChangedLeaf]:
    """By leaf, the weights that adapters stand beside with these added, in float32.

    trained: the adapters' matrices by path. Weights are read from `base` as they are asked for.
    """
    scale = np.float32(lora.alpha / lora.rank)

    def of(weight: str) -> ChangedLeaf:
        owner = weight.removesuffix(".weight")
        a, b = trained[f"{owner}.lora_A"], trained[f"{owner}.lora_B"]

        def rows(index: Index, start: int, stop: int) -> Callable[[], np.ndarray]:
            tall, wide = b.rows(index, start, stop), a.rows(index, 0, lora.rank)
            return lambda: _dense_rows(base, owner, index, start, stop) + scale * tall() @ wide()

        return ChangedLeaf(dtype=np.dtype(np.float32), rows=rows)

    return {weight: of(weight) for weight in sorted(set(map(moved_leaf, trained)))}


def _dense_rows(base: Checkpoint, owner: str, index: Index, start: int, stop: int) -> np.ndarray:
    """Rows of a stored matrix in float32, dequantised where it is FP8."""
    stored = base.read_rows(f"{owner}.weight", index, start, stop)
    rows = stored.astype(np.float32)
    if stored.dtype != FP8:
        return rows
    block = base.config.weight_block_size
    assert block is not None
    first = start // block[0]
    scales = base.read_rows(f"{owner}.weight_scale_inv", index, first, num_blocks(stop, block[0]))
    by_row = np.repeat(scales, block[0], axis=0)[start - first * block[0] :][: stop - start]
    return rows * np.repeat(by_row, block[1], axis=1)[:, : rows.shape[1]]

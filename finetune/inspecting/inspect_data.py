"""`finetune-deepseek inspect-data`: the rows that training would see first, token by token.

Rows come from the packer that training reads, targets from the loss: nothing is worked out anew.
T position in a row, K depths; depth 0 is the main model.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from finetune.data.packing import Batch, Packer
from finetune.data.run_text import RunText, open_run_text
from finetune.data.tokens import TokenDocuments
from finetune.objective.losses import targets
from finetune.settings import (
    BatchSettings,
    DataPaths,
    EvaluationSettings,
    RunSettings,
    SettingsError,
    too_small,
    weight_faults,
)
from finetune.settings_rules import short_rows
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.reporting import plural

NOTHING = "\N{MIDDLE DOT}"  # no target, or one that does not count
SEGMENT_STYLES = ("cyan", "magenta")  # in turn, so that one sees where a document ends
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # a decoder's answer to a part of a character


@dataclass(frozen=True, kw_only=True)
class InspectDataSettings:
    """Show the packed rows that `train` would see first: tokens, segments, positions, loss mask,
    and what each depth is to predict.

    With the same data, checkpoint, seed and sizes these are exactly the batches of training.
    """

    checkpoint: str
    """Checkpoint directory, as `convert-deepseek import` or training writes it; local or gs://."""
    data: DataPaths
    data_weights: tuple[float, ...] = ()
    """Share of the tokens that each path of --data gives, as in training."""
    eval_data: tuple[Path, ...] = ()
    """Held-out text, as in training: with it no document of --data is held out."""
    # By its name in `train` too, which messages about the data say.
    holdout_every: Annotated[int, tyro.conf.arg(aliases=["--evaluation.holdout-every"])] = 20
    """One document in this many is held out and not shown, as in `train`."""
    rows: int = 8
    """Rows in a batch (train: --batch.rows)."""
    row_tokens: int = 1024
    """Tokens in a row (train: --batch.row-tokens)."""
    draft_tokens: int = 0
    """MTP depths whose targets are shown. 0: as many as there are modules."""
    seed: int = 0
    """Decides the order of the documents, as in training."""
    batches: int = 1
    """Batches to show."""
    around: int = 4
    """Tokens shown on each side of a place where the document or the loss mask changes; those in
    between are counted."""
    json: bool = False
    """Print one JSON object with every token instead of tables."""


class ShownRow(NamedTuple):
    """A packed row: what training is given, and what its losses are taken over."""

    batch: int  # from 1
    row: int  # from 1
    documents: list[str]  # where segment 1, 2, ... was read
    pieces: list[str | None]  # text of each token, None without a tokenizer
    token_ids_T: np.ndarray
    segment_ids_T: np.ndarray
    positions_T: np.ndarray
    loss_mask_T: np.ndarray
    targets_KT: np.ndarray
    valid_KT: np.ndarray


class Inspected(NamedTuple):
    """What training says of its data, and its first rows."""

    description: str
    rows: list[ShownRow]


def check(settings: InspectDataSettings) -> None:
    """Raise SettingsError with everything that is wrong with the values."""
    least = {"rows": 1, "row_tokens": 2, "draft_tokens": 0, "seed": 0, "batches": 1, "around": 1}
    least |= {"holdout_every": 0}
    faults = too_small(settings, least)
    if settings.holdout_every == 1:
        faults.append("--holdout-every is 1, needed 0, or 2 and more")
    faults += [] if settings.data else ["--data is empty, needed at least one path"]
    faults += weight_faults(settings.data_weights, settings.data)
    if faults:
        raise SettingsError("settings that cannot be used", faults)


def inspect_data(settings: InspectDataSettings) -> Inspected:
    """The first rows of a run with these settings; nothing is loaded but tokenizer and config."""
    check(settings)
    config = open_checkpoint(settings.checkpoint).config
    modules = config.num_nextn_predict_layers
    faults = short_rows("--row-tokens", settings.row_tokens, settings.draft_tokens, modules)
    if faults:
        raise SettingsError("settings that cannot be used", faults)
    depths = settings.draft_tokens or modules
    text = open_run_text(_as_run(settings), config)
    packer = Packer(
        text.train,
        rows=settings.rows,
        row_tokens=settings.row_tokens,
        seed=settings.seed,
        sources=text.sources,
    )
    rows: list[ShownRow] = []
    for number in range(1, settings.batches + 1):
        batch, _ = next(packer)
        rows += _shown_rows(number, batch, depths, text, packer.documents_of_rows)
    return Inspected(text.description, rows)


def _as_run(settings: InspectDataSettings) -> RunSettings:
    """The settings of a run that reads the same text."""
    return RunSettings(
        checkpoint=settings.checkpoint,
        data=settings.data,
        data_weights=settings.data_weights,
        out=Path(),  # nothing is written
        eval_data=settings.eval_data,
        seed=settings.seed,
        batch=BatchSettings(rows=settings.rows, row_tokens=settings.row_tokens),
        evaluation=EvaluationSettings(holdout_every=settings.holdout_every),
    )


def _shown_rows(
    number: int, batch: Batch, depths: int, text: RunText, documents_of_rows: list[list[int]]
) -> Iterator[ShownRow]:
    on_device = jax.tree.map(jnp.asarray, batch)
    target = [targets(on_device, k) for k in range(depths + 1)]
    tokens_KBT = np.stack([np.asarray(each.tokens_BT) for each in target])
    valid_KBT = np.stack([np.asarray(each.valid_BT) for each in target])
    assert isinstance(text.train, TokenDocuments)  # nothing was captured
    tokenizer, where = text.train.encoder.tokenizer, text.train.corpus.where
    for row, documents in enumerate(documents_of_rows):
        yield ShownRow(
            batch=number,
            row=row + 1,
            documents=[where(document) for document in documents],
            pieces=[_piece(tokenizer, int(token)) for token in batch.tokens_BT[row]],
            token_ids_T=batch.tokens_BT[row],
            segment_ids_T=batch.segment_ids_BT[row],
            positions_T=batch.positions_BT[row],
            loss_mask_T=batch.loss_mask_BT[row],
            targets_KT=tokens_KBT[:, row],
            valid_KT=valid_KBT[:, row],
        )


def _piece(tokenizer: Tokenizer | None, token: int) -> str | None:
    """A token's text, a special one's name; of part of a character, what the tokenizer calls it."""
    if tokenizer is None:
        return None
    text = tokenizer.decode([token], skip_special_tokens=False)
    return tokenizer.id_to_token(token) if UNKNOWN in text or not text else text


def as_json(settings: InspectDataSettings, found: Inspected) -> dict[str, Any]:
    """Every token of every row, for programs."""
    return {
        "checkpoint": settings.checkpoint,
        "description": found.description,
        "rows": [_row_as_json(row) for row in found.rows],
    }


def _row_as_json(row: ShownRow) -> dict[str, Any]:
    return {
        "batch": row.batch,
        "row": row.row,
        "documents": row.documents,
        "tokens": row.pieces,
        "token_ids": row.token_ids_T.tolist(),
        "segment_ids": row.segment_ids_T.tolist(),
        "positions": row.positions_T.tolist(),
        "loss_mask": row.loss_mask_T.tolist(),
        "targets": [
            {"depth": depth, "token_ids": ids_T.tolist(), "valid": valid_T.tolist()}
            for depth, (ids_T, valid_T) in enumerate(zip(row.targets_KT, row.valid_KT, strict=True))
        ],
    }


def show_rows(console: Console, found: Inspected, around: int) -> None:
    """Print the rows as tables, in colour on a terminal."""
    console.print(Text(found.description), soft_wrap=True)
    console.print(
        f"a target that is {NOTHING} does not count: it is behind the document's end, or masked",
        soft_wrap=True,
    )
    for row in found.rows:
        console.print()
        console.print(Text(_heading(row)), soft_wrap=True)
        console.print(_table(row, around))


def _heading(row: ShownRow) -> str:
    real = int((row.segment_ids_T != 0).sum())
    learnt = int(row.loss_mask_T.sum())
    counts = [int(valid_T.sum()) for valid_T in row.valid_KT]
    by_depth = ", ".join(f"depth {k} {count:,}" for k, count in enumerate(counts[1:], start=1))
    lines = [
        f"batch {row.batch}, row {row.row}: {plural(real, 'token')} of {len(row.token_ids_T):,}, "
        f"{learnt:,} learnt; targets: main model {counts[0]:,}{by_depth and f', {by_depth}'}"
    ]
    for segment, where in enumerate(row.documents, start=1):
        size = int((row.segment_ids_T == segment).sum())
        lines.append(f"  segment {segment}: {plural(size, 'token')} of {_printable(where)}")
    return "\n".join(lines)


def _table(row: ShownRow, around: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("place", "segment", "position"):
        table.add_column(name, justify="right")
    depths = ["main model", *(f"depth {k}" for k in range(1, len(row.targets_KT)))]
    for name in ("token", "learnt", *depths):
        table.add_column(name, overflow="ellipsis", no_wrap=True)
    pieces = dict(zip(row.token_ids_T.tolist(), row.pieces, strict=True))
    before = -1
    for place in _places(row, around):
        if place > before + 1:
            table.add_row("", "", "", f"... {place - before - 1:,} more")
        if place < len(row.token_ids_T):
            table.add_row(*_cells(row, place, pieces))
        before = place
    return table


def _places(row: ShownRow, around: int) -> Iterable[int]:
    """Places near a change of the document or of the loss mask; the row's end behind them."""
    kinds_T = np.stack([row.segment_ids_T, row.loss_mask_T])
    changes = np.flatnonzero((kinds_T[:, 1:] != kinds_T[:, :-1]).any(axis=0)) + 1
    length = kinds_T.shape[1]
    near = {
        place
        for change in (0, *changes.tolist(), length)
        for place in range(max(0, change - around), min(length, change + around))
    }
    return [*sorted(near), length]


def _cells(row: ShownRow, place: int, pieces: dict[int, str | None]) -> list[Text]:
    """One line of the table."""
    segment, learnt = int(row.segment_ids_T[place]), bool(row.loss_mask_T[place])
    if not segment:
        return [Text(cell, style="dim") for cell in (str(place), "0", "", "padding")]
    style = SEGMENT_STYLES[segment % len(SEGMENT_STYLES)]
    token = int(row.token_ids_T[place])
    shown = [
        Text(str(place), style="dim"),
        Text(str(segment), style=style),
        Text(str(row.positions_T[place])),
        Text(_named(token, pieces), style=style if learnt else f"dim {style}"),
        Text("yes" if learnt else "no", style="green" if learnt else "dim"),
    ]
    for ids_T, valid_T in zip(row.targets_KT, row.valid_KT, strict=True):
        counts = bool(valid_T[place])
        cell = _named(int(ids_T[place]), pieces) if counts else NOTHING
        shown.append(Text(cell, style="green" if counts else "dim"))
    return shown


def _named(token: int, pieces: dict[int, str | None]) -> str:
    """`7 " the"`: the number, and the text where there is one."""
    piece = pieces[token]
    return str(token) if piece is None else f'{token} "{_printable(piece)}"'


def _printable(text: str) -> str:
    """Without what a terminal would act on: text comes from outside."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

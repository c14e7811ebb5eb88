"""Which convention an MTP module was trained with, or that it was not trained: told by its loss.

Tools differ in what they feed a module and in what it is to predict, and a checkpoint does not say.
Wrong ones fail nowhere: drafts are accepted less often. On real text the right one has the lowest
loss; each choice is compared with its alternatives, all else as in the best.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.format.fit import sound_fit
from converters.format.listing import SourceCheckpoint
from converters.verifying.fetched import fetched_by_part, module_of
from converters.verifying.logits.check import FETCHED, raise_unless_it_fits, source_identity
from converters.verifying.logits.layers import SavedWalk, Walk
from converters.verifying.logits.text import text_problem, tokens_of_text
from mtp_model.problems import Problem, ProblemsError
from mtp_model.progress import OnProgress

if TYPE_CHECKING:
    from converters.verifying.logits.torch_probe import Losses

ROW_TOKENS = 128  # of a text; longer rows tell no more of a convention
MOST_ROWS = 8
FEWEST_TOKENS = 32
# A module that guesses has a loss of ln V; one that was trained is far below, also on odd text.
TRAINED_SHARE = 0.9
_SURE = 3.0  # standard errors between two conventions, over the same tokens


@dataclass(frozen=True, kw_only=True)
class Convention:
    """A way to use a module, and its mean loss in nats a token.

    label: row i, which is fed the embedding of token i + 1, gives token i + label.
    """

    order: str
    state: str
    label: int
    norm: str
    head: str
    loss: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One thing that tools do in several ways. other: the next best way, None where there is none.

    sure: whether the two differ by more than chance over these tokens.
    """

    what: str
    found: str
    loss: float
    other: str | None
    other_loss: float | None
    sure: bool
    expected: str


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """All that was tried. uniform_loss: ln V, of who guesses. conventions: the best first."""

    source: str
    tokens: int
    uniform_loss: float
    main_loss: float
    conventions: tuple[Convention, ...]
    choices: tuple[Choice, ...]

    @property
    def main_reads_the_text(self) -> bool:
        return self.main_loss < TRAINED_SHARE * self.uniform_loss

    @property
    def is_trained(self) -> bool:
        """Whether any convention gives less than guessing does."""
        return self.conventions[0].loss < TRAINED_SHARE * self.uniform_loss

    @property
    def differing(self) -> tuple[Choice, ...]:
        """What was surely done in another way than this toolkit would with this config."""
        return tuple(choice for choice in self.choices if choice.sure and not _is_usual(choice))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        differing = [choice.what for choice in self.differing]
        return {
            **dataclasses.asdict(self),
            "main_reads_the_text": self.main_reads_the_text,
            "is_trained": self.is_trained,
            "differing": differing,
        }


def _is_usual(choice: Choice) -> bool:
    return choice.found == choice.expected


def probe(
    source: SourceCheckpoint, text: str, progress: OnProgress, saved: Path | None = None
) -> ProbeResult:
    """Run main model and module on a text. progress: told layers. saved: a file that is written
    after each layer of the main model, from which the same probe goes on, and which is gone then.

    Raises ProblemsError for a checkpoint without a module, or a text that is too short or makes no
    tokens of this model; CheckpointError where memory does not suffice; UserError without torch.
    """
    config, *_ = sound_fit(source, "all")
    where = source.source.name
    if not config.num_nextn_predict_layers:
        raise ProblemsError(where, [Problem("MTP", "num_nextn_predict_layers", _NO_MODULE)])
    raise_unless_it_fits(where, config, "probe on a larger machine")
    tokens = _rows(text, source, config.vocab_size)
    from converters.verifying.logits import torch_probe  # here: it needs the extra `verify`

    state = torch_probe.STATES[config.mtp_hidden_state != "post_norm"]
    kept = SavedWalk(saved, source_identity(source, tokens)) if saved else None
    begun = (kept and kept.read()) or Walk()
    parts = dict([*_parts(source, config.num_hidden_layers).items()][begun.done :])
    with fetched_by_part(source, parts, saved and saved.with_name(FETCHED)) as finish:
        run = torch_probe.TorchProbe(source, tokens)

        def after_layer(number: int, state: np.ndarray) -> None:
            if kept:
                kept.write(Walk(done=number + 1, theirs=state))
            finish(f"model.layers.{number}")

        main_loss = float(run.run_main(progress, after_layer, begun.done, begun.theirs).mean())
        found = sorted(run.run_module(), key=lambda losses: losses.by_token.mean())
        next_depth = run.run_next(found[0])
        finish(_REST)
    if saved:
        saved.unlink(missing_ok=True)
    layers = config.num_hidden_layers + 2
    progress(layers, layers)
    usual = {"order": torch_probe.ORDERS[0], "state": state, "label": torch_probe.LABELS[0]}
    usual |= {"norm": torch_probe.NORMS[0], "head": torch_probe.HEADS[0]}
    choices = [_choice(name, found, expected) for name, expected in usual.items()]
    choices.append(_between("recycled state", next_depth, torch_probe.RECYCLED[0]))
    if found[0].label == _REPEATED:
        label = _NAMES["label"]
        choices = [dataclasses.replace(c, sure=c.sure and c.what == label) for c in choices]
    return ProbeResult(
        source=where,
        tokens=tokens.size,
        uniform_loss=math.log(config.vocab_size),
        main_loss=main_loss,
        conventions=tuple(_plain(losses) for losses in found),
        choices=tuple(choices),
    )


_REST = "rest"
_NO_MODULE = "is 0: there is no MTP module whose convention could be told"


def _parts(source: SourceCheckpoint, layers: int) -> dict[str, tuple[str, ...]]:
    """The main model's layers, each of which is read once, and all else, which is read again."""
    main = [f"model.layers.{index}" for index in range(layers)]
    rest = sorted({module_of(name) for name in source.tensors} - set(main))
    return {**{name: (name,) for name in main}, _REST: tuple(rest)}


def _rows(text: str, source: SourceCheckpoint, vocab_size: int) -> np.ndarray:
    """Tokens of a text, int [B, T]; what is left of it stays out."""
    ids = tokens_of_text(text, source, "--data", vocab_size)
    if len(ids) < FEWEST_TOKENS:
        found = f"makes {len(ids)} tokens of the text"
        raise text_problem(source, f"{found}, needed {FEWEST_TOKENS}; give --data a longer text")
    length = min(ROW_TOKENS, len(ids))
    rows = min(len(ids) // length, MOST_ROWS)
    return np.array(ids[: rows * length]).reshape(rows, length)


def _plain(losses: "Losses") -> Convention:
    fields = losses._asdict()
    return Convention(loss=float(fields.pop("by_token").mean()), **fields)


def _choice(name: str, found: Sequence["Losses"], expected: object) -> Choice:
    """One field of the best convention against its alternatives, all else the same."""
    best = found[0]
    others = [name_ for name_ in best._fields if name_ not in (name, "by_token")]
    alike = (
        losses for losses in found if all(getattr(losses, k) == getattr(best, k) for k in others)
    )
    shown: Callable[[Any], str] = _LABEL.format if name == "label" else str
    by_way = {shown(getattr(losses, name)): losses.by_token for losses in alike}
    return _between(_NAMES[name], by_way, shown(expected))


_LABEL = "token i + {}"
_REPEATED = 1  # a module that repeats the token it is fed has no need of anything else
_NAMES = {
    "order": "concatenation",
    "state": "state fed",
    "label": "label of row i",
    "norm": "norm before the head",
    "head": "head",
}


def _between(what: str, by_way: dict[str, np.ndarray], expected: str) -> Choice:
    """The way with the lowest loss, and the next."""
    first, *rest = sorted(by_way, key=lambda way: by_way[way].mean())
    if not rest:
        loss = float(by_way[first].mean())
        return Choice(
            what=what,
            found=first,
            loss=loss,
            other=None,
            other_loss=None,
            sure=False,
            expected=expected,
        )
    difference = by_way[rest[0]] - by_way[first]
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return Choice(
        what=what,
        found=first,
        loss=float(by_way[first].mean()),
        other=rest[0],
        other_loss=float(by_way[rest[0]].mean()),
        sure=bool(difference.mean() > _SURE * error),
        expected=expected,
    )

"""Our network and the reference side by side, a layer at a time: where do they part?

Every part is run twice on ours: on what ours gave before it, which is what the logits come from,
and alone, on what the reference gave before it, which tells a wrong layer from those after it.
After each part the states are saved, a few megabytes, so that a run that was stopped goes on.
"""

import json
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np

from converters.sources.source import Finish
from mtp_model.config import ModelConfig
from mtp_model.model import Scope
from mtp_model.problems import UserError
from mtp_model.progress import OnProgress

UNFINISHED = "logits.unfinished.npz"
_SMALLEST = np.finfo(np.float32).tiny  # a row of zeros has no relative error


class Parts(Protocol):
    """A network part by part on one batch: [B, T, D] in and out, [B, T, V] for logits."""

    def embed(self) -> np.ndarray: ...
    def layer(self, index: int, x: np.ndarray, /) -> np.ndarray: ...
    def norm(self, x: np.ndarray, /) -> np.ndarray: ...
    def module(self, index: int, h: np.ndarray, /) -> np.ndarray: ...
    def logits(self, hidden: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class LayerCheck:
    """A part of the network, named as the checkpoint names it: ours against the reference.

    Both are |ours - reference| / |reference| of the residual stream, the worst position's.
    depth: 0 for the main model. alone: both sides were given the reference's state. after: each was
    given its own, so that it has all errors before it. seconds: of both sides.
    """

    name: str
    depth: int
    alone: float
    after: float
    seconds: float


@dataclass(kw_only=True)
class Walk:
    """How far the two have come.

    ours, theirs: the state before the next part; ours None where our side has no main layers.
    hidden: what the head reads, of every depth, as (ours, theirs).
    """

    done: int = 0
    ours: np.ndarray | None = None
    theirs: np.ndarray | None = None
    hidden: list[tuple[np.ndarray | None, np.ndarray]] = field(default_factory=list)
    checks: list[LayerCheck] = field(default_factory=list)


def valid_positions(segments: np.ndarray, depth: int) -> np.ndarray:
    """Positions [B, T] whose input token at a depth is in their document; padding has none."""
    valid = segments != 0
    if depth:
        valid[:, -depth:] = False
        valid[:, :-depth] &= segments[:, depth:] == segments[:, :-depth]
    return valid


@dataclass(frozen=True)
class _Step:
    """A part of the network: its name in the checkpoint, and the method of Parts that runs it."""

    name: str
    part: str
    index: tuple[int, ...] = ()
    depth: int = 0


def _steps(config: ModelConfig, scope: Scope, chosen: Collection[int]) -> Iterator[_Step]:
    layers = config.num_hidden_layers
    yield _Step("model.embed_tokens", "embed")
    for index in sorted(chosen):
        yield _Step(f"model.layers.{index}", "layer", (index,))
    yield _Step("model.norm", "norm")
    if scope != "main":
        for index in range(config.num_nextn_predict_layers):
            yield _Step(f"model.layers.{layers + index}", "module", (index,), index + 1)


def modules_of_parts(
    config: ModelConfig, scope: Scope, chosen: Collection[int]
) -> dict[str, tuple[str, ...]]:
    """The parts of a walk in order, each with the modules that either side reads for it."""
    embedding = "model.embed_tokens"
    return {
        step.name: (step.name, embedding) if step.part == "module" else (step.name,)
        for step in _steps(config, scope, chosen)
    }


def walk(
    ours: Parts,
    theirs: Parts,
    config: ModelConfig,
    scope: Scope,
    segments: np.ndarray,
    *,
    layers: Collection[int] | None = None,
    begun: Walk | None = None,
    saved: "SavedWalk | None" = None,
    finish: Finish | None = None,
    progress: OnProgress | None = None,
) -> Walk:
    """Run all parts but the head, from where `begun` was left.

    layers: those of the main model that are run, one fed by the one before it; None: all. saved:
    is written after each part. finish: told each part that has been run.
    """
    now = begun or Walk()
    chosen = range(config.num_hidden_layers) if layers is None else layers
    steps = list(_steps(config, scope, chosen))
    for step in steps[now.done :]:
        if progress:
            progress(now.done, len(steps))
        _take(step, now, ours, theirs, config, scope, segments)
        now.done += 1
        if saved:
            saved.write(now)
        if finish:
            finish(step.name)
    if progress:
        progress(len(steps), len(steps))
    return now


def _take(
    step: _Step,
    now: Walk,
    ours: Parts,
    theirs: Parts,
    config: ModelConfig,
    scope: Scope,
    segments: np.ndarray,
) -> None:
    """Move a walk by one part and note how far the two are apart."""
    began = time.monotonic()
    reference = getattr(theirs, step.part)(*step.index, *_states(now.theirs))
    own = alone = None
    if scope != "mtp" or step.part == "module":
        both = getattr(ours, step.part)(*step.index, *_states(now.ours, now.theirs))
        own, alone = both[: len(reference)], both[-len(reference) :]
        valid = valid_positions(segments, step.depth)
        now.checks.append(
            LayerCheck(
                name=step.name,
                depth=step.depth,
                alone=worst_row(alone, reference, valid),
                after=worst_row(own, reference, valid),
                seconds=round(time.monotonic() - began, 3),
            )
        )
    if step.part in ("norm", "module"):
        now.hidden.append((own, reference))
    if step.part != "norm" or config.mtp_hidden_state == "post_norm":
        now.ours, now.theirs = own, reference
    if step.part == "norm" and scope == "mtp":
        now.ours = now.theirs  # MTP modules alone are fed the reference's state: there is no other


def _states(*states: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """The argument of a part: states one below the other; none for the embedding."""
    given = [state for state in states if state is not None]
    return (np.concatenate(given),) if given else ()


def worst_row(ours: np.ndarray, theirs: np.ndarray, valid: np.ndarray) -> float:
    """|ours - theirs| / |theirs| of each valid position's vector, the largest; NaN stays NaN."""
    a, b = ours[valid].astype(np.float64), theirs[valid].astype(np.float64)
    norms = np.maximum(np.linalg.norm(b, axis=-1), _SMALLEST)
    return float((np.linalg.norm(a - b, axis=-1) / norms).max(initial=0))


class SavedWalk:
    """A walk in a file, for a run that was stopped; another checkpoint, source or text begins anew.

    identity: what has to be the same, as JSON can hold it.
    """

    def __init__(self, file: Path, identity: Any):
        self.file = file
        self._identity = json.loads(json.dumps(identity))

    def read(self) -> Walk | None:
        """The walk so far; None where there is none of these inputs."""
        if not self.file.exists():
            return None
        try:
            with np.load(self.file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            facts = json.loads(arrays.pop("facts").tobytes())
            if facts["identity"] != self._identity:
                return None
            return Walk(
                done=facts["done"],
                ours=arrays.get("ours"),
                theirs=arrays.get("theirs"),
                hidden=[
                    (arrays.get(f"ours_{k}"), arrays[f"theirs_{k}"]) for k in range(facts["hidden"])
                ],
                checks=[LayerCheck(**check) for check in facts["checks"]],
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise UserError(
                f"{self.file} holds how far the same command came, and cannot be read ({error}); "
                "delete it and run it again"
            ) from error

    def write(self, now: Walk) -> None:
        """Replace what was saved, in one step."""
        arrays = {"ours": now.ours, "theirs": now.theirs}
        for k, (ours, theirs) in enumerate(now.hidden):
            arrays |= {f"ours_{k}": ours, f"theirs_{k}": theirs}
        facts = {
            "identity": self._identity,
            "done": now.done,
            "hidden": len(now.hidden),
            "checks": [asdict(check) for check in now.checks],
        }
        present: dict[str, Any] = {n: array for n, array in arrays.items() if array is not None}
        text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        partial = self.file.with_name(self.file.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, facts=text, **present)
        partial.rename(self.file)

"""The file of answers: one record a line, whole or visibly unfinished, and continued where it is.

While it is written it is called FILE.partial. FILE.about says how it came to be, and counts; the
lock FILE.lock keeps other processes out.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune.generation.growing import growing
from mtp_model import cluster
from mtp_model.files.open import as_place, is_address, written
from mtp_model.files.place import Place
from mtp_model.files.untrusted_json import JsonError, faults, parse
from mtp_model.problems import UserError

# Of answers that are written to a bucket: no object is smaller without need, and no more are lost.
SENT_BYTES = 8 << 20
SENT_EVERY_S = 30.0


class AnswersError(UserError):
    """A file of answers that cannot be begun or continued."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What was written, and what became of drafts; names as vLLM reports them."""

    documents: int = 0
    tokens: int = 0
    num_drafts: int = 0  # rounds
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)

    @property
    def tokens_a_round(self) -> float:
        return self.tokens / max(self.num_drafts, 1)

    def plus(self, documents: int, tokens: int, rounds: int, accepted: Sequence[int]) -> "Counts":
        before = self.num_accepted_tokens_per_pos or [0] * len(accepted)
        return Counts(
            documents=self.documents + documents,
            tokens=self.tokens + tokens,
            num_drafts=self.num_drafts + rounds,
            num_accepted_tokens_per_pos=[a + b for a, b in zip(before, accepted, strict=True)],
        )


_COUNTS = {"documents": int, "tokens": int, "num_drafts": int, "num_accepted_tokens_per_pos": [int]}
_ABOUT = {"made_by": dict, "counts": _COUNTS}


class Answers:
    """A file of answers that is being written; `counts` say what is in it."""

    def __init__(self, path: Path, made_by: dict[str, Any]):
        """path: or an address. Nothing is read or written before `begin`."""
        self.path, self.made_by, self.counts = path, made_by, Counts()
        self._place = as_place(path)
        self._growing = growing(path)
        self._about = about(path)
        self._waiting: list[bytes] = []
        self._said = 0  # answers that are kept, and counted in FILE.about
        self._said_s = time.monotonic()

    def begin(self, overwrite: bool) -> dict[str, Any]:
        """Begin or go on; what is in the file. To be called by who holds its lock."""
        if overwrite:
            for each in (self._place, self._about):
                if each.is_file():
                    each.unlink()
            self._growing.clear()
        if self._place.exists():
            self._growing.clear(finished=True)
            path = written(self.path)
            raise AnswersError(f"{path} is there already; give another --out, or --overwrite")
        if self._growing.has_begun():
            self._go_on()
        else:
            self._say()
            self._growing.begin()
        return asdict(self.counts)

    def add(self, answers: Sequence[tuple[np.ndarray, int]], counts: Counts) -> None:
        """Write texts, each with the length of its prompt; counts: with these.

        On a disk they are kept at once; in a bucket when there are some, or after half a minute.
        """
        self.counts = counts
        if not cluster.is_first():
            return
        for ids, prompt in answers:
            mask = [0] * prompt + [1] * (len(ids) - prompt)
            record = json.dumps({"input_ids": ids.tolist(), "loss_mask": mask})
            self._waiting.append(record.encode() + b"\n")
        is_late = time.monotonic() - self._said_s > SENT_EVERY_S
        if not self._place.is_far or is_late or sum(map(len, self._waiting)) > SENT_BYTES:
            self.keep()

    def keep(self) -> None:
        """Write what waits; nothing is lost then."""
        if self._said == self.counts.documents or not cluster.is_first():
            return
        self._growing.add(self._waiting, self._said)
        self._say()
        self._said, self._said_s = self.counts.documents, time.monotonic()
        self._waiting.clear()

    def finish(self) -> None:
        """Give the file its name."""
        if cluster.is_first():
            self.keep()
            self._growing.finish()

    def _go_on(self) -> None:
        made_by, self.counts = self._read_about()
        partial = self._growing.partial
        if made_by != self.made_by:
            raise AnswersError(
                f"{partial} was begun with other settings or another checkpoint or data; "
                "give the same ones to continue it, another --out, or --overwrite"
            )
        # What was written behind the last count goes.
        self._said = self._growing.keep(self.counts.documents)
        if self._said != self.counts.documents:
            raise self._damaged(f"{partial} has {self._said} of {self.counts.documents} answers")

    def _read_about(self) -> tuple[dict[str, Any], Counts]:
        """What the file was made by, and what is in it."""
        about: Any = None
        try:
            about = parse(self._about.read_bytes())
            wrong = [*faults(about, _ABOUT)]
        except (OSError, JsonError) as error:
            wrong = [str(error)]
        if wrong:
            raise self._damaged(f"{self._about}: {'; '.join(wrong)}")
        return about["made_by"], Counts(**{name: about["counts"][name] for name in _COUNTS})

    def _damaged(self, what: str) -> AnswersError:
        return AnswersError(f"{what}; give another --out, or --overwrite")

    def _say(self) -> None:
        text = json.dumps({"made_by": self.made_by, "counts": asdict(self.counts)}, indent=2)
        self._about.write_pieces([text.encode() + b"\n"])


def about(path: Path) -> Place:
    """What says of a file of answers how it was made, and counts."""
    return _beside(path, ".about")


def _beside(path: Path, suffix: str) -> Place:
    place = as_place(path)
    return place.parent / f"{place.name}{suffix}"


@contextlib.contextmanager
def opened(path: Path, made_by: dict[str, Any], overwrite: bool = False) -> Iterator[Answers]:
    """Begin a file, or go on with one that was made the same way; no other process may then.

    Raises AnswersError for one that is there, finished or made otherwise, unless overwrite.
    Of a cluster the first process writes, and the others know of its counts.
    """
    answers = Answers(path, made_by)

    def begin() -> dict[str, Any]:
        lock = _beside(path, ".lock")
        lock.parent.make_folder()
        if not held.enter_context(lock.locked()):
            place = f"{written(path)}{lock.holder()}"
            raise AnswersError(
                f"another process writes {place}; wait for it, end it, or give another --out"
            )
        return answers.begin(overwrite)

    with contextlib.ExitStack() as held:
        answers.counts = Counts(**cluster.by_first(begin))
        try:
            yield answers
        finally:
            if is_address(path):  # on a disk nothing waits
                answers.keep()


def in_batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

"""The file of answers: one record a line, whole or visibly unfinished, and continued where it is.

While it is written it is called FILE.partial. FILE.about says how it came to be, and counts.
"""

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mtp_model import cluster
from mtp_model.files.untrusted_json import JsonError, faults, parse
from mtp_model.problems import UserError


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

    def __init__(self, path: Path, made_by: dict[str, Any], overwrite: bool = False):
        """Begin the file, or go on with one that was made the same way.

        Raises AnswersError for one that is there, finished or made otherwise, unless overwrite.
        Of a cluster the first process writes, and the others know of its counts.
        """
        self.path, self.made_by, self.counts = path, made_by, Counts()
        self._partial = path.with_name(path.name + ".partial")
        self._about = path.with_name(path.name + ".about")
        self.counts = Counts(**cluster.by_first(partial(self._begin, overwrite)))

    def _begin(self, overwrite: bool) -> dict[str, Any]:
        """Begin or go on; what is in the file."""
        path = self.path
        if overwrite:
            for each in (self.path, self._partial, self._about):
                each.unlink(missing_ok=True)
        if path.exists():
            raise AnswersError(f"{path} is there already; give another --out, or --overwrite")
        if self._partial.exists():
            self._go_on()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._say()
            self._partial.touch()
        return asdict(self.counts)

    def add(self, answers: Sequence[tuple[np.ndarray, int]], counts: Counts) -> None:
        """Write texts, each with the length of its prompt; counts: with these."""
        self.counts = counts
        if not cluster.is_first():
            return
        with self._partial.open("a", encoding="utf-8") as file:
            for ids, prompt in answers:
                mask = [0] * prompt + [1] * (len(ids) - prompt)
                file.write(json.dumps({"input_ids": ids.tolist(), "loss_mask": mask}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._say()

    def finish(self) -> None:
        """Give the file its name."""
        if cluster.is_first():
            self._partial.replace(self.path)

    def _go_on(self) -> None:
        made_by, self.counts = self._read_about()
        if made_by != self.made_by:
            raise AnswersError(
                f"{self._partial} was begun with other settings or another checkpoint or data; "
                "give the same ones to continue it, another --out, or --overwrite"
            )
        with self._partial.open("rb+") as file:  # what was written behind the last count goes
            lines = itertools.islice(iter(file.readline, b""), self.counts.documents)
            whole = sum(line.endswith(b"\n") for line in lines)
            file.truncate()
        if whole < self.counts.documents:
            raise self._damaged(f"{self._partial} has {whole} of {self.counts.documents} answers")

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
        new = self._about.with_name(self._about.name + ".new")
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(self._about)


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

"""Sums of a batch as the numbers people read, and the files those go to.

RUN/metrics.jsonl has one object a step, RUN/evaluations.jsonl one for each evaluation on held-out
text; TensorBoard has both.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np

from finetune.objective.losses import Measured


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was measured on some text; lists have one entry a depth. None: nothing to measure.

    Losses are nats a target. `acceptance[k-1]` is the probability that the first k drafts are all
    accepted: the product of `conditional`, which is accepted / reached (see acceptance.py).
    """

    tokens: int
    main_loss: float | None
    mtp_loss: list[float | None]
    acceptance: list[float | None]
    conditional: list[float | None]
    agreement: list[float | None]
    reached: list[int]
    accepted: list[int]

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens a decoding step yields: 1 + sum over k of P(the first k drafts are accepted)."""
        if any(rate is None for rate in self.acceptance):
            return None
        return 1.0 + sum(rate for rate in self.acceptance if rate is not None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"mean_accepted_length": self.mean_accepted_length}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Summary":
        return cls(**{entry.name: row[entry.name] for entry in fields(cls)})


def add_up(measured: Iterable[Measured]) -> Measured:
    """Sums over several batches, exact in float64 and int64 on the host."""
    total: Any = None
    for each in measured:
        host = jax.tree.map(_wide, jax.device_get(each))
        total = host if total is None else jax.tree.map(np.add, total, host)
    if total is None:
        raise ValueError("no batch was measured")
    return total


def _wide(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float64 if np.issubdtype(x.dtype, np.floating) else np.int64)


def summarise(measured: Measured) -> Summary:
    """Sums of one batch or several, on the host, as rates and means."""
    main_loss, *mtp_loss = _rates(measured.nll_sum_K1, measured.num_targets_K1)
    counts = measured.acceptance
    conditional = _rates(counts.accepted_K, counts.reached_K)
    return Summary(
        tokens=int(measured.num_tokens),
        main_loss=main_loss,
        mtp_loss=mtp_loss,
        acceptance=_products(conditional),
        conditional=conditional,
        agreement=_rates(counts.agreed_K, counts.compared_K),
        reached=[int(n) for n in np.asarray(counts.reached_K)],
        accepted=[int(n) for n in np.asarray(counts.accepted_K)],
    )


def _rates(parts: Any, wholes: Any) -> list[float | None]:
    pairs = zip(np.asarray(parts), np.asarray(wholes), strict=True)
    return [float(part / whole) if whole else None for part, whole in pairs]


def _products(rates: list[float | None]) -> list[float | None]:
    """Running products; None from the first unknown rate on."""
    found: list[float | None] = []
    product: float | None = 1.0
    for rate in rates:
        product = None if product is None or rate is None else product * rate
        found.append(product)
    return found


class RunLog:
    """Appends to the files of a run; `last_step` is what the run continues after."""

    def __init__(self, metrics: Path, evaluations: Path, tensorboard: Path, last_step: int):
        # tensorboardX imports torch where that is installed: seconds, wanted here only.
        from tensorboardX import SummaryWriter

        self.metrics, self.evaluations = metrics, evaluations
        self.writer = SummaryWriter(str(tensorboard), purge_step=last_step + 1)
        for file in (metrics, evaluations):
            trim(file, last_step)

    def step(self, row: dict[str, Any]) -> None:
        """One training step; row has `step`."""
        self._append(self.metrics, row, "train")

    def evaluation(self, row: dict[str, Any]) -> None:
        """One evaluation on held-out text; row has `step`."""
        self._append(self.evaluations, row, "held_out")

    def close(self) -> None:
        """Close the files. What TensorBoard misses on a full disk is in metrics.jsonl or told."""
        try:
            self.writer.close()
        except OSError:
            # It would try again when Python ends, and say so with a traceback.
            events: Any = self.writer.file_writer.event_writer  # pyright: ignore
            events._worker.stop()
            events._closed = True

    def _append(self, file: Path, row: dict[str, Any], group: str) -> None:
        try:
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
        except OSError as error:  # of a full disk, which doesn't say where
            raise OSError(error.errno, error.strerror, str(file)) from error
        for name, value in row.items():
            if isinstance(value, list):
                for depth, each in enumerate(value, start=1):
                    self._scalar(f"{group}/{name}/depth_{depth}", each, row["step"])
            elif name != "step":
                self._scalar(f"{group}/{name}", value, row["step"])

    def _scalar(self, tag: str, value: float | None, step: int) -> None:
        if value is not None:
            self.writer.add_scalar(tag, value, step)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, without a last line that a killed process left unfinished."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def trim(file: Path, last_step: int) -> None:
    """Drop the rows after a step: what comes after it will be computed again."""
    rows = [row for row in read_rows(file) if row["step"] <= last_step]
    whole = file.with_name(file.name + ".partial")
    whole.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    whole.replace(file)

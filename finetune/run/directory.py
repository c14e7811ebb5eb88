"""The run directory: whether it is new, to be continued, finished, or not ours."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.settings import RunSettings, differences, read_yaml, write_yaml
from mtp_model.checkpoint.directory import COMPLETE
from mtp_model.files.open import as_place
from mtp_model.problems import UserError


class RunError(UserError):
    """A run directory that cannot be used: what it is, and what to do."""


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """RUN and what is in it."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def finished(self) -> bool:
        return (self.final / COMPLETE).is_file()

    def raise_unless_usable(self, settings: RunSettings, overwrite: bool) -> None:
        """RunError unless a run with these settings may start or go on here. Touches nothing."""
        if not self.config.is_file():
            if self.path.exists() and not (self.path.is_dir() and self._is_empty()):
                raise RunError(
                    f"{self.path} is not empty and no run; nothing in it was touched; "
                    "give --out another place"
                )
            return
        if overwrite:
            return
        if self.finished:
            raise RunError(
                f"{self.path} is a finished run (its result is {self.final}); "
                "give --out another place, or --overwrite to train anew"
            )
        changed = differences(read_yaml(self.config), settings)
        if changed:
            advice = "give the same settings to continue it, another --out, or --overwrite"
            lines = "\n  ".join(changed)
            raise RunError(f"{self.path} is a run with other settings; {advice}:\n  {lines}")

    @contextlib.contextmanager
    def claim(self, settings: RunSettings, overwrite: bool) -> Iterator[None]:
        """Hold the directory against other processes, with the settings saved in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with as_place(self.lock).locked() as got:
            if not got:
                raise RunError(f"another process is training in {self.path}; wait for it or end it")
            if overwrite:
                self._delete()
            if not self.config.is_file():
                partial = self.config.with_suffix(".partial")
                write_yaml(settings, partial)
                partial.replace(self.config)
            yield

    def _is_empty(self) -> bool:
        ours = (self.lock, self.config.with_suffix(".partial"))
        return all(entry in ours for entry in self.path.iterdir())

    def _delete(self) -> None:
        """Delete what a run writes, and nothing else that may be there; config.yaml last."""
        for folder in (self.final, self.checkpoints, self.tensorboard):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.metrics, self.evaluations, self.curves, self.config):
            file.unlink(missing_ok=True)

"""The run directory: whether it is new, to be continued, finished, or not ours."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml

from finetune.run.changes import forbidden_changes
from finetune.run.mirror import Mirror
from finetune.settings import ComputeDtype, RunSettings, SettingsError
from finetune.settings_file import read_yaml, write_yaml
from mtp_model import cluster
from mtp_model.checkpoint.directory import COMPLETE
from mtp_model.files.open import absolute, as_place
from mtp_model.files.place import Place
from mtp_model.problems import UserError
from mtp_model.report_folder import REPORT_HTML, RUN_RESOLVED, RUN_SETTINGS, clear_report

_LOCK = "lock"
_SELDOM_S = 30.0


class RunError(UserError):
    """A run directory that cannot be used: what it is, and what to do."""


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """RUN and what is in it.

    Where it is kept in a bucket, `path` has copies of its small files, as long as it is `opened`.
    """

    path: Path
    mirror: Mirror | None = None

    @property
    def place(self) -> Place:
        """Where the run is kept: a folder, or in a bucket."""
        return self.mirror.there if self.mirror else as_place(self.path)

    @property
    def config(self) -> Path:
        return self.path / RUN_SETTINGS

    @property
    def resolved(self) -> Path:
        """What `auto` in config.yaml stood for where the run began."""
        return self.path / RUN_RESOLVED

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
    def page(self) -> Path:
        """What a finished run did, for people; beside it the same for programs."""
        return self.path / REPORT_HTML

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def checkpoints(self) -> Place:
        return self.place / "checkpoints"

    @property
    def final(self) -> Place:
        return self.place / "final"

    @property
    def adapters(self) -> Place:
        """With --lora.keep: adapters that are merged in `final`, by themselves."""
        return self.place / "adapters"

    @property
    def lock(self) -> Place:
        return self.place / _LOCK

    @property
    def finished(self) -> bool:
        return (self.final / COMPLETE).is_file()

    def is_of(self, config: Path) -> bool:
        """Whether a YAML file is the one that the run in this directory saved."""
        same = as_place(absolute(config)) == self.place / self.config.name
        begun = (self.place / name for name in (_LOCK, self.resolved.name))
        return same and any(file.is_file() for file in begun)

    @property
    def began_s(self) -> float:
        """When the run that is here began, in seconds since 1970."""
        first = self.place / self.resolved.name
        return (first if first.is_file() else self.place / self.config.name).written_s()

    def fetch(self) -> None:
        """Copies of what a bucket has of the run, to be read and appended to."""
        if self.mirror:
            files = (self.resolved, self.metrics, self.evaluations, self.config)
            self.mirror.fetch(*(file.name for file in files))

    def send(self, *, seldom: bool = False) -> None:
        """Bring what was written here to the bucket, where one keeps the run.

        seldom: not where it was done in the last half minute.
        """
        if self.mirror and cluster.is_first():
            self.mirror.send(_SELDOM_S if seldom else 0.0)

    def saved_settings(self) -> RunSettings | None:
        """Settings of the run that is here, None where there is none."""
        return _by_text(read_yaml(self.config)) if self.config.is_file() else None

    def as_it_began(self, settings: RunSettings) -> RunSettings:
        """Settings that name no objective, with that of an earlier version's run, if one is here.

        Those had cross entropy alone, and did not save its name.
        """
        if settings.objective.weights() or not self.config.is_file():
            return settings
        unnamed = not read_yaml(self.config).objective.weights()
        return _by_text(settings) if unnamed else settings

    def raise_unless_usable(self, settings: RunSettings, overwrite: bool) -> None:
        """RunError unless a run with these settings may start or go on here. Touches nothing."""
        saved = self.saved_settings()
        if saved is None:
            if self.place.exists() and not (self.place.is_dir() and self._is_empty()):
                raise RunError(
                    f"{self.place} is not empty and no run; nothing in it was touched; "
                    "give --out another place"
                )
            return
        if overwrite:
            self._raise_if_result(settings.checkpoint)
            return
        changed = forbidden_changes(saved, settings)
        found, wanted = self.computed_in(), settings.compute_dtype
        if wanted not in ("auto", found):
            changed.append(f"--compute-dtype was {found}, is now {wanted}")
        if changed:
            advice = "give the same settings to continue it, another --out, or --overwrite"
            lines = "\n  ".join(changed)
            raise RunError(f"{self.place} is a run with other settings; {advice}:\n  {lines}")
        if self.finished and settings.steps == saved.steps:
            raise RunError(
                f"{self.place} is a finished run (its result is {self.final}); give --out another "
                f"place, more --steps than {saved.steps} to go on, or --overwrite to train anew"
            )

    def _raise_if_result(self, checkpoint: str) -> None:
        """RunError where what is trained is a result of the run that --overwrite would delete."""
        place = as_place(checkpoint)
        if place.exists() and any(entry.is_same(place) for entry in self.place.entries()):
            raise RunError(
                f"--overwrite would delete {checkpoint}, which --checkpoint names, with the run in "
                f"{self.place}; nothing in it was touched; give --out another place"
            )

    def computed_in(self) -> ComputeDtype | None:
        """The precision of the run that is here, None where there is none."""
        saved = self.saved_settings()
        if saved is None or saved.compute_dtype != "auto":
            return saved and saved.compute_dtype
        try:
            found = yaml.safe_load(self.resolved.read_text(encoding="utf-8"))["compute_dtype"]
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            found = None
        if found not in ("float32", "bfloat16"):
            what = "does not say what --compute-dtype auto stood for when the run began"
            advice = "write `compute_dtype: float32` or `compute_dtype: bfloat16` into it"
            where = self.place / self.resolved.name
            raise SettingsError(str(where), [f"{what}; {advice}"])
        return found

    @contextlib.contextmanager
    def claim(
        self, settings: RunSettings, computed_in: ComputeDtype, overwrite: bool
    ) -> Iterator[None]:
        """Hold the directory against other processes, with the settings saved in it.

        Of a cluster the first process holds it for all.
        """
        cluster.wait("all have read what is here")
        if not cluster.is_first():
            cluster.wait("run is claimed")
            self.fetch()
            yield
            return
        self.place.make_folder()
        with self.lock.locked() as got:
            if not got:
                where = f"{self.place}{self.lock.holder()}"
                raise RunError(f"another process is training in {where}; wait for it or end it")
            self.fetch()  # another process may have gone on with it just before
            if overwrite:
                self._delete()
            if not self.config.is_file():
                self.resolved.write_text(f"compute_dtype: {computed_in}\n", encoding="utf-8")
                self.send()
                self._save(settings)
            cluster.wait("run is claimed")
            yield

    def go_on_with(self, settings: RunSettings) -> Place | None:
        """Save settings that have changed; returns where a lengthened run's result is now.

        It keeps that name: it is a checkpoint directory like any other.
        """
        saved = self.saved_settings()
        if saved in (None, settings):
            return None
        aside = None
        if self.finished:
            aside = self.place / f"final-of-{saved.steps}-steps"
            self.final.move_to(aside)
        clear_report(self.place)
        self._save(settings)
        return aside

    def _save(self, settings: RunSettings) -> None:
        partial = self.config.with_suffix(".partial")
        write_yaml(settings, partial)
        partial.replace(self.config)
        self.send()

    def _is_empty(self) -> bool:
        ours = (_LOCK, self.resolved.name, self.config.with_suffix(".partial").name)
        return all(entry.name in ours for entry in self.place.entries())

    def _delete(self) -> None:
        """Delete what a run writes, and nothing else that may be there; config.yaml last."""
        names = {entry.name for entry in self.place.entries()}
        folders = {f.name for f in (self.final, self.adapters, self.checkpoints)}
        folders |= {f.name for f in (self.tensorboard, self.profile)}
        folders |= {name for name in names if fnmatch(name, "final-of-*-steps")}
        for name in folders & names:
            (self.place / name).delete_tree(ignore_errors=True)
        for file in (self.metrics, self.evaluations, self.curves, self.resolved, self.config):
            for copy in (as_place(file), self.place / file.name):
                if copy.is_file():
                    copy.unlink()
        clear_report(self.place)


@contextlib.contextmanager
def opened(out: Path) -> Iterator[RunDirectory]:
    """The run at a path or an address, with what is there of it; there need not be one."""
    place = as_place(absolute(out))
    with place.on_this_machine() as here:
        run = RunDirectory(path=here, mirror=Mirror(here, place) if place.is_far else None)
        run.fetch()
        yield run


def _by_text(settings: RunSettings) -> RunSettings:
    """Settings whose objective is cross entropy unless they name one."""
    if settings.objective.weights():
        return settings
    return dataclasses.replace(settings, objective=dataclasses.replace(settings.objective, ce=1.0))

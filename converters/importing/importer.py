"""Safetensors in, checkpoint directory out: streamed, resumable, every byte hashed on the way.

Memory is bounded by the units in flight, one a worker; convert.py says what a unit is.
"""

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from converters.format.kinds import PlainWeights
from converters.format.listing import SourceCheckpoint
from converters.importing.convert import (
    Buffers,
    Done,
    Unit,
    is_early,
    make_buffers,
    run_unit,
    unit_bytes,
    unit_reads,
)
from converters.importing.finish import finish_import, raise_if_stale
from converters.importing.plan import Copies, Dtype, ImportPlan, make_plan
from converters.sources.ahead import room_for_fetched
from converters.sources.source import Finish, long_names, raise_if_overlapping
from mtp_model.checkpoint.chunks import DEFAULT_POLICY, ChunkPolicy
from mtp_model.checkpoint.claim import claim, clear, raise_if_filled
from mtp_model.checkpoint.directory import COMPLETE, UNFINISHED, CheckpointError, open_checkpoint
from mtp_model.checkpoint.writer import ParamsWriter, reserved_names
from mtp_model.config import HiddenState
from mtp_model.files.journal import (
    Journal,
    begun_by_another,
    delete_journals,
    has_journals,
    read_entries,
)
from mtp_model.files.local import raise_if_full
from mtp_model.files.open import as_place
from mtp_model.files.place import Place
from mtp_model.model import Scope
from mtp_model.problems import Problem, raise_if_any
from mtp_model.progress import OnProgress
from mtp_model.threads import in_threads

DEFAULT_WORKERS = 3
_MAKING_ROOM = "setup-lock"  # within UNFINISHED: held to begin and to finish


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What this worker did of an import; `finished` False: the last of the others finishes it.

    Amounts are of this worker's share: of the whole where there is one worker.
    """

    path: Place
    worker: tuple[int, int]
    finished: bool
    num_tensors: int
    source_bytes: int
    stored_bytes: int
    num_units: int
    resumed_units: int
    plain_weights: tuple[PlainWeights, ...]
    """Those of the source that are not FP8 beside others that are."""


def import_checkpoint(
    checkpoint: SourceCheckpoint,
    dst: str | Path | Place,
    *,
    scope: Scope = "all",
    dtype: Dtype = "keep",
    copies: Copies = "check",
    workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    progress: OnProgress | None = None,
    worker: tuple[int, int] = (0, 1),
    mtp_hidden_state: HiddenState | None = None,
    policy: ChunkPolicy = DEFAULT_POLICY,
) -> ImportSummary:
    """Write the checkpoint directory `dst`; run again after an interruption, it continues.

    Run again after its end, it does nothing.

    dtype: what weights are stored as; `keep` as in the source, FP8 included. Scales and router
    biases stay float32. copies: `main` ignores copies that differ from the main model's tensors.
    worker: (i, n) does the i-th of n shares, for n processes with one destination; the last one
    to end finishes the directory. mtp_hidden_state None: as the config says.

    Raises ProblemsError for a source that is unfit, was changed, or holds values that no such
    tensor may have (all of these in one report), CheckpointError for a destination in use, or one
    that holds the source or is in it.
    """
    dst = as_place(dst)
    for source in (checkpoint.source, *([checkpoint.taken.source] if checkpoint.taken else [])):
        raise_if_overlapping(dst, source)
    files = checkpoint.copied_files  # written last, and what cannot be is told first
    raise_if_any(checkpoint.source.name, [*reserved_names(files), *long_names(dst, files)])
    plan = make_plan(
        checkpoint,
        scope=scope,
        dtype=dtype,
        copies=copies,
        mtp_hidden_state=mtp_hidden_state,
        policy=policy,
    )
    share = plan.share(worker)
    todo: list[Unit] = []
    with claim(dst, shared=worker[1] > 1):
        with (dst / UNFINISHED / _MAKING_ROOM).locked(wait=True):
            finished = not overwrite and _is_result(dst, plan)
            opened = None if finished else _begin(dst, plan, worker, overwrite)
        if opened:
            with closing(opened) as journal:
                todo = _do_share(dst, plan, share, worker, journal, workers, progress)
            finished = _finish_if_last(dst, plan)
    return ImportSummary(
        path=dst,
        worker=worker,
        finished=finished,
        num_tensors=sum(len(unit.slots) for unit in share),
        source_bytes=sum(unit_bytes(plan.conversion, unit) for unit in share),
        stored_bytes=plan.stored_bytes(share),
        num_units=len(share),
        resumed_units=len(share) - len(todo),
        plain_weights=plan.plain_weights,
    )


def _is_result(dst: Place, plan: ImportPlan) -> bool:
    """Whether `dst` is what this very import gave, with every chunk in full."""
    try:
        provenance = open_checkpoint(dst).provenance
    except CheckpointError:
        return False
    if "derived" in provenance or provenance.get("plan") != plan.digest:
        return False
    is_whole = ParamsWriter(dst, plan.conversion.leaves).whole_chunks()
    pieces = provenance["pieces"].items()
    return all(is_whole(path, name) for path, names in pieces for name in names)


def _begin(dst: Place, plan: ImportPlan, worker: tuple[int, int], overwrite: bool) -> Journal:
    _make_room(dst, plan, overwrite)
    return Journal(dst / UNFINISHED, plan.fingerprint, worker)


def _make_room(dst: Place, plan: ImportPlan, overwrite: bool) -> None:
    """Make `dst` ready to begin or continue; with `overwrite` whatever was there before goes."""
    folder = dst / UNFINISHED
    if overwrite and begun_by_another(folder, plan.fingerprint):
        delete_journals(folder)
    is_complete, is_begun = (dst / COMPLETE).is_file(), has_journals(folder)
    if not (is_complete or is_begun or overwrite):
        raise_if_filled(dst)
    if is_complete or not is_begun:
        clear(dst, overwrite=overwrite)


def _still_there(
    writer: ParamsWriter, plan: ImportPlan, entries: Iterable[dict]
) -> dict[str, Done]:
    """Finished units whose chunk files are whole: a rename may be lost when the power fails."""
    paths = {unit.key: unit.path for unit in plan.units}
    found = {}
    is_whole = writer.whole_chunks()
    for done in map(Done.from_json, entries):
        if done.key not in paths:
            continue  # a copy that this run does not read
        path = paths[done.key]
        if all(is_whole(path, name) for name in done.pieces):
            found[done.key] = done
    return found


def _do_share(
    dst: Place,
    plan: ImportPlan,
    share: list[Unit],
    worker: tuple[int, int],
    journal: Journal,
    workers: int,
    progress: OnProgress | None,
) -> list[Unit]:
    """Do what is left of a worker's share; returns that."""
    writer = ParamsWriter(dst, plan.conversion.leaves)
    source = plan.conversion.listing.source
    done = _still_there(writer, plan, journal.entries)
    todo = [unit for unit in share if unit.key not in done]
    reads = {unit.key: unit_reads(plan.conversion, unit) for unit in todo}
    with room_for_fetched(dst / UNFINISHED, worker) as fetched:
        _raise_if_full(dst, plan.stored_bytes(todo), source.room_needed(reads, fetched))
        report = _Counter(plan, share, todo, progress)
        with source.staged(reads, fetched) as finish:
            _run(plan, todo, writer, journal, workers, report, finish)
    return todo


def _raise_if_full(dst: Place, stored_bytes: int, fetched: Mapping[Path, int]) -> None:
    stored = dst.room_for(stored_bytes)
    advice = "name another place" if stored else "set TMPDIR to a folder on another disk"
    raise_if_full({**stored, **fetched}, advice)


class _Counter:
    """Counts source bytes for the progress callback."""

    def __init__(
        self, plan: ImportPlan, share: list[Unit], todo: list[Unit], progress: OnProgress | None
    ):
        self._bytes = {unit.key: unit_bytes(plan.conversion, unit) for unit in share}
        self._total = sum(self._bytes.values())
        self._done = self._total - sum(self._bytes[unit.key] for unit in todo)
        self._progress = progress
        self._report()

    def add(self, unit: Unit) -> None:
        """Count one more unit."""
        self._done += self._bytes[unit.key]
        self._report()

    def _report(self) -> None:
        if self._progress:
            self._progress(self._done, self._total)


def _run(
    plan: ImportPlan,
    todo: list[Unit],
    writer: ParamsWriter,
    journal: Journal,
    workers: int,
    report: _Counter,
    finish: Finish,
) -> None:
    """Do these units. ProblemsError with all that is wrong with their values.

    Where scales and copies come first, nothing else is read when something is wrong with these.
    """
    idle: SimpleQueue[Buffers] = SimpleQueue()
    for _ in range(workers):
        idle.put(make_buffers(plan.conversion))

    def work(unit: Unit) -> tuple[Unit, Done]:
        buffers = idle.get()
        try:
            done = run_unit(plan.conversion, unit, writer, buffers)
        finally:
            idle.put(buffers)
        if not done.problems:
            journal.append(done.to_json())
        finish(unit.key)
        return unit, done

    source = plan.conversion.listing.source
    num_early = 0 if source.is_far else sum(is_early(plan.conversion, unit) for unit in todo)
    for units in (todo[:num_early], todo[num_early:]):
        problems: list[Problem] = []
        tensors: dict[str, str] = {}
        with closing(in_threads(work, units, workers)) as finished:
            for unit, done in finished:
                report.add(unit)
                problems += done.problems
                tensors |= done.tensors if is_early(plan.conversion, unit) else {}
        raise_if_any(source.name, sorted(problems, key=lambda problem: problem.subject))
        raise_if_stale(plan, tensors)


def _finish_if_last(dst: Place, plan: ImportPlan) -> bool:
    """Finish the directory when every share is done; False while other workers are at it."""
    folder = dst / UNFINISHED
    try:
        with (folder / _MAKING_ROOM).locked(wait=True):
            if (dst / COMPLETE).is_file():
                return True
            writer = ParamsWriter(dst, plan.conversion.leaves)
            done = _still_there(writer, plan, read_entries(folder, plan.fingerprint))
            if len(done) < len(plan.units):
                return False
            finish_import(writer, plan, done)
            return True
    except FileNotFoundError:
        if (dst / COMPLETE).is_file():
            return True  # another worker finished it and took the folder of locks away
        raise

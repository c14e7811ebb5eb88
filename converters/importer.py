"""Safetensors in, checkpoint directory out: streamed, resumable, every byte hashed on the way.

Memory is bounded by the units in flight, one a worker; units.py says what a unit is.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass
from queue import SimpleQueue

from converters.import_plan import Copies, Dtype, Options, Plan, make_plan, side_files, source_files
from converters.journal import (
    Journal,
    begun_by_another,
    delete_journals,
    has_journals,
    read_entries,
)
from converters.listing import Listing
from converters.problems import Problem, raise_if_any
from converters.provenance import source_record, tool_versions
from converters.staging import Finish, room_for_fetched, staged
from converters.units import (
    Buffers,
    Done,
    Unit,
    make_buffers,
    run_unit,
    unit_bytes,
    unit_reads,
)
from mtp_model.chunks import DEFAULT_POLICY, ChunkPolicy
from mtp_model.cloud import AnyPath, CloudPath, as_path
from mtp_model.config import HiddenState, ModelConfig
from mtp_model.destination import claim, clear, locked
from mtp_model.model import Scope
from mtp_model.store import COMPLETE, UNFINISHED, CheckpointError
from mtp_model.store_writer import Digests, ParamsWriter

DEFAULT_WORKERS = 3
_SIDE_PIECE_BYTES = 4 << 20
_MAKING_ROOM = "setup-lock"  # within UNFINISHED: held to begin and to finish

Progress = Callable[[int, int], None]
"""Called with the source bytes that are done, and their total."""


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What this worker did of an import; `finished` False: the last of the others finishes it.

    Amounts are of this worker's share: of the whole where there is one worker.
    """

    path: AnyPath
    worker: tuple[int, int]
    finished: bool
    num_tensors: int
    source_bytes: int
    stored_bytes: int
    num_units: int
    resumed_units: int


def import_checkpoint(
    listing: Listing,
    config: ModelConfig,
    dst: str | AnyPath,
    *,
    scope: Scope = "all",
    dtype: Dtype = "keep",
    copies: Copies = "check",
    workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    progress: Progress | None = None,
    worker: tuple[int, int] = (0, 1),
    mtp_hidden_state: HiddenState | None = None,
    policy: ChunkPolicy = DEFAULT_POLICY,
) -> ImportSummary:
    """Write the checkpoint directory `dst`; run again after an interruption, it continues.

    dtype: what weights are stored as; `keep` as in the source, FP8 included. Scales and router
    biases stay float32. copies: `main` ignores copies that differ from the main model's tensors.
    worker: (i, n) does the i-th of n shares, for n processes with one destination; the last one
    to end finishes the directory. mtp_hidden_state None: as the config says.

    Raises ProblemsError for a source that is unfit, was changed, or holds values that cannot be
    converted (NaN in FP8 weights or scales), CheckpointError for a destination that is in use.
    """
    dst = as_path(dst)
    hidden_state = mtp_hidden_state or config.mtp_hidden_state
    options = Options(scope=scope, dtype=dtype, copies=copies, mtp_hidden_state=hidden_state)
    plan = make_plan(listing, config, options, policy)
    with claim(dst, shared=worker[1] > 1):
        with locked(dst / UNFINISHED / _MAKING_ROOM, wait=True):
            _make_room(dst, plan, overwrite)
            opened = Journal(dst / UNFINISHED, plan.fingerprint, worker)
        with closing(opened) as journal:
            writer = ParamsWriter(dst, plan.conversion.leaves)
            share = plan.units[worker[0] :: worker[1]]
            done = _still_there(writer, plan, journal.entries)
            todo = [unit for unit in share if unit.key not in done]
            _raise_if_full(dst, plan, todo)
            report = _Counter(plan, share, todo, progress)
            reads = {unit.key: unit_reads(plan.conversion, unit) for unit in todo}
            with (
                room_for_fetched(dst / UNFINISHED, worker) as fetched,
                staged(listing.source, reads, fetched) as finish,
            ):
                _run(plan, todo, writer, journal, workers, report, finish)
        finished = _finish_if_last(writer, plan)
    return ImportSummary(
        path=dst,
        worker=worker,
        finished=finished,
        num_tensors=sum(len(unit.slots) for unit in share),
        source_bytes=sum(unit_bytes(plan.conversion, unit) for unit in share),
        stored_bytes=_stored_bytes(plan, share),
        num_units=len(share),
        resumed_units=len(share) - len(todo),
    )


def _make_room(dst: AnyPath, plan: Plan, overwrite: bool) -> None:
    """Make `dst` ready to begin or continue; with `overwrite` whatever was there before goes."""
    folder = dst / UNFINISHED
    if overwrite and begun_by_another(folder, plan.fingerprint):
        delete_journals(folder)
    if (dst / COMPLETE).is_file() or not has_journals(folder):
        clear(dst, overwrite=overwrite)


def _still_there(writer: ParamsWriter, plan: Plan, entries: Iterable[dict]) -> dict[str, Done]:
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


def _raise_if_full(dst: AnyPath, plan: Plan, todo: Iterable[Unit]) -> None:
    if isinstance(dst, CloudPath):
        return
    needed, free = _stored_bytes(plan, todo), shutil.disk_usage(dst).free
    if needed > free:
        raise CheckpointError(
            f"{dst} needs {needed / 1e9:.1f} GB more, its disk has {free / 1e9:.1f} GB free; "
            "make room and run the same command again, or name another place"
        )


def _stored_bytes(plan: Plan, units: Iterable[Unit]) -> int:
    leaves = plan.conversion.leaves
    return sum(
        leaves[unit.path].chunk_bytes * leaves[unit.path].num_row_chunks
        for unit in units
        if not unit.is_copy
    )


class _Counter:
    """Counts source bytes for the progress callback."""

    def __init__(self, plan: Plan, share: list[Unit], todo: list[Unit], progress: Progress | None):
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
    plan: Plan,
    todo: list[Unit],
    writer: ParamsWriter,
    journal: Journal,
    workers: int,
    report: _Counter,
    finish: Finish,
) -> None:
    idle: SimpleQueue[Buffers] = SimpleQueue()
    for _ in range(workers):
        idle.put(make_buffers(plan.conversion))

    def work(unit: Unit) -> Unit:
        buffers = idle.get()
        try:
            done = run_unit(plan.conversion, unit, writer, buffers)
        finally:
            idle.put(buffers)
        journal.append(done.to_json())
        finish(unit.key)
        return unit

    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in as_completed([pool.submit(work, unit) for unit in todo]):
                report.add(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _finish_if_last(writer: ParamsWriter, plan: Plan) -> bool:
    """Finish the directory when every share is done; False while other workers are at it."""
    folder = writer.path / UNFINISHED
    try:
        with locked(folder / _MAKING_ROOM, wait=True):
            if (writer.path / COMPLETE).is_file():
                return True
            done = _still_there(writer, plan, read_entries(folder, plan.fingerprint))
            if len(done) < len(plan.units):
                return False
            _finish(writer, plan, done)
            return True
    except FileNotFoundError:
        if (writer.path / COMPLETE).is_file():
            return True  # another worker finished it and took the folder of locks away
        raise


def _finish(writer: ParamsWriter, plan: Plan, done: dict[str, Done]) -> None:
    listing, options = plan.conversion.listing, plan.options
    tensors = {name: value for unit in done.values() for name, value in unit.tensors.items()}
    stale = [problem.subject for problem in _stale_copies(plan, tensors)]
    if options.copies == "check":
        raise_if_any(listing.source.name, _stale_copies(plan, tensors))
    side = {
        file: writer.write_side_file(file, _side_pieces(listing, file))
        for file in side_files(listing)
    }
    raise_if_any(listing.source.name, _changed_files(plan))
    writer.finish(
        provenance={
            "source": source_record(listing, tensors),
            **asdict(options),
            "stale_copies": stale,
            "tools": tool_versions(),
        },
        digests=_digests(plan, done),
        headers={file: header.raw.decode() for file, header in listing.headers.items()},
        side_files=side,
    )


def _stale_copies(plan: Plan, tensors: dict[str, str]) -> Iterator[Problem]:
    for slot in plan.conversion.slots.values():
        if slot.copy_of and slot.name in tensors and tensors[slot.name] != tensors[slot.copy_of]:
            advice = "import with --copies main to take the main model's"
            yield Problem("copy", slot.name, f"differs from {slot.copy_of}; {advice}")


def _side_pieces(listing: Listing, file: str) -> Iterator[bytes]:
    size = int(listing.source.fingerprint(file)["size"])
    for begin in range(0, size, _SIDE_PIECE_BYTES):
        yield listing.source.read(file, begin, min(_SIDE_PIECE_BYTES, size - begin))


def _changed_files(plan: Plan) -> Iterator[Problem]:
    """Files that were replaced while they were read."""
    began = plan.fingerprint["files"]
    for file, state in source_files(plan.conversion.listing).items():
        if any(began[file][key] != value for key, value in state.items()):
            advice = "import it again with --overwrite"
            yield Problem("changed", file, f"was replaced while it was read; {advice}")


def _digests(plan: Plan, done: dict[str, Done]) -> Digests:
    """Chunk digests by leaf, in the order of the table and of the units."""
    found: Digests = {path: {} for path in plan.conversion.leaves}
    for unit in plan.units:
        if not unit.is_copy:
            found[unit.path] |= done[unit.key].pieces
    return found

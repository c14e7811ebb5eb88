"""Checkpoint directory in, safetensors out: the source's own files, byte for byte where unchanged.

Files are written one after the other; a few threads prepare the pieces that come next, so memory
is bounded by those. A file counts as written once it was read back from the disk and is the same.
"""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from converters.encode import Encoder, Requantisation
from converters.export_plan import Dtype, OutFile, Plan, make_plan
from converters.export_stream import Segments, prepared_segments
from converters.journal import Fingerprint, Journal, begun_by_another, delete_journals
from converters.mapping import TABLE_VERSION
from converters.problems import Problem, ProblemsError
from converters.safetensors_io import TensorInfo
from converters.safetensors_writer import StreamWriter
from mtp_model.destination import LOCK, locked
from mtp_model.rawio import file_digest, file_pieces, sync_directory, write_pieces
from mtp_model.store import COMPLETE, CONFIG, PARAMS, UNFINISHED, Checkpoint, CheckpointError

DEFAULT_WORKERS = 3
_SUFFIX = ".safetensors"

Progress = Callable[[int, int], None]
"""Called with the bytes that are written, and their total."""


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """A file that was written and read back.

    same_as_source: every byte is the source's. changed: tensors whose bytes are not the source's
    (empty for another dtype). requantised: those of them that got new scales, and what it cost.
    """

    name: str
    size: int
    digest: str
    same_as_source: bool
    changed: tuple[str, ...]
    requantised: tuple[Requantisation, ...]

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "ExportedFile":
        """A line of the journal."""
        costs = tuple(Requantisation(**cost) for cost in line["requantised"])
        return cls(**line | {"changed": tuple(line["changed"]), "requantised": costs})


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What an export did; `notes` are for the user, a line each."""

    path: Path
    files: tuple[ExportedFile, ...]
    num_tensors: int
    written_bytes: int
    resumed_files: int
    notes: tuple[str, ...]

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of all tensors whose bytes are not the source's."""
        return tuple(name for file in self.files for name in file.changed)

    @property
    def requantised(self) -> tuple[Requantisation, ...]:
        """Every weight that got new scales, and what that cost."""
        return tuple(cost for file in self.files for cost in file.requantised)


def export_checkpoint(
    checkpoint: Checkpoint,
    dst: str | Path,
    *,
    dtype: Dtype = "keep",
    workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write the safetensors checkpoint `dst`; run again after an interruption, it continues.

    dtype: `keep` gives the source's files, `bf16` the same with all weights in bfloat16.
    Raises ProblemsError for a damaged checkpoint or one that lacks tensors of its source,
    CheckpointError for a destination that is in use.
    """
    dst = Path(dst)
    plan = make_plan(checkpoint, dtype)
    fingerprint = _fingerprint(checkpoint, dtype)
    with _claim(dst, fingerprint, overwrite):
        with closing(Journal(dst / UNFINISHED, fingerprint)) as journal:
            done = _still_there(dst, journal.entries)
            todo = [file for file in plan.files if file.name not in done]
            _raise_if_full(dst, todo)
            export = _Export(checkpoint, dst, plan, journal, progress)
            written = done | export.run(todo, workers)
        _write_side_files(checkpoint, dst, plan)
        sync_directory(dst)
        shutil.rmtree(dst / UNFINISHED)
    files = tuple(written[file.name] for file in plan.files)
    return ExportSummary(
        path=dst,
        files=files,
        num_tensors=len(plan.dtypes),
        written_bytes=sum(file.size for file in files),
        resumed_files=len(done),
        notes=plan.notes,
    )


def _fingerprint(checkpoint: Checkpoint, dtype: Dtype) -> Fingerprint:
    """Everything that the files depend on: COMPLETE holds the digests of all other digests."""
    complete = {COMPLETE: {"digest": file_digest(checkpoint.path / COMPLETE)}}
    return {"options": {"dtype": dtype, "table version": TABLE_VERSION}, "files": complete}


@contextmanager
def _claim(dst: Path, fingerprint: Fingerprint, overwrite: bool) -> Iterator[None]:
    """Hold `dst`, which is empty, or unfinished by this very export, or may be overwritten."""
    folder = dst / UNFINISHED
    if not folder.is_dir() or (dst / PARAMS).exists():
        _raise_if_occupied(dst, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK) as got:
        if not got:
            advice = "wait for it, or end it and run this again"
            raise CheckpointError(f"another process is writing {dst}; {advice}")
        if overwrite and begun_by_another(folder, fingerprint):
            delete_journals(folder)
        yield


def _raise_if_occupied(dst: Path, overwrite: bool) -> None:
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return
    if (dst / PARAMS).exists() or not (dst / CONFIG).is_file() or not any(dst.glob("*" + _SUFFIX)):
        raise CheckpointError(
            f"{dst} is not empty and no safetensors checkpoint; nothing in it was touched; name "
            "another place, or empty it"
        )
    if not overwrite:
        raise CheckpointError(f"{dst} holds a checkpoint; name another place or --overwrite it")


def _still_there(dst: Path, entries: list[dict[str, Any]]) -> dict[str, ExportedFile]:
    """Files that were written before, and are there in full."""
    files = {file.name: file for file in map(ExportedFile.from_json, entries)}
    return {
        name: file
        for name, file in files.items()
        if (dst / name).is_file() and (dst / name).stat().st_size == file.size
    }


def _raise_if_full(dst: Path, todo: list[OutFile]) -> None:
    needed, free = sum(file.size for file in todo), shutil.disk_usage(dst).free
    if needed > free:
        raise CheckpointError(
            f"{dst} needs {needed / 1e9:.1f} GB more, its disk has {free / 1e9:.1f} GB free; "
            "make room and run the same command again, or name another place"
        )


class _Export:
    """Writes the files, compares every tensor with the source's digest, reads every file back."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dst: Path,
        plan: Plan,
        journal: Journal,
        progress: Progress | None,
    ):
        self._checkpoint = checkpoint
        self._dst = dst
        self._encoder = Encoder(checkpoint, plan.dtypes)
        self._journal = journal
        self._progress = progress
        self._total = sum(file.size for file in plan.files)
        self._source = _source_digests(plan, checkpoint)
        trained = checkpoint.provenance.get("derived", [])
        self._trained = {path for record in trained for path in record["changed"]}

    def run(self, todo: list[OutFile], workers: int) -> dict[str, ExportedFile]:
        """Write the files; reading one back goes on while the next is written."""
        self._written = self._total - sum(file.size for file in todo)
        self._report(0)
        checks: list[Future[ExportedFile]] = []
        with (
            ThreadPoolExecutor(1) as checker,
            closing(prepared_segments(self._encoder, todo, workers)) as segments,
        ):
            for file in todo:
                written = self._write(file, segments)
                checks.append(checker.submit(self._read_back, written))
                for check in checks[:-1]:
                    check.result()  # one file behind at most: a failing disk is noticed at once
        return {file.name: file for file in (check.result() for check in checks)}

    def _write(self, file: OutFile, segments: Segments) -> ExportedFile:
        changed: list[str] = []
        costs: list[Requantisation] = []
        with StreamWriter(self._dst / file.name, file.raw_header) as out:
            self._report(out.size - sum(tensor.nbytes for tensor in file.tensors))
            for tensor in file.tensors:
                if self._write_tensor(tensor, segments, out):
                    changed.append(tensor.name)
                cost = self._encoder.requantisation(tensor.name)
                costs += [cost] if cost else []
                self._encoder.forget(tensor.name)
        return ExportedFile(
            name=file.name,
            size=file.size,
            digest=out.digest,
            same_as_source=file.is_source_file and not changed,
            changed=tuple(changed),
            requantised=tuple(costs),
        )

    def _write_tensor(self, tensor: TensorInfo, segments: Segments, out: StreamWriter) -> bool:
        """Write a tensor; whether it is another than the source's."""
        state, left = xxhash.xxh3_128(), tensor.nbytes
        while left:
            segment = next(segments)
            assert segment.tensor is tensor, (segment, tensor)
            data = segment.data(self._encoder)
            state.update(data.data)
            out.write(data)
            self._report(len(data))
            left -= len(data)
        source = self._source.get(tensor.name)
        if source is None or state.hexdigest() == source:
            return False
        self._raise_if_damaged(tensor)
        return True

    def _raise_if_damaged(self, tensor: TensorInfo) -> None:
        """A tensor that nobody trained, and that is stored as it came, has to be the source's."""
        slot = self._encoder.slots[tensor.name]
        if slot.copy_of or slot.path in self._trained or not self._encoder.is_as_stored(slot.name):
            return
        detail = f"in leaf {slot.path} is not what was imported: a chunk file is damaged"
        advice = f"`convert-deepseek verify {self._checkpoint.path}` finds it; import it again"
        where = str(self._checkpoint.path)
        raise ProblemsError(where, [Problem("damaged", tensor.name, f"{detail}; {advice}")])

    def _read_back(self, file: ExportedFile) -> ExportedFile:
        found = file_digest(self._dst / file.name)
        if found != file.digest:
            detail = f"reads back as {found}, {file.digest} was written: the disk is failing"
            raise ProblemsError(str(self._dst), [Problem("file", file.name, detail)])
        self._journal.append(asdict(file))
        return file

    def _report(self, nbytes: int) -> None:
        if self._progress:
            self._written += nbytes
            self._progress(self._written, self._total)


def _source_digests(plan: Plan, checkpoint: Checkpoint) -> dict[str, str]:
    """Digest of every tensor of the source that is written in the source's dtype."""
    records = checkpoint.provenance["source"]["files"]
    return {
        tensor.name: digest
        for file in plan.files
        if file.is_source_file
        for tensor, digest in zip(file.tensors, records[file.name]["tensors"], strict=True)
    }


def _write_side_files(checkpoint: Checkpoint, dst: Path, plan: Plan) -> None:
    """Everything but tensors; without it nobody takes what is there for a checkpoint."""
    for stale in {path.name for path in dst.glob("*" + _SUFFIX)} - {f.name for f in plan.files}:
        (dst / stale).unlink()
    digests = checkpoint.side_file_digests()
    for name in checkpoint.side_files():
        file = dst / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name in plan.replaced:
            write_pieces(file, [plan.replaced[name]])
        elif write_pieces(file, file_pieces(checkpoint.path / name)) != digests[name]:
            file.unlink()
            detail = "was changed since the import; restore it, or import again with --overwrite"
            raise ProblemsError(str(checkpoint.path), [Problem("damaged", name, detail)])

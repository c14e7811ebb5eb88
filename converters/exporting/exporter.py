"""Checkpoint directory in, safetensors out: the source's own files, byte for byte where unchanged.

Files are written one after the other; a few threads prepare the pieces that come next, so memory
is bounded by those. A file counts as written once what is stored was proved to be the same.
With a base, the source itself, only files that hold changed tensors are written.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from converters.exporting.destination import claimed, keep_record
from converters.exporting.draft import Engine, draft_plan
from converters.exporting.encode import Encoder, Requantisation
from converters.exporting.files import ExportFiles
from converters.exporting.plan import Dtype, ExportPlan, make_plan
from converters.exporting.result import ExportedFile, ExportSummary
from converters.exporting.reuse import (
    BaseEncoder,
    base_state,
    check_base,
    compare_files,
    compared_before,
    raise_if_changed,
)
from converters.exporting.stream import Segments, encoded_segments, tensor_segments
from converters.format.header import Header, TensorInfo
from converters.format.listing import SUFFIX, Listing
from converters.format.mapping import TABLE_VERSION, mtp_layers
from converters.format.writer import StreamWriter
from converters.sources.source import long_names, raise_if_overlapping
from mtp_model.checkpoint.directory import COMPLETE, UNFINISHED, Checkpoint
from mtp_model.files.journal import Fingerprint, Journal
from mtp_model.files.open import as_place
from mtp_model.files.place import Place
from mtp_model.problems import Problem, ProblemsError, raise_if_any
from mtp_model.progress import OnProgress

DEFAULT_WORKERS = 3
_WRITTEN_S = "written_s"  # of a journal's entry, beside what its file is


def export_checkpoint(
    checkpoint: Checkpoint,
    dst: str | Path | Place,
    *,
    dtype: Dtype = "keep",
    base: Listing | None = None,
    draft: Engine | None = None,
    workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    continuable: bool = False,
    progress: OnProgress | None = None,
) -> ExportSummary:
    """Write the safetensors checkpoint `dst`; run again after an interruption, it continues.

    dtype: `keep` gives the source's files, `bf16` the same with all weights in bfloat16.
    base: the source that `checkpoint` was imported from. Its files without changed tensors are
    linked or copied, and it gives the tensors that `checkpoint` does not hold; for `keep` only.
    draft: only the MTP module, as this engine loads it; without a base.
    continuable: the finished export may be run again, and does nothing, until forget_record(dst);
    only in a folder on this machine. progress: told the bytes that are done, and their total.
    Raises ProblemsError for a damaged checkpoint, one that lacks tensors of its source, or another
    base than this source; CheckpointError for a destination that is in use.
    """
    dst = as_place(dst)
    files = ExportFiles(dst)
    plan = make_plan(checkpoint, dtype, has_base=base is not None, in_part=draft is not None)
    if draft:
        plan = draft_plan(plan, checkpoint, draft)
    _raise_if_damaged(checkpoint, checkpoint.damaged_files(_copied(checkpoint, plan)))
    names = [*plan.side_files(checkpoint), *(file.file for file in plan.files)]
    raise_if_any(str(checkpoint.path), long_names(dst, names))
    if base:
        raise_if_overlapping(dst, base.source)
        check_base(base, checkpoint)
    fingerprint = _fingerprint(checkpoint, dtype, base, draft)
    with claimed(dst, fingerprint, overwrite=overwrite):
        with closing(Journal(dst / UNFINISHED, fingerprint)) as journal:
            done = _still_there(files, journal.entries)
            export = _Export(checkpoint, files, plan, base, journal, progress)
            written = done | export.run([f for f in plan.files if f.file not in done], workers)
        if base:
            raise_if_changed(base, fingerprint)
        _delete_others(dst, plan)
        _write_side_files(checkpoint, dst, plan)
        dst.sync()
        if continuable:
            keep_record(dst)
        else:
            (dst / UNFINISHED).delete_tree()
    exported = tuple(written[file.file] for file in plan.files)
    return ExportSummary(
        path=dst,
        base=base.source.name if base else None,
        files=exported,
        num_side_files=len(plan.side_files(checkpoint)),
        num_tensors=sum(len(file.tensors) for file in plan.files),
        mtp_modules=len(mtp_layers(plan.dtypes)),
        written_bytes=sum(f.size for f in exported if f.how in ("written", "copy")),
        resumed_files=len(done),
        notes=plan.notes,
        draft=draft,
    )


def _fingerprint(
    checkpoint: Checkpoint, dtype: Dtype, base: Listing | None, draft: Engine | None
) -> Fingerprint:
    """Everything that the files depend on: COMPLETE holds the digests of all other digests."""
    complete = {COMPLETE: {"digest": checkpoint.digest}}
    options = {"dtype": dtype, "--base": base is not None, "table version": TABLE_VERSION}
    options |= {"--draft": draft} if draft else {}
    state = base_state(base, checkpoint) if base else {}
    return {"options": options, "files": complete, **state}


def _still_there(files: ExportFiles, entries: Iterable[dict[str, Any]]) -> dict[str, ExportedFile]:
    """Files that were written before, and that nothing else has written since."""
    written = [entry for entry in entries if "compared" not in entry]
    sizes = files.sizes() if written else {}
    return {
        entry["name"]: ExportedFile.from_json(entry)
        for entry in written
        if sizes.get(entry["name"]) == entry["size"]
        if files.is_untouched(entry["name"], entry.get(_WRITTEN_S), entry["digest"])
    }


class _WrittenTensor(NamedTuple):
    """A tensor as it was written. cost: of a weight that got new scales."""

    name: str
    is_changed: bool
    cost: Requantisation | None


class _Export:
    """Writes the files, compares every tensor with the source's digest, proves what is stored."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        files: ExportFiles,
        plan: ExportPlan,
        base: Listing | None,
        journal: Journal,
        progress: OnProgress | None,
    ):
        self._checkpoint = checkpoint
        self._files = files
        self._plan = plan
        self._base = base
        self._encoder = (
            BaseEncoder(checkpoint, plan, base)
            if base
            else Encoder(checkpoint, plan.slots, plan.dtypes)
        )
        self._journal = journal
        self._progress = progress
        self._source = _source_digests(plan, checkpoint)
        trained = checkpoint.provenance.get("derived", [])
        self._trained = {path for record in trained for path in record["changed"]}

    def run(self, todo: list[Header], workers: int) -> dict[str, ExportedFile]:
        """Write these files, or take those from the base that are the same there."""
        self._total = sum(file.size for file in self._plan.files)
        self._done = self._total - sum(file.size for file in todo)
        if not self._base:
            self._files.raise_if_full(self._total - self._done)
            self._files.unmark()
            self._report(0)
            return self._write_all(todo, workers)
        kept = self._unchanged(self._base, todo, workers)
        changed = [file for file in todo if file not in kept]
        copied = [f for f in kept if self._files.needs_room(self._base.source, f.file)]
        self._files.raise_if_full(sum(file.size for file in (*changed, *copied)))
        self._files.unmark()
        taken = {file.file: self._take(self._base, file) for file in kept}
        return taken | self._write_all(changed, workers)

    def _unchanged(self, base: Listing, todo: list[Header], workers: int) -> list[Header]:
        """The files whose bytes would be those of the base."""
        found = compared_before(self._journal.entries)
        left = [file for file in todo if file.file not in found]
        nbytes = {f.file: sum(t.nbytes for t in self._plan.held(f)) for f in self._plan.files}
        self._total += sum(nbytes.values())
        self._done += sum(nbytes.values()) - sum(nbytes[file.file] for file in left)
        self._report(0)
        for file in compare_files(
            self._encoder, base, self._checkpoint, left, workers=workers, report=self._report
        ):
            self._journal.append(asdict(file))
            found[file.compared] = file
        for file in found.values():
            self._source |= file.digests
        return [file for file in todo if not found[file.file].is_changed]

    def _take(self, base: Listing, file: Header) -> ExportedFile:
        """A file of the base as it is."""
        how, digest = self._files.take(base.source, file.file)
        self._report(file.size)
        return self._proved(
            ExportedFile(
                name=file.file, size=file.size, how=how, digest=digest, same_as_source=True
            )
        )

    def _write_all(self, files: list[Header], workers: int) -> dict[str, ExportedFile]:
        """Write files; one is read back while the next is written."""
        checks: list[Future[ExportedFile]] = []
        tensors = [tensor for file in files for tensor in file.tensors]
        with (
            ThreadPoolExecutor(1) as checker,
            closing(encoded_segments(self._encoder, tensors, workers)) as segments,
        ):
            for file in files:
                written = self._write(file, segments)
                checks.append(checker.submit(self._proved, written))
                for check in checks[:-1]:
                    check.result()  # one file behind at most: a failing disk is noticed at once
        return {file.name: file for file in (check.result() for check in checks)}

    def _write(self, file: Header, segments: Segments) -> ExportedFile:
        with StreamWriter(self._files.open(file.file), file) as out:
            self._report(out.size - sum(tensor.nbytes for tensor in file.tensors))
            written = [self._write_tensor(tensor, segments, out) for tensor in file.tensors]
        changed = tuple(tensor.name for tensor in written if tensor.is_changed)
        return ExportedFile(
            name=file.file,
            size=file.size,
            digest=out.digest,
            same_as_source=self._plan.dtype == "keep" and not changed and not self._plan.whole,
            changed=changed,
            requantised=tuple(tensor.cost for tensor in written if tensor.cost),
        )

    def _write_tensor(
        self, tensor: TensorInfo, segments: Segments, out: StreamWriter
    ) -> _WrittenTensor:
        state, cost = xxhash.xxh3_128(), None
        for segment in tensor_segments(segments, tensor):
            state.update(segment.data.data)
            out.write(segment.data)
            self._report(len(segment.data))
            cost = segment.cost
        source = self._source.get(tensor.name)
        is_changed = source is not None and state.hexdigest() != source
        if is_changed:
            self._raise_if_damaged(tensor)
        return _WrittenTensor(tensor.name, is_changed, cost)

    def _raise_if_damaged(self, tensor: TensorInfo) -> None:
        """A tensor that nobody trained, and that is stored as it came, has to be the source's."""
        slot = self._encoder.slots[tensor.name]
        if slot.copy_of or slot.path in self._trained or not self._encoder.is_as_stored(slot.name):
            return
        detail = f"in leaf {slot.path} is not what was imported: a chunk file is damaged"
        where = str(self._checkpoint.path)
        advice = f"`convert-deepseek verify {where}` finds it; import it again with --overwrite"
        raise ProblemsError(where, [Problem("damaged", tensor.name, f"{detail}; {advice}")])

    def _proved(self, file: ExportedFile) -> ExportedFile:
        """The same once what is stored is what was written; then it counts."""
        fault = self._files.fault(file.name, file.digest) if file.digest else None
        if fault:
            raise ProblemsError(str(self._files.folder), [Problem("file", file.name, fault)])
        self._journal.append({**asdict(file), _WRITTEN_S: self._files.written_s(file.name)})
        return file

    def _report(self, nbytes: int) -> None:
        if self._progress:
            self._done += nbytes
            self._progress(self._done, self._total)


def _source_digests(plan: ExportPlan, checkpoint: Checkpoint) -> dict[str, str | None]:
    """Of every tensor that is written in the source's dtype; None where import did not read it."""
    if plan.dtype != "keep":
        return {}
    records = checkpoint.provenance["source"]["files"]
    return {
        tensor.name: digest
        for file in plan.whole or plan.files
        for tensor, digest in zip(file.tensors, records[file.file]["tensors"], strict=True)
    }


def _delete_others(dst: Place, plan: ExportPlan) -> None:
    """Safetensors files of an earlier checkpoint."""
    names = {file.file for file in plan.files}
    for stale in dst.entries():
        if stale.name.endswith(SUFFIX) and stale.name not in names:
            stale.unlink()


def _copied(checkpoint: Checkpoint, plan: ExportPlan) -> list[str]:
    """Side files that are written as they are."""
    return [name for name in plan.side_files(checkpoint) if name not in plan.replaced]


def _raise_if_damaged(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    detail = "was changed since the import; restore it, or import again with --overwrite"
    problems = (Problem("damaged", name, detail) for name in names)
    raise_if_any(str(checkpoint.path), problems)


def _write_side_files(checkpoint: Checkpoint, dst: Place, plan: ExportPlan) -> None:
    """Everything but tensors."""
    digests, copied = checkpoint.side_file_digests(), _copied(checkpoint, plan)
    for name in plan.side_files(checkpoint):
        file = dst / name
        file.parent.make_folder()
        if name not in copied:
            file.write_pieces([plan.replaced[name]])
        elif file.write_pieces((checkpoint.path / name).pieces()) != digests[name]:
            file.unlink()
            _raise_if_damaged(checkpoint, [name])

"""Whether a checkpoint directory still holds the bytes that were written."""

from dataclasses import dataclass

from mtp_model.checkpoint.directory import PARAMS, Checkpoint, Piece
from mtp_model.checkpoint.orbax import damaged_metadata
from mtp_model.problems import Problem
from mtp_model.progress import OnProgress
from mtp_model.threads import in_threads

DEFAULT_WORKERS = 3


@dataclass(frozen=True, kw_only=True)
class DigestCheck:
    """Chunk files that were read, and every file whose digest is not the recorded one."""

    files: int
    bytes: int
    problems: tuple[Problem, ...]

    @property
    def holds(self) -> bool:
        return not self.problems


def check_digests(
    checkpoint: Checkpoint,
    *,
    workers: int = DEFAULT_WORKERS,
    progress: OnProgress | None = None,
) -> DigestCheck:
    """Read every file and compare its digest with the one that was recorded when it was written."""
    problems = [
        Problem("digest", name, "is gone or has other bytes than were written")
        for name in checkpoint.damaged_files()
    ]
    problems += [
        Problem("orbax", f"{PARAMS}/{name}", "is gone or is not what was written")
        for name in damaged_metadata(checkpoint.params, checkpoint.leaves)
    ]
    pieces = list(checkpoint.pieces())
    total = sum(checkpoint.leaves[piece.path].chunk_bytes for piece in pieces)
    done = 0
    faults: dict[Piece, str] = {}
    for piece, fault in in_threads(_fault, pieces, workers):
        if fault:
            faults[piece] = fault
        done += checkpoint.leaves[piece.path].chunk_bytes
        if progress:
            progress(done, total)
    problems += [
        Problem("digest", f"{PARAMS}/{piece.path}/{piece.coord}", faults[piece])
        for piece in pieces
        if piece in faults
    ]
    return DigestCheck(files=len(pieces), bytes=total, problems=tuple(problems))


def _fault(piece: Piece) -> tuple[Piece, str | None]:
    try:
        found = piece.file.digest()
    except OSError as err:
        return piece, f"cannot be read: {err.strerror}"
    if found != piece.digest:
        recorded = f"(xxh3-128 {found}, recorded {piece.digest})"
        return piece, f"has other bytes than were written {recorded}"
    return piece, None

"""The disk's limit: plain copies by the best methods known; must not know what is copied."""

import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

PIECE = 16 << 20
PAGE = 4096
PART = 64 * PIECE


@dataclass(frozen=True, kw_only=True)
class Method:
    """How to copy: with how many threads, and whether reads pass the page cache by."""

    num_threads: int
    direct_reads: bool


METHODS = {
    "2 threads, direct": Method(num_threads=2, direct_reads=True),
    "3 threads, direct": Method(num_threads=3, direct_reads=True),
    "3 threads, cached reads": Method(num_threads=3, direct_reads=False),
}
"""All write past the page cache: through it, and with copy_file_range, writing is slower."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Bytes written for bytes read, as small whole numbers; with no writes it is only read."""

    reads: int
    writes: int


def drop_from_cache(folder: Path) -> None:
    """Make the next read of every file below `folder` come from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed_copies(sources: list[Path], scratch: Path, ratio: Ratio) -> dict[str, float]:
    """Seconds of each method; nothing is left in `scratch`, a folder that is made if missing."""
    scratch.mkdir(exist_ok=True)
    seconds = {}
    for name, method in METHODS.items():
        for source in sources:
            drop_from_cache(source)
        seconds[name] = _copy(method, sources, scratch, ratio)
        for path in scratch.iterdir():
            path.unlink()
    return seconds


def _copy(method: Method, sources: list[Path], scratch: Path, ratio: Ratio) -> float:
    parts: SimpleQueue[tuple[Path, int, int]] = SimpleQueue()
    for part in _parts(sources):
        parts.put(part)
    began = time.perf_counter()
    with ThreadPoolExecutor(method.num_threads) as pool:
        targets = [scratch / str(number) for number in range(method.num_threads)]
        for done in [pool.submit(_copy_parts, parts, method, t, ratio) for t in targets]:
            done.result()
    return time.perf_counter() - began


def _parts(folders: list[Path]) -> Iterator[tuple[Path, int, int]]:
    """(file, first byte, bytes) of everything below the folders."""
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path.is_file():
            size = path.stat().st_size
            for begin in range(0, size, PART):
                yield path, begin, min(PART, size - begin)


def _copy_parts(
    parts: "SimpleQueue[tuple[Path, int, int]]", method: Method, target: Path, ratio: Ratio
) -> None:
    """One thread: parts to the end of one file, until none is left."""
    memory = memoryview(mmap.mmap(-1, PIECE))
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o644)
    num_reads = written = 0
    try:
        while True:
            path, begin, nbytes = parts.get_nowait()
            source = os.open(path, os.O_RDONLY | (os.O_DIRECT if method.direct_reads else 0))
            for offset in range(begin, begin + nbytes, PIECE):
                whole = -(-min(PIECE, begin + nbytes - offset) // PAGE) * PAGE
                os.preadv(source, [memory[:whole]], offset)
                num_reads += 1
                for _ in range(0 if num_reads % ratio.reads else ratio.writes):
                    written += os.pwrite(out, memory[:whole], written)
            os.close(source)
    except Empty:
        os.fsync(out)
    finally:
        os.close(out)

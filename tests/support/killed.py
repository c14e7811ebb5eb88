"""Imports and exports in processes of their own, killed (SIGKILL) at chosen points.

    python killed.py '[["import"|"export", SRC, DST, POINT, COUNT, [I, N]], ...]'

SRC may be the command's own arguments [SRC, "--mtp-from", SRC2], for the command itself. POINT is
what the process is about to do for the COUNTth time when it dies; `none` lets it finish.
All run side by side, forked from one that has imported everything. Prints their exit statuses.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from dying import before
from roundtrip import run_import

from converters.cli.main import main
from converters.exporting.exporter import export_checkpoint
from converters.format import fp8
from converters.format.writer import StreamWriter
from converters.importing import finish as import_finish
from mtp_model.checkpoint import writer as store_writer
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.files import journal, object_place
from mtp_model.files.local import LocalPlace
from mtp_model.files.objects import StoredObject
from mtp_model.files.open import as_place


def half_a_line(self: Any, entry: Any) -> None:
    """Write the start of a line of the journal."""
    self._lines.append(str(entry).encode()[:20])


def half_a_piece(self: Any, data: Any) -> None:
    """Write a part of a safetensors file, and leave it there."""
    self._file.append(data[: len(data) // 2])
    self._file._flush()


POINTS: dict[str, Callable[[int], None]] = {
    "none": lambda _: None,
    "chunk": lambda n: before(LocalPlace, "write_buffer", n),
    "chunk written": lambda n: before(os, "close", n),
    "journal": lambda n: before(journal.Journal, "append", n, half_a_line),
    "object": lambda n: before(StoredObject, "write_bytes", n),
    "metadata": lambda n: before(store_writer, "write_orbax_metadata", n),
    "layout": lambda n: before(store_writer, "_write_json", n),
    "side file": lambda n: before(import_finish, "_side_pieces", n),
    "marker": lambda n: before(shutil, "rmtree", n),
    "piece": lambda n: before(StreamWriter, "write", n, half_a_piece),
    "read back": lambda n: before(LocalPlace, "fault", n),
    "exported side file": lambda n: before(LocalPlace, "write_pieces", n),
    "joined object": lambda n: before(object_place, "join", n),
}


def run(
    command: str, src: str | list[str], dst: str, point: str, count: int, worker: tuple[int, int]
) -> None:
    os.fsync = lambda _: None  # a killed process loses nothing that it wrote
    object_place._PART_BYTES = 1000  # as in the tests
    POINTS[point](count)
    if isinstance(src, list):
        source, *options = src
        assert main([command, source, dst, *options]) == 0
    elif command == "import":
        run_import(Path(src), as_place(dst), dtype="bf16", worker=worker)
    else:
        export_checkpoint(open_checkpoint(src), as_place(dst))


def forked(arguments: list[Any]) -> int:
    """Run in a process of its own; its process id."""
    child = os.fork()
    if not child:
        status = 1
        try:
            run(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def compile_kernels() -> None:
    """Once, for all processes."""
    weight = np.ones((8, 16), np.uint16)
    codes, scale = np.empty((8, 16), np.uint8), np.ones((1, 1), np.float32)
    fp8.requantise_into(codes, weight, scale, (8, 16))
    fp8.dequantise_into(weight, codes, scale, (8, 16))


def run_side_by_side() -> None:
    compile_kernels()
    children = [forked(arguments) for arguments in json.loads(sys.argv[1])]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes))


if __name__ == "__main__":
    run_side_by_side()

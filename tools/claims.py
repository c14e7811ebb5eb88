"""What this toolkit claims of itself, counted on checkpoints that anybody can make.

`python -m tools.claims` prints the table of docs/verification.md: a tiny checkpoint in each format
of the released files, with two MTP modules, is imported and exported again and both are compared
byte for byte, tensor by tensor, by plain means; its logits are compared with the torch reference.
"""

import argparse
import contextlib
import io
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from converters.cli.main import main as convert
from converters.format.listing import open_safetensors
from converters.sources.open import open_source
from converters.verifying.logits.check import check_logits
from converters.verifying.logits.depths import TOLERANCE
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.reporting import Grid, markdown
from tools.make_tiny_checkpoint import Flavour, make_tiny_checkpoint

COLUMNS = (
    "tiny checkpoint",
    "tensors",
    "values",
    "differing tensors",
    "differing files",
    "logits",
)

Stored = dict[str, tuple[int, bytes]]
"""Number of values and bytes of every tensor."""


def claims(scratch: Path) -> Iterator[tuple[str, ...]]:
    """A row for each format."""
    for dtype in get_args(Flavour):
        source, checkpoint, out = (scratch / dtype / name for name in ("source", "ckpt", "out"))
        make_tiny_checkpoint(source, dtype=dtype, num_mtp=2)
        run("import", source, checkpoint)
        run("export", checkpoint, out, "--no-verify")
        before, after = stored(source), stored(out)
        found = check_logits(
            open_safetensors(open_source(str(source))), open_checkpoint(checkpoint)
        )
        largest = max(depth.relative_difference for depth in found.depths)
        yield (
            f"{dtype}, two MTP modules",
            f"{len(before):,}",
            f"{sum(count for count, _ in before.values()):,}",
            str(sum(before.get(n) != after.get(n) for n in before.keys() | after.keys())),
            str(len(differing_files(source, out))),
            f"within {TOLERANCE:.0e}" if found.holds else f"{largest:.1e} apart",
        )


def run(*command: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        status = convert([str(word) for word in command])
    assert status == 0, command


def stored(folder: Path) -> Stored:
    """Every tensor of a folder's safetensors files, read by hand."""
    found: Stored = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = math.prod(entry["shape"]), raw[start + begin : start + end]
    return found


def differing_files(a: Path, b: Path) -> set[str]:
    """Names of the files that are not in both with the same bytes."""
    ours, theirs = ({f.name: f.read_bytes() for f in folder.iterdir()} for folder in (a, b))
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(markdown([Grid(COLUMNS, list(claims(Path(scratch))))]))


if __name__ == "__main__":
    main()

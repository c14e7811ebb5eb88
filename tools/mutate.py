"""Whether damage is caught: forty damaged checkpoints, imports and networks, and who said so.

`python -m tools.mutate` prints the table of docs/verification.md, and fails if anything passes. A
damaged source is imported; where that succeeds, it is compared with the import of the sound one
(`verify SRC CKPT`). A damaged checkpoint directory is verified alone; a network that computes
something else is compared with the torch reference (`verify SRC CKPT --logits`).
"""

import argparse
import copy
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.cli.main import main as convert
from converters.format.listing import open_safetensors
from converters.sources.open import open_source
from converters.verifying.logits.check import check_logits
from converters.verifying.report import logits_verdict
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.reporting import Grid, markdown
from tools.make_tiny_checkpoint import (
    random_weight,
    stored_tensors,
    tiny_config,
    write_json,
    write_tokenizer,
    write_weights,
)
from tools.mutations import MUTATIONS, SIZES, Mutation, with_config
from tools.released_format import weight_shapes

NUM_FILES = 3
_MOST_WORDS = 24
NOBODY = "NOBODY"


@dataclass(frozen=True)
class Catch:
    """Who caught a damage, and the line that says it."""

    by: str
    message: str


class Bench:
    """A sound checkpoint and its import, which every damage begins from."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self.source, self.checkpoint = scratch / "sound", scratch / "imported"
        self._config = tiny_config("fp8", num_mtp=1, q_lora=True, sizes=SIZES)
        self._tensors: dict[str, np.ndarray] = {}
        for name, shape in weight_shapes(self._config, copies=True):
            self._tensors |= stored_tensors(name, random_weight(name, shape, 0), self._config)
        self._write(self.source, self._tensors, self._config)
        assert said("import", self.source, self.checkpoint) is None

    def caught(self, mutation: Mutation) -> Catch | None:
        """None where nobody saw the damage."""
        if mutation.directory:
            return self._of_directory(mutation)
        if mutation.weights or mutation.files:
            return self._of_source(mutation)
        return self._of_network(mutation)

    def sound(self) -> Catch | None:
        """What is said of no damage at all: nothing."""
        for mutation in (
            Mutation("nothing", weights=lambda *_: None),
            Mutation("nothing", directory=lambda _: None),
            Mutation("nothing", network=nullcontext),
        ):
            if catch := self.caught(mutation):
                return catch
        return None

    def _of_source(self, mutation: Mutation) -> Catch | None:
        folder, imported = self.scratch / "damaged", self.scratch / "import"
        for old in (folder, imported):
            shutil.rmtree(old, ignore_errors=True)
        tensors = {name: tensor.copy() for name, tensor in self._tensors.items()}
        config = copy.deepcopy(self._config)
        if mutation.weights:
            mutation.weights(tensors, config)
        self._write(folder, tensors, config)
        if mutation.files:
            mutation.files(folder)
        if message := said("import", folder, imported):
            return Catch("import", message)
        message = said("verify", folder, self.checkpoint)
        return Catch("verify SRC CKPT", message) if message else None

    def _of_directory(self, mutation: Mutation) -> Catch | None:
        assert mutation.directory
        folder = self.scratch / "directory"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.checkpoint, folder)
        mutation.directory(folder)
        message = said("verify", folder)
        return Catch("verify CKPT", message) if message else None

    def _of_network(self, mutation: Mutation) -> Catch | None:
        checkpoint = with_config(open_checkpoint(self.checkpoint), mutation.config or {})
        source = open_safetensors(open_source(str(self.source)))
        with mutation.network() if mutation.network else nullcontext():
            found = check_logits(source, checkpoint)
        return None if found.holds else Catch("verify --logits", logits_verdict(found))

    def _write(self, folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        folder.mkdir()
        write_weights(folder, tensors, NUM_FILES)
        write_json(folder / "config.json", config)
        write_tokenizer(folder, config)


def said(*command: object) -> str | None:
    """What a command says of what is wrong, on a line; None where it succeeds."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = convert([str(word) for word in command])
    if status == 0:
        return None
    return _shortest(out.getvalue() + err.getvalue())


def _shortest(text: str) -> str:
    """The first problem, or the first tensor that differs, and how many there are."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for number, line in enumerate(lines[:-1]):
        if re.match(r"\d+ problems? in ", line):
            return lines[number + 1]
        if line == "differing:":
            return f"differing: {lines[number + 1]}"
    return next((line for line in lines if "FAILED" in line), lines[-1])


def table(bench: Bench) -> Iterator[tuple[str, str, str]]:
    for mutation in MUTATIONS:
        catch = bench.caught(mutation)
        yield mutation.name, catch.by if catch else NOBODY, _cut(bench, catch) if catch else ""


def _cut(bench: Bench, catch: Catch) -> str:
    """The message for a table: without this run's folder, and not without end."""
    words = catch.message.replace(f"{bench.scratch}/", "").split()
    return " ".join([*words[:_MOST_WORDS], *(["..."] if len(words) > _MOST_WORDS else [])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        if catch := bench.sound():
            print(f"no damage, and {catch.by} says: {catch.message}", file=sys.stderr)
            return 1
        rows = list(table(bench))
    print(markdown([Grid(("damage", "caught by", "message"), rows)]))
    missed = [name for name, by, _ in rows if by == NOBODY]
    print(f"{len(rows) - len(missed)} of {len(rows)} caught", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

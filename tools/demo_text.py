"""Two domains of real text that every machine with Python has: its standard library's code without
comments, and the documentation strings that were in it. And a small tokenizer trained on both."""

import ast
import contextlib
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# Names of the released tokenizer; ids 0, 1 and 2, as training keeps the order.
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"  # noqa: RUF001
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}
HELD_OUT_EVERY = 20  # one file in this many is for evaluation only
SHORTEST_DOCSTRING = 80  # characters
WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Domain(NamedTuple):
    """Two .jsonl files of {"text"} lines."""

    train: Path
    held_out: Path


def write_domains(folder: Path) -> tuple[Domain, Domain]:
    """Write code and documentation strings; returns (code, prose)."""
    folder.mkdir(parents=True, exist_ok=True)
    domains = [
        Domain(folder / f"{name}.jsonl", folder / f"{name}-held-out.jsonl")
        for name in ("code", "prose")
    ]
    files = [path.open("w", encoding="utf-8") for domain in domains for path in domain]
    code, code_held_out, prose, prose_held_out = files
    for number, module in enumerate(library_modules()):
        held_out = number % HELD_OUT_EVERY == 0
        stripped, docstrings = take_docstrings(module)
        write_line(code_held_out if held_out else code, stripped)
        for text in docstrings:
            write_line(prose_held_out if held_out else prose, text)
    for file in files:
        file.close()
    return domains[0], domains[1]


def write_line(file, text: str) -> None:
    file.write(json.dumps({"text": text}) + "\n")


def library_modules() -> Iterator[ast.Module]:
    """The standard library's modules, in the order of their paths; those that parse."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts):
            source = path.read_text(encoding="utf-8", errors="ignore")
            with warnings.catch_warnings(), contextlib.suppress(SyntaxError, ValueError):
                warnings.simplefilter("ignore")  # of the library's own string escapes
                yield ast.parse(source)


def take_docstrings(module: ast.Module) -> tuple[str, list[str]]:
    """The code without comments and documentation strings, and the longer ones of these."""
    docstrings = []
    for node in ast.walk(module):
        if isinstance(node, WITH_DOCSTRING) and (text := ast.get_docstring(node)):
            docstrings.append(text)
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(module), [text for text in docstrings if len(text) >= SHORTEST_DOCSTRING]


def train_tokenizer(texts: list[Path], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer that begins every document with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_texts(texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def read_texts(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]

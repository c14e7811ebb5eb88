"""Training text on disk: where each document is, and that it can be read.

A corpus is an index (file, first byte, bytes) of 20 bytes a document; the text stays on disk.
"""

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mtp_model.problems import UserError

# A text file is indexed in pieces of at most this size, so that a file of any size is read
# piece by piece, and so that one long file can be shuffled and partly held out.
PIECE_BYTES = 64 * 1024
REPORTED_FAULTS = 40
FORMS = '{"text"}, {"prompt", "completion"}, or {"input_ids", optional "loss_mask"}'


class DataError(UserError):
    """Data that cannot be trained on, with every fault (the first 40 are printed)."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        count = f"{len(faults)} problem{'' if len(faults) == 1 else 's'} in the data:"
        rest = len(faults) - REPORTED_FAULTS
        more = [f"and {rest} more"] if rest > 0 else []
        super().__init__("\n  ".join([count, *faults[:REPORTED_FAULTS], *more]))


@dataclass(frozen=True, kw_only=True)
class Text:
    """A document of plain text, or a piece of one."""

    text: str
    starts: bool = True  # the document begins here
    ends: bool = True


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A prompt, which is read, and a completion, which is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """A document that comes as tokens; loss_mask is 1 for each token that is learnt."""

    input_ids: list[int]
    loss_mask: list[int] | None = None


Record = Text | Exchange | TokenIds


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Documents by number: `corpus.read(3)`. N documents."""

    files: tuple[Path, ...]
    file_N: np.ndarray  # int32, which file
    begin_N: np.ndarray  # int64, first byte
    nbytes_N: np.ndarray  # int64
    digest: str  # xxh3-128 of all files' contents, in order
    has_text: bool  # some document needs the tokenizer
    left_out: tuple[Path, ...] = ()  # files of a folder that are not UTF-8 text

    def __len__(self) -> int:
        return len(self.file_N)

    def select(self, chosen_N: np.ndarray) -> "Corpus":
        """The documents where `chosen_N` (bool) holds, in the same order."""
        columns = ("file_N", "begin_N", "nbytes_N")
        return replace(self, **{name: getattr(self, name)[chosen_N] for name in columns})

    def where(self, document: int) -> str:
        """FILE:LINE of a document, for messages."""
        path, begin = self.files[self.file_N[document]], int(self.begin_N[document])
        with path.open("rb") as file:
            lines = sum(block.count(b"\n") for block in _blocks(file, begin))
        return f"{path}:{lines + 1}"

    def read(self, document: int) -> Record:
        """One document's record, read from its file."""
        path = self.files[self.file_N[document]]
        begin, nbytes = int(self.begin_N[document]), int(self.nbytes_N[document])
        with path.open("rb") as file:
            file.seek(begin)
            content = file.read(nbytes)
            last = not file.read(1)
        if _is_jsonl(path):
            return parse_record(json.loads(content))
        return Text(text=content.decode("utf-8"), starts=begin == 0, ends=last)


def scan(paths: Iterable[Path], vocab_size: int) -> Corpus:
    """Index every document under `paths`, in a fixed order, and check it.

    A file that is named must be UTF-8 text; in a folder, files that are not are left out, and so
    are hidden ones. Raises DataError with every malformed line as FILE:LINE.
    """
    scanner = _Scanner(vocab_size)
    for path in paths:
        if path.is_dir():
            for inner in _files_of(path):
                scanner.scan(inner, required=False)
        else:
            scanner.scan(path, required=True)
    if not scanner.faults and not scanner.nbytes:
        scanner.faults.append(f"no document in {', '.join(map(str, paths))}")
    if scanner.faults:
        raise DataError(scanner.faults)
    return scanner.corpus()


def parse_record(value: Any, vocab_size: int | None = None) -> Record:
    """A parsed line of JSONL as a record. Raises ValueError that says what is wrong with it."""
    if not isinstance(value, dict):
        raise ValueError(f"is {type(value).__name__}, needed an object: {FORMS}")
    if sum(key in value for key in ("text", "prompt", "input_ids")) != 1:
        raise ValueError(f"has the keys {', '.join(sorted(value)) or 'of none'}, needed {FORMS}")
    if "input_ids" in value:
        return _token_ids(value["input_ids"], value.get("loss_mask"), vocab_size)
    names = ("text",) if "text" in value else ("prompt", "completion")
    for name in names:
        if not isinstance(value.get(name), str):
            raise ValueError(f"{name} is {_kind(value.get(name))}, needed a string")
    if "text" in value:
        return Text(text=value["text"])
    return Exchange(prompt=value["prompt"], completion=value["completion"])


def _token_ids(ids: Any, mask: Any, vocab_size: int | None) -> TokenIds:
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise ValueError("input_ids is not a list of whole numbers")
    top = vocab_size or (1 << 31)
    wrong = next((each for each in ids if not 0 <= each < top), None)
    if wrong is not None:
        raise ValueError(f"input_ids has {wrong}, the vocabulary is 0 to {top - 1}")
    if mask is not None:
        if not isinstance(mask, list) or not all(type(m) is int and m in (0, 1) for m in mask):
            raise ValueError("loss_mask is not a list of 0 and 1")
        if len(mask) != len(ids):
            raise ValueError(f"loss_mask has {len(mask)} entries for {len(ids)} input_ids")
    return TokenIds(input_ids=ids, loss_mask=mask)


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


def _is_jsonl(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


def _files_of(folder: Path) -> list[Path]:
    """Files below a folder, sorted by their path in it; hidden files and folders left out."""
    inner = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    seen = (path for path in inner if not any(part.startswith(".") for part in path.parts))
    return [folder / path for path in sorted(seen, key=lambda path: path.parts)]


def _blocks(file: Any, nbytes: int) -> Iterator[bytes]:
    """The next `nbytes` of a file, in blocks."""
    while nbytes > 0 and (block := file.read(min(nbytes, 1 << 20))):
        yield block
        nbytes -= len(block)


def _cut(data: bytes) -> int:
    """Where to cut a full piece: after its last line end, else before its last character."""
    if line_end := data.rfind(b"\n") + 1:
        return line_end
    start = len(data) - 1
    while start > len(data) - 4 and data[start] & 0xC0 == 0x80:  # inside a UTF-8 character
        start -= 1
    return start


class _Scanner:
    """Builds a Corpus file by file, collecting faults."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.faults: list[str] = []
        self.files: list[Path] = []
        self.left_out: list[Path] = []
        self.file, self.begin, self.nbytes = array("i"), array("q"), array("q")
        self.digest = xxhash.xxh3_128()
        self.has_text = False

    def scan(self, path: Path, required: bool) -> None:
        known = len(self.nbytes)
        self.files.append(path.absolute())
        try:
            (self._scan_jsonl if _is_jsonl(path) else self._scan_text)(path)
        except UnicodeDecodeError as error:
            if required:
                self.faults.append(f"{path} is not UTF-8 text: {error.reason}")
            else:
                self._forget(known)
                self.left_out.append(path)
        except OSError as error:
            self.faults.append(f"{path} cannot be read: {error.strerror}")

    def corpus(self) -> Corpus:
        return Corpus(
            files=tuple(self.files),
            file_N=np.array(self.file, np.int32),
            begin_N=np.array(self.begin, np.int64),
            nbytes_N=np.array(self.nbytes, np.int64),
            digest=self.digest.hexdigest(),
            has_text=self.has_text,
            left_out=tuple(self.left_out),
        )

    def _add(self, begin: int, content: bytes) -> None:
        self.digest.update(content)
        self.file.append(len(self.files) - 1)
        self.begin.append(begin)
        self.nbytes.append(len(content))

    def _forget(self, known: int) -> None:
        for column in (self.file, self.begin, self.nbytes):
            del column[known:]

    def _scan_text(self, path: Path) -> None:
        begin = 0
        with path.open("rb") as file:
            while data := file.read(PIECE_BYTES):
                if len(data) == PIECE_BYTES:
                    data = data[: _cut(data)]
                    file.seek(begin + len(data))
                data.decode("utf-8")
                self._add(begin, data)
                begin += len(data)
        self.has_text |= begin > 0

    def _scan_jsonl(self, path: Path) -> None:
        begin = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._scan_line(f"{path}:{number}", begin, line)
                begin += len(line)

    def _scan_line(self, where: str, begin: int, line: bytes) -> None:
        try:
            record = parse_record(json.loads(line), self.vocab_size)
        except json.JSONDecodeError as error:
            self.faults.append(f"{where} is not JSON: {error.msg} at column {error.colno}")
        except UnicodeDecodeError as error:
            self.faults.append(f"{where} is not UTF-8: {error.reason}")
        except (ValueError, RecursionError) as error:
            self.faults.append(f"{where} {error}")
        else:
            self._add(begin, line)
            self.has_text |= not isinstance(record, TokenIds)

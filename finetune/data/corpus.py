"""Training text on disk: where each document is, and that it can be read.

A corpus is an index (file, first byte, bytes) of 20 bytes a document; the text stays on disk.
"""

import codecs
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
FORMS = (
    '{"text"}, {"prompt", "completion" or "response"}, {"instruction", optional "input", '
    '"output"}, or {"input_ids", optional "loss_mask" or "labels"}'
)
_BESIDE_IDS = {"input_ids", "loss_mask", "labels", "attention_mask"}
_NOT_LEARNT = -100  # in labels, as Transformers' losses leave it out
_COMPLETIONS = {"prompt": ("completion", "response"), "instruction": ("output",)}


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


def has_target(record: Record) -> bool:
    """Whether there is anything to learn in a record. Its first token is never a target."""
    if isinstance(record, Text):
        return bool(record.text)
    if isinstance(record, Exchange):
        return bool(record.completion)
    mask = record.loss_mask if record.loss_mask is not None else [1] * len(record.input_ids)
    return any(mask[1:])


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Documents by number: `corpus.read(3)`. N documents."""

    files: tuple[Path, ...]
    file_N: np.ndarray  # int32, which file
    begin_N: np.ndarray  # int64, first byte
    nbytes_N: np.ndarray  # int64
    idle_N: np.ndarray  # bool, documents with nothing to learn
    digest: str  # xxh3-128 of all files' contents, in order
    has_text: bool  # some document needs the tokenizer
    left_out: tuple[Path, ...] = ()  # files of a folder that are not UTF-8 text

    def __len__(self) -> int:
        return len(self.file_N)

    def select(self, chosen_N: np.ndarray) -> "Corpus":
        """The documents where `chosen_N` (bool) holds, in the same order."""
        columns = ("file_N", "begin_N", "nbytes_N", "idle_N")
        return replace(self, **{name: getattr(self, name)[chosen_N] for name in columns})

    @property
    def num_idle(self) -> int:
        """How many documents have nothing to learn."""
        return int(self.idle_N.sum())

    def raise_if_idle(self) -> None:
        """DataError where no document has anything to learn."""
        if self.num_idle == len(self):
            why = "every loss mask and label leaves all tokens out, or completions are empty"
            raise DataError([f"nothing to learn in any of {len(self):,} documents: {why}"])

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
        if begin == 0:
            content = content.removeprefix(codecs.BOM_UTF8)  # no part of the text
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
    corpus = scanner.corpus()
    corpus.raise_if_idle()
    return corpus


def parse_record(value: Any, vocab_size: int | None = None) -> Record:
    """A parsed line of JSONL as a record. Raises ValueError that says what is wrong with it."""
    if not isinstance(value, dict):
        raise ValueError(f"is {type(value).__name__}, needed an object: {FORMS}")
    forms = [key for key in ("text", "prompt", "instruction", "input_ids") if key in value]
    if len(forms) != 1:
        raise ValueError(f"has the keys {', '.join(sorted(value)) or 'of none'}, needed {FORMS}")
    [form] = forms
    if form == "input_ids":
        return _token_ids(value, vocab_size)
    if form == "text":
        return Text(text=_string(value, "text"))
    return _exchange(value, form)


def _exchange(value: dict[str, Any], form: str) -> Exchange:
    names = [name for name in _COMPLETIONS[form] if name in value] or _COMPLETIONS[form][:1]
    if len(names) > 1:
        raise ValueError(f"has both {' and '.join(names)}, needed one of them")
    prompt, completion = _string(value, form), _string(value, names[0])
    if form == "instruction" and value.get("input"):
        prompt = f"{prompt}\n\n{_string(value, 'input')}"
    return Exchange(prompt=prompt, completion=completion)


def _string(value: dict[str, Any], name: str) -> str:
    if not isinstance(value.get(name), str):
        raise ValueError(f"{name} is {_kind(value.get(name))}, needed a string")
    return value[name]


def _token_ids(value: dict[str, Any], vocab_size: int | None) -> TokenIds:
    unknown = sorted(value.keys() - _BESIDE_IDS)
    if unknown:
        known = ", ".join(sorted(_BESIDE_IDS - {"input_ids"}))
        raise ValueError(f"has {', '.join(unknown)} beside input_ids, known there are {known}")
    ids, mask = value["input_ids"], value.get("loss_mask")
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise ValueError("input_ids is not a list of whole numbers")
    top = vocab_size or (1 << 31)
    wrong = next((each for each in ids if not 0 <= each < top), None)
    if wrong is not None:
        raise ValueError(f"input_ids has {wrong}, the vocabulary is 0 to {top - 1}")
    if value.get("labels") is not None:
        if mask is not None:
            raise ValueError("has both loss_mask and labels, needed one of them")
        mask = _mask_of_labels(value["labels"], ids)
    mask = _zeros_and_ones(mask, "loss_mask", ids)
    attention = _zeros_and_ones(value.get("attention_mask"), "attention_mask", ids)
    if attention is None or all(attention):
        return TokenIds(input_ids=ids, loss_mask=mask)
    kept = [position for position, seen in enumerate(attention) if seen]  # the rest is padding
    return TokenIds(
        input_ids=[ids[position] for position in kept],
        loss_mask=mask and [mask[position] for position in kept],
    )


def _zeros_and_ones(mask: Any, name: str, ids: list[int]) -> list[int] | None:
    if mask is None:
        return None
    if not isinstance(mask, list) or not all(type(m) is int and m in (0, 1) for m in mask):
        raise ValueError(f"{name} is not a list of 0 and 1")
    if len(mask) != len(ids):
        raise ValueError(f"{name} has {len(mask)} entries for {len(ids)} input_ids")
    return mask


def _mask_of_labels(labels: Any, ids: list[int]) -> list[int]:
    """The loss mask that labels stand for: its own token, or -100 where it is not learnt."""
    if not isinstance(labels, list) or len(labels) != len(ids):
        found = len(labels) if isinstance(labels, list) else _kind(labels)
        raise ValueError(f"labels has {found} entries for {len(ids)} input_ids")
    for position, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (token, _NOT_LEARNT):
            found = f"labels has {label!r} at {position}, where input_ids has {token}"
            raise ValueError(f"{found}; needed that token, or {_NOT_LEARNT}: nothing is shifted")
    return [int(label != _NOT_LEARNT) for label in labels]


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
        self.idle = array("b")  # 1 for a document with nothing to learn

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
            idle_N=np.array(self.idle, bool),
            digest=self.digest.hexdigest(),
            has_text=self.has_text,
            left_out=tuple(self.left_out),
        )

    def _add(self, begin: int, content: bytes, *, idle: bool = False) -> None:
        self.idle.append(idle)
        self.digest.update(content)
        self.file.append(len(self.files) - 1)
        self.begin.append(begin)
        self.nbytes.append(len(content))

    def _forget(self, known: int) -> None:
        for column in (self.file, self.begin, self.nbytes, self.idle):
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
            content = line if begin else line.removeprefix(codecs.BOM_UTF8)
            record = parse_record(json.loads(content), self.vocab_size)
        except json.JSONDecodeError as error:
            self.faults.append(f"{where} is not JSON: {error.msg} at column {error.colno}")
        except UnicodeDecodeError as error:
            self.faults.append(f"{where} is not UTF-8: {error.reason}")
        except (ValueError, RecursionError) as error:
            self.faults.append(f"{where} {error}")
        else:
            self._add(begin, line, idle=not has_target(record))
            self.has_text |= not isinstance(record, TokenIds)

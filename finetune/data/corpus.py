"""Training text in files: where each document is, and that it can be read.

A corpus is an index (file, number, first byte, bytes) of 28 bytes a document; the text stays on
disk, that of a bucket in a copy that is gone with the process.
"""

import codecs
import functools
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from finetune.data.chat import ChatTemplate
from finetune.data.kinds import (
    ARRAY,
    NAMES,
    PROSE,
    TABLE,
    Broken,
    FileError,
    FileKind,
    Span,
    kind_of,
    parse,
    read_header,
    spans,
)
from finetune.data.records import (
    Chat,
    DataError,
    Record,
    Text,
    TokenIds,
    has_target,
    is_record,
    parse_record,
)
from finetune.data.stored import StoredFile, raise_unless_room
from mtp_model.files.objects import CloudError
from mtp_model.files.open import as_place
from mtp_model.files.place import Place
from mtp_model.progress import Report, progress

REPORTED_EVERY = 256  # records
LONG_BYTES = 64 * 1024  # prose longer than this is tokenised in stretches
# Text about data, which lies beside it in many folders. Named on its own it is read.
ABOUT_DATA = ("readme", "license", "licence", "changelog", "contributing", "notice")


@dataclass(frozen=True, kw_only=True, eq=False)
class DataFile:
    """A file of documents, and what its documents need to be parsed."""

    path: Place
    kind: FileKind
    stored: StoredFile
    header: tuple[str, ...] = ()  # of a table

    @functools.cached_property
    def day(self) -> str:
        """When it was last changed: today, for chat templates that write the date.

        A run that goes on must see the same text on another day.
        """
        return date.fromtimestamp(self.path.written_s()).isoformat()

    def record(self, value: Any, vocab_size: int | None = None) -> Record:
        """A JSON value of this file as a record. Raises ValueError."""
        record = parse_record(value, vocab_size)
        return replace(record, day=self.day) if isinstance(record, Chat) else record


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Documents by number: `corpus.read(3)`. N documents."""

    files: tuple[DataFile, ...]
    file_N: np.ndarray  # int32, which file
    number_N: np.ndarray  # int64, of its line in the file, or in its array
    begin_N: np.ndarray  # int64, first byte
    nbytes_N: np.ndarray  # int64
    idle_N: np.ndarray  # bool, documents with nothing to learn
    digest: str  # xxh3-128 of all files' contents, in order
    has_text: bool  # some document needs the tokenizer
    left_out: tuple[Place, ...] = ()  # files of a folder that are no data

    def __len__(self) -> int:
        return len(self.file_N)

    def select(self, chosen_N: np.ndarray) -> "Corpus":
        """The documents where `chosen_N` (bool) holds, in the same order."""
        columns = ("file_N", "number_N", "begin_N", "nbytes_N", "idle_N")
        return replace(self, **{name: getattr(self, name)[chosen_N] for name in columns})

    @property
    def num_idle(self) -> int:
        """How many documents have nothing to learn."""
        return int(self.idle_N.sum())

    @property
    def kinds(self) -> dict[str, int]:
        """How many files there are of each kind."""
        return dict(sorted(Counter(file.kind.name for file in self.files).items()))

    def raise_if_idle(self) -> None:
        """DataError where no document has anything to learn."""
        if self.num_idle == len(self):
            why = "every loss mask and label leaves all tokens out, or completions are empty"
            raise DataError([f"nothing to learn in any of {len(self):,} documents: {why}"])

    def where(self, document: int) -> str:
        """FILE:LINE of a document, or FILE and its number in it, for messages."""
        return _where(self.files[self.file_N[document]], int(self.number_N[document]))

    def read(self, document: int) -> Record:
        """One document's record, read from its file."""
        file, content = self.files[self.file_N[document]], self.content(document)
        if file.kind.form == PROSE:
            return Text(text=content.decode("utf-8"))
        return file.record(parse(file.stored.form, content, file.header))

    def is_long(self, document: int) -> bool:
        """Whether a document is prose that should not be read all at once."""
        is_prose = self.files[self.file_N[document]].kind.form == PROSE
        return is_prose and self.nbytes_N[document] > LONG_BYTES

    def content(self, document: int, begin: int = 0, end: int | None = None) -> bytes:
        """Some or all bytes of a document."""
        end = int(self.nbytes_N[document]) if end is None else min(end, self.nbytes_N[document])
        stored = self.files[self.file_N[document]].stored
        return stored.read(int(self.begin_N[document]) + begin, max(0, int(end) - begin))


def scan(paths: Iterable[Path], vocab_size: int, chats: ChatTemplate | None = None) -> Corpus:
    """Index every document under `paths`, in a fixed order, and check it.

    A file that is named must be of a known kind; in a folder, files that are not are left out, and
    so are hidden ones and those about the data. chats: the checkpoint's chat template, by which
    conversations are checked. Raises DataError with every malformed record.
    """
    places = tuple(map(as_place, paths))
    with progress("read data", "records") as report:
        scanner = _Scanner(vocab_size, chats, report)
        found = [each for place in places for each in _found(place)]
        wanted = [file for file in found if file.is_named or _is_data(file.path)]
        raise_unless_room((file.path, file.nbytes) for file in wanted)
        for file in found:
            scanner.scan(file.path, file.is_named)
    if not scanner.faults and not scanner.nbytes:
        left = f"; left out: {', '.join(map(str, scanner.left_out))}" if scanner.left_out else ""
        scanner.faults.append(f"no document in {', '.join(map(str, places))}{left}")
    if scanner.faults:
        raise DataError(scanner.faults)
    corpus = scanner.corpus()
    corpus.raise_if_idle()
    return corpus


def _where(file: DataFile, number: int) -> str:
    if file.kind.form == PROSE:
        return str(file.path)
    lined = file.kind.form != ARRAY and file.stored.form == file.kind.form
    return f"{file.path}:{number}" if lined else f"{file.path}, record {number}"


class _Found(NamedTuple):
    path: Place
    nbytes: int
    is_named: bool  # by the user, not found in a folder


def _found(path: Place) -> list[_Found]:
    """A file, or those below a folder, sorted by their path in it; hidden ones left out."""
    if path.is_file() or not path.is_dir():
        return [_Found(path, path.size() if path.is_far and path.is_file() else 0, True)]
    files = {tuple(name.split("/")): nbytes for name, nbytes in path.sizes().items()}
    # Consoles leave an object where somebody made a folder: its name ends with a slash.
    seen = (p for p in sorted(files) if p[-1] and not any(part.startswith(".") for part in p))
    return [_Found(path / "/".join(parts), files[parts], False) for parts in seen]


def _is_data(path: Place) -> bool:
    """Whether a file of a folder is read."""
    kind = kind_of(path.name)
    return kind is not None and not _is_about_data(path, kind)


class _Scanner:
    """Builds a Corpus file by file, collecting faults."""

    def __init__(self, vocab_size: int, chats: ChatTemplate | None, report: Report):
        self.vocab_size, self.chats, self.report = vocab_size, chats, report
        self.faults: list[str] = []
        self.files: list[DataFile] = []
        self.left_out: list[Place] = []
        self.file, self.number = array("i"), array("q")
        self.begin, self.nbytes = array("q"), array("q")
        self.digest = xxhash.xxh3_128()
        self.has_text = False
        self.idle = array("b")  # 1 for a document with nothing to learn
        self.with_chats: set[Place] = set()

    def scan(self, path: Place, is_named: bool) -> None:
        kind = kind_of(path.name)
        if kind is None and is_named and path.exists():
            self.faults.append(f"{path} is of no kind that is read: {NAMES}")
        elif not is_named and not _is_data(path):
            self.left_out.append(path)
        else:
            self._scan_file(path, kind or FileKind("", PROSE, False), is_named)

    def corpus(self) -> Corpus:
        return Corpus(
            files=tuple(self.files),
            file_N=np.array(self.file, np.int32),
            number_N=np.array(self.number, np.int64),
            begin_N=np.array(self.begin, np.int64),
            nbytes_N=np.array(self.nbytes, np.int64),
            idle_N=np.array(self.idle, bool),
            digest=self.digest.hexdigest(),
            has_text=self.has_text,
            left_out=tuple(self.left_out),
        )

    def _scan_file(self, path: Place, kind: FileKind, is_named: bool) -> None:
        try:
            stored = StoredFile(path.absolute(), kind, self._say)
            with stored.open() as opened:
                header = read_header(opened) if kind.form == TABLE else ()
                file = DataFile(path=path.absolute(), kind=kind, stored=stored, header=header)
                if not is_named and _is_one_other_object(file):
                    self.left_out.append(path)
                    return
                self.files.append(file)
                for span in spans(stored.form, opened, self.digest.update):
                    self._take(file, span)
        except FileError as error:
            self.faults.append(f"{path} {error}")
        except UnicodeDecodeError as error:
            self.faults.append(f"{path} is not UTF-8 text: {error.reason}")
        except OSError as error:
            self.faults.append(f"{path} cannot be read: {error.strerror or error}")
        except CloudError as error:
            self.faults.append(str(error))

    def _take(self, file: DataFile, span: Span | Broken) -> None:
        where = _where(file, span.number)
        if isinstance(span, Broken):
            self.faults.append(f"{where} {span.why}")
            return
        if file.kind.form == PROSE:
            self._add(span, is_idle=False)
            self.has_text = True
            if span.nbytes > LONG_BYTES:
                self.digest.update(b"one document")  # where earlier versions saw several
            return
        try:
            record = file.record(span.value, self.vocab_size)
            if isinstance(record, Chat):
                self._check(file, record)
        except (ValueError, RecursionError) as error:
            self.faults.append(f"{where} {error}")
        else:
            self._add(span, is_idle=not has_target(record))
            self.has_text |= not isinstance(record, TokenIds)

    def _check(self, file: DataFile, chat: Chat) -> None:
        """Render it, and count what it depends on as part of the data. Raises ValueError."""
        is_first = file.path not in self.with_chats
        self.with_chats.add(file.path)
        if self.chats is None:
            if is_first:  # said once
                raise ValueError(NO_TEMPLATE)
            return
        self.chats.render(chat)
        if is_first:
            day = chat.day if self.chats.reads_the_day else ""
            self.digest.update((self.chats.identity + day).encode())

    def _add(self, span: Span, *, is_idle: bool) -> None:
        self.idle.append(is_idle)
        self.file.append(len(self.files) - 1)
        self.number.append(span.number)
        self.begin.append(span.begin)
        self.nbytes.append(span.nbytes)
        if len(self.nbytes) % REPORTED_EVERY == 0:
            self._say(self.files[-1].path.name)

    def _say(self, note: str) -> None:
        self.report(len(self.nbytes), None, note)


NO_TEMPLATE = (
    "holds messages, and the checkpoint's tokenizer has no chat template: put the template that "
    "the model is served with into the checkpoint directory as chat_template.jinja, "
    'or write the records as {"prompt", "completion"}'
)


def _is_about_data(path: Place, kind: FileKind) -> bool:
    return kind.form == PROSE and path.name.lower().startswith(ABOUT_DATA)


def _is_one_other_object(file: DataFile) -> bool:
    """Whether a .json file is a single object that is no record, as dataset_info.json is."""
    if file.kind.form != ARRAY:
        return False
    try:
        with file.stored.open() as opened:
            if opened.read(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"{":
                return False
            found = spans(ARRAY, opened, lambda _: None)
            first, second = next(found, None), next(found, None)
    except (FileError, UnicodeDecodeError):
        return False
    if not isinstance(first, Span) or second is not None:
        return False
    return isinstance(first.value, dict) and not is_record(first.value)

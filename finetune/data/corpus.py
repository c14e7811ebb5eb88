"""Training text in files: where each document is, and that it can be read.

A corpus is an index (file, number, first byte, bytes) of 28 bytes a document; the text stays on
disk, that of a bucket in a copy that is gone with the process.
"""

import codecs
import functools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from finetune.data.chat import ChatTemplate
from finetune.data.files.arrays import TokenFile, open_token_file, token_spans
from finetune.data.files.folders import Listed, listed_files, shown_path
from finetune.data.files.kinds import (
    ARRAY,
    LINES,
    NAMES,
    PROSE,
    TABLE,
    TOKENS,
    Broken,
    FileError,
    FileKind,
    Span,
    kind_of,
    parse,
    read_header,
    spans,
)
from finetune.data.files.stored import StoredFile, raise_unless_room
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
from mtp_model.files.objects import CloudError
from mtp_model.files.place import Place
from mtp_model.progress import Report, progress

REPORTED_EVERY = 256  # records
LONG_BYTES = 64 * 1024  # prose longer than this is tokenised in stretches


@dataclass(frozen=True, kw_only=True, eq=False)
class DataFile:
    """A file of documents, and what its documents need to be parsed."""

    path: Place
    kind: FileKind
    stored: StoredFile
    header: tuple[str, ...] = ()  # of a table
    token_dtype: np.dtype | None = None  # of a file that holds token ids alone
    source: int = 0  # which of the paths that were given it is from

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
    from_hub: tuple[str, ...] = ()  # data sets, with their commits

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

    @property
    def source_of_each(self) -> np.ndarray:
        """Which of the paths that were given each document is from."""
        return np.array([file.source for file in self.files], np.int32)[self.file_N]

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
        if file.token_dtype is not None:
            return TokenIds(input_ids=np.frombuffer(content, file.token_dtype).tolist())
        return file.record(parse(file.stored.form, content, file.header))

    def holds_ids(self, document: int) -> bool:
        """Whether a document is in a file of token ids, which `ids` reads."""
        return self.files[self.file_N[document]].token_dtype is not None

    def ids(self, document: int, begin: int) -> tuple[np.ndarray, int | None]:
        """Token ids from a byte on, int32, and the byte where more follow; LONG_BYTES at a time."""
        dtype, end = self.files[self.file_N[document]].token_dtype, begin + LONG_BYTES
        ids = np.frombuffer(self.content(document, begin, end), dtype).astype(np.int32)
        return ids, end if end < self.nbytes_N[document] else None

    def is_long(self, document: int) -> bool:
        """Whether a document is prose that should not be read all at once."""
        is_prose = self.files[self.file_N[document]].kind.form == PROSE
        return is_prose and self.nbytes_N[document] > LONG_BYTES

    def content(self, document: int, begin: int = 0, end: int | None = None) -> bytes:
        """Some or all bytes of a document."""
        end = int(self.nbytes_N[document]) if end is None else min(end, self.nbytes_N[document])
        stored = self.files[self.file_N[document]].stored
        return stored.read(int(self.begin_N[document]) + begin, max(0, int(end) - begin))


def scan(
    paths: Iterable[Path],
    vocab_size: int,
    chats: ChatTemplate | None = None,
    eos: tuple[int, ...] = (),
    *,
    to_learn: bool = True,
) -> Corpus:
    """Index every document under `paths`, in a fixed order, and check it.

    A file that is named must be of a known kind; in a folder, files that are not are left out, and
    so are hidden ones and those about the data. chats: the checkpoint's chat template, by which
    conversations are checked. eos: tokens that end a document in files of token ids.
    to_learn: some document must have something to learn. Raises DataError with every malformed
    record.
    """
    paths = tuple(paths)
    with progress("read data", "records") as report:
        scanner = _Scanner(vocab_size, chats, eos, report)
        found = [(source, listed_files(path)) for source, path in enumerate(paths)]
        raise_unless_room((each.path, each.nbytes) for _, listed in found for each in listed.files)
        for scanner.source, listed in found:
            scanner.scan_all(listed)
    if not scanner.faults and not scanner.nbytes:
        left = f"; left out: {', '.join(map(str, scanner.left_out))}" if scanner.left_out else ""
        scanner.faults.append(f"no document in {', '.join(map(shown_path, paths))}{left}")
    if scanner.faults:
        raise DataError(scanner.faults)
    corpus = scanner.corpus()
    if to_learn:
        corpus.raise_if_idle()
    return corpus


def _where(file: DataFile, number: int) -> str:
    if file.kind.form == PROSE:
        return str(file.path)
    lined = file.kind.form in (LINES, TABLE) and file.stored.form == file.kind.form
    return f"{file.path}:{number}" if lined else f"{file.path}, record {number}"


class _Scanner:
    """Builds a Corpus file by file, collecting faults."""

    def __init__(
        self, vocab_size: int, chats: ChatTemplate | None, eos: tuple[int, ...], report: Report
    ):
        self.vocab_size, self.chats, self.eos, self.report = vocab_size, chats, eos, report
        self.source = 0
        self.faults: list[str] = []
        self.files: list[DataFile] = []
        self.left_out: list[Place] = []
        self.from_hub: list[str] = []
        self.file, self.number = array("i"), array("q")
        self.begin, self.nbytes = array("q"), array("q")
        self.digest = xxhash.xxh3_128()
        self.has_text = False
        self.idle = array("b")  # 1 for a document with nothing to learn
        self.with_chats: set[Place] = set()

    def scan_all(self, listed: Listed) -> None:
        """The files of one of the paths that were given."""
        self.faults += listed.faults
        self.left_out += listed.left_out
        self.from_hub += listed.from_hub
        for found in listed.files:
            self.scan(found.path, found.is_named)

    def scan(self, path: Place, is_named: bool) -> None:
        kind = kind_of(path.name)
        if kind is None and is_named and path.exists():
            self.faults.append(f"{path} is of no kind that is read: {NAMES}")
        else:
            self._scan_file(path, kind or FileKind("", PROSE, ""), is_named)

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
            from_hub=tuple(self.from_hub),
        )

    def _scan_file(self, path: Place, kind: FileKind, is_named: bool) -> None:
        try:
            stored = StoredFile(path.absolute(), kind, self._say)
            with stored.open() as opened:
                header = read_header(opened) if kind.form == TABLE else ()
                tokens = open_token_file(path, opened) if kind.form == TOKENS else None
                file = DataFile(
                    path=path.absolute(),
                    kind=kind,
                    stored=stored,
                    header=header,
                    token_dtype=tokens.dtype if tokens else None,
                    source=self.source,
                )
                if not is_named and _is_one_other_object(file):
                    self.left_out.append(path)
                    return
                self.files.append(file)
                for span in self._spans(file, opened, tokens):
                    self._take(file, span)
        except FileError as error:
            self.faults.append(f"{path} {error}")
        except UnicodeDecodeError as error:
            self.faults.append(f"{path} is not UTF-8 text: {error.reason}")
        except OSError as error:
            self.faults.append(f"{path} cannot be read: {error.strerror or error}")
        except CloudError as error:
            self.faults.append(str(error))

    def _spans(
        self, file: DataFile, opened: BinaryIO, tokens: TokenFile | None
    ) -> Iterator[Span | Broken]:
        if tokens is None:
            return spans(file.stored.form, opened, self.digest.update)
        return token_spans(opened, tokens, self.vocab_size, self.eos, self.digest.update)

    def _take(self, file: DataFile, span: Span | Broken) -> None:
        where = _where(file, span.number)
        if isinstance(span, Broken):
            self.faults.append(f"{where} {span.why}")
            return
        if file.token_dtype is not None:
            self._add(span, is_idle=span.nbytes <= file.token_dtype.itemsize)
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

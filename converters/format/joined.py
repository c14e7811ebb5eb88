"""A source of two: the files of one, some of them made anew from tensors of both.

Nothing is copied for it. A made file is a header in memory and a list of tensors; its bytes are
those of the two sources, read where they are when they are asked for. A tensor that needs another
format (bfloat16 to FP8, or the reverse) is converted on the way, in whole rows of blocks.
"""

import bisect
import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from converters.format import fp8
from converters.format.header import DTYPES, TensorInfo, make_header, start_of_file
from converters.format.kinds import FP8
from converters.format.values import scale_fault
from converters.sources.source import (
    Buffer,
    Fingerprint,
    Finish,
    Read,
    Source,
    byte_view,
    range_fault,
)
from mtp_model.checkpoint.directory import digest_of_json
from mtp_model.files.place import Place, digest
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem, ProblemsError

_PIECE_BYTES = 8 << 20  # of FP8: four times as much in float32


class MadeTensor(Protocol):
    """A tensor of a made file."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> Source: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_into(self, begin: int, out: np.ndarray) -> None:
        """Fill `out` (uint8) with the tensor's bytes from `begin`."""
        ...

    def reads(self, begin: int, nbytes: int) -> list[Read]:
        """What of the source these bytes need."""
        ...


@dataclass(frozen=True, kw_only=True)
class TakenTensor:
    """A tensor whose bytes are taken as they are."""

    name: str
    source: Source
    tensor: TensorInfo

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def read_into(self, begin: int, out: np.ndarray) -> None:
        self.source.read_into(self.tensor.file, self.tensor.begin + begin, out)

    def reads(self, begin: int, nbytes: int) -> list[Read]:
        return [(self.tensor.file, self.tensor.begin + begin, nbytes)]


@dataclass(frozen=True)
class Format:
    """How weights are stored. block: of FP8 scales; powers_of_two: these are made so."""

    dtype: str
    block: fp8.Block | None = None
    powers_of_two: bool = False


@dataclass(frozen=True, kw_only=True)
class RecodedTensor:
    """A weight in another format, or with `is_scale` the FP8 scales that come with it.

    stored: dtype and FP8 blocks of `tensor`, whose block scales are `scale`.
    """

    name: str
    source: Source
    tensor: TensorInfo
    scale: TensorInfo | None
    stored: Format
    wanted: Format
    is_scale: bool = False

    @property
    def dtype(self) -> str:
        return "F32" if self.is_scale else self.wanted.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        if not self.is_scale:
            return self.tensor.shape
        assert self.wanted.block
        return fp8.grid(self.tensor.shape, self.wanted.block)

    def read_into(self, begin: int, out: np.ndarray) -> None:
        if self.is_scale:  # they follow from all of the weight, and are small
            made, start = self._all_scales(), begin
        else:
            rows = self._rows(begin, len(out))
            made, start = self._made(rows)[0], begin - rows.start * self._row_bytes
        out[...] = made.reshape(-1).view(np.uint8)[start : start + len(out)]

    def reads(self, begin: int, nbytes: int) -> list[Read]:
        if self.is_scale or not nbytes:
            rows = range(self.tensor.shape[0])
        else:
            rows = self._rows(begin, nbytes)
        row_bytes = self.tensor.nbytes // self.tensor.shape[0]
        first = self.tensor.begin + rows.start * row_bytes
        scales = [(s.file, s.begin, s.nbytes) for s in (self.scale,) if s]
        return [(self.tensor.file, first, len(rows) * row_bytes), *scales]

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.tensor.shape[1:]) * DTYPES[self.wanted.dtype].itemsize

    def _rows(self, begin: int, nbytes: int) -> range:
        """The rows that hold these bytes, to whole blocks of both formats."""
        step = math.lcm(*(form.block[0] for form in (self.stored, self.wanted) if form.block))
        start = begin // self._row_bytes // step * step
        stop = -(-(begin + nbytes) // self._row_bytes)
        return range(start, min(-(-stop // step) * step, self.tensor.shape[0]))

    def _all_scales(self) -> np.ndarray:
        """The new scales of the whole weight, of which a piece is in memory."""
        size, row_bytes, made, end = self.tensor.shape[0], self._row_bytes, [], 0
        while end < size:
            rows = self._rows(end * row_bytes, min(_PIECE_BYTES, (size - end) * row_bytes))
            made.append(self._made(rows)[1])
            end = rows.stop
        return np.concatenate(made)

    def _made(self, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """These rows as they are wanted, and of FP8 their scales."""
        try:
            if self.wanted.dtype != FP8:
                return self._values(rows, DTYPES[self.wanted.dtype]), np.empty(0, np.float32)
            weight, block = self._values(rows, np.dtype(np.float32)), self.wanted.block
            assert block
            codes = np.empty(weight.shape, np.uint8)
            made = fp8.requantise_into(
                codes,
                weight,
                np.ones(fp8.grid(weight.shape, block), np.float32),
                block,
                powers_of_two=self.wanted.powers_of_two,
            )
        except fp8.Fp8Error as error:
            raise self._error(self.tensor, str(error)) from error
        return codes, made.scale

    def _values(self, rows: range, dtype: np.dtype) -> np.ndarray:
        stored = DTYPES[self.tensor.dtype]
        row_bytes = self.tensor.nbytes // self.tensor.shape[0]
        raw = np.empty(len(rows) * row_bytes, np.uint8)
        self.source.read_into(self.tensor.file, self.tensor.begin + rows.start * row_bytes, raw)
        values = raw.view(stored).reshape(len(rows), *self.tensor.shape[1:])
        if self.scale is None:
            return values.astype(dtype)
        block = self.stored.block
        assert block
        out = np.empty(values.shape, dtype)
        scale = self._scales(self.scale, block)[rows.start // block[0] : -(-rows.stop // block[0])]
        fp8.dequantise_into(out, values, scale, block)
        return out

    def _scales(self, tensor: TensorInfo, block: fp8.Block) -> np.ndarray:
        raw = self.source.read(tensor.file, tensor.begin, tensor.nbytes)
        scales = np.frombuffer(raw, np.float32)
        if fault := scale_fault(scales):
            raise self._error(tensor, fault)
        return scales.reshape(-1, -(-self.tensor.shape[1] // block[1]))

    def _error(self, tensor: TensorInfo, fault: str) -> ProblemsError:
        return ProblemsError(self.source.name, [Problem("value", shown(tensor.name), fault)])


@dataclass(frozen=True, kw_only=True)
class MadeFile:
    """A safetensors file that is nowhere: its first bytes, and where each tensor begins."""

    start: bytes
    tensors: Sequence[MadeTensor]
    begins: Sequence[int] = field(repr=False)
    size: int

    @classmethod
    def of(cls, tensors: Sequence[MadeTensor], metadata: Mapping[str, str]) -> "MadeFile":
        """These tensors in this order; the largest elements first where one would be unaligned."""
        begins, nbytes = _begins(tensors)
        if any(at % DTYPES[t.dtype].itemsize for at, t in zip(begins, tensors, strict=True)):
            tensors = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
            begins, nbytes = _begins(tensors)
        raw = make_header([(t.name, t.dtype, t.shape) for t in tensors], metadata)
        start = start_of_file(raw)
        places = [len(start) + begin for begin in begins]
        return cls(start=start, tensors=tensors, begins=places, size=len(start) + nbytes)

    def parts(self, begin: int, nbytes: int) -> Iterator[tuple[MadeTensor, int, int, int]]:
        """The tensors in a range of bytes: tensor, first byte in it, number, place in the range."""
        for number, low, high in overlapping(self.begins, self.size, begin, begin + nbytes):
            at = self.begins[number]
            yield self.tensors[number], low - at, high - low, low - begin


def overlapping(
    begins: Sequence[int], size: int, begin: int, end: int
) -> Iterator[tuple[int, int, int]]:
    """Of tensors that lie one behind the other up to `size`: number, and first and last byte of
    what each has between `begin` and `end`."""
    for number in range(max(bisect.bisect_right(begins, begin) - 1, 0), len(begins)):
        if begins[number] >= end:
            return
        stop = begins[number + 1] if number + 1 < len(begins) else size
        low, high = max(begins[number], begin), min(stop, end)
        if low < high:
            yield number, low, high


def nbytes_of(tensor: MadeTensor) -> int:
    """Bytes of a tensor."""
    return math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize


def _begins(tensors: Sequence[MadeTensor]) -> tuple[list[int], int]:
    begins, end = [], 0
    for tensor in tensors:
        begins.append(end)
        end += nbytes_of(tensor)
    return begins, end


class JoinedSource(Source):
    """The files of `main`, without `left_out`, with `made` and `texts` beside or in place of them.

    made: safetensors files of tensors of both. texts: other files, by their bytes.
    """

    def __init__(
        self,
        main: Source,
        other: Source,
        *,
        made: Mapping[str, MadeFile],
        texts: Mapping[str, bytes],
        left_out: Collection[str],
    ):
        self.name = f"{main.name} with the MTP module of {other.name}"
        self.is_far = main.is_far or other.is_far
        self._main, self._other = main, other
        self._made, self._texts = made, texts
        new = {file: len(text) for file, text in texts.items()}
        new |= {file: content.size for file, content in made.items()}
        self._main_files = main.files()
        kept = {file: size for file, size in self._main_files.items() if file not in left_out}
        self._sizes = dict(sorted((kept | new).items()))

    @property
    def folder(self) -> Place | None:
        return self._main.folder

    def place(self, file: str) -> Place | None:
        return None if file in self._made or file in self._texts else self._main.place(file)

    def files(self) -> dict[str, int]:
        return dict(self._sizes)

    def read(self, file: str, begin: int, nbytes: int) -> bytes:
        if self.is_main(file):
            return self._main.read(file, begin, nbytes)
        self._check_range(file, begin, nbytes)  # before memory is taken for it
        out = bytearray(nbytes)
        self.read_into(file, begin, out)
        return bytes(out)

    def read_into(self, file: str, begin: int, out: Buffer) -> None:
        if self.is_main(file):
            self._main.read_into(file, begin, out)
            return
        view = byte_view(out)
        self._check_range(file, begin, len(view))
        start = self._texts[file] if file in self._texts else self._made[file].start
        known = start[begin : begin + len(view)]
        view[: len(known)] = np.frombuffer(known, np.uint8)
        if file in self._made:
            for tensor, first, nbytes, at in self._made[file].parts(begin, len(view)):
                tensor.read_into(first, view[at : at + nbytes])

    def fingerprint(self, file: str) -> Fingerprint:
        if self.is_main(file):
            return self._main.fingerprint(file)
        self._check_range(file, 0, 0)
        if file in self._texts:
            theirs = self._main.fingerprint(file) if file in self._main_files else {}
            made_as = digest_of_json([digest(self._texts[file]), theirs])
            return {"size": self._sizes[file], "made_as": made_as}
        files = {
            (tensor.source is self._other, name)
            for tensor in self._made[file].tensors
            for name, _, _ in tensor.reads(0, 1)
        }
        states = [
            [of_other, name, (self._other if of_other else self._main).fingerprint(name)]
            for of_other, name in sorted(files)
        ]
        start = digest(self._made[file].start)
        return {"size": self._sizes[file], "made_as": start, "made_of": digest_of_json(states)}

    def room_needed(self, reads: Mapping[str, Sequence[Read]], folder: Path) -> Mapping[Path, int]:
        needed: dict[Path, int] = {}
        for source, part in self._sources(folder):
            needed |= source.room_needed(self._reads_of(source, reads), part)
        return needed

    @contextlib.contextmanager
    def staged(self, reads: Mapping[str, Sequence[Read]], folder: Path) -> Iterator[Finish]:
        with contextlib.ExitStack() as stack:
            finishes = [
                stack.enter_context(source.staged(self._reads_of(source, reads), part))
                for source, part in self._sources(folder)
            ]

            def finish(step: str) -> None:
                for each in finishes:
                    each(step)

            yield finish

    def _sources(self, folder: Path) -> list[tuple[Source, Path]]:
        return [(self._main, folder / "main"), (self._other, folder / "mtp")]

    def _reads_of(
        self, source: Source, reads: Mapping[str, Sequence[Read]]
    ) -> dict[str, list[Read]]:
        """What these reads need of one of the two sources."""
        return {
            step: [part for read in of_step for part in self._parts_of(source, read)]
            for step, of_step in reads.items()
        }

    def _parts_of(self, source: Source, read: Read) -> Iterator[Read]:
        file, begin, nbytes = read
        if self.is_main(file):
            yield from [read] if source is self._main else []
        elif file in self._made:
            for tensor, first, count, _ in self._made[file].parts(begin, nbytes):
                if tensor.source is source:
                    yield from tensor.reads(first, count)

    def is_main(self, file: str) -> bool:
        """Whether a file is the main model's as it is."""
        return file in self._sizes and file not in self._made and file not in self._texts

    def _check_range(self, file: str, begin: int, nbytes: int) -> None:
        size = self._sizes.get(file)
        fault = range_fault(size, begin, nbytes) if size is not None else "is not in the checkpoint"
        if fault:
            raise ProblemsError(self.name, [Problem("file", shown(file), fault)])

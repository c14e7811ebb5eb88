"""What a checkpoint holds: config, index, headers, side files; no tensor is read."""

import dataclasses
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from converters.format.header import (
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    bounded,
    read_header,
)
from converters.format.mapping import layer_of, mtp_layers, unfused
from converters.sources.source import Fingerprint, Source
from mtp_model.files.place import name_fault
from mtp_model.files.untrusted_json import JsonError, is_text_map, parse, shown
from mtp_model.problems import Problem, ProblemsError, braces, raise_if_any

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SUFFIX = ".safetensors"

_LARGEST_CONFIG_BYTES = 1 << 20
_NO_HEADERS: Mapping[str, Header] = {}
_THREADS = 8  # a header is a few small reads: latency on a remote source, not bandwidth


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All files of a checkpoint, headers only. `index`: the index file, None without one."""

    source: Source
    headers: dict[str, Header]
    tensors: dict[str, TensorInfo]
    side_files: tuple[str, ...]
    """Every file that is neither safetensors nor the index: config, tokenizer, code, ..."""
    index: bytes | None

    @property
    def copied_files(self) -> tuple[str, ...]:
        """Every file that export writes again as it was: side files, and the index."""
        return (*self.side_files, *([INDEX_FILE] if self.index is not None else []))

    def file_states(self) -> dict[str, Fingerprint]:
        """What tells, for every file, that it is still the same."""
        names = (*self.headers, *self.copied_files)
        return {file: dict(self.source.fingerprint(file)) for file in names}


@dataclass(frozen=True, kw_only=True)
class TakenModule:
    """Where the MTP module of a checkpoint was taken from, which is not where its main model is.

    headers: of the files that it was in. names: name there -> name here, of those tensors whose
    bytes were taken as they are. notes: what the user should know of it, a line each. new_layers:
    numbers here of modules that `new-mtp` made, which learnt nothing yet.
    """

    main: str
    source: Source
    headers: Mapping[str, Header]
    names: Mapping[str, str]
    notes: tuple[str, ...]
    new_layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SourceCheckpoint(Listing):
    """A safetensors checkpoint that was opened: its files, and the parsed config.json."""

    config: Mapping[str, Any]
    taken: TakenModule | None = None


def open_safetensors(
    source: Source, *, known: Mapping[str, Header] = _NO_HEADERS
) -> SourceCheckpoint:
    """Headers and config.json; ProblemsError tells everything that is wrong with both, at once.

    known: headers that were read already, by file.
    """
    problems: list[Problem] = []
    listing, config = None, None
    try:
        listing = list_checkpoint(source, known=known)
    except ProblemsError as err:
        problems += err.problems
    try:
        config = read_config(source)
    except ProblemsError as err:
        problems += err.problems
    raise_if_any(source.name, problems)
    assert listing is not None
    assert config is not None
    fields = {field.name: getattr(listing, field.name) for field in dataclasses.fields(listing)}
    return SourceCheckpoint(**fields, config=config)


def list_checkpoint(
    source: Source,
    *,
    known: Mapping[str, Header] = _NO_HEADERS,
    may_lie_beside: Callable[[Sequence[str]], bool] = lambda _: False,
) -> Listing:
    """All headers of a checkpoint; ProblemsError tells everything that is wrong, at once.

    known: headers that were read already, by file. may_lie_beside: whether a file with tensors of
    these names may be in the folder though it is no part of the checkpoint.
    """
    sizes = source.files()
    problems: list[Problem] = []
    index, weight_map = read_index(source, sizes)
    stored = [file for file in sizes if file.endswith(SUFFIX)]
    named = named_files(stored, index, weight_map)
    problems += bounded(_absent_files(stored, named), INDEX_FILE)
    unread = [file for file in named if file in stored and file not in known]
    read = read_headers(source, unread, problems)
    found = {file: known.get(file) or read.get(file) for file in named}
    headers = {file: header for file, header in found.items() if header}
    tensors = _merge(headers.values(), problems)
    unnamed = {file: _names_in(source, file) for file in stored if file not in named}
    unnamed = {file: names for file, names in unnamed.items() if not may_lie_beside(names)}
    problems += bounded(_unnamed_files(source, unnamed, tensors, index), INDEX_FILE)
    if index is not None:
        problems += bounded(_index_problems(weight_map, tensors, headers), INDEX_FILE)
    raise_if_any(source.name, problems)
    side_files = tuple(file for file in sizes if file not in stored and file != INDEX_FILE)
    return Listing(
        source=source, headers=headers, tensors=tensors, side_files=side_files, index=index
    )


def is_module_alone(names: Sequence[str]) -> bool:
    """Whether these are the tensors of MTP modules and of nothing else."""
    return bool(names) and {*map(layer_of, names)} == {*mtp_layers(names)}


def read_config(source: Source) -> dict[str, Any]:
    """The parsed config.json of a source; ProblemsError when there is none or it is no object."""
    return read_config_text(source)[1]


def read_config_text(source: Source) -> tuple[bytes, dict[str, Any]]:
    """config.json, verbatim and parsed; raises as read_config does."""
    size = source.files().get(CONFIG_FILE)
    fault, config, text = None, None, b""
    if size is None:
        fault = "is missing; every size of the network comes from it"
    elif size > _LARGEST_CONFIG_BYTES:
        fault = f"is {size} bytes, more than {_LARGEST_CONFIG_BYTES}"
    else:
        try:
            text = source.read(CONFIG_FILE, 0, size)
            config = parse(text)
        except JsonError as err:
            fault = str(err)
    if not fault and not isinstance(config, dict):
        fault = f"is {shown(config)}, needed an object"
    if fault:
        raise ProblemsError(source.name, [Problem("config", CONFIG_FILE, fault)])
    assert isinstance(config, dict)
    return text, config


def named_files(
    stored: Sequence[str], index: bytes | None, weight_map: Mapping[str, str]
) -> Sequence[str]:
    """The safetensors files that are the checkpoint, of those that are stored."""
    if index is not None:
        return sorted(set(weight_map.values()))
    # Shards need no index: their headers say the same.
    return [SINGLE_FILE] if SINGLE_FILE in stored else stored


def read_index(source: Source, sizes: Mapping[str, int]) -> tuple[bytes | None, dict[str, str]]:
    """The index verbatim and its weight map, tensor -> file; (None, {}) where there is no index."""
    if INDEX_FILE not in sizes:
        if any(file.endswith(SUFFIX) for file in sizes):
            return None, {}
        found = f"and there is no {SUFFIX} file"
        raise ProblemsError(source.name, [Problem("missing", INDEX_FILE, found)])
    fault = None
    if sizes[INDEX_FILE] > MAX_HEADER_BYTES:
        fault = f"is {sizes[INDEX_FILE]} bytes, more than {MAX_HEADER_BYTES}"
        raise ProblemsError(source.name, [Problem("index", INDEX_FILE, fault)])
    raw = source.read(INDEX_FILE, 0, sizes[INDEX_FILE])
    index = None
    try:
        index = parse(raw)
    except JsonError as err:
        fault = str(err)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if is_text_map(weight_map):
        return raw, weight_map
    fault = fault or 'needs an object "weight_map" from tensor names to file names'
    raise ProblemsError(source.name, [Problem("index", INDEX_FILE, fault)])


def _absent_files(stored: Sequence[str], named: Sequence[str]) -> Iterator[Problem]:
    for file in named:
        if file not in stored:
            absent = f"is named by the index, and there is no such {SUFFIX} file"
            yield Problem("index", shown(file), name_fault(file) or absent)


def _names_in(source: Source, file: str) -> list[str]:
    """Names of the tensors of a file, none where its header cannot be read."""
    try:
        return [tensor.name for tensor in unfused(read_header(source, file)).tensors]
    except ProblemsError:
        return []


def _unnamed_files(
    source: Source,
    files: Mapping[str, Sequence[str]],
    tensors: Mapping[str, TensorInfo],
    index: bytes | None,
) -> Iterator[Problem]:
    """Files that are no part of the checkpoint by its index, and what to do with each."""
    listed_in = "named by the index" if index is not None else f"part of it, {SINGLE_FILE} is all"
    for file, names in files.items():
        held = f"is in the folder and not {listed_in}"
        yield Problem("index", shown(file), f"{held}; {_use_of(source, names, tensors, index)}")


def _use_of(
    source: Source, names: Sequence[str], tensors: Mapping[str, TensorInfo], index: bytes | None
) -> str:
    """What to do with a file of these tensors that is no part of the checkpoint."""
    if not names or tensors.keys() & names:
        return "move it out of the folder"
    if is_module_alone(names):
        modules = mtp_layers(names)
        found = f"it holds the MTP module model.layers.{braces(modules)}"
        return f"{found}: import with --mtp-from {shlex.quote(source.name)} to take that in"
    if index is not None:
        way = f"move {INDEX_FILE} out of the folder, the files' own headers tell the same"
    else:
        way = f"give {SINGLE_FILE} another name, without one of that name all files are read"
    return f"if it belongs to the checkpoint, {way}; if not, move it out of the folder"


def read_headers(
    source: Source, files: Sequence[str], problems: list[Problem]
) -> dict[str, Header]:
    """The headers of these files, fused experts as the tensors that they are; what is wrong with
    one goes to `problems`."""

    def read(file: str) -> Header | ProblemsError:
        try:
            return unfused(read_header(source, file))
        except ProblemsError as err:
            return err

    headers = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for file, found in zip(files, pool.map(read, files), strict=True):
            if isinstance(found, Header):
                headers[file] = found
            else:
                problems += found.problems
    return headers


def _merge(headers: Iterable[Header], problems: list[Problem]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for tensor in header.tensors:
            first = tensors.setdefault(tensor.name, tensor)
            if first is not tensor:
                files = f"is in {shown(first.file)} and in {shown(tensor.file)}"
                problems.append(Problem("index", shown(tensor.name), f"{files}; needed once"))
    return tensors


def _index_problems(
    weight_map: dict[str, str], listed: dict[str, TensorInfo], headers: dict[str, Header]
) -> Iterator[Problem]:
    tensors = {tensor.name_in_file: tensor for tensor in listed.values()}
    for name, file in weight_map.items():
        if name not in tensors and file in headers:
            yield Problem("missing", shown(name), f"in {shown(file)}, where the index puts it")
        elif name in tensors and tensors[name].file != file:
            places = f"is in {shown(tensors[name].file)}, the index says {shown(file)}"
            yield Problem("index", shown(name), places)
    for name, tensor in tensors.items():
        if name not in weight_map:
            yield Problem("index", shown(name), f"of {shown(tensor.file)} is not in the index")

"""What a checkpoint holds: config, index, headers, side files; no tensor is read."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
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
from converters.sources.source import Fingerprint, Source, name_fault
from mtp_model.files.untrusted_json import JsonError, is_text_map, parse, shown
from mtp_model.problems import Problem, ProblemsError, raise_if_any

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SUFFIX = ".safetensors"

_LARGEST_CONFIG_BYTES = 1 << 20
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
class SourceCheckpoint(Listing):
    """A safetensors checkpoint that was opened: its files, and the parsed config.json."""

    config: Mapping[str, Any]


def open_safetensors(source: Source) -> SourceCheckpoint:
    """Headers and config.json; ProblemsError tells everything that is wrong with both, at once."""
    problems: list[Problem] = []
    listing, config = None, None
    try:
        listing = list_checkpoint(source)
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


def list_checkpoint(source: Source) -> Listing:
    """All headers of a checkpoint; ProblemsError tells everything that is wrong, at once."""
    sizes = source.files()
    problems: list[Problem] = []
    index, weight_map = _read_index(source, sizes)
    stored = [file for file in sizes if file.endswith(SUFFIX)]
    listed_in = "named by the index" if index is not None else f"part of it, {SINGLE_FILE} is all"
    if index is not None:
        named = sorted(set(weight_map.values()))
    else:  # shards need no index: their headers say the same
        named = [SINGLE_FILE] if SINGLE_FILE in stored else stored
    problems += bounded(_file_problems(stored, named, listed_in), INDEX_FILE)
    headers = _read_headers(source, [file for file in named if file in stored], problems)
    tensors = _merge(headers.values(), problems)
    if index is not None:
        problems += bounded(_index_problems(weight_map, tensors, headers), INDEX_FILE)
    raise_if_any(source.name, problems)
    side_files = tuple(file for file in sizes if file not in stored and file != INDEX_FILE)
    return Listing(
        source=source, headers=headers, tensors=tensors, side_files=side_files, index=index
    )


def read_config(source: Source) -> dict[str, Any]:
    """The parsed config.json of a source; ProblemsError when there is none or it is no object."""
    size = source.files().get(CONFIG_FILE)
    fault, config = None, None
    if size is None:
        fault = "is missing; every size of the network comes from it"
    elif size > _LARGEST_CONFIG_BYTES:
        fault = f"is {size} bytes, more than {_LARGEST_CONFIG_BYTES}"
    else:
        try:
            config = parse(source.read(CONFIG_FILE, 0, size))
        except JsonError as err:
            fault = str(err)
    if not fault and not isinstance(config, dict):
        fault = f"is {shown(config)}, needed an object"
    if fault:
        raise ProblemsError(source.name, [Problem("config", CONFIG_FILE, fault)])
    assert isinstance(config, dict)
    return config


def _read_index(source: Source, sizes: dict[str, int]) -> tuple[bytes | None, dict[str, str]]:
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


def _file_problems(stored: list[str], named: list[str], listed_in: str) -> Iterator[Problem]:
    for file in named:
        if file not in stored:
            absent = f"is named by the index, and there is no such {SUFFIX} file"
            yield Problem("index", shown(file), name_fault(file) or absent)
    for file in stored:
        if file not in named:
            move = "move it out of the folder if it is no part of the checkpoint"
            yield Problem("index", shown(file), f"is in the folder and not {listed_in}; {move}")


def _read_headers(source: Source, files: list[str], problems: list[Problem]) -> dict[str, Header]:
    def read(file: str) -> Header | ProblemsError:
        try:
            return read_header(source, file)
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
    weight_map: dict[str, str], tensors: dict[str, TensorInfo], headers: dict[str, Header]
) -> Iterator[Problem]:
    for name, file in weight_map.items():
        if name not in tensors and file in headers:
            yield Problem("missing", shown(name), f"in {shown(file)}, where the index puts it")
        elif name in tensors and tensors[name].file != file:
            places = f"is in {shown(tensors[name].file)}, the index says {shown(file)}"
            yield Problem("index", shown(name), places)
    for name, tensor in tensors.items():
        if name not in weight_map:
            yield Problem("index", shown(name), f"of {shown(tensor.file)} is not in the index")

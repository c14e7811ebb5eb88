"""Throw malformed headers, indices and configs at the readers; must not know how they read.

`python -m tools.fuzz_inputs --seconds 600` runs for as long as one likes what the test suite runs
for seconds. An input is either read, and then what was read is consistent, or refused by one
report that can be printed. Whatever is accepted, the reference library of safetensors accepts too.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from converters.format.header import DTYPES, read_header
from converters.format.listing import INDEX_FILE, list_checkpoint
from converters.sources.open import open_source
from mtp_model.config import ConfigError, ModelConfig
from mtp_model.files.untrusted_json import JsonError, parse
from mtp_model.problems import ProblemsError
from tools.make_tiny_checkpoint import TINY_CONFIG

FILES = ("a.safetensors", "b.safetensors")
OUTSIDE = ("../x.safetensors", "/x.safetensors", "x/../../x.safetensors", "\0", "", ".")
MAX_REPORT_CHARACTERS = 20_000

Entries = dict[str, Any]

MOSTLY = st.sampled_from([True, True, True, False])
SIZES = st.sampled_from([-1, 0, 1, 2, 3, 7, 2**31, 2**32, 2**62, 2**63, 2**64, 10**40])
SCALARS = st.none() | st.booleans() | SIZES | st.floats() | st.text(max_size=4)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
NAMES = st.sampled_from(["t", "u", "__metadata__", "", "\x1b[2J", "\ud800", "ä" * 300])
INSERTED = [b"", b"[" * 100_000, b'{"":' * 100_000, b"9" * 5000, b"1e999", b"NaN"]


@st.composite
def sound_entries(draw: st.DrawFn, names: str) -> tuple[Entries, int]:
    """A well-formed header of a few tensors, in any order, and the bytes of their data."""
    entries, end = {}, 0
    for name in draw(st.lists(st.sampled_from(names), unique=True)):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return dict(draw(st.permutations(list(entries.items())))), end


@st.composite
def spoilt(draw: st.DrawFn, value: Any) -> Any:
    """The JSON value with one of its parts, found at random, replaced, left out or added."""
    if isinstance(value, dict) and value and draw(MOSTLY):
        key = draw(st.sampled_from(list(value)))
        return {**value, key: draw(spoilt(value[key]))}
    if isinstance(value, list) and value and draw(MOSTLY):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(spoilt(value[place])), *value[place + 1 :]]
    if isinstance(value, dict) and value and draw(st.booleans()):
        return without(value, draw(st.sampled_from(list(value))))
    if isinstance(value, dict) and draw(MOSTLY):
        return {**value, draw(NAMES): draw(JUNK)}
    return draw(JUNK)


@st.composite
def spoilt_entry(draw: st.DrawFn, entries: Entries) -> Entries:
    """One tensor renamed, moved, of another shape, or spoilt in any other way."""
    if not entries:
        return draw(spoilt(entries))
    name = draw(st.sampled_from(list(entries)))
    entry = entries[name]
    match draw(st.sampled_from(["name", "offsets", "shape", "any"])):
        case "name":
            return {**without(entries, name), draw(NAMES): entry}
        case "offsets":
            moved = draw(st.integers(-3, 3))
            entry = {**entry, "data_offsets": [at + moved for at in entry["data_offsets"]]}
        case "shape":
            entry = {**entry, "shape": draw(st.lists(st.integers(0, 3) | SIZES, max_size=3))}
        case "any":
            entry = draw(spoilt(entry))
    return {**entries, name: entry}


@st.composite
def spoilt_text(draw: st.DrawFn, raw: bytes) -> bytes:
    """JSON text with some bytes replaced, repeated, left out or nested deeply."""
    begin = draw(st.integers(0, len(raw)))
    end = draw(st.integers(begin, min(len(raw), begin + 90)))
    inserted = st.sampled_from([*INSERTED, raw[begin:end] * 2]) | st.binary(max_size=3)
    return raw[:begin] + draw(inserted) + (raw[end:] if draw(MOSTLY) else b"")


@st.composite
def safetensors_files(draw: st.DrawFn, names: str = "abc") -> tuple[bytes, bool]:
    """The bytes of a file, and whether it is sound: otherwise one thing about it is spoilt."""
    entries, nbytes = draw(sound_entries(names))
    fault = draw(st.sampled_from(["", "entry", "twice", "text", "length", "size", "cut"]))
    if fault == "entry":
        entries = draw(spoilt_entry(entries))
    raw = json.dumps(entries).encode()
    if fault == "twice":
        raw = b"{" + raw[1:-1] + b"," + raw[1:]
    elif fault == "text":
        raw = draw(spoilt_text(raw))
    raw += b" " * draw(st.integers(0, 9))
    data = file_bytes(raw, nbytes)
    if fault == "length":
        data = draw(st.integers(0, 200) | st.integers(0, 2**64 - 1)).to_bytes(8, "little") + raw
    elif fault == "size":
        data = file_bytes(raw, max(0, nbytes + draw(st.sampled_from([-1, 1, 2**20]))))
    elif fault == "cut":
        data = data[: draw(st.integers(0, len(data)))]
    return data, not fault


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[dict[str, bytes], bool]:
    """Two files and their index, by file name, and whether they are sound: else one is spoilt."""
    found = [draw(sound_entries(names)) for names in ("abc", "def")]
    index: Any = {
        "weight_map": {name: f for f, each in zip(FILES, found, strict=True) for name in each[0]}
    }
    files = {
        f: file_bytes(json.dumps(e).encode(), n) for f, (e, n) in zip(FILES, found, strict=True)
    }
    fault = draw(st.sampled_from(["", "name", "index", "text", "file", "other file"]))
    if fault == "name":
        name = draw(st.sampled_from("abcdef"))
        index["weight_map"][name] = draw(st.sampled_from([*OUTSIDE, *FILES]))
    elif fault == "index":
        index = draw(spoilt(index))
    elif fault == "file":
        files[FILES[0]], _ = draw(safetensors_files())
    elif fault == "other file":
        files[FILES[0]] = file_bytes(*draw(sound_entries("abd").map(as_text)))
    raw = json.dumps(index).encode()
    files[INDEX_FILE] = draw(spoilt_text(raw)) if fault == "text" else raw
    return files, not fault and all(each[0] for each in found)


@st.composite
def spoilt_configs(draw: st.DrawFn) -> bytes:
    """A config.json with some of its values replaced, left out or added, as text."""
    values: Any = TINY_CONFIG
    for _ in range(draw(st.integers(0, 3))):
        values = draw(spoilt(values))
    raw = json.dumps(values).encode()
    return raw if draw(MOSTLY) else draw(spoilt_text(raw))


def file_bytes(raw: bytes, nbytes: int) -> bytes:
    return len(raw).to_bytes(8, "little") + raw + bytes(nbytes)


def as_text(found: tuple[Entries, int]) -> tuple[bytes, int]:
    return json.dumps(found[0]).encode(), found[1]


def without(members: dict[str, Any], left_out: str) -> dict[str, Any]:
    return {key: value for key, value in members.items() if key != left_out}


def check_header(folder: Path, data: bytes, sound: bool) -> None:
    (folder / FILES[0]).write_bytes(data)
    source = open_source(str(folder))
    try:
        header = read_header(source, FILES[0])
    except ProblemsError as err:
        check_refusal(err, sound)
        return
    end = 8 + len(header.raw)
    for tensor in header.tensors:
        assert tensor.begin == end, tensor
        assert tensor.nbytes == math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize, tensor
        assert len(source.read(tensor.file, tensor.begin, tensor.nbytes)) == tensor.nbytes
        end += tensor.nbytes
    assert end == header.size == len(data)
    pairs = json.loads(header.raw, object_pairs_hook=list)
    assert sum(name != "__metadata__" for name, _ in pairs) == len(header.tensors)
    reference = {name: tuple(tensor["shape"]) for name, tensor in safetensors.deserialize(data)}
    assert reference == {tensor.name: tensor.shape for tensor in header.tensors}


def check_index(folder: Path, files: dict[str, bytes], sound: bool) -> None:
    for file, data in files.items():
        (folder / file).write_bytes(data)
    try:
        found = list_checkpoint(open_source(str(folder)))
    except ProblemsError as err:
        check_refusal(err, sound)
        return
    index = json.loads(files[INDEX_FILE])
    assert {name: tensor.file for name, tensor in found.tensors.items()} == index["weight_map"]
    assert found.headers.keys() == set(FILES)
    assert sum(len(header.tensors) for header in found.headers.values()) == len(found.tensors)


def check_config(raw: bytes) -> None:
    try:
        values = parse(raw)
        config = ModelConfig.from_dict(values if isinstance(values, dict) else {})
    except (JsonError, ConfigError) as err:
        check_refusal(err, sound=False)
        return
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert repr(again) == repr(config)  # and not ==: True == 1


def check_refusal(error: ValueError, sound: bool) -> None:
    """Only unsound input is refused; the report can be printed and does not drown what it says."""
    assert not sound, error
    text = str(error)
    text.encode()
    assert len(text) < MAX_REPORT_CHARACTERS, len(text)
    assert all(line.isprintable() for line in text.splitlines()), text


def run(name: str, examples: int, seed_number: int) -> None:
    """One round of the named check, the same for the same seed; raises what it finds."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "checkpoint")
        folder.mkdir()
        Path(temporary, "x.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
        properties: dict[str, tuple[st.SearchStrategy, Callable[[Any], None]]] = {
            "header": (safetensors_files(), lambda made: check_header(folder, *made)),
            "index": (checkpoints(), lambda made: check_index(folder, *made)),
            "config": (spoilt_configs(), check_config),
        }
        strategy, check = properties[name]
        bounded = settings(max_examples=examples, deadline=None, database=None)
        bounded(seed(seed_number)(given(strategy)(check)))()


def rounds(seconds: float) -> Iterator[int]:
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz what reads headers, indices and configs.")
    parser.add_argument("--seconds", type=float, default=60, help="how long; 60 by default")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    args = parser.parse_args()
    count = 0
    for count in rounds(args.seconds):
        for name in ("header", "index", "config"):
            run(name, 500, args.seed + count)
        print(
            f"\rround {count + 1}: 1500 inputs, seed {args.seed + count}", end="", file=sys.stderr
        )
    print(f"\n{(count + 1) * 1500} inputs read or refused as they should be", file=sys.stderr)


if __name__ == "__main__":
    main()

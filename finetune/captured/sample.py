"""A captured sample as a file: tokens of one document, and what the main model made of them.

It is a safetensors file as vLLM's hidden-state connectors write it, and says more than theirs:

    token_ids      [T]     int64
    hidden_states  [T, D]  or [T, layers, D], of which the last is read
    loss_mask      [T]     uint8; without it all tokens are learnt
    hidden_states_scale [T]  float32, with FP8 hidden_states: what each token is multiplied by

Metadata `state` is pre_norm or post_norm: whether `model.norm` is still to be applied. Files that
do not say are vLLM's, pre_norm. `main_model` and `xxh3_128` tell foreign and damaged files apart.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import xxhash

from finetune.data.files.kinds import FileError
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.files.open import as_place
from mtp_model.files.place import Place, digest
from mtp_model.files.untrusted_json import Each, JsonError, faults, is_text_map, parse, shown

StateName = Literal["pre_norm", "post_norm"]
StoredAs = Literal["bfloat16", "float32", "float8"]

_DTYPES = {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FP8 = _DTYPES["F8_E4M3"]
_FP8_LARGEST = float(ml_dtypes.finfo(_FP8).max)
_KINDS = {
    "token_ids": ("I64", "I32"),
    "hidden_states": ("BF16", "F32", "F8_E4M3"),
    "loss_mask": ("U8", "BOOL", "I32", "I64"),
    "hidden_states_scale": ("F32",),
}
_HEADER_BYTES = 1 << 20  # at most: a header of four tensors takes some hundred
_BEGUN_BYTES = 8 << 10  # has most headers: asked for at once
_PIECE_BYTES = 8 << 20
_SHAPE = {"dtype": str, "shape": [int], "data_offsets": [int]}


class _Stored(NamedTuple):
    """A tensor of a file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # byte in the file


@dataclass(frozen=True, kw_only=True)
class CapturedSample:
    """A sample on the disk, whose header was read."""

    path: Place
    tensors: Mapping[str, _Stored]
    state: StateName
    main_model: str | None  # `main_model_digest`; None: nobody said
    digest: str | None  # xxh3_128 of what follows the header
    data_begin: int
    header: bytes
    content: bytes | None = None  # all of the file, where that is held
    source: int = 0  # which of the folders that were given it is from

    @property
    def num_tokens(self) -> int:
        return self.tensors["token_ids"].shape[0]

    @property
    def stored(self) -> str:
        """The precision that its states are kept in, as `capture --stored` names it."""
        dtype = self.tensors["hidden_states"].dtype
        return "float8" if dtype == _FP8 else dtype.name

    @property
    def hidden_size(self) -> int:
        return self.tensors["hidden_states"].shape[-1]

    def held(self) -> "CapturedSample":
        """With all of its bytes in memory, for one in a bucket, where each read is a request."""
        return replace(self, content=b"".join(self.path.pieces()))

    def token_ids(self) -> np.ndarray:
        """[T], int64."""
        return self._rows("token_ids", 0, self.num_tokens).astype(np.int64)

    def loss_mask(self) -> np.ndarray:
        """[T], int32: 1 where a token is learnt."""
        if "loss_mask" not in self.tensors:
            return np.ones(self.num_tokens, np.int32)
        return (self._rows("loss_mask", 0, self.num_tokens) != 0).astype(np.int32)

    def states(self, begin: int, end: int) -> np.ndarray:
        """Hidden states of some tokens, [end - begin, D] float32 or bfloat16."""
        rows = self._rows("hidden_states", begin, end)
        rows = rows[:, -1] if rows.ndim == 3 else rows
        if rows.dtype != _FP8:
            return rows
        return rows.astype(np.float32) * self._rows("hidden_states_scale", begin, end)[:, None]

    def fault(self) -> str | None:
        """What is wrong with the bytes, None for nothing. Reads the whole file."""
        try:
            if self.digest is not None:
                found = self._digest()
                return None if found == self.digest else f"is damaged: its bytes give {found}"
            step = max(1, _PIECE_BYTES // (4 * self.hidden_size))
            for begin in range(0, self.num_tokens, step):
                rows = self.states(begin, min(begin + step, self.num_tokens))
                if not np.isfinite(rows.astype(np.float32)).all():
                    return "is damaged: NaN or infinity in hidden_states"
        except (OSError, FileError) as error:
            return f"cannot be read: {error}"
        return None

    def _digest(self) -> str:
        state, begin = xxhash.xxh3_128(), self.data_begin
        while piece := self._read(begin, _PIECE_BYTES):
            state.update(piece)
            begin += len(piece)
        return state.hexdigest()

    def _rows(self, name: str, begin: int, end: int) -> np.ndarray:
        stored = self.tensors[name]
        row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        raw = self._read(stored.begin + begin * row_bytes, (end - begin) * row_bytes)
        if len(raw) != (end - begin) * row_bytes:
            raise FileError("ends before its last token")
        return np.frombuffer(raw, stored.dtype).reshape(end - begin, *stored.shape[1:])

    def _read(self, begin: int, nbytes: int) -> bytes:
        if self.content is not None:
            return self.content[begin : begin + nbytes]
        return _read(self.path, begin, nbytes)


def _read(place: Place, begin: int, nbytes: int) -> bytes:
    """Bytes of a file, fewer where it ends before; of an object CloudError then."""
    if place.is_far:
        out = np.empty(nbytes, np.uint8)
        place.read_range_into(begin, out)
        return out.tobytes()
    with Path(str(place)).open("rb") as file:
        file.seek(begin)
        return file.read(nbytes)


def open_sample(path: Path | Place, nbytes: int | None = None, source: int = 0) -> CapturedSample:
    """A file's header, checked against the file's size. Raises FileError or OSError.

    nbytes: the size, where it is known. source: which of the folders that were given it is from.
    """
    place = as_place(path)
    nbytes = place.size() if nbytes is None else nbytes
    begun = _read(place, 0, min(_BEGUN_BYTES, nbytes))
    length = int.from_bytes(begun[:8], "little")
    if not 2 <= length <= min(_HEADER_BYTES, nbytes - 8):
        raise FileError("is no safetensors file, or was cut short")
    raw = begun[8 : 8 + length]
    raw += _read(place, 8 + len(raw), length - len(raw)) if len(raw) < length else b""
    try:
        header = parse(raw)
    except JsonError as error:
        raise FileError(f"has a header that {error}") from error
    said: Any = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
    wrong = list(faults(header, Each(_SHAPE)))
    if wrong or not is_text_map(said):
        raise FileError(f"has a header that is none: {(*wrong, 'metadata is no text')[0]}")
    described: Any = header
    tensors = {
        name: _stored(name, entry, 8 + length, nbytes)
        for name, entry in described.items()
        if name in _KINDS
    }
    _raise_unless_a_sample(tensors, described)
    state = said.get("state", "pre_norm")
    if state not in ("pre_norm", "post_norm"):
        raise FileError(f"has the state {shown(state)}, needed pre_norm or post_norm")
    return CapturedSample(
        path=place,
        tensors=tensors,
        state=state,
        main_model=said.get("main_model"),
        digest=said.get("xxh3_128"),
        data_begin=8 + length,
        header=raw,
        source=source,
    )


def _stored(name: str, entry: Mapping[str, Any], data_begin: int, nbytes: int) -> _Stored:
    if entry["dtype"] not in _KINDS[name]:
        needed = " or ".join(_KINDS[name])
        raise FileError(f"has {name} in {shown(entry['dtype'])}, needed {needed}")
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = (*entry["data_offsets"], 0, 0)[:2]
    if min(shape, default=0) < 1 or begin < 0:
        raise FileError(f"has {name} of shape {list(shape)}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise FileError(f"has {end - begin} bytes of {name}, not those of shape {list(shape)}")
    if data_begin + end > nbytes:
        missing = data_begin + end - nbytes
        raise FileError(f"was cut short: {missing:,} bytes of {name} are missing")
    return _Stored(dtype, shape, data_begin + begin)


def _raise_unless_a_sample(tensors: Mapping[str, _Stored], described: Mapping[str, Any]) -> None:
    lacking = [name for name in ("token_ids", "hidden_states") if name not in tensors]
    if lacking:
        found = shown(", ".join(described))
        raise FileError(f"has the tensors {found}, needed {' and '.join(lacking)} too")
    states = tensors["hidden_states"]
    if states.dtype == _FP8 and "hidden_states_scale" not in tensors:
        raise FileError("has FP8 hidden_states, needed hidden_states_scale too")
    if len(states.shape) not in (2, 3):
        raise FileError(f"has hidden_states of shape {list(states.shape)}, needed [T, D]")
    count = tensors["token_ids"].shape[0]
    for name, stored in tensors.items():
        if stored.shape[0] != count or (name != "hidden_states" and len(stored.shape) != 1):
            raise FileError(f"has {name} of shape {list(stored.shape)} for {count} tokens")


class Content(NamedTuple):
    """What a sample is made of."""

    token_ids: np.ndarray  # [T]
    loss_mask: np.ndarray  # [T]
    states_TD: np.ndarray


def write_sample(
    path: Path | Place, content: Content, state: StateName, main_model: str, stored: StoredAs
) -> None:
    """Write a sample's file, which appears when it is whole."""
    tensors = {
        "token_ids": content.token_ids.astype(np.int64),
        "loss_mask": content.loss_mask.astype(np.uint8),
        **_as_stored(content.states_TD, stored),
    }
    raw = {name: np.ascontiguousarray(x).view(np.uint8).tobytes() for name, x in tensors.items()}
    header: dict[str, Any] = {}
    begin = 0
    for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):  # aligned
        offsets = [begin, begin + len(raw[name])]
        entry = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name] = {**entry, "data_offsets": offsets}
        begin = offsets[1]
    data = [raw[name] for name in header]
    of_data = xxhash.xxh3_128()
    for piece in data:
        of_data.update(piece)
    said = {"state": state, "main_model": main_model, "xxh3_128": of_data.hexdigest()}
    text = json.dumps({"__metadata__": said, **header}).encode()
    text += b" " * (-len(text) % 8)
    place, pieces = as_place(path), [len(text).to_bytes(8, "little"), text, *data]
    if not place.is_far:
        place.write_pieces(pieces)
        return
    out = place.appended()  # in parts, whatever the size
    for piece in pieces:
        out.append(np.frombuffer(piece, np.uint8))
    out.finish()


def _as_stored(states_TD: np.ndarray, stored: StoredAs) -> dict[str, np.ndarray]:
    if stored != "float8":
        return {"hidden_states": states_TD.astype(np.dtype(stored))}
    wide_TD = states_TD.astype(np.float32)
    scale_T = np.abs(wide_TD).max(axis=-1) / np.float32(_FP8_LARGEST)
    scale_T = np.where(scale_T > 0, scale_T, np.float32(1))
    quantised = (wide_TD / scale_T[:, None]).astype(_FP8)
    return {"hidden_states": quantised, "hidden_states_scale": scale_T}


def main_model_digest(checkpoint: Checkpoint) -> str:
    """Tells main models apart: by the final norm's weights, which every import has, and, where the
    layers are there, by what training has written of the main model (adapters move no norm)."""
    weights = checkpoint.read_rows("norm.weight", (), 0, checkpoint.config.hidden_size)
    norm = digest(weights.astype(np.float32).tobytes())
    if checkpoint.provenance["scope"] == "mtp":
        return norm
    pieces = checkpoint.provenance["pieces"]
    derived = checkpoint.provenance.get("derived", [])
    changed = {n for each in derived for n in each["changed"] if not n.startswith("mtp.")}
    written = {name: pieces[name] for name in sorted(changed & pieces.keys())}
    return f"{norm}.{digest(json.dumps(written, sort_keys=True).encode())}"


def is_same_main_model(one: str, other: str) -> bool:
    """Of two digests, as far as both of them say. Earlier captures have the norm's alone."""
    both = list(zip(one.split("."), other.split("."), strict=False))
    return all(a == b for a, b in both)

"""A checkpoint directory as a source: the safetensors files that its export would write.

`--mtp-from` takes the MTP module from it, trained or not. Nothing is written: tensors are encoded
when they are read.
"""

import json
from collections.abc import Collection, Iterator

import numpy as np

from converters.exporting.encode import Encoder
from converters.exporting.plan import make_plan
from converters.format.header import TensorInfo, start_of_file
from converters.format.joined import overlapping
from converters.format.listing import CONFIG_FILE, INDEX_FILE
from converters.sources.source import Buffer, Fingerprint, Source, byte_view, range_fault
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.files.place import Place
from mtp_model.files.untrusted_json import shown
from mtp_model.model import Scope
from mtp_model.problems import Problem, ProblemsError, raise_if_any


class DirectorySource(Source):
    """The files that an export of a checkpoint directory with `--dtype keep` would write.

    config.json says what the directory knows of `mtp_hidden_state`. Of a directory that holds the
    MTP modules alone, other tensors cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint):
        """Raises ProblemsError where a chunk file of its MTP modules is damaged."""
        self.name = str(checkpoint.path)
        self._checkpoint = checkpoint
        plan = make_plan(checkpoint, "keep", has_base=True)
        raise_if_any(self.name, _damaged(checkpoint))
        self._headers = {header.file: header for header in plan.files}
        self._begins = {f: [t.begin for t in h.tensors] for f, h in self._headers.items()}
        held = {name: dtype for name, dtype in plan.dtypes.items() if name in plan.slots}
        self._encoder = Encoder(checkpoint, plan.slots, held)
        config = checkpoint.config_dict
        state = checkpoint.provenance["mtp_hidden_state"]
        text = json.dumps({**config, "mtp_hidden_state": state}).encode()
        self._texts = {CONFIG_FILE: text}
        if INDEX_FILE in checkpoint.side_files():
            self._texts[INDEX_FILE] = (checkpoint.path / INDEX_FILE).read_bytes()
        self._complete = checkpoint.digest
        sizes = {file: header.size for file, header in self._headers.items()}
        sizes |= {file: len(text) for file, text in self._texts.items()}
        self._sizes = dict(sorted(sizes.items()))

    @property
    def scope(self) -> Scope:
        return self._checkpoint.provenance["scope"]

    @property
    def held(self) -> Collection[str]:
        """The tensors that can be read."""
        return self._encoder.slots.keys()

    @property
    def folder(self) -> Place:
        return self._checkpoint.path

    def files(self) -> dict[str, int]:
        return dict(self._sizes)

    def read(self, file: str, begin: int, nbytes: int) -> bytes:
        self._check_range(file, begin, nbytes)  # before memory is taken for it
        out = np.empty(nbytes, np.uint8)
        self.read_into(file, begin, out)
        return out.tobytes()

    def read_into(self, file: str, begin: int, out: Buffer) -> None:
        view = byte_view(out)
        self._check_range(file, begin, len(view))
        known = self._start(file)[begin : begin + len(view)]
        view[: len(known)] = np.frombuffer(known, np.uint8)
        begins, size = self._begins.get(file, ()), self._sizes[file]
        for number, low, high in overlapping(begins, size, begin, begin + len(view)):
            tensor = self._headers[file].tensors[number]
            self._read_tensor(tensor, low - tensor.begin, view[low - begin : high - begin])

    def fingerprint(self, file: str) -> Fingerprint:
        self._check_range(file, 0, 0)
        return {"size": self._sizes[file], "complete": self._complete}

    def _start(self, file: str) -> bytes:
        """The bytes of a file that are no tensor's."""
        if file in self._texts:
            return self._texts[file]
        return start_of_file(self._headers[file].raw)

    def _read_tensor(self, tensor: TensorInfo, begin: int, out: np.ndarray) -> None:
        """Fill `out` with bytes of a tensor; whole rows of blocks around them are encoded."""
        if tensor.name not in self._encoder.slots:
            raise self._error(tensor.name, "is not in the checkpoint directory")
        row_bytes, end = self._encoder.row_bytes(tensor.name), begin + len(out)
        for rows in self._encoder.spans(tensor.name, max(len(out), row_bytes)):
            first = rows.start * row_bytes
            low, high = max(first, begin), min(first + len(rows) * row_bytes, end)
            if low < high:
                encoded = np.empty(len(rows) * row_bytes, np.uint8)
                self._encoder.encode(tensor.name, rows, encoded)
                out[low - begin : high - begin] = encoded[low - first : high - first]

    def _check_range(self, file: str, begin: int, nbytes: int) -> None:
        absent = f"is not there, needed bytes {begin} to {begin + nbytes}"
        size = self._sizes.get(file)
        if fault := absent if size is None else range_fault(size, begin, nbytes):
            raise self._error(file, fault)

    def _error(self, subject: str, fault: str) -> ProblemsError:
        return ProblemsError(self.name, [Problem("file", shown(subject), fault)])


def _damaged(checkpoint: Checkpoint) -> Iterator[Problem]:
    for piece in checkpoint.pieces():
        if piece.path.startswith("mtp.") and piece.file.digest() != piece.digest:
            detail = "has other bytes than were written"
            advice = "copy it again, or import it again with --overwrite"
            yield Problem("damaged", f"{piece.path}/{piece.coord}", f"{detail}; {advice}")

"""The most frequent tokens of a text: what a smaller draft head gives, and SGLang's file of them.

A file of its own: it counts and writes, and measures nothing. The head takes most of a draft's
time, and drafts are frequent tokens mostly (FR-Spec, arXiv 2502.14856).
"""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.data.packing import Documents

# Of pickle's second protocol, what a list of integers needs; written out, since nothing here
# unpickles.
_BEGIN_LIST, _INTEGER, _END_LIST = b"\x80\x02](", b"J", b"e."


class DraftVocab(NamedTuple):
    """Tokens, the most frequent first, of those that are learnt. coverage: their share of these."""

    tokens: tuple[int, ...]
    coverage: float


def most_frequent(documents: Documents, vocab_size: int, count: int) -> DraftVocab:
    """The `count` most frequent tokens; of equals, and of those that never occur, the first ids."""
    found_V = np.zeros(vocab_size, np.int64)
    for ids in _learnt(documents):
        found_V += np.bincount(ids, minlength=vocab_size)
    kept = np.argsort(-found_V, kind="stable")[:count]
    total = int(found_V.sum())
    coverage = float(found_V[kept].sum() / total) if total else 0.0
    return DraftVocab(tuple(kept.tolist()), coverage)


def _learnt(documents: Documents) -> Iterator[np.ndarray]:
    """The tokens that count, a stretch of a document at a time."""
    for document in range(len(documents)):
        tokens = documents[document]
        yield tokens.ids[tokens.loss_mask != 0]
        while tokens.following is not None:
            tokens = documents.stretch(document, tokens.following)
            yield tokens.ids[tokens.loss_mask != 0]


def write_token_map(file: Path, tokens: Sequence[int]) -> None:
    """A list of token ids as `torch.save` writes it, which SGLang reads as its token map.

    FileExistsError where the file is there already.
    """
    numbers = (_INTEGER + token.to_bytes(4, "little", signed=True) for token in tokens)
    content = b"".join((_BEGIN_LIST, *numbers, _END_LIST))
    parts = {"data.pkl": content, "byteorder": b"little", "version": b"3\n"}
    with file.open("xb") as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, part in parts.items():
            archive.writestr(f"{file.stem}/{name}", part)

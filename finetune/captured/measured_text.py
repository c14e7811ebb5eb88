"""What `evaluate` measures, apart from how: text, or what was captured of it, and whose it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.captured.documents import (
    SampleDocuments,
    Say,
    digest_of_samples,
    open_samples,
    overlap,
)
from finetune.captured.sample import CapturedSample
from finetune.data.corpus import Corpus, DataFile
from finetune.data.files.kinds import is_on_hub
from finetune.data.packing import Documents
from finetune.data.run_text import open_documents, whole_name
from finetune.data.tokens import TokenDocuments
from finetune.settings import SettingsError
from mtp_model import ModelConfig
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.files.open import as_place, written
from mtp_model.files.place import Place


class MeasuredText(NamedTuple):
    """Documents, and what is said of them."""

    documents: Documents
    digest: str  # of their files
    sources: dict[str, list[int]]  # documents of each path, where there are several
    captured: tuple[str, ...] = ()  # of captured states: in which precisions they were kept


def text_of(checkpoint: str, paths: tuple[Path, ...], config: ModelConfig) -> MeasuredText:
    """All text of some paths; of files that several of them name, once."""
    found = open_documents(checkpoint, paths, config)
    corpus = _once(found.corpus)
    documents = TokenDocuments(corpus, found.encoder, config.vocab_size)
    sources = _by_source(paths, corpus) if len(paths) > 1 else {}
    return MeasuredText(documents, corpus.digest, sources)


def _once(corpus: Corpus) -> Corpus:
    """Without what is there a second time: measured twice, it would seem twice as certain."""
    firsts: dict[str, int] = {}
    is_first = [
        firsts.setdefault(whole_name(file.path), number) == number
        for number, file in enumerate(corpus.files)
    ]
    return corpus if all(is_first) else corpus.select(np.array(is_first)[corpus.file_N])


def text_of_states(
    folders: tuple[Path, ...], base: Checkpoint, dtype: str, row_tokens: int, skip: Say | None
) -> MeasuredText:
    """All captured samples below some folders, each once.

    SettingsError where one would be cut: the states of what is left saw all of it. skip: is told of
    what cannot be used, and left out; without it that is a DataError.
    """
    opened = open_samples(folders, base, dtype, skip)
    documents = SampleDocuments(_each_once(opened.samples, folders), opened.dtype, skip)
    longest = max(sample.num_tokens for sample in documents.samples)
    if longest > row_tokens:
        found = f"--row-tokens is {row_tokens}, needed {longest} or more"
        why = "a sample has so many, and the states of a part of it would be of the whole"
        raise SettingsError("settings that cannot be used", [f"{found}: {why}"])
    by_folder: dict[str, list[int]] = {written(path): [] for path in folders}
    for number, sample in enumerate(documents.samples):
        by_folder[written(folders[sample.source])].append(number)
    kept = tuple(sorted({sample.stored for sample in documents.samples}))
    digest = digest_of_samples(documents.samples)
    return MeasuredText(documents, digest, by_folder if len(folders) > 1 else {}, kept)


def _each_once(
    samples: Sequence[CapturedSample], folders: tuple[Path, ...]
) -> Sequence[CapturedSample]:
    """Without what is there a second time; of folders within each other the inner one's."""
    if not overlap(folders):
        return samples
    inner = sorted(samples, key=lambda sample: len(folders[sample.source].parts))
    kept = {whole_name(sample.path): sample for sample in inner}
    return [sample for sample in samples if kept[whole_name(sample.path)] is sample]


def _by_source(paths: tuple[Path, ...], corpus: Corpus) -> dict[str, list[int]]:
    """The documents of each path; of paths within each other the inner one's."""
    named = {as_place(path).absolute(): written(path) for path in paths}

    def owner(place: Place) -> Place:
        return place if place in named else owner(place.parent)

    def owner_of(file: DataFile) -> Place:
        given = paths[file.source]  # files of the Hub are elsewhere than their path says
        return as_place(given).absolute() if is_on_hub(given) else owner(file.path)

    owners = [owner_of(file) for file in corpus.files]
    by_path: dict[Place, list[int]] = {path: [] for path in named}
    for document, file in enumerate(corpus.file_N.tolist()):
        by_path[owners[file]].append(document)
    return {named[path]: numbers for path, numbers in by_path.items()}

"""The text of a run: what is trained on, what is held out, and both as documents of tokens."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import xxhash

from finetune.data.corpus import Corpus, scan
from finetune.data.files.folders import shown_path
from finetune.data.order import DataSource
from finetune.data.packing import Batch, Documents, Packer, PostNorm, PreNorm, first_rows
from finetune.data.records import DataError
from finetune.data.tokens import TextEncoder, TokenDocuments
from finetune.objective.acceptance import is_learnt
from finetune.settings import RunSettings
from mtp_model import ModelConfig
from mtp_model.files.open import as_place
from mtp_model.files.place import Place

SHOWN_FILES = 8  # of those left out
_MOST_IN_A_FILE = 1 << 40  # documents


@dataclass(frozen=True, kw_only=True)
class RunText:
    """Documents to train on and documents held out (None: no evaluation)."""

    train: Documents
    held_out: Documents | None
    digest: str  # of the files that are trained on
    description: str  # for the person who started the run
    sources: tuple[DataSource, ...] = ()  # of --data, where they have weights
    states: PreNorm | PostNorm | None = None  # captured ones, of no token


def open_run_text(settings: RunSettings, config: ModelConfig) -> RunText:
    """Scan, check and split the data of a run. Raises DataError with everything wrong with it."""
    encoder = TextEncoder(as_place(settings.checkpoint))
    train, held_out, said = _split(settings, config.vocab_size, encoder)
    train.raise_if_idle()
    sources = weighted_sources(train.source_of_each, settings.data, settings.data_weights)
    documents = (
        TokenDocuments(each, encoder, config.vocab_size) for each in (train, held_out) if each
    )
    train_documents, held_out_documents = (*documents, None)[:2]
    assert train_documents is not None
    return RunText(
        train=train_documents,
        held_out=held_out_documents,
        digest=with_counts(train.digest, sources),
        description=f"{len(train)} documents to train on, {said}{_files(train)}{mixed(sources)}"
        f"{_idle(train)}{in_both(num_shared(train, held_out) if held_out else 0)}",
        sources=sources,
    )


def raise_unless_teaching(text: RunText, settings: RunSettings, config: ModelConfig) -> None:
    """DataError where MTP modules alone learn, and no document has a target for them.

    Mostly the first batch has one; where none has, all documents are read, once.
    """
    if settings.part != "mtp":
        return
    drafts = settings.draft_tokens or config.num_nextn_predict_layers
    joined = settings.objective.or_default(settings.part).joins_depths and drafts > 1
    batch = settings.batch
    packer = Packer(
        text.train,
        rows=batch.rows,
        row_tokens=batch.row_tokens,
        seed=settings.seed,
        epochs=1,
        sources=text.sources,
    )
    if any(_has_target(packed, drafts, joined) for packed, _ in packer):
        return
    needed = f"{drafts} tokens that are learnt" if joined else "a token that is learnt"
    fewer = " or fewer --draft-tokens" if joined else ""
    raise DataError(
        [
            f"nothing to learn for the MTP modules in any of {len(text.train):,} documents: needed "
            f"{needed} behind two others; give longer documents{fewer}"
        ]
    )


def _has_target(batch: Batch, drafts: int, joined: bool) -> bool:
    """Whether MTP depths have a target, joined: all of them at one place."""
    valid_KBT = np.stack([is_learnt(batch, ahead) for ahead in range(2, drafts + 2)])
    return bool(np.any(np.all(valid_KBT, axis=0) if joined else valid_KBT))


def open_documents(
    checkpoint: str, data: tuple[Path, ...], config: ModelConfig, *, to_learn: bool = True
) -> TokenDocuments:
    """All documents under `data`, as tokens of the checkpoint's tokenizer.

    to_learn: something in them must be learnt; prompts that wait for their answers need not.
    """
    encoder = TextEncoder(as_place(checkpoint))
    corpus = scan(data, config.vocab_size, encoder.chats, encoder.eos, to_learn=to_learn)
    return TokenDocuments(corpus, encoder, config.vocab_size)


def held_out_batches(
    documents: Documents, settings: RunSettings
) -> list[tuple[Batch, list[list[int]]]]:
    """The rows of every evaluation: a fixed sample, whatever the order of training is.

    Each batch with the numbers of the documents in its rows, as `Packer.documents_of_rows`.
    """
    packer = Packer(
        documents,
        rows=settings.batch.rows,
        row_tokens=settings.batch.row_tokens,
        seed=0,
        epochs=1,
    )
    batches = first_rows(packer, settings.evaluation.rows)
    return [(batch, packer.documents_of_rows) for batch, _ in batches]


def digest_of(batches: Iterable[Batch]) -> str:
    """Which held-out text it is that is measured: xxh3-128 of all its rows."""
    state = xxhash.xxh3_128()
    for batch in batches:
        add_rows(state, batch)
    return state.hexdigest()


def add_rows(state: xxhash.xxh3_128, batch: Batch) -> None:
    """The rows of one batch, added to the digest of measured text."""
    for each in jax.tree.leaves(batch):
        state.update(np.ascontiguousarray(each).view(np.uint8).data)


def _split(
    settings: RunSettings, vocab_size: int, encoder: TextEncoder
) -> tuple[Corpus, Corpus | None, str]:
    """What to train on, what is held out, and a sentence about the latter."""
    corpus = scan(settings.data, vocab_size, encoder.chats, encoder.eos)
    if settings.eval_data:
        held_out = scan(settings.eval_data, vocab_size, encoder.chats, encoder.eos)
        return corpus, held_out, f"{len(held_out)} held out (--eval-data)"
    chosen_N, said = held_out_numbers(len(corpus), settings.evaluation.holdout_every)
    if not chosen_N.any():
        return corpus, None, said
    return corpus.select(~chosen_N), corpus.select(chosen_N), said


def held_out_numbers(count: int, holdout_every: int) -> tuple[np.ndarray, str]:
    """Which of so many documents are held out (bool), and a sentence about it."""
    every = min(holdout_every, count)
    if not every:
        return np.zeros(count, bool), "none held out: no evaluation"
    if every == 1:
        raise DataError(
            [
                "one document only, so none can be held out: give --eval-data, more documents, "
                "or --evaluation.holdout-every 0 to train without evaluation"
            ]
        )
    chosen_N = np.arange(count) % every == every - 1
    said = f"{chosen_N.sum()} held out (1 of every {every}; --eval-data names others)"
    return chosen_N, said


def weighted_sources(
    source_N: np.ndarray, paths: tuple[Path, ...], weights: tuple[float, ...]
) -> tuple[DataSource, ...]:
    """The paths with their weights, () where they have none; source_N: of which a document is."""
    if not weights:
        return ()
    sources = tuple(
        DataSource(np.flatnonzero(source_N == number), weight, shown_path(path))
        for number, (path, weight) in enumerate(zip(paths, weights, strict=True))
    )
    faults = [
        f"{source.name} has a weight, but no document that is not held out: leave it out, or give "
        "--eval-data or --evaluation.holdout-every 0"
        for source in sources
        if not len(source.documents)
    ]
    if faults:
        raise DataError(faults)
    return sources


def with_counts(digest: str, sources: tuple[DataSource, ...]) -> str:
    """Of what is trained on; with weights it counts too which path a document is from."""
    if not sources:
        return digest
    counts = [len(source.documents) for source in sources]
    return xxhash.xxh3_128(f"{digest} {counts}".encode()).hexdigest()


def mixed(sources: tuple[DataSource, ...]) -> str:
    """What share of the tokens each path gives."""
    if not sources:
        return ""
    whole = sum(source.weight for source in sources)
    shares = ", ".join(
        f"{100 * source.weight / whole:.3g} % of the tokens from {Path(source.name).name} "
        f"({len(source.documents):,} documents)"
        for source in sources
    )
    return f"; mixed: {shares}"


def _idle(corpus: Corpus) -> str:
    if not corpus.num_idle:
        return ""
    return f"; warning: {corpus.num_idle:,} documents have nothing to learn"


def in_both(found: int) -> str:
    """How much of the held-out text is learnt, where a file was given twice."""
    return f"; warning: {found:,} documents held out are trained on too" if found else ""


def num_shared(train: Corpus, held_out: Corpus) -> int:
    """How many documents held out are documents to train on, by their file and place in it."""
    files = [*train.files, *(held_out.files if held_out.files is not train.files else ())]
    numbers: dict[str, int] = {}
    for file in files:
        numbers.setdefault(whole_name(file.path), len(numbers))
    if len(numbers) == len(files):
        return 0  # sorting millions of documents takes seconds

    def places(corpus: Corpus) -> np.ndarray:
        file_F = np.array([numbers[whole_name(file.path)] for file in corpus.files], np.int64)
        return file_F[corpus.file_N] * _MOST_IN_A_FILE + corpus.number_N

    return int(np.isin(places(held_out), places(train)).sum())


def whole_name(path: Place) -> str:
    """The same for a file whatever it is called by."""
    return str(path) if path.is_far else os.path.realpath(str(path))


def _files(corpus: Corpus) -> str:
    """How many files of which kind are read, and which of a folder are not."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in corpus.kinds.items())
    said = f"; read: {kinds}{''.join(f', of {name}' for name in corpus.from_hub)}"
    if corpus.left_out:
        first = ", ".join(path.name for path in corpus.left_out[:SHOWN_FILES])
        more = len(corpus.left_out) - SHOWN_FILES
        said += f"; left out: {first}" + (f" and {more} more" if more > 0 else "")
    return said

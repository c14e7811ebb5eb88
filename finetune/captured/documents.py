"""Captured samples as the documents of a run: found, checked, held out, and read when packed."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from finetune.captured.folder import samples_below
from finetune.captured.sample import (
    CapturedSample,
    is_same_main_model,
    main_model_digest,
    open_sample,
)
from finetune.data.files.kinds import FileError
from finetune.data.packing import PostNorm, PreNorm
from finetune.data.records import DataError
from finetune.data.run_text import (
    RunText,
    held_out_numbers,
    in_both,
    mixed,
    open_run_text,
    raise_unless_teaching,
    weighted_sources,
    whole_name,
    with_counts,
)
from finetune.data.tokens import Tokens
from finetune.settings import RunSettings
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.files.open import as_place, written
from mtp_model.files.place import Place
from mtp_model.files.untrusted_json import shown
from mtp_model.progress import progress

ADVICE = (
    "; delete such samples and run the same `capture` again, or leave them out with --skip-unusable"
)
Say = Callable[[str], None]
T = TypeVar("T")
_AT_ONCE = 16
_HELD_BYTES = 512 << 20  # of samples in a bucket, and one more
_KINDS = {"pre_norm": PreNorm, "post_norm": PostNorm}


class SampleDocuments:
    """Tokens of captured samples with their hidden states, which are read when a row takes them.

    A sample's bytes are checked when it is begun. One that is damaged is an error that names it,
    or with `skip` said once and passed. Those of a bucket are fetched whole, and held for a while.
    """

    def __init__(self, samples: Sequence[CapturedSample], dtype: np.dtype, skip: Say | None):
        self.samples, self.dtype, self.skip = samples, dtype, skip
        self._faults: dict[int, str | None] = {}
        self._held: dict[int, CapturedSample] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, document: int) -> Tokens:
        if fault := self._fault(document):
            if self.skip is None:
                raise DataError([f"{self.samples[document].path} {fault}{ADVICE}"])
            return Tokens(np.zeros(0, np.int32), np.zeros(0, np.int32))
        with self._readable(document):
            sample = self._sample(document)
            ids, mask = sample.token_ids().astype(np.int32), sample.loss_mask()
        return Tokens(ids, mask, states=functools.partial(self._states, document))

    def stretch(self, document: int, begin: int) -> Tokens:
        """Samples have no stretches: all their tokens are known at once."""
        raise AssertionError(f"sample {document} has nothing behind {begin}")

    @property
    def form(self) -> PreNorm | PostNorm:
        """States of no token: of which kind, size and dtype all are."""
        sample = self.samples[0]
        return _KINDS[sample.state](np.zeros((0, sample.hidden_size), self.dtype))

    def _states(self, document: int, begin: int, end: int) -> PreNorm | PostNorm:
        with self._readable(document):
            rows = self._sample(document).states(begin, end)
        return _KINDS[self.samples[document].state](rows.astype(self.dtype))

    @contextlib.contextmanager
    def _readable(self, document: int) -> Iterator[None]:
        try:
            yield
        except (OSError, FileError) as error:
            raise DataError([f"{self.samples[document].path} cannot be read: {error}"]) from error

    def _sample(self, document: int) -> CapturedSample:
        """A sample to read from; of those in a bucket the last ones are held."""
        sample = self.samples[document]
        if not sample.path.is_far:
            return sample
        if document not in self._held:
            while sum(len(each.content or b"") for each in self._held.values()) > _HELD_BYTES:
                self._held.pop(next(iter(self._held)))
            self._held[document] = sample.held()
        return self._held[document]

    def _fault(self, document: int) -> str | None:
        if document not in self._faults:
            try:
                fault = self._sample(document).fault()
            except OSError as error:
                fault = f"cannot be read: {error}"
            self._faults[document] = fault
            if fault and self.skip:
                self.skip(f"{self.samples[document].path} {fault}: left out")
        return self._faults[document]


def open_text(settings: RunSettings, base: Checkpoint, dtype: str, say: Say) -> RunText:
    """What a run learns from: text, or what was captured of it."""
    if settings.states:
        text = open_states(settings, base, dtype, say)
    else:
        text = open_run_text(settings, base.config)
    raise_unless_teaching(text, settings, base.config)
    return text


def open_states(settings: RunSettings, base: Checkpoint, dtype: str, say: Say) -> RunText:
    """Find, check and split the samples of a run. DataError has everything wrong with them.

    dtype: in which states come to the devices. say: is told what is left out, where that was asked.
    """
    skip = say if settings.skip_unusable else None
    train = scan_samples(settings.states, base, skip)
    if settings.eval_data:
        held_out = scan_samples(settings.eval_data, base, skip)
        said = f"{len(held_out)} held out (--eval-data)"
    else:
        chosen_N, said = held_out_numbers(len(train), settings.evaluation.holdout_every)
        held_out = [sample for sample, out in zip(train, chosen_N, strict=True) if out]
        train = [sample for sample, out in zip(train, chosen_N, strict=True) if not out]
    _raise_unless_of_one_kind([*train, *held_out])
    kind = np.dtype(dtype)
    tokens = sum(sample.num_tokens for sample in train)
    source_N = np.array([sample.source for sample in train])
    sources = weighted_sources(source_N, settings.states, settings.data_weights)
    documents = SampleDocuments(train, kind, skip)
    return RunText(
        train=documents,
        held_out=SampleDocuments(held_out, kind, skip) if held_out else None,
        digest=with_counts(digest_of_samples(train), sources),
        description=f"{len(train)} captured samples of {tokens:,} tokens to train on, {said}"
        f"{mixed(sources)}{_cut([*train, *held_out], settings.batch.row_tokens)}"
        f"{in_both(_num_shared(settings, train, held_out))}",
        sources=sources,
        states=documents.form,
    )


def _cut(samples: Iterable[CapturedSample], row_tokens: int) -> str:
    """How many samples no row holds: of a run beside the main model parts would be documents."""
    number = sum(sample.num_tokens > row_tokens for sample in samples)
    what = f"{number:,} samples are longer than a row and cut: states of a part are of the whole"
    return f"; warning: {what}" if number else ""


def _num_shared(
    settings: RunSettings, train: Iterable[CapturedSample], held_out: Iterable[CapturedSample]
) -> int:
    """How many samples held out are trained on too, where a folder was given twice."""
    if not overlap((*settings.states, *settings.eval_data)):
        return 0
    names = {whole_name(sample.path) for sample in train}
    return sum(whole_name(sample.path) in names for sample in held_out)


def overlap(folders: Iterable[Path]) -> bool:
    """Whether a sample may be in several of them.

    Only then are names looked up, which takes minutes for millions.
    """
    pairs = itertools.combinations(map(as_place, folders), 2)
    return any(one.overlaps(other) for one, other in pairs)


def open_samples(
    folders: Iterable[Path], base: Checkpoint, dtype: str, skip: Say | None
) -> SampleDocuments:
    """All samples below folders, to be measured; DataError has everything wrong with them."""
    samples = scan_samples(folders, base, skip)
    _raise_unless_of_one_kind(samples)
    return SampleDocuments(samples, np.dtype(dtype), skip)


def _raise_unless_of_one_kind(samples: Iterable[CapturedSample]) -> None:
    if len({sample.state for sample in samples}) > 1:
        raise DataError(["pre_norm and post_norm samples together: give one kind of them"])


def scan_samples(
    folders: Iterable[Path], base: Checkpoint, skip: Say | None
) -> list[CapturedSample]:
    """All samples below folders, with headers and tokens checked for a checkpoint.

    skip: is told of those that cannot be used; without it they are a DataError.
    """
    model, found, faults = main_model_digest(base), [], []

    def scanned(source: int, path: Place, nbytes: int) -> CapturedSample | str:
        try:
            sample = open_sample(path, nbytes, source)
            _raise_if_foreign(sample, base, model)
        except (FileError, OSError) as error:
            return f"{path} {error}"
        return sample

    with progress("scan samples", "samples") as report:
        for source, folder in enumerate(folders):
            below, lacking = samples_below(folder)
            for each in itertools.chain(lacking, _in_order(scanned, ((source, *b) for b in below))):
                (faults if isinstance(each, str) else found).append(each)
                report(len(found) + len(faults), None)
    if faults and skip is None:
        raise DataError([*faults, f"{len(found)} samples can be used{ADVICE}"])
    for fault in faults:
        assert skip is not None
        skip(f"{fault}: left out")
    if not found:
        raise DataError([f"no sample (*.safetensors) in {', '.join(map(written, folders))}"])
    return found


def _in_order(act: Callable[..., T], items: Iterable[tuple]) -> Iterator[T]:
    """The results of `act` for all items: many at once, since in a bucket each is a request."""
    waiting = iter(items)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while some := list(itertools.islice(waiting, 8 * _AT_ONCE)):
            yield from pool.map(lambda item: act(*item), some)


def _raise_if_foreign(sample: CapturedSample, base: Checkpoint, model: str) -> None:
    """FileError for a sample that is of another model, or no use to this one."""
    config = base.config
    if sample.hidden_size != config.hidden_size:
        needed = f"the model's are {config.hidden_size} wide"
        raise FileError(f"has states {sample.hidden_size} wide, {needed}: of another model")
    if sample.main_model and not is_same_main_model(sample.main_model, model):
        found = f"{shown(sample.main_model)}, this one is {model}"
        raise FileError(f"was captured from another main model ({found})")
    if sample.state == "post_norm" and config.mtp_hidden_state == "pre_norm":
        raise FileError("has post_norm states, but this model's MTP modules are fed pre_norm ones")
    ids = sample.token_ids()
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        raise FileError(f"has token {bad}, the model's vocabulary is 0 to {config.vocab_size - 1}")


def digest_of_samples(samples: Iterable[CapturedSample]) -> str:
    """Which samples they are: of headers, which have the digests of what `capture` wrote, tokens
    and loss masks."""
    state = xxhash.xxh3_128()
    for parts in _in_order(_identifying, ((sample,) for sample in samples)):
        for part in parts:
            state.update(part)
    return state.hexdigest()


def _identifying(sample: CapturedSample) -> tuple[bytes, ...]:
    return sample.header, sample.token_ids().tobytes(), sample.loss_mask().tobytes()

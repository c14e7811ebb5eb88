"""Captured samples as the documents of a run: found, checked, held out, and read when packed."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from finetune.captured.sample import (
    CapturedSample,
    main_model_digest,
    open_sample,
    samples_below,
)
from finetune.data.files.kinds import FileError
from finetune.data.packing import PostNorm, PreNorm
from finetune.data.records import DataError
from finetune.data.run_text import RunText, held_out_numbers, open_run_text
from finetune.data.tokens import Tokens
from finetune.settings import RunSettings
from mtp_model.checkpoint.directory import Checkpoint
from mtp_model.files.untrusted_json import parse, shown
from mtp_model.problems import UserError
from mtp_model.progress import progress

PROGRESS_FILE = "capture.json"
ADVICE = "; capture it again, or leave such samples out with --skip-unusable"
Say = Callable[[str], None]
_KINDS = {"pre_norm": PreNorm, "post_norm": PostNorm}


class SampleDocuments:
    """Tokens of captured samples with their hidden states, which are read when a row takes them.

    A sample's bytes are checked when it is begun. One that is damaged is an error that names it,
    or with `skip` said once and passed.
    """

    def __init__(self, samples: Sequence[CapturedSample], dtype: np.dtype, skip: Say | None):
        self.samples, self.dtype, self.skip = samples, dtype, skip
        self._faults: dict[int, str | None] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, document: int) -> Tokens:
        sample = self.samples[document]
        if fault := self._fault(document):
            if self.skip is None:
                raise DataError([f"{sample.path} {fault}{ADVICE}"])
            return Tokens(np.zeros(0, np.int32), np.zeros(0, np.int32))
        ids = sample.token_ids().astype(np.int32)
        return Tokens(ids, sample.loss_mask(), states=lambda b, e: self._states(sample, b, e))

    def stretch(self, document: int, begin: int) -> Tokens:
        """Samples have no stretches: all their tokens are known at once."""
        raise AssertionError(f"sample {document} has nothing behind {begin}")

    @property
    def form(self) -> PreNorm | PostNorm:
        """States of no token: of which kind, size and dtype all are."""
        sample = self.samples[0]
        return _KINDS[sample.state](np.zeros((0, sample.hidden_size), self.dtype))

    def _states(self, sample: CapturedSample, begin: int, end: int) -> PreNorm | PostNorm:
        try:
            rows = sample.states(begin, end)
        except (OSError, FileError) as error:
            raise DataError([f"{sample.path} cannot be read: {error}"]) from error
        return _KINDS[sample.state](rows.astype(self.dtype))

    def _fault(self, document: int) -> str | None:
        if document not in self._faults:
            fault = self._faults[document] = self.samples[document].fault()
            if fault and self.skip:
                self.skip(f"{self.samples[document].path} {fault}: left out")
        return self._faults[document]


def open_text(settings: RunSettings, base: Checkpoint, dtype: str, say: Say) -> RunText:
    """What a run learns from: text, or what was captured of it."""
    if settings.states:
        return open_states(settings, base, dtype, say)
    return open_run_text(settings, base.config)


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
    if len({sample.state for sample in (*train, *held_out)}) > 1:
        raise DataError(["pre_norm and post_norm samples together: train on one kind of them"])
    kind = np.dtype(dtype)
    tokens = sum(sample.num_tokens for sample in train)
    documents = SampleDocuments(train, kind, skip)
    return RunText(
        train=documents,
        held_out=SampleDocuments(held_out, kind, skip) if held_out else None,
        digest=_digest(train),
        description=f"{len(train)} captured samples of {tokens:,} tokens to train on, {said}",
        states=documents.form,
    )


def scan_samples(
    folders: Iterable[Path], base: Checkpoint, skip: Say | None
) -> list[CapturedSample]:
    """All samples below folders, with headers and tokens checked for a checkpoint.

    skip: is told of those that cannot be used; without it they are a DataError.
    """
    model, found, faults = main_model_digest(base), [], []
    with progress("scan samples", "samples") as report:
        for folder in folders:
            _raise_unless_finished(folder)
            for path in samples_below(folder):
                try:
                    sample = open_sample(path)
                    _raise_if_foreign(sample, base, model)
                except (FileError, OSError) as error:
                    faults.append(f"{path} {error}")
                else:
                    found.append(sample)
                report(len(found) + len(faults), None)
    if faults and skip is None:
        raise DataError([*faults, f"{len(faults)} of {len(faults) + len(found)} samples{ADVICE}"])
    for fault in faults:
        assert skip is not None
        skip(f"{fault}: left out")
    if not found:
        raise DataError([f"no sample (*.safetensors) in {', '.join(map(str, folders))}"])
    return found


def _raise_unless_finished(folder: Path) -> None:
    """DataError for a capture that was interrupted."""
    if not folder.is_dir():
        raise DataError([f"{folder} is no folder of captured states"])
    file = folder / PROGRESS_FILE
    try:
        progress_of: Any = parse(file.read_bytes()) if file.is_file() else {"finished": True}
    except UserError as error:
        raise DataError([f"{file} {error}"]) from error
    if not isinstance(progress_of, dict) or not progress_of.get("finished"):
        raise DataError([f"{folder} is not finished: run the same `capture` again to go on"])


def _raise_if_foreign(sample: CapturedSample, base: Checkpoint, model: str) -> None:
    """FileError for a sample that is of another model, or no use to this one."""
    config = base.config
    if sample.hidden_size != config.hidden_size:
        needed = f"the model's are {config.hidden_size} wide"
        raise FileError(f"has states {sample.hidden_size} wide, {needed}: of another model")
    if sample.main_model not in (None, model):
        found = f"{shown(sample.main_model)}, this one's is {model}"
        raise FileError(f"was captured from another main model (final norm {found})")
    if sample.state == "post_norm" and config.mtp_hidden_state == "pre_norm":
        raise FileError("has post_norm states, but this model's MTP modules are fed pre_norm ones")
    ids = sample.token_ids()
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        raise FileError(f"has token {bad}, the model's vocabulary is 0 to {config.vocab_size - 1}")


def _digest(samples: Iterable[CapturedSample]) -> str:
    """Which samples they are: of headers, which have the digests of what `capture` wrote, tokens
    and loss masks."""
    state = xxhash.xxh3_128()
    for sample in samples:
        state.update(sample.header)
        state.update(sample.token_ids().tobytes())
        state.update(sample.loss_mask().tobytes())
    return state.hexdigest()

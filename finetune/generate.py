"""`finetune-deepseek generate`: text that the main model itself writes, to train and measure on."""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import xxhash
from jax.sharding import Mesh

from finetune.data.run_text import open_documents
from finetune.data.tokens import TokenDocuments, Tokens
from finetune.devices import Workload, devices_for
from finetune.generation.answers import Answers, Counts, about, in_batches, opened
from finetune.generation.decoder import Decoding, Prompts, decode, room_for
from finetune.generation.server import Server, Wanted, Written, written_in_order
from finetune.run.changes import given_to_all
from finetune.settings import (
    ClusterSettings,
    ComputeDtype,
    MeshSettings,
    SettingsError,
    flat,
    option,
    too_small,
)
from finetune.weights import compute_dtype
from mtp_model import DeepSeekV3, cluster
from mtp_model.checkpoint.directory import (
    Checkpoint,
    CheckpointError,
    open_checkpoint,
)
from mtp_model.files.open import as_place, written
from mtp_model.load import load
from mtp_model.progress import progress


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Write the main model's own answers to prompts, as records that training reads.

    Decoding meets what the main model writes. Drafts are measured exactly on such text, and learnt
    from it. The same command continues a file that was interrupted.
    """

    checkpoint: str
    """Checkpoint directory, as `convert-deepseek import` or training writes it; local or gs://.
    With --server its tokenizer and config are used, and no weights."""
    data: tuple[Path, ...]
    """Prompts, in the forms that training reads. Of a conversation, or a prompt with its
    completion, all that comes before the last answer, or all of it where the last turn is not the
    assistant's; of plain text its first tokens."""
    out: Path
    """File of answers, .jsonl; local or gs://. Records {"input_ids", "loss_mask"}, the prompt not
    learnt."""
    max_new_tokens: int = 256
    """Tokens of an answer, at most."""
    prompt_tokens: int = 32
    """Tokens of plain text that are its prompt."""
    max_documents: int | None = None
    """Stop after this many answers (default: all documents)."""
    temperature: float = 1.0
    """Of sampling; 0 takes the likeliest token."""
    seed: int = 0
    """Decides what is sampled; each document has random numbers of its own."""
    speculate: int = 0
    """Tokens that the MTP modules draft a step; the text has the same distribution without."""
    rows: int = 16
    """Texts that are written at a time."""
    server: str | None = None
    """Let a server of the same model write: an address like http://host:8000 (vLLM, SGLang, or what
    else has OpenAI's completions). Its key, if it wants one, is read from FINETUNE_SERVER_KEY."""
    server_model: str | None = None
    """The model's name there; default: the only one that it serves."""
    requests: int = 64
    """Answers that a server is asked for at a time."""
    compute_dtype: ComputeDtype = "auto"
    """Precision of activations; auto is float32 on CPU and bfloat16 elsewhere."""
    mesh: MeshSettings = field(default_factory=MeshSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    json: bool = False
    """Print one JSON object instead of a table."""
    overwrite: bool = False
    """Delete what is in --out, and begin anew."""


# What decides which answers are written.
DECIDING = ("max_new_tokens", "prompt_tokens", "temperature", "seed", "speculate")


class Prompt(NamedTuple):
    """The tokens that an answer follows, of a document by its number."""

    document: int
    ids: np.ndarray  # int32 [n]


def check(settings: GenerateSettings) -> None:
    """Raise SettingsError with everything that is wrong with the values."""
    least = {"max_new_tokens": 1, "prompt_tokens": 2, "max_documents": 1, "rows": 1}
    least |= {"speculate": 0, "temperature": 0, "seed": 0, "requests": 1}
    faults = too_small(settings, least)
    if settings.server is not None:
        faults += _faults_of_server(settings, settings.server)
    faults += [] if settings.data else ["--data is empty, needed at least one path"]
    if settings.out.suffix != ".jsonl":
        faults.append(f"--out is {written(settings.out)}, needed a name that ends with .jsonl")
    if faults:
        raise SettingsError("settings that cannot be used", faults)


def _faults_of_server(settings: GenerateSettings, server: str) -> list[str]:
    """What is wrong with an address, and with what a server decides itself."""
    try:
        parts = urlsplit(server)
        plain = f"{parts.scheme}://{parts.netloc}{parts.path}" == server
        good = plain and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    faults = []
    if not good or "@" in server:  # which may be a password, so it is not said again
        faults.append("--server needed http://HOST:PORT or https://..., without name, key or query")
    if settings.speculate:
        faults.append("--speculate is for answers without --server: a server drafts as it was told")
    devices = {"mesh": (settings.mesh, 0), "cluster": (settings.cluster, None)}
    faults += [
        f"{option(f'{group}.{name}')} is {value}, needed none with --server: no weights are here"
        for group, (given, usual) in devices.items()
        for name, value in flat(given).items()
        if value != usual
    ]
    return faults


def generate(settings: GenerateSettings) -> Counts:
    """Write all answers; returns what is in the file.

    Raises SettingsError, CheckpointError, DataError or AnswersError before anything is written, and
    ServerError while it is.
    """
    check(settings)
    checkpoint = _open(settings)
    documents = open_documents(
        settings.checkpoint, settings.data, checkpoint.config, to_learn=False
    )
    _raise_if_prompts(settings.out, documents)
    if settings.server is not None:
        # Two minutes, if nobody answers.
        with progress(f"reach {settings.server}", "models") as report:
            of_server = settings.server, settings.server_model, settings.requests
            server = Server(*of_server, lambda why: report(0, None, why))
        with server:
            made_by = _made_by(settings, checkpoint, documents) | {"server_model": server.model}
            with opened(settings.out, made_by, settings.overwrite) as answers:
                _ask(server, settings, checkpoint, documents, answers)
        return answers.counts
    mesh = devices_for(settings.mesh, Workload.of(checkpoint, None, settings.rows))
    made_by = _made_by(settings, checkpoint, documents)
    made_by |= {"computed_in": compute_dtype(settings.compute_dtype)}
    digests = {name: made_by[name] for name in ("checkpoint", "data")}
    cluster.raise_unless_alike(given_to_all(settings) | digests)
    with opened(settings.out, made_by, settings.overwrite) as answers:
        _decode_all(settings, documents, mesh, answers)
    return answers.counts


def _decode_all(
    settings: GenerateSettings, documents: TokenDocuments, mesh: Mesh | None, answers: Answers
) -> None:
    """Let the model here write all answers."""
    model = load(settings.checkpoint, mesh, compute_dtype=compute_dtype(settings.compute_dtype))
    how = Decoding(
        num_drafts=settings.speculate,
        temperature=settings.temperature,
        end_ids=documents.encoder.eos,
    )
    left, total = _left(settings, documents, answers)
    with progress("generate", "answers", answers.counts.documents, total) as report:
        for batch in in_batches(left, settings.rows):
            _write(model, mesh, batch, how, settings, answers, report, total)
    answers.finish()


def _left(
    settings: GenerateSettings, documents: TokenDocuments, answers: Answers
) -> tuple[Iterator[Prompt], int]:
    """The prompts that have no answer yet, and about how many there are in all."""
    prompts = prompts_of(documents, settings.prompt_tokens)
    left = itertools.islice(prompts, answers.counts.documents, settings.max_documents)
    return left, min(len(documents), settings.max_documents or len(documents))


def _ask(
    server: Server,
    settings: GenerateSettings,
    checkpoint: Checkpoint,
    documents: TokenDocuments,
    answers: Answers,
) -> None:
    """Let a server write all answers."""
    encoder = documents.encoder
    wanted = Wanted(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        end_ids=encoder.eos,
        vocab_size=checkpoint.config.vocab_size,
    )

    def ask(prompt: Prompt) -> Written:
        seed = int(_seeds(settings, np.array([prompt.document]))[0]) & 0x7FFFFFFF  # 31 bits
        return server.answer(prompt.document, prompt.ids.tolist(), seed, wanted)

    def with_prompt(prompt: Prompt, written: Written) -> tuple[np.ndarray, int]:
        if written.ids is None:
            ids = encoder.encode_answer(written.text, written.ended)
        else:  # an end token is left out by some
            missing = written.ended and written.ids[-1:] != encoder.eos
            ids = [*written.ids, *(encoder.eos if missing else ())]
        return np.concatenate([prompt.ids, np.array(ids, np.int32)]), len(prompt.ids)

    left, total = _left(settings, documents, answers)
    with progress("generate", "answers", answers.counts.documents, total) as report:
        server.on_failure = lambda why: report(answers.counts.documents, total, why)
        for ready in written_in_order(ask, left, settings.requests):
            found = [with_prompt(*each) for each in ready]
            tokens = sum(len(ids) - length for ids, length in found)
            answers.add(found, answers.counts.plus(len(found), tokens, 0, ()))
            report(answers.counts.documents, total, f"{answers.counts.tokens:,} tokens")
    answers.finish()


def prompts_of(documents: TokenDocuments, prompt_tokens: int) -> Iterator[Prompt]:
    """A prompt of each document that has one, in their order.

    Of a conversation, or a prompt with its completion, it is all that comes before the last answer,
    of a conversation that waits for its answer all of it, with the header of that answer; of plain
    text, which is learnt from its start, the first `prompt_tokens`, of a shorter one all but EOS.
    """
    for document in range(len(documents)):
        if (question := documents.question(document)) is not None:
            ids = question.ids
        else:
            tokens = documents.as_written(document)
            ids = _prompt_of(tokens, prompt_tokens, documents.encoder.eos)
        if len(ids):
            yield Prompt(document, ids)


def _prompt_of(tokens: Tokens, prompt_tokens: int, eos: tuple[int, ...]) -> np.ndarray:
    """The tokens of a document that an answer follows."""
    if length := _before_last_answer(tokens.loss_mask):
        return tokens.ids[:length]
    ids = tokens.ids[:prompt_tokens]
    return ids[:-1] if eos and ids[-1:].tolist() == [*eos] else ids


def _before_last_answer(loss_mask: np.ndarray) -> int:
    """Where the last stretch of learnt tokens begins; 0 for one that begins the document."""
    learnt = np.flatnonzero(loss_mask)
    if not learnt.size:
        return len(loss_mask)
    unlearnt = np.flatnonzero(loss_mask[: learnt[-1]] == 0)
    return int(unlearnt[-1]) + 1 if unlearnt.size else 0


def _open(settings: GenerateSettings) -> Checkpoint:
    """A checkpoint with a main model, and a module where one is to draft."""
    checkpoint = open_checkpoint(settings.checkpoint)
    scope, modules = checkpoint.provenance["scope"], checkpoint.config.num_nextn_predict_layers
    if scope == "mtp" and settings.server is None:
        raise CheckpointError(
            f"{settings.checkpoint} was imported with --scope mtp: it has no main model to write "
            "text; import it again with --scope all --overwrite, or to another place"
        )
    modules = 0 if scope == "main" else modules
    if settings.speculate and not modules:
        raise CheckpointError(
            f"{settings.checkpoint} has no MTP module to draft; leave out --speculate"
        )
    return checkpoint


def _raise_if_prompts(out: Path, documents: TokenDocuments) -> None:
    """SettingsError where the answers would take the place of a file that prompts are read from."""
    place = as_place(out)
    if place.exists() and any(file.path.is_same(place) for file in documents.corpus.files):
        found = f"--out is {written(out)}, which --data reads: needed another file"
        raise SettingsError("settings that cannot be used", [found])


def _made_by(
    settings: GenerateSettings, checkpoint: Checkpoint, documents: TokenDocuments
) -> dict[str, Any]:
    """What decides which answers are written: a file is continued with the same only."""
    return {
        "by": "finetune-deepseek generate",
        "checkpoint": checkpoint.digest,
        "data": documents.corpus.digest,
        **{name: getattr(settings, name) for name in DECIDING},
    }


def _write(
    model: DeepSeekV3,
    mesh: Mesh | None,
    batch: list[Prompt],
    how: Decoding,
    settings: GenerateSettings,
    answers: Answers,
    report: Any,
    total: int,
) -> None:
    """The answers to one batch of prompts."""
    began, before = time.perf_counter(), answers.counts

    def written(tokens: int) -> None:
        rate = tokens / (time.perf_counter() - began)
        report(before.documents, total, f"{before.tokens + tokens:,} tokens, {rate:,.0f} tokens/s")

    prompts = _padded(batch, settings)
    texts = decode(model, prompts, how, written, mesh)
    ids = [texts.tokens_BS[row, : texts.length_B[row]] for row in range(len(batch))]
    lengths = prompts.length_B[: len(batch)]
    tokens = sum(map(len, ids)) - int(lengths.sum())
    counts = before.plus(
        len(batch),
        tokens,
        int(texts.rounds_B.sum()),
        texts.accepted_BK.sum(axis=0).tolist(),
    )
    answers.add([*zip(map(np.asarray, ids), lengths.tolist(), strict=True)], counts)
    written(tokens)


def _padded(batch: list[Prompt], settings: GenerateSettings) -> Prompts:
    """Prompts as arrays; rows that there are no prompts for have ended already."""
    rows = [*batch, *[batch[-1]] * (settings.rows - len(batch))]
    length_B = np.array([len(each.ids) for each in rows], np.int32)
    end_B = length_B + np.int32(settings.max_new_tokens)
    end_B[len(batch) :] = 0
    tokens_BS = np.zeros((len(rows), room_for(int(end_B.max()), settings.speculate)), np.int32)
    for row, each in enumerate(rows):
        tokens_BS[row, : len(each.ids)] = each.ids
    seed_B = _seeds(settings, np.array([each.document for each in rows]))
    return Prompts(tokens_BS, length_B, end_B, seed_B)


def _seeds(settings: GenerateSettings, documents_B: np.ndarray) -> np.ndarray:
    """Of each document's random numbers, uint32."""
    return documents_B.astype(np.uint32) + np.uint32(settings.seed * 0x9E3779B9 % 2**32)


def as_json(settings: GenerateSettings, counts: Counts) -> dict[str, Any]:
    """What was written, and how, for programs and `compare`."""
    answers = xxhash.xxh3_128()
    for piece in as_place(settings.out).pieces():
        answers.update(piece)
    made_by = json.loads(about(settings.out).read_bytes())["made_by"]
    asked = [made_by[name] for name in ("data", "max_new_tokens", "prompt_tokens")]
    prompts = json.dumps([*asked, counts.documents])
    return {
        "out": written(settings.out),
        **dataclasses.asdict(counts),
        "sampling": "rejection" if settings.temperature else "greedy",
        "temperature": settings.temperature,
        "prompts": xxhash.xxh3_128_hexdigest(prompts.encode()),
        "data": answers.hexdigest(),  # as `evaluate` names the text when it reads this file
    }

"""Records of text as tokens with a loss mask, by the checkpoint's own tokenizer."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from finetune.data.chat import Rendered, open_chat_template, token_text
from finetune.data.corpus import Corpus
from finetune.data.records import Chat, DataError, Exchange, Record, TokenIds
from finetune.data.stretches import UncuttableError, read_stretch
from mtp_model.files.place import Place


class Tokens(NamedTuple):
    """A document, or a stretch of one. loss_mask belongs to the token itself: 1 if it is learnt."""

    ids: np.ndarray  # int32 [n]
    loss_mask: np.ndarray  # int32 [n]
    following: int | None = None  # where the document's next stretch begins, in its bytes
    # Reads what the main model made of tokens [begin, end), where that was captured.
    states: Callable[[int, int], Any] | None = None


class TextEncoder:
    """Encodes records: bos before each document, eos after it; conversations by their template.

    Which tokens those are, and whether bos is wanted (`add_bos_token`), is read from the
    checkpoint's tokenizer_config.json and config.json. `{"input_ids"}` stays as it is, and so does
    what the chat template (`chats`, None without one) writes.
    Raises DataError for files that cannot be read.
    """

    def __init__(self, checkpoint: Place):
        self.tokenizer = _tokenizer(checkpoint / "tokenizer.json")
        settings = _json(checkpoint / "tokenizer_config.json")
        config = _json(checkpoint / "config.json")
        wanted = settings.get("add_bos_token", True)
        self.bos = self._special("bos_token", settings, config) if wanted else ()
        self.eos = self._special("eos_token", settings, config)
        added = self.tokenizer.get_added_tokens_decoder().values() if self.tokenizer else ()
        self.chats = open_chat_template(checkpoint, settings, (each.content for each in added))

    def encode(self, record: Record) -> Tokens:
        """Tokens of one record; text needs a tokenizer. Raises ValueError for a conversation."""
        if isinstance(record, TokenIds):
            mask = record.loss_mask
            ids = record.input_ids
            return _tokens((ids, [1] * len(ids) if mask is None else mask))
        if isinstance(record, Exchange):
            prompt, completion = self._encode(record.prompt), self._encode(record.completion)
            context, learnt = self._begun(prompt), self._ended(completion)
            return _tokens((context, [0] * len(context)), (learnt, [1] * len(learnt)))
        if isinstance(record, Chat):
            assert self.chats is not None  # scan checks it
            return self._encode_chat(self.chats.render(record))
        ids = self._ended(self._begun(self._encode(record.text)))
        return _tokens((ids, [1] * len(ids)))

    def encode_question(self, chat: Chat) -> Tokens:
        """Tokens of a conversation up to where an assistant answers. Raises ValueError."""
        assert self.chats is not None  # scan checks it
        return self._encode_chat(self.chats.render(chat, asks=True))

    def encode_answer(self, text: str, ended: bool) -> list[int]:
        """Tokens of what a model wrote behind a prompt, with eos where one ended it.

        DataError where the checkpoint has no tokenizer.
        """
        if self.tokenizer is None:
            raise DataError(["the server returns text, needed token ids: no tokenizer.json here"])
        return self._ended(self._encode(text)) if ended else self._encode(text)

    def encode_stretch(self, corpus: Corpus, document: int, begin: int) -> Tokens:
        """Tokens of a long text from a byte on, which is where the stretch before ended."""
        assert self.tokenizer is not None  # TokenDocuments checks it
        ids, following = read_stretch(
            self.tokenizer,
            lambda first, end: corpus.content(document, first, end),
            int(corpus.nbytes_N[document]),
            begin,
        )
        ids = self._begun(ids) if begin == 0 else ids
        ids = self._ended(ids) if following is None else ids
        return _tokens((ids, [1] * len(ids)))._replace(following=following)

    def _begun(self, ids: list[int]) -> list[int]:
        """With bos in front, once: the text may have it."""
        return ids if self.bos and tuple(ids[:1]) == self.bos else [*self.bos, *ids]

    def _ended(self, ids: list[int]) -> list[int]:
        """With eos at the end, once: the text may have it."""
        return ids if self.eos and tuple(ids[-1:]) == self.eos else [*ids, *self.eos]

    def _encode(self, text: str) -> list[int]:
        assert self.tokenizer is not None  # TokenDocuments checks it
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_chat(self, rendered: Rendered) -> Tokens:
        """Tokens of a conversation; one that is partly in a learnt span is learnt."""
        assert self.tokenizer is not None  # TokenDocuments checks it
        encoding = self.tokenizer.encode(rendered.text, add_special_tokens=False)
        begin_n, end_n = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        mask_n = np.zeros(len(encoding.ids), np.int32)
        for begin, end in rendered.spans:
            mask_n |= (begin_n < end) & (end_n > begin)
        return Tokens(np.array(encoding.ids, np.int32), mask_n)

    def _special(self, key: str, settings: dict, config: dict) -> tuple[int, ...]:
        """The id of bos or eos as a tuple, empty where the checkpoint has none."""
        text = token_text(settings, key)
        if text is not None and self.tokenizer is not None:
            found = self.tokenizer.token_to_id(text)
            if found is not None:
                return (found,)
        number = config.get(f"{key}_id")
        number = number[0] if isinstance(number, list) and number else number
        return (number,) if isinstance(number, int) else ()


class TokenDocuments:
    """Tokens of a corpus, document by document: what packing reads."""

    def __init__(self, corpus: Corpus, encoder: TextEncoder, vocab_size: int):
        if corpus.has_text and encoder.tokenizer is None:
            raise DataError(
                ["the checkpoint has no tokenizer.json: add it, or give .jsonl with input_ids"]
            )
        self.corpus, self.encoder, self.vocab_size = corpus, encoder, vocab_size

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, document: int) -> Tokens:
        """One document's tokens, of a long one the first stretch.

        Raises DataError when an id is outside the vocabulary, or a text cannot be tokenised.
        """
        return self.stretch(document, 0)

    def question(self, document: int) -> Tokens | None:
        """What a conversation that waits for an answer asks for it with, None for all else.

        Raises DataError where the chat template does not render it so.
        """
        if self.corpus.holds_ids(document) or self.corpus.is_long(document):
            return None
        record = self.corpus.read(document)
        if not isinstance(record, Chat) or record.is_answered:
            return None
        try:
            return self.encoder.encode_question(record)
        except ValueError as error:
            raise DataError([f"{self.corpus.where(document)} {error}"]) from error

    def stretch(self, document: int, begin: int) -> Tokens:
        """The stretch of a long document that begins where `following` of the one before says.

        Where a document has nothing to learn, neither is the eos behind it: that an answer is
        empty.
        """
        tokens = self.as_written(document, begin)
        if self.corpus.idle_N[document] and not self.corpus.holds_ids(document):
            return tokens._replace(loss_mask=np.zeros_like(tokens.loss_mask))
        return tokens

    def as_written(self, document: int, begin: int = 0) -> Tokens:
        """As `stretch` gives it, with an empty answer told from its prompt by the loss mask."""
        try:
            if self.corpus.holds_ids(document):
                ids, following = self.corpus.ids(document, begin)
                tokens = Tokens(ids, np.ones(ids.size, np.int32), following)
            elif self.corpus.is_long(document):
                tokens = self.encoder.encode_stretch(self.corpus, document, begin)
            else:
                tokens = self.encoder.encode(self.corpus.read(document))
        except (ValueError, UncuttableError) as error:
            raise DataError([f"{self.corpus.where(document)} {error}"]) from error
        if tokens.ids.size and int(tokens.ids.max()) >= self.vocab_size:
            found = f"{self.corpus.where(document)} gives token {int(tokens.ids.max())}"
            needed = f"the model's vocabulary is 0 to {self.vocab_size - 1}"
            raise DataError([f"{found}, {needed}: the tokenizer is another model's"])
        return tokens


def _tokens(*parts: tuple[list[int], list[int]]) -> Tokens:
    ids, mask = ([each for part in parts for each in part[column]] for column in (0, 1))
    return Tokens(np.array(ids, np.int32), np.array(mask, np.int32))


def _tokenizer(file: Place) -> Tokenizer | None:
    """The tokenizer of a checkpoint, set to give every token of a text; None without the file."""
    if not file.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_buffer(file.read_bytes())
    except Exception as error:  # tokenizers raises no narrower class
        raise DataError([f"{file} is not a tokenizer: {error}"]) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # It would add special tokens, which nobody asks it for, and trims spaces off the offsets.
    tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _json(path: Place) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise DataError([f"{path} is not JSON: {error}"]) from error

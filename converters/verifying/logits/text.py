"""The user's own text as tokens, by the tokenizer of the checkpoint that is looked at."""

from converters.format.listing import SourceCheckpoint
from mtp_model.files.untrusted_json import shown
from mtp_model.problems import Problem, ProblemsError

_TOKENIZER = "tokenizer.json"


def tokens_of_text(text: str, source: SourceCheckpoint, option: str, vocab_size: int) -> list[int]:
    """Token ids; special tokens are those that the source's tokenizer.json adds by itself.

    option: what the user gave the text with. Raises ProblemsError where there is no tokenizer, or
    not this model's.
    """
    content = _tokenizer(source)
    if content is None:
        detail = f"is missing, {option} needs it; put the model's there"
        raise ProblemsError(source.source.name, [Problem("file", _TOKENIZER, detail)])
    from tokenizers import Tokenizer  # here: built-in tokens do without

    fault, ids = None, []
    try:
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = tokenizer.encode(text).ids
    except Exception as error:  # tokenizers raises no narrower class
        fault = f"makes no tokens of the text: {shown(str(error))}"
    if ids and max(ids) >= vocab_size:
        found = f"gives token {max(ids)}, the vocabulary is 0 to {vocab_size - 1}"
        fault = f"{found}; it is another model's, put this one's there"
    if fault:
        raise text_problem(source, fault)
    return ids


def _tokenizer(source: SourceCheckpoint) -> bytes | None:
    """tokenizer.json, as a file of the source or, of a checkpoint directory, beside its weights."""
    sizes, folder = source.source.files(), source.source.folder
    if _TOKENIZER in sizes:
        return source.source.read(_TOKENIZER, 0, sizes[_TOKENIZER])
    beside = folder / _TOKENIZER if folder else None
    return beside.read_bytes() if beside and beside.is_file() else None


def text_problem(source: SourceCheckpoint, fault: str) -> ProblemsError:
    """What is wrong with a text, or with what makes tokens of it."""
    return ProblemsError(source.source.name, [Problem("text", _TOKENIZER, fault)])

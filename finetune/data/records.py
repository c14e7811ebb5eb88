"""What a record of training data may be, and what is wrong with one that is none of it."""

import json
from dataclasses import dataclass
from typing import Any

from mtp_model.files.untrusted_json import JsonError, shown, unique_members
from mtp_model.problems import UserError

REPORTED_FAULTS = 40
_FAULT_CHARACTERS = 1000
FORMS = (
    '{"text"}, {"messages"}, {"prompt", "completion" or "response"}, '
    '{"instruction", optional "input", "output"}, '
    'or {"input_ids", optional "loss_mask" or "labels"}'
)
_FORMS_BY_KEY = ("text", "messages", "conversations", "prompt", "instruction", "input_ids")
FORM_KEYS = set(_FORMS_BY_KEY)  # each record has exactly one of them
_BESIDE_IDS = {"input_ids", "loss_mask", "labels", "attention_mask"}
_NOT_LEARNT = -100  # in labels, as Transformers' losses leave it out
_COMPLETIONS = {"prompt": ("completion", "response"), "instruction": ("output",)}
_BESIDE_TURNS = {"system", "tools", "chat_template_kwargs"}
_BESIDE_PROMPT = {"completion", "response", "input", "output", "system", "history"}
KNOWN_KEYS = FORM_KEYS | _BESIDE_IDS | _BESIDE_TURNS | _BESIDE_PROMPT
# Roles as ShareGPT writes them in "from", and as chat templates know them.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_LEARN_SWITCHES = ("weight", "train")  # 0 or false beside a turn: read, not learnt
ASSISTANT = "assistant"


class DataError(UserError):
    """Data that cannot be trained on, with every fault (the first 40 are printed)."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        count = f"{len(faults)} problem{'' if len(faults) == 1 else 's'} in the data:"
        rest = len(faults) - REPORTED_FAULTS
        more = [f"and {rest} more"] if rest > 0 else []
        lines = map(_one_line, faults[:REPORTED_FAULTS])
        super().__init__("\n  ".join([count, *lines, *more]))


def _one_line(fault: str) -> str:
    """A fault as a line of bounded length: what it quotes of the data may be anything."""
    cut = fault[:_FAULT_CHARACTERS] + "..." * (len(fault) > _FAULT_CHARACTERS)
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in cut)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A document of plain text."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A prompt, which is read, and a completion, which is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation, as the chat template takes it; turns in `learnt` (numbers) are learnt."""

    messages: list[dict[str, Any]]
    learnt: tuple[int, ...]
    tools: list[Any] | None = None
    variables: dict[str, Any] | None = None  # others that the template may read
    day: str = "2000-01-01"  # today, for templates that write it: the day of the data's file

    @property
    def is_answered(self) -> bool:
        """Whether its last word is an assistant's."""
        return self.messages[-1]["role"] == ASSISTANT


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """A document that comes as tokens; loss_mask is 1 for each token that is learnt."""

    input_ids: list[int]
    loss_mask: list[int] | None = None


Record = Text | Exchange | Chat | TokenIds


def has_target(record: Record) -> bool:
    """Whether there is anything to learn in a record. Its first token is never a target."""
    if isinstance(record, Text):
        return bool(record.text)
    if isinstance(record, Exchange):
        return bool(record.completion)
    if isinstance(record, Chat):
        return any(_says_something(record.messages[number]) for number in record.learnt)
    mask = record.loss_mask if record.loss_mask is not None else [1] * len(record.input_ids)
    return any(mask[1:])


def _says_something(message: dict[str, Any]) -> bool:
    return any(value for key, value in message.items() if key != "role")


def is_record(value: Any) -> bool:
    """Whether a JSON value looks like a record, a wrong one or a right one."""
    return isinstance(value, dict) and bool(FORM_KEYS & value.keys())


def parse_record(value: Any, vocab_size: int | None = None) -> Record:
    """A JSON value as a record. Raises ValueError that says what is wrong with it."""
    if not isinstance(value, dict):
        raise ValueError(f"is {type(value).__name__}, needed an object: {FORMS}")
    value = {key: each for key, each in value.items() if each is not None}
    forms = [key for key in _FORMS_BY_KEY if key in value]
    if len(forms) > 1:  # a prompt alone stands beside messages in many data sets
        forms = [form for form in forms if _is_answered(value, form)]
    if len(forms) != 1:
        found = shown(", ".join(sorted(value))) if value else "of none"
        raise ValueError(f"has the keys {found}, needed {FORMS}")
    [form] = forms
    if form == "input_ids":
        return _token_ids(value, vocab_size)
    if form == "text":
        return Text(text=_string(value, "text"))
    if form in ("messages", "conversations"):
        return _chat(value, _messages(value[form], form), 0)
    return _exchange(value, form)


# --- prompts with completions


def _is_answered(value: dict[str, Any], form: str) -> bool:
    return any(name in value for name in _COMPLETIONS.get(form, (form,)))


def _exchange(value: dict[str, Any], form: str) -> Record:
    names = [name for name in _COMPLETIONS[form] if name in value] or _COMPLETIONS[form][:1]
    if len(names) > 1:
        raise ValueError(f"has both {' and '.join(names)}, needed one of them")
    [name] = names
    if isinstance(value[form], list) and form == "prompt":
        prompt_turns = _messages(value[form], form)
        return _chat(value, [*prompt_turns, *_messages(value.get(name), name)], len(prompt_turns))
    lost = [key for key in ("system", "history") if value.get(key)]
    if lost:
        raise ValueError(f"has {' and '.join(lost)} beside {form}: write it as messages")
    prompt, completion = _string(value, form), _string(value, name)
    if form == "instruction" and value.get("input"):
        prompt = f"{prompt}\n\n{_string(value, 'input')}"
    return Exchange(prompt=prompt, completion=completion)


def _string(value: dict[str, Any], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str):
        raise ValueError(f"{name} is {_kind(text)}, needed a string")
    raise_if_no_unicode(text, name)
    return text


def raise_if_no_unicode(text: str, name: str) -> None:
    """ValueError for half of a UTF-16 pair, which JSON can escape: it is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half a character at {error.start}") from None


# --- conversations


def _chat(value: dict[str, Any], messages: list[dict[str, Any]], first_learnt: int) -> Chat:
    """The messages with what stands beside them; those before `first_learnt` are only read."""
    switches = [_learn_switch(number, turn) for number, turn in enumerate(messages)]
    learnt = [
        number
        for number, turn in enumerate(messages)
        if number >= first_learnt and turn["role"] == ASSISTANT and switches[number]
    ]
    if system := value.get("system"):
        messages = [{"role": "system", "content": _string({"system": system}, "system")}, *messages]
        learnt = [number + 1 for number in learnt]
    variables = value.get("chat_template_kwargs")
    if variables is not None and not isinstance(variables, dict):
        raise ValueError(f"chat_template_kwargs is {_kind(variables)}, needed an object")
    return Chat(
        messages=[
            {key: each for key, each in turn.items() if key not in _LEARN_SWITCHES}
            for turn in messages
        ],
        learnt=tuple(learnt),
        tools=_tools(value.get("tools")),
        variables=variables,
    )


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {_kind(value) if value != [] else 'empty'}, needed messages")
    return [_message(f"{name}[{number}]", turn) for number, turn in enumerate(value)]


def _message(name: str, turn: Any) -> dict[str, Any]:
    """One turn with role and content; `{"from", "value"}` is one too. null is as if missing."""
    if not isinstance(turn, dict):
        raise ValueError(f'{name} is {_kind(turn)}, needed {{"role", "content"}}')
    turn = {key: each for key, each in turn.items() if each is not None}
    if "from" in turn and "role" not in turn:
        sender, others = turn["from"], {k: v for k, v in turn.items() if k not in ("from", "value")}
        if not isinstance(sender, str) or sender not in _ROLES:
            known = ", ".join(sorted(_ROLES))
            raise ValueError(f"{name} is from {shown(repr(sender))}, known are {known}")
        turn = {"role": _ROLES[sender], "content": _string(turn, "value"), **others}
    if not isinstance(turn.get("role"), str):
        raise ValueError(f"{name} has role {_kind(turn.get('role'))}, needed a string")
    if "content" not in turn and turn["role"] != ASSISTANT:
        raise ValueError(f"{name} has no content")
    _check_content(name, turn.get("content", ""))
    return turn


def _check_content(name: str, content: Any) -> None:
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            found = part.get("type") if isinstance(part, dict) else _kind(part)
            raise ValueError(f"{name} has content of type {shown(found)}, needed text")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{name} has content {_kind(part.get('text'))}, needed a string")
        raise_if_no_unicode(part["text"], name)


def _learn_switch(number: int, turn: dict[str, Any]) -> bool:
    for name in _LEARN_SWITCHES:
        if turn.get(name, 1) not in (0, 1):
            raise ValueError(f"turn {number} has {name} {shown(repr(turn[name]))}, needed 0 or 1")
    return all(turn.get(name, 1) for name in _LEARN_SWITCHES)


def _tools(tools: Any) -> list[Any] | None:
    """Tools that the template describes; data sets often hold them as a string of JSON."""
    if isinstance(tools, str):
        tools = _json_of_tools(tools) if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"tools is {_kind(tools)}, needed a list")
    return tools or None


def _json_of_tools(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_members)
    except JsonError as error:
        raise ValueError(f"tools {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"tools is text that is not JSON: {error}") from error


# --- tokens


def _token_ids(value: dict[str, Any], vocab_size: int | None) -> TokenIds:
    unknown = sorted(value.keys() - _BESIDE_IDS)
    if unknown:
        known = ", ".join(sorted(_BESIDE_IDS - {"input_ids"}))
        found = shown(", ".join(unknown))
        raise ValueError(f"has {found} beside input_ids, known there are {known}")
    ids, mask = value["input_ids"], value.get("loss_mask")
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise ValueError("input_ids is not a list of whole numbers")
    top = vocab_size or (1 << 31)
    wrong = next((each for each in ids if not 0 <= each < top), None)
    if wrong is not None:
        raise ValueError(f"input_ids has {shown(wrong)}, the vocabulary is 0 to {top - 1}")
    if "labels" in value:
        if mask is not None:
            raise ValueError("has both loss_mask and labels, needed one of them")
        mask = _mask_of_labels(value["labels"], ids)
    mask = _zeros_and_ones(mask, "loss_mask", ids)
    attention = _zeros_and_ones(value.get("attention_mask"), "attention_mask", ids)
    if attention is None or all(attention):
        return TokenIds(input_ids=ids, loss_mask=mask)
    kept = [position for position, seen in enumerate(attention) if seen]  # the rest is padding
    return TokenIds(
        input_ids=[ids[position] for position in kept],
        loss_mask=mask and [mask[position] for position in kept],
    )


def _zeros_and_ones(mask: Any, name: str, ids: list[int]) -> list[int] | None:
    if mask is None:
        return None
    if not isinstance(mask, list) or not all(type(m) is int and m in (0, 1) for m in mask):
        raise ValueError(f"{name} is not a list of 0 and 1")
    if len(mask) != len(ids):
        raise ValueError(f"{name} has {len(mask)} entries for {len(ids)} input_ids")
    return mask


def _mask_of_labels(labels: Any, ids: list[int]) -> list[int]:
    """The loss mask that labels stand for: its own token, or -100 where it is not learnt."""
    if not isinstance(labels, list) or len(labels) != len(ids):
        found = len(labels) if isinstance(labels, list) else _kind(labels)
        raise ValueError(f"labels has {found} entries for {len(ids)} input_ids")
    for position, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (token, _NOT_LEARNT):
            found = f"labels has {shown(repr(label))} at {position}, where input_ids has {token}"
            raise ValueError(f"{found}; needed that token, or {_NOT_LEARNT}: nothing is shifted")
    return [int(label != _NOT_LEARNT) for label in labels]


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__

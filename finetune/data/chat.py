"""The checkpoint's chat template: where it is, and conversations rendered by it."""

import json
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.records import Chat, DataError, raise_if_no_unicode
from mtp_model.files.place import Place

TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_RENDERING = Path(__file__).with_name("rendering.py")
_TIMEOUT_S = 20.0


class Rendered(NamedTuple):
    """A conversation's text, and the spans of its characters that are learnt."""

    text: str
    spans: list[tuple[int, int]]


class ChatTemplate:
    """Renders conversations in a process of its own (`rendering`), which is started when needed."""

    def __init__(self, templates: dict[str, str], settings: dict[str, Any], special: Iterable[str]):
        """templates: by name. settings: tokenizer_config.json. special: the tokenizer's."""
        self._templates = templates
        self._special = sorted(set(special))
        self._variables = _special_tokens(settings)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    @property
    def identity(self) -> str:
        """What the rendered text depends on, beside the conversation and its day."""
        return json.dumps([self._templates, self._special, self._variables], sort_keys=True)

    @property
    def reads_the_day(self) -> bool:
        """Whether a template writes today's date."""
        return any("strftime_now" in each for each in self._templates.values())

    def render(self, chat: Chat, *, asks: bool = False) -> Rendered:
        """Text and learnt spans. Raises ValueError that says why there are none.

        asks: the text goes on to where an assistant would answer, and nothing is learnt.
        """
        request = {
            "messages": chat.messages,
            "learnt": list(chat.learnt),
            "asks": asks,
            "tools": chat.tools,
            "day": chat.day,
            "variables": self._variables | (chat.variables or {}),
        }
        with self._lock:  # training reads ahead in a thread
            reply = self._ask(self._name(chat), request)
        if "error" in reply:
            raise ValueError(reply["error"])
        raise_if_no_unicode(reply["text"], "what the chat template writes")
        return Rendered(reply["text"], [tuple(span) for span in reply["spans"]])

    def _name(self, chat: Chat) -> str:
        """The template's name: Transformers takes `tool_use` where there are tools."""
        names = ["tool_use", "default"] if chat.tools else ["default"]
        found = next((name for name in names if name in self._templates), None)
        if found is None:
            known = ", ".join(sorted(self._templates))
            raise ValueError(f"needs a chat template named default; the tokenizer has {known}")
        return found

    def _ask(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        if name not in self._processes:
            process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", str(_RENDERING)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # an interrupt is for us
            )
            weakref.finalize(self, _end, process)
            self._processes[name] = process
            first = {"source": self._templates[name], "special": self._special}
            reply = self._exchange(name, first)
            if "error" in reply:
                self._forget(name)
                return reply
        return self._exchange(name, request)

    def _exchange(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        """A line there and a line back. A process that does not answer in time is ended."""
        process = self._processes[name]
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], _TIMEOUT_S)[0]:
                if line := process.stdout.readline():
                    return json.loads(line)
                why = "ended its process"
            else:
                why = f"takes longer than {_TIMEOUT_S:.0f} s"
        except BrokenPipeError:
            why = "ended its process"
        self._forget(name)
        return {"error": f"the chat template {why}"}

    def _forget(self, name: str) -> None:
        if process := self._processes.pop(name, None):
            _end(process)


def open_chat_template(
    checkpoint: Place, settings: dict[str, Any], special: Iterable[str]
) -> ChatTemplate | None:
    """The chat template of a checkpoint, as Transformers finds it: its file before its setting."""
    file = checkpoint / TEMPLATE_FILE
    given = settings.get("chat_template")
    if file.is_file():
        try:
            given = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError([f"{file} is not UTF-8 text: {error.reason}"]) from error
    if given is None:
        return None
    named = given if isinstance(given, list) else [{"name": "default", "template": given}]
    templates = {
        each["name"]: each["template"]
        for each in named
        if isinstance(each, dict)
        and all(isinstance(each.get(k), str) for k in ("name", "template"))
    }
    if len(templates) < len(named):
        where = checkpoint / "tokenizer_config.json"
        raise DataError([f"{where} has a chat_template that is no text and no list of named ones"])
    return ChatTemplate(templates, settings, special) if templates else None


def token_text(settings: dict[str, Any], key: str) -> str | None:
    """A special token's text in tokenizer_config.json, which may be the token or describe it."""
    token = settings.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Special tokens by the names that templates know them by."""
    found = {}
    for name in _SPECIAL:
        text = token_text(settings, f"{name}_token")
        if text is not None:
            found[f"{name}_token"] = text
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:  # what was not written yet
                continue
    process.wait()

"""A process of its own that renders conversations by a chat template, which is untrusted.

Run as a file, with jinja2 and nothing of ours: a line of JSON comes in on stdin, a line goes out on
stdout. jinja2's sandbox keeps a template from attributes of Python; what it cannot bound, memory
and time, the operating system bounds for this process (time: whoever started it ends it).

What a template sees is what Transformers gives to one. What is learnt are its {% generation %}
blocks; where it has none, what an assistant's turn adds to the conversation before it.
"""

import contextlib
import datetime
import json
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

MEMORY_BYTES = 1 << 30
LONGEST_S = 60  # far above what whoever started it waits: for one that is gone
TEXT_CHARS = 32 << 20
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")

Span = tuple[int, int]
"""First character, and the one after the last."""


class CannotRenderError(ValueError):  # not a UserError: its text goes to the process that asked
    """A conversation that this template does not render."""


class Generation(ext.Extension):
    """{% generation %} ... {% endgeneration %}: what stands in it, an assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        text = caller()
        done: list[str] | None = getattr(self.environment, "done", None)
        if done is not None:  # not while a macro or a block is being put together elsewhere
            begin = sum(map(len, done))
            self.environment.spans.append((begin, begin + len(text)))  # pyright: ignore[reportAttributeAccessIssue]
        return text


class _Namespace(jinja2.utils.Namespace):
    """namespace() for templates: names that begin with _ are none of theirs."""

    def __init__(*args: Any, **kwargs: Any):
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _raise_if_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _raise_if_private(name)
        super().__setitem__(name, value)


def _raise_if_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")


class _Dict:
    """dict() for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


class Renderer:
    """A compiled template. special: texts of the tokenizer's special and added tokens."""

    def __init__(self, source: str, special: list[str]):
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
        )
        self.day = datetime.datetime.now()
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: self.day.strftime(form),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self.environment = environment
        self.template = environment.from_string(source)
        self.has_blocks = _GENERATION.search(source) is not None
        self.special = [each for each in special if each]
        self.takes_parts = self._takes_parts()

    def render(self, request: dict[str, Any]) -> dict[str, Any]:
        """The text of a conversation and the spans of it that are learnt; of one that asks for its
        next turn, the text with that turn's header."""
        self.day = datetime.datetime.fromisoformat(request["day"])
        messages = [self._prepared(each) for each in request["messages"]]
        given = {"tools": request["tools"], "documents": None, **request["variables"]}
        if request["asks"]:
            return {"text": self._text(messages, given, prompt=True)[0], "spans": []}
        text, blocks = self._text(messages, given)
        assistant = [n for n, each in enumerate(messages) if each["role"] == "assistant"]
        learnt = request["learnt"]
        if not self.has_blocks:
            spans = [self._turn(text, messages, number, given) for number in learnt]
        elif learnt == assistant:
            spans = blocks
        elif len(blocks) == len(assistant):
            spans = [blocks[assistant.index(number)] for number in learnt]
        else:
            raise CannotRenderError(
                f"the chat template marks {len(blocks)} stretches as generated in a conversation "
                f"of {len(assistant)} assistant turns, so some of these turns cannot be left out"
            )
        spans = [(begin, end) for begin, end in spans if end > begin]
        if learnt and not spans:
            raise CannotRenderError("the chat template writes nothing for the assistant's turns")
        return {"text": text, "spans": spans}

    def _text(self, messages: list[dict], given: dict, prompt: bool = False) -> tuple[str, list]:
        done, spans = [], []
        self.environment.done, self.environment.spans = done, spans  # pyright: ignore[reportAttributeAccessIssue]
        size = 0
        for part in self.template.generate(
            messages=messages, add_generation_prompt=prompt, **given
        ):
            done.append(part)
            size += len(part)
            if size > TEXT_CHARS:
                raise CannotRenderError(
                    f"the chat template writes more than {TEXT_CHARS} characters"
                )
        return "".join(done), spans

    def _turn(self, text: str, messages: list[dict], number: int, given: dict) -> Span:
        """What an assistant's turn adds, without the header that the model is given."""
        plain, _ = self._text(messages[:number], given)
        asked, _ = self._text(messages[:number], given, prompt=True)
        after, _ = self._text(messages[: number + 1], given)
        if not text.startswith(after) or not after.startswith(plain):
            raise CannotRenderError(
                f"turn {number} is rendered otherwise when more turns follow, so what is learnt of "
                'it cannot be told: give the turns up to it as "prompt" and it as "completion", '
                "both lists of messages, in a record that ends with it"
            )
        begin = len(asked) if after.startswith(asked) else self._header_end(plain, asked, after)
        if begin is None:
            raise CannotRenderError(
                f"the prompt that the chat template asks turn {number} with is not how it renders "
                "the turn, so what is learnt of it cannot be told"
            )
        return begin, self._turn_end(after, begin)

    def _header_end(self, plain: str, asked: str, after: str) -> int | None:
        """The end of the last special token that the asking prompt and the turn have in common.

        DeepSeek-R1's prompt goes on with <think>, which its turns are rendered without.
        """
        pairs = enumerate(zip(asked, after, strict=False))
        same = next((at for at, (one, other) in pairs if one != other), min(len(asked), len(after)))
        ends = [
            at + len(token)
            for token in self.special
            if (at := after.rfind(token, len(plain), same)) >= 0
        ]
        return max(ends, default=None)

    def _turn_end(self, after: str, begin: int) -> int:
        """Where what the model writes ends: line ends behind its last special token are not its."""
        end = len(after.rstrip())
        closed = end > begin and any(after.endswith(token, begin, end) for token in self.special)
        return end if closed else len(after)

    def _takes_parts(self) -> bool:
        """Whether the template itself reads content that is a list of parts."""
        parts = [{"type": "text", "text": "part-of-text"}]
        with contextlib.suppress(Exception):
            text, _ = self._text([{"role": "user", "content": parts}], {"tools": None})
            return "part-of-text" in text and "'type'" not in text and '"type"' not in text
        return False

    def _prepared(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message as Transformers hands it on; parts are joined where the template knows none."""
        content = message.get("content")
        if isinstance(content, list) and not self.takes_parts:
            message = {**message, "content": "\n".join(part["text"] for part in content)}
        said = next((message[key] for key in _REASONING if message.get(key) is not None), None)
        if said is None:
            return message
        return {"thinking": said, **message, "reasoning_content": said}


def _answer(renderer: Renderer, line: bytes) -> dict[str, Any]:
    try:
        return renderer.render(json.loads(line))
    except CannotRenderError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": f"the chat template needs more than {MEMORY_BYTES >> 20} MiB"}
    except jinja2.UndefinedError as error:
        hint = 'a turn without content may need "content": ""'
        return {"error": f"the chat template says: {_said(error)}; {hint}"}
    except Exception as error:  # whatever a template does
        return {"error": f"the chat template says: {_said(error)}"}


def _said(error: Exception) -> str:
    name = type(error).__name__
    return str(error) if name == "TemplateError" else f"{name}: {error}"


def main() -> None:
    for what, most in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, 0)):
        with contextlib.suppress(ValueError, OSError):  # not every system has every limit
            resource.setrlimit(what, (most, most))
    # A signal to all of a terminal's processes is for the one that trains: it still needs this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    lines, out = sys.stdin.buffer, sys.stdout.buffer
    signal.alarm(LONGEST_S)
    try:
        renderer = Renderer(**json.loads(lines.readline()))
        reply: dict[str, Any] = {"ready": True}
    except Exception as error:
        renderer, reply = None, {"error": f"the chat template cannot be used: {_said(error)}"}
    while True:
        out.write(json.dumps(reply).encode() + b"\n")
        out.flush()
        signal.alarm(0)
        line = lines.readline()
        if not line or renderer is None:
            return
        signal.alarm(LONGEST_S)
        reply = _answer(renderer, line)


if __name__ == "__main__":
    main()

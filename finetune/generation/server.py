"""A server that writes the answers: OpenAI's completions, as vLLM and SGLang serve them.

Prompts are sent as token ids, so that no template or tokenizer of the server stands between, and
the ids of answers are kept where the server returns them: vLLM's `return_token_ids`, SGLang's own
`/generate`. Another server's answers are text, which becomes tokens again.

What may be secret (the key, and what a URL may hold) is in no error and no file.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple, Self, TypeVar

import httpx2

from mtp_model.files.untrusted_json import parse, shown
from mtp_model.problems import UserError

KEY = "FINETUNE_SERVER_KEY"
"""The environment variable with the server's key, where it wants one."""

TRIES = 8
FIRST_WAIT_S = 1.0  # doubles with each failure
LONGEST_WAIT_S = 60.0
ANSWER_S = 1800.0  # that one answer may take
CONNECT_S = 30.0
_PASSING_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))
_AHEAD = 4  # answers that are asked for or wait for an earlier one, a request at a time

T = TypeVar("T")
P = TypeVar("P")


class ServerError(UserError):
    """A server that does not answer as it should: what it said, and what to do."""


class _PassingError(Exception):
    """A failure that may pass, and the seconds that the server asks to wait."""

    def __init__(self, found: str, wait_s: float = 0.0):
        super().__init__(found)
        self.wait_s = wait_s


class Written(NamedTuple):
    """What a server wrote behind a prompt: ids where it returns them, else text."""

    ids: tuple[int, ...] | None
    text: str
    ended: bool  # by an end token, not by the longest length


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How answers are to be written."""

    max_new_tokens: int
    temperature: float
    end_ids: tuple[int, ...]
    vocab_size: int


class Server:
    """A server, asked by many threads at once. A context manager: it ends their connections."""

    def __init__(
        self, url: str, model: str | None, requests: int, on_failure: Callable[[str], None]
    ):
        """ServerError where nothing answers there, or it does not serve the model."""
        self._where = url
        self.on_failure = on_failure
        """Told of what is tried again, by any thread, until there is a better word."""
        key = self._key = os.environ.get(KEY)
        self._ended = threading.Event()
        self._client = httpx2.Client(
            base_url=url.removesuffix("/").removesuffix("/v1"),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=requests, max_keepalive_connections=requests),
            trust_env=False,
        )
        try:
            self.model, self.kind = self._served(model)
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._client.close()

    def answer(self, document: int, prompt: Sequence[int], seed: int, wanted: Wanted) -> Written:
        """What the server writes behind a prompt; ServerError names the document."""
        sampling = {"temperature": wanted.temperature, "top_p": 1.0}
        if self.kind == "sglang":
            sampling |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
            sampling |= {"max_new_tokens": wanted.max_new_tokens, "sampling_seed": seed}
            sampling |= {"stop_token_ids": list(wanted.end_ids)}
            path, asked = "/generate", {"input_ids": list(prompt), "sampling_params": sampling}
        else:
            path, asked = "/v1/completions", {"model": self.model, "prompt": list(prompt)}
            asked |= {"max_tokens": wanted.max_new_tokens, "seed": seed, **sampling}
        if self.kind == "vllm":  # what it else takes from the model's generation_config.json
            asked |= {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
            asked |= {"stop_token_ids": list(wanted.end_ids), "return_token_ids": True}
        subject = f"document {document}"

        def read() -> Written:
            said = self._request("POST", path, subject, asked)
            written = _of_sglang(said) if self.kind == "sglang" else _of_openai(said, prompt)
            if any(not 0 <= token < wanted.vocab_size for token in written.ids or ()):
                raise ServerError(
                    f"{self._where}: {subject}: it wrote a token that the checkpoint lacks (its "
                    f"vocabulary has {wanted.vocab_size}); it serves another model"
                )
            return written

        return self._persist(read, subject)

    def _served(self, wanted: str | None) -> tuple[str, str]:
        """The name of the model, and the kind of the server, from what it says it serves."""

        def read() -> list[dict[str, Any]]:
            said = self._request("GET", "/v1/models", "its models")
            models = said.get("data")
            if not isinstance(models, list) or not all(
                isinstance(each, dict) and isinstance(each.get("id"), str) for each in models
            ):
                raise _PassingError("got an answer that is no list of models")
            return models

        models = self._persist(read, "its models")
        found = [each for each in models if wanted in (None, each["id"])]
        if len(found) != 1:
            names = ", ".join(shown(each["id"]) for each in models) or "nothing"
            asked = "one of them by --server-model" if wanted is None else f"{shown(wanted)}"
            raise ServerError(f"{self._where} serves {names}; needed {asked}")
        return found[0]["id"], str(found[0].get("owned_by"))

    def _request(self, method: str, path: str, subject: str, asked: Any = None) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, json=asked)
        except httpx2.RequestError as error:
            raise _PassingError(f"the connection failed ({type(error).__name__})") from error
        status = answer.status_code
        if status in _PASSING_STATUS:
            raise _PassingError(f"it answered {status}", _asked_wait_s(answer.headers))
        if status in (401, 403):
            detail = f"it answered {status}: put its key into the environment variable {KEY}"
            raise ServerError(f"{self._where}: {subject}: {detail}")
        if status != 200:
            said = self._without_key(_message(answer.content))
            raise ServerError(f"{self._where}: {subject}: it answered {status}{said}")
        try:
            said: Any = parse(answer.content)
        except ValueError as error:
            raise _PassingError("its answer is not whole JSON") from error
        if not isinstance(said, dict):
            raise _PassingError("its answer is no JSON object")
        return said

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "(the key)") if self._key else text

    def _persist(self, task: Callable[[], T], subject: str) -> T:
        """The result of a task, which is tried again when it fails in passing."""
        failures = 0
        while True:
            try:
                return task()
            except _PassingError as failure:
                failures += 1
                if failures >= TRIES or self._ended.is_set():
                    raise ServerError(
                        f"{self._where}: {subject}: {failure}; tried {failures} times; the same "
                        "command goes on when the server answers again"
                    ) from None
                self.on_failure(f"{subject}: {failure}; trying again")
                wait_s = max(FIRST_WAIT_S * 2 ** (failures - 1), failure.wait_s)
                self._ended.wait(min(wait_s, LONGEST_WAIT_S))


def written_in_order(
    ask: Callable[[P], Written], prompts: Iterator[P], requests: int
) -> Iterator[list[tuple[P, Written]]]:
    """Prompts with their answers, in their order, as they come; so many are asked for at once.

    A later answer waits for an earlier one, up to four times as many as are asked for at once.
    """
    waiting: deque[tuple[P, Future[Written]]] = deque()
    asked: SimpleQueue[tuple[P, Future[Written]] | None] = SimpleQueue()
    # An answer may take half an hour. Of a pool of threads Python would wait for it at its end,
    # and nothing that was interrupted, or has failed, would end before.
    for _ in range(requests):
        threading.Thread(target=_ask_all, args=(ask, asked), daemon=True).start()
    try:
        while True:
            while len(waiting) < _AHEAD * requests:
                prompt = next(prompts, None)
                if prompt is None:
                    break
                waiting.append((prompt, Future()))
                asked.put(waiting[-1])
            if not waiting:
                return
            first, answer = waiting.popleft()
            ready = [(first, answer.result())]
            while waiting and waiting[0][1].done() and waiting[0][1].exception() is None:
                following, answer = waiting.popleft()
                ready.append((following, answer.result()))
            yield ready
    finally:
        for _, answer in waiting:
            answer.cancel()
        for _ in range(requests):
            asked.put(None)


def _ask_all(
    ask: Callable[[P], Written], asked: "SimpleQueue[tuple[P, Future[Written]] | None]"
) -> None:
    """What one thread does until there is None: each prompt's answer goes into its future."""
    while (job := asked.get()) is not None:
        prompt, answer = job
        if answer.set_running_or_notify_cancel():
            try:
                answer.set_result(ask(prompt))
            except BaseException as error:  # whoever waits for the answer raises it
                answer.set_exception(error)


def _of_openai(said: dict[str, Any], prompt: Sequence[int]) -> Written:
    """vLLM's answer, or another server's, to one prompt."""
    choice = _first(said.get("choices"))
    fed = choice.get("prompt_token_ids", said.get("prompt_token_ids"))
    if fed is not None and fed != list(prompt):
        raise ServerError(
            f"the server read {len(fed)} tokens where {len(prompt)} were sent: it changes prompts, "
            "so its answers are not to them; turn that off"
        )
    ids = choice.get("token_ids", choice.get("response_token_ids"))
    reason, text = choice.get("finish_reason"), choice.get("text")
    if reason not in ("stop", "length") or not isinstance(text, str):
        raise _PassingError(f"its answer ended by {shown(reason)}, needed stop or length")
    return Written(None if ids is None else _token_ids(ids), text, reason == "stop")


def _of_sglang(said: dict[str, Any]) -> Written:
    """What SGLang's /generate answers to one prompt."""
    about = said.get("meta_info")
    reason = about.get("finish_reason") if isinstance(about, dict) else None
    kind = reason.get("type") if isinstance(reason, dict) else None
    if kind not in ("stop", "length"):
        raise _PassingError(f"its answer ended by {shown(kind)}, needed stop or length")
    return Written(_token_ids(said.get("output_ids")), "", kind == "stop")


def _first(choices: Any) -> dict[str, Any]:
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise _PassingError("its answer has not one choice")
    return choices[0]


def _token_ids(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise _PassingError("its answer has no list of token ids")
    return tuple(ids)


def _message(content: bytes) -> str:
    """What an answer says of an error, in the forms that servers have for it."""
    try:
        said: Any = parse(content)
    except ValueError:
        return ""
    inner = said.get("error", said) if isinstance(said, dict) else None
    found = inner.get("message", inner.get("detail")) if isinstance(inner, dict) else inner
    return f": {shown(found)}" if found is not None else ""


def _asked_wait_s(headers: httpx2.Headers) -> float:
    """Seconds that an answer asks to wait; 0 when it does not say."""
    value = headers.get("Retry-After", "")
    return float(value[:9]) if value.isascii() and value.isdigit() else 0.0

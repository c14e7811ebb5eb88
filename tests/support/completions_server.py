"""A server on loopback that completes prompts as vLLM, SGLang or a plain OpenAI server do.

It can fail as real ones do: for each request a list of faults is taken from first to last.
"""

import contextlib
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "org/tiny"
EOS = 1


class CompletionsServer(ThreadingHTTPServer):
    """`faults` by the first token of a prompt; `asked` are the bodies that were answered."""

    daemon_threads = True

    def __init__(self, kind: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kind = kind
        self.models = [MODEL]
        self.key: str | None = None
        self.faults: dict[int, list[str]] = defaultdict(list)
        self.asked: list[dict[str, Any]] = []
        self.at_once, self.most_at_once = 0, 0
        self.lock = threading.Lock()
        self.gate = threading.Barrier(1)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of ours."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def completions_server(kind: str) -> Iterator[CompletionsServer]:
    server = CompletionsServer(kind)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(prompt: list[int], most: int) -> tuple[list[int], str]:
    """What the server writes behind a prompt, with the token that ends it, and why it ends."""
    wanted = 3 + sum(prompt) % 7
    ids = [3 + (31 * sum(prompt) + 7 * i) % 250 for i in range(min(wanted, most))]
    return (ids, "length") if wanted > most else ([*ids[:-1], EOS], "stop")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any  # CompletionsServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        if self._is_let_in():
            owner = "somebody" if self.server.kind == "openai" else self.server.kind
            models = [{"id": name, "owned_by": owner} for name in self.server.models]
            self._say(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_let_in():
            return
        server = self.server
        with server.lock:
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            server.gate.wait(10)
            prompt = body["input_ids"] if server.kind == "sglang" else body["prompt"]
            with server.lock:
                faults = server.faults[prompt[0]]
                fault = faults.pop(0) if faults else None
            self._fail(fault) if fault else self._complete(body, prompt)
        finally:
            with server.lock:
                server.at_once -= 1

    def _is_let_in(self) -> bool:
        if self.server.key in (None, self.headers.get("Authorization", "").removeprefix("Bearer ")):
            return True
        self._say(401, {"error": {"message": f"no such key: {self.headers['Authorization']}"}})
        return False

    def _complete(self, body: dict[str, Any], prompt: list[int]) -> None:
        self.server.asked.append(body)
        if self.server.kind == "sglang":
            assert self.path == "/generate"
            ids, reason = completion(prompt, body["sampling_params"]["max_new_tokens"])
            about = {"finish_reason": {"type": reason}, "completion_tokens": len(ids)}
            self._say(200, {"text": "?", "output_ids": ids, "meta_info": about})
            return
        assert self.path == "/v1/completions"
        assert body["model"] == MODEL
        ids, reason = completion(prompt, body["max_tokens"])
        choice = {"index": 0, "text": f"text of {len(ids)}", "finish_reason": reason}
        if body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        self._say(200, {"object": "text_completion", "choices": [choice]})

    def _fail(self, fault: str) -> None:
        if fault == "drop":
            self.close_connection = True
        elif fault == "truncate":
            self._say(200, {"choices": []}, missing=3)
        elif fault == "half":
            self.send_response(200)
            self.send_header("Content-Length", "12")
            self.end_headers()
            self.wfile.write(b'{"choices":[')
        elif fault == "abort":
            choice = {"text": "", "finish_reason": "abort", "token_ids": []}
            self._say(200, {"choices": [choice]})
        elif fault == "long":
            said = "This model's maximum context length is 8 tokens, key sesame-open"
            self._say(400, {"error": {"message": said, "code": 400}})
        else:
            self._say(int(fault), {"error": {"message": "busy"}}, {"Retry-After": "0"})

    def _say(
        self,
        status: int,
        value: dict[str, Any],
        headers: dict[str, str] | None = None,
        missing: int = 0,
    ) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) - missing])
        self.close_connection = bool(missing)

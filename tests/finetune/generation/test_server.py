"""`generate --server`: answers are kept in order and whole, whatever a server does meanwhile."""

import dataclasses
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from advice import follows
from completions_server import EOS, MODEL, CompletionsServer, completion, completions_server

from finetune import cli
from finetune.data.tokens import TextEncoder
from finetune.generate import GenerateSettings, as_json, generate
from finetune.generation import server as client
from finetune.generation.answers import AnswersError
from finetune.generation.server import ServerError
from finetune.settings import MeshSettings, SettingsError
from mtp_model import progress
from mtp_model.checkpoint.directory import open_checkpoint

COUNT, NEW = 40, 6


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.001)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """The first token of each is its number, which faults are chosen by."""
    rng = np.random.default_rng(0)
    return [[n + 3, *rng.integers(3, 300, 2 + n % 5).tolist()] for n in range(COUNT)]


@pytest.fixture
def settings(checkpoint, prompts, tmp_path) -> GenerateSettings:
    file = tmp_path / "prompts.jsonl"
    rows = [{"input_ids": [*p, 5], "loss_mask": [0] * len(p) + [1]} for p in prompts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return GenerateSettings(
        checkpoint=str(checkpoint),
        data=(file,),
        out=tmp_path / "answers.jsonl",
        max_new_tokens=NEW,
        seed=2,
        requests=8,
    )


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def at(server: CompletionsServer, settings: GenerateSettings, **more) -> GenerateSettings:
    return dataclasses.replace(settings, server=server.url, **more)


def expected(prompts: list[list[int]]) -> list[dict]:
    answers = [completion(prompt, NEW)[0] for prompt in prompts]
    assert {answer[-1] == EOS for answer in answers} == {True, False}
    return [
        {"input_ids": prompt + ids, "loss_mask": [0] * len(prompt) + [1] * len(ids)}
        for prompt, ids in zip(prompts, answers, strict=True)
    ]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_servers_tokens_are_kept(kind, settings, prompts):
    """In the order of the prompts; many are asked for at once, each with a seed of its own."""
    with completions_server(kind) as server:
        server.gate = threading.Barrier(8)  # nothing is answered before eight were asked
        counts = generate(at(server, settings))
    assert read_rows(settings.out) == expected(prompts)
    assert server.most_at_once == 8
    assert counts.documents == COUNT
    assert counts.tokens == sum(sum(row["loss_mask"]) for row in expected(prompts))
    assert as_json(settings, counts)["temperature"] == 1.0
    sampling = [body.get("sampling_params", body) for body in server.asked]
    seeds = {each.get("seed", each.get("sampling_seed")) for each in sampling}
    assert len(seeds) == COUNT
    assert all(each["stop_token_ids"] == [EOS] for each in sampling)
    neutral = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert all(neutral.items() <= each.items() for each in sampling)


def test_text_becomes_tokens_where_a_server_returns_no_ids(settings, prompts, checkpoint):
    with completions_server("openai") as server:
        generate(at(server, settings, max_documents=3))
    encoder = TextEncoder(open_checkpoint(checkpoint).path)
    for row, prompt in zip(read_rows(settings.out), prompts, strict=False):
        ids, reason = completion(prompt, NEW)
        text = encoder.encode_answer(f"text of {len(ids)}", ended=reason == "stop")
        assert row["input_ids"] == prompt + text
        assert (text[-1] == EOS) == (reason == "stop")
    assert "return_token_ids" not in server.asked[0], "a strict server would refuse it"


def test_what_passes_is_tried_again(settings, prompts, monkeypatch):
    """A busy server, a broken connection, half an answer, one that was aborted: every answer comes
    all the same, and the progress says what is waited for."""
    notes = []
    say = progress._Lines.report

    def noted(display, done, total, note=""):
        notes.append(note)
        say(display, done, total, note)

    monkeypatch.setattr(progress._Lines, "report", noted)
    faults = ["429", "503", "drop", "truncate", "half", "abort"]
    with completions_server("vllm") as server:
        for number, fault in enumerate(faults):
            server.faults[3 + 5 * number] = [fault, faults[number - 1]]
        generate(at(server, settings))
        assert not any(server.faults.values())
    assert any("it answered 503; trying again" in note for note in notes)
    assert read_rows(settings.out) == expected(prompts)


@follows("command goes on when the server answers again")
def test_an_interrupted_file_goes_on(settings, prompts, monkeypatch, tmp_path):
    """What came before the document that failed is kept; the key is in no file and no message."""
    monkeypatch.setenv("FINETUNE_SERVER_KEY", "sesame-open")
    with completions_server("vllm") as server:
        server.key = "sesame-open"
        server.faults[prompts[20][0]] = ["503"] * client.TRIES
        with pytest.raises(ServerError, match=r"document 20: it answered 503; tried 8 times") as e:
            generate(at(server, settings))
        partial = settings.out.with_name("answers.jsonl.partial")
        assert read_rows(partial) == expected(prompts)[:20]
        asked = len(server.asked)
        with pytest.raises(AnswersError, match="begun with other settings"):
            generate(at(server, settings, temperature=0.5))
        generate(at(server, settings))
        assert len(server.asked) - asked == COUNT - 20
        assert read_rows(settings.out) == expected(prompts)

        server.faults[prompts[1][0]] = ["long"]
        again = dataclasses.replace(settings, out=tmp_path / "again.jsonl")
        with pytest.raises(ServerError, match=r"document 1: it answered 400: This model's") as f:
            generate(at(server, again))
    assert "(the key)" in str(f.value)
    files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    for said in (str(e.value).encode(), str(f.value).encode(), *files):
        assert b"sesame" not in said


FAILS_WHILE_ANOTHER_HANGS = """
import threading
from finetune.generation.server import written_in_order
hangs, never = threading.Event(), threading.Event()
def ask(prompt):
    if prompt == "hangs":
        hangs.set()
        never.wait()
    hangs.wait()
    raise OSError("this one failed")
list(written_in_order(ask, iter(["fails", "hangs"]), 2))
"""


def test_nothing_waits_for_an_answer_that_does_not_come():
    """A command that failed, or was interrupted, ends at once."""
    script = [sys.executable, "-c", FAILS_WHILE_ANOTHER_HANGS]
    ended = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stderr.endswith("OSError: this one failed\n")


@follows(
    "put its key into the environment variable",
    "one of them by --server-model",
    "it serves another model",
)
def test_a_server_that_cannot_be_used_is_said(settings, prompts, monkeypatch, capsys):
    def told(server: CompletionsServer, **more) -> str:
        with pytest.raises(ServerError) as error:
            generate(at(server, settings, **more))
        return str(error.value)

    with completions_server("vllm") as server:
        server.key = "sesame-open"
        monkeypatch.setenv("FINETUNE_SERVER_KEY", "not-this")
        said = told(server)
        assert "put its key into the environment variable FINETUNE_SERVER_KEY" in said
        assert "not-this" not in said
        monkeypatch.setenv("FINETUNE_SERVER_KEY", "sesame-open")
        server.models.append("org/other")
        assert f"serves {MODEL}, org/other; needed one of them by --server-model" in told(server)
        assert "needed org/third" in told(server, server_model="org/third")
        small = dataclasses.replace(settings, max_documents=4, server_model=MODEL)
        monkeypatch.setattr("completions_server.completion", lambda *_: ([9999], "length"))
        with pytest.raises(ServerError, match="it wrote a token that the checkpoint lacks"):
            generate(at(server, small, overwrite=True))
        monkeypatch.undo()
        monkeypatch.setenv("FINETUNE_SERVER_KEY", "sesame-open")
        generate(at(server, small, overwrite=True))
    assert read_rows(settings.out) == expected(prompts)[:4]
    nobody = dataclasses.replace(settings, server=server.url, overwrite=True)
    monkeypatch.setattr(client, "TRIES", 2)
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.5)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.05)
    with pytest.raises(ServerError, match=r"its models: the connection failed \(ConnectError\)"):
        generate(nobody)
    said = capsys.readouterr().err
    assert f"reach {server.url}: " in said
    assert "its models: the connection failed (ConnectError); trying again" in said


@pytest.mark.parametrize(
    "address", ["host:8000", "ftp://host", "http://me:secret@host", "http://host?key=secret"]
)
def test_an_address_is_plain(address, settings):
    wrong = dataclasses.replace(settings, speculate=1, mesh=MeshSettings(expert=2))
    with pytest.raises(SettingsError) as error:
        generate(dataclasses.replace(wrong, server=address))
    first, second, third = error.value.faults
    assert first.startswith("--server needed http://HOST:PORT")
    assert "secret" not in str(error.value)
    assert second.startswith("--speculate is for answers without --server")
    assert third == "--mesh.expert is 2, needed none with --server: no weights are here"


def test_the_command_line_takes_a_server(settings, prompts, capsys):
    words = ["generate", "--checkpoint", settings.checkpoint, "--data", str(settings.data[0])]
    words += ["--out", str(settings.out), "--max-new-tokens", str(NEW), "--max-documents", "2"]
    with completions_server("vllm") as server:
        assert cli.run([*words, "--server", f"{server.url}/v1", "--server-model", MODEL]) == 0
    assert "2 answers" in " ".join(capsys.readouterr().out.split())
    assert read_rows(settings.out) == expected(prompts)[:2]

"""Conversations by a chat template: Transformers' text and tokens, loss on answers alone."""

import datetime
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from finetune.data import chat as chat_module
from finetune.data.chat import ChatTemplate, Rendered
from finetune.data.corpus import scan
from finetune.data.packing import Packer, Position
from finetune.data.records import DataError, parse_record
from finetune.data.run_text import open_run_text
from finetune.data.tokens import TextEncoder, TokenDocuments
from finetune.settings import RunSettings
from mtp_model import ModelConfig
from tools.make_tiny_checkpoint import EOS, make_tiny_checkpoint

VOCAB = 512
USER, ANSWER = "<｜User｜>", "<｜Assistant｜>"  # noqa: RUF001
SPECIAL = [USER, ANSWER, "<|start|>", "<|end|>", "<call>", "</call>"]

# Templates of our own in the manner of those that models are released with.
DEEPSEEK = """
{%- set ns = namespace(system='', is_tool=false) -%}
{%- for m in messages if m['role'] == 'system' -%}
  {%- set ns.system = ns.system + ('\n\n' if ns.system else '') + m['content'] -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}{{ 'USER' + m['content'] }}
  {%- elif m['role'] == 'tool' -%}{%- set ns.is_tool = true -%}{{ '<out>' + m['content'] }}
  {%- elif m['role'] == 'assistant' -%}
    {%- if not ns.is_tool -%}{{ 'ANSWER' }}{%- endif -%}{%- set ns.is_tool = false -%}
    {%- for call in m['tool_calls'] or [] -%}
      {{ '<call>' + call['function']['name'] + '\n```json\n' + call['function']['arguments']
         + '\n```</call>' }}
    {%- endfor -%}
    {{ (m['content'] or '').split('</think>')[-1] + eos_token }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.is_tool -%}{{ 'ANSWER' }}{%- endif -%}
""".replace("USER", USER).replace("ANSWER", ANSWER)
# DeepSeek-R1 asks with <think>, and takes the thoughts out of what was answered.
THINKS = DEEPSEEK.replace(
    f"{{{{ '{ANSWER}' }}}}{{%- endif -%}}\n", f"{{{{ '{ANSWER}<think>\\n' }}}}{{%- endif -%}}\n"
)
CHATML = """{% for m in messages %}
    {% if loop.first and m.role != 'system' %}
{{ '<|start|>system\nYou help.<|end|>' }}
    {% endif %}
{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
LLAMA = """{% for m in messages %}
{% set content = '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<call>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{- content -}}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"""
MARKED = """{% for m in messages %}
{{ '<|start|>' + m['role'] + '\n' }}
    {%- if m['role'] == 'assistant' -%}
        {% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}
    {%- else %}{{ m['content'] + '<|end|>' }}{% endif %}

{% endfor %}"""
PARTS = """{{ tools | tojson(indent=2) if tools }}{% for m in messages -%}
  {{ '<|start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}
    {%- for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ '<|end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
TRICKS = """{%- macro shown(x) -%}[{{ x | tojson(indent=1) }}|{{ x | tojson }}]{%- endmacro -%}
{%- for m in messages -%}
  {%- if m.role == 'tool' -%}{%- continue -%}{%- endif -%}
  {{ strftime_now('%d %b %Y') }}{{ unk_token }}{{ pad_token }}{{ dict(b=1, a='<é>') | tojson }}
  {{- dict(b=1, a=2) | tojson(sort_keys=true, separators=(',', ':')) }}
  {% if m.role == 'assistant' %}
{{ m.reasoning_content }}/{{ m.thinking }}
    {%- generation -%}
  {{ m.content }}|{{ m.content | title }} {{ shown(m) }}
    {%- endgeneration -%}
  {% else %}
{{ shown(m) }}
  {% endif %}
{% endfor %}{{ documents is none }}"""
TEMPLATES = {
    "deepseek": DEEPSEEK,
    "thinks": THINKS,
    "chatml": CHATML,
    "llama": LLAMA,
    "marked": MARKED,
    "parts": PARTS,
    "tricks": TRICKS,
}


def turn(role: str, content, **others):
    return {"role": role, "content": content, **others}


CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": "<é>"}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "é <b>", "parameters": {}}}
CHATS = {
    "short": [turn("user", "def first"), turn("assistant", "return item")],
    "long": [
        turn("system", "Be brief."),
        turn("user", " a  "),
        turn("assistant", " b\n"),
        turn("user", "é 日本語"),
        turn("assistant", "d <b> & 'e'"),
        turn("user", "a last word"),
    ],
    "thoughts": [turn("user", "a"), turn("assistant", "<think>\nx\n</think>\n\nb")],
    "reasoning": [turn("user", "a"), turn("assistant", "b", reasoning_content="hm", name=None)],
    "empty": [turn("user", "a"), turn("assistant", ""), turn("user", "b"), turn("assistant", "c")],
    "tools": [
        turn("user", "weather?"),
        turn("assistant", "", tool_calls=[CALL, CALL]),
        turn("tool", "sunny", tool_call_id="1"),
        turn("assistant", "It is sunny."),
    ],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    make_tiny_checkpoint(folder, num_files=1, sizes={"num_hidden_layers": 1, "vocab_size": VOCAB})
    return folder


@pytest.fixture
def with_template(source, tmp_path):
    """Makes a checkpoint's tokenizer files with a chat template in tokenizer_config.json."""

    def make(template, name="made") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        tokenizer.add_special_tokens(SPECIAL)
        tokenizer.add_tokens(["<think>", "</think>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = json.loads((source / "tokenizer_config.json").read_text())
        settings |= {} if template is None else {"chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        return folder

    return make


def chat_of(messages, **others):
    today = datetime.date.today().isoformat()
    record = parse_record({"messages": messages, **others})
    return type(record)(**{**vars(record), "day": today})


def rendered_by(encoder: TextEncoder, chat) -> Rendered:
    assert encoder.chats is not None
    return encoder.chats.render(chat)


def learnt(encoder: TextEncoder, chat) -> list[str]:
    """The stretches of text that are learnt."""
    rendered = rendered_by(encoder, chat)
    return [rendered.text[begin:end] for begin, end in rendered.spans]


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_tokens_are_those_of_transformers(with_template, name):
    transformers = pytest.importorskip("transformers")
    folder = with_template(TEMPLATES[name])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    encoder = TextEncoder(folder)
    for kind, messages in CHATS.items():
        tools = [TOOL] if kind == "tools" else None
        wanted = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        chat = chat_of(messages, tools=tools)
        assert rendered_by(encoder, chat).text == wanted, kind
        tokens = encoder.encode(chat)
        with_mask = theirs.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        assert tokens.ids.tolist() == with_mask["input_ids"], kind
        if "endgeneration" in TEMPLATES[name]:
            assert tokens.loss_mask.tolist() == with_mask["assistant_masks"], kind
            assert 0 < tokens.loss_mask.sum() < len(tokens.ids)


def test_content_in_parts_is_given_to_a_template_that_takes_it(with_template):
    transformers = pytest.importorskip("transformers")
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [turn("user", parts), turn("assistant", parts)]
    folder = with_template(PARTS)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    wanted = theirs.apply_chat_template(messages, tokenize=False)
    assert rendered_by(TextEncoder(folder), chat_of(messages)).text == wanted
    joined = rendered_by(TextEncoder(with_template(CHATML, "other")), chat_of(messages)).text
    assert "assistant\none\ntwo<|end|>" in joined


LEARNT = {
    "deepseek": {
        "short": [f"return item{EOS}"],
        "long": [f" b\n{EOS}", f"d <b> & 'e'{EOS}"],
        "empty": [EOS, f"c{EOS}"],
        "tools": ['<call>f\n```json\n{"a": "<é>"}\n```</call>' * 2 + EOS, f"It is sunny.{EOS}"],
    },
    "thinks": {"long": [f" b\n{EOS}", f"d <b> & 'e'{EOS}"], "thoughts": [f"\n\nb{EOS}"]},
    "chatml": {"long": [" b\n<|end|>", "d <b> & 'e'<|end|>"], "empty": ["<|end|>", "c<|end|>"]},
    "llama": {"long": ["b<call>", "d <b> & 'e'<call>"]},
    "marked": {"long": [" b\n<|end|>", "d <b> & 'e'<|end|>"]},
}


@pytest.mark.parametrize("name", LEARNT)
def test_what_the_assistant_writes_is_learnt_with_its_end_and_nothing_else(with_template, name):
    encoder = TextEncoder(with_template(TEMPLATES[name]))
    assert encoder.tokenizer is not None
    for kind, wanted in LEARNT[name].items():
        chat = chat_of(CHATS[kind])
        assert learnt(encoder, chat) == wanted, kind
        tokens = encoder.encode(chat)
        ids = tokens.ids[tokens.loss_mask == 1].tolist()
        text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
        assert text == "".join(wanted), kind


def test_turns_may_be_left_out_of_the_loss(with_template):
    first, second = turn("assistant", "one"), turn("assistant", "two")
    question = turn("user", "q")
    for name in ("chatml", "marked"):
        encoder = TextEncoder(with_template(TEMPLATES[name], name))
        for record in (
            {"messages": [question, {**first, "weight": 0}, question, {**second, "weight": 1}]},
            {"messages": [question, {**first, "train": False}, question, second]},
            {"prompt": [question, first, question], "completion": [second]},
        ):
            assert learnt(encoder, parse_record(record)) == ["two<|end|>"]


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [turn("user", "q"), turn("assistant", "a")]},
        {"prompt": [turn("user", "q")], "completion": [turn("assistant", "a")]},
        {"prompt": "q", "messages": [turn("user", "q"), turn("assistant", "a")]},
        {"messages": [turn("user", "q"), turn("assistant", "a")], "tools": "[]", "id": 3},
    ],
)
def test_other_ways_to_write_a_conversation(record):
    same = parse_record({"messages": [turn("user", "q"), turn("assistant", "a")]})
    assert parse_record(record) == same


def test_system_and_tools_may_stand_beside_the_turns(with_template):
    encoder = TextEncoder(with_template(PARTS))
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    beside = {"conversations": turns, "system": "s", "tools": json.dumps([TOOL])}
    messages = [turn("system", "s"), turn("user", "q"), turn("assistant", "a")]
    rendered = rendered_by(encoder, parse_record(beside))
    assert rendered == rendered_by(encoder, chat_of(messages, tools=[TOOL]))
    assert '"description": "é <b>"' in rendered.text


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"messages": []}, "messages is empty, needed messages"),
        ({"messages": "hello"}, "messages is str, needed messages"),
        ({"messages": ["hello"]}, r'messages\[0\] is str, needed {"role", "content"}'),
        ({"messages": [{"content": "a"}]}, r"messages\[0\] has role missing"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
        ({"messages": [turn("user", 3)]}, r"messages\[0\] has content int"),
        ({"messages": [turn("user", [{"type": "image"}])]}, "has content of type image"),
        ({"messages": [turn("user", "a\ud800")]}, "has half a character at 1"),
        (
            {"messages": [turn("assistant", "a", weight=0.5)]},
            "turn 0 has weight 0.5, needed 0 or 1",
        ),
        ({"conversations": [{"from": "cat", "value": "a"}]}, "is from 'cat', known are assistant"),
        ({"messages": CHATS["short"], "text": "a"}, "has the keys messages, text"),
        (
            {"messages": CHATS["short"], "prompt": "a", "completion": "b"},
            "has the keys completion, messages, prompt",
        ),
        ({"prompt": CHATS["short"], "completion": "a"}, "completion is str, needed messages"),
        ({"messages": CHATS["short"], "tools": {}}, "tools is dict, needed a list"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "write it as messages"),
    ],
)
def test_what_is_no_conversation_says_why(record, wanted):
    with pytest.raises(ValueError, match=wanted):
        parse_record(record)


# --- where templates are


def write_chats(folder: Path, *chats) -> Path:
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": each}) + "\n" for each in chats))
    return file


def test_without_a_template_the_error_says_what_to_do_and_it_works(with_template, tmp_path):
    folder, file = with_template(None), write_chats(tmp_path, CHATS["short"], CHATS["long"])
    settings = RunSettings(checkpoint=str(folder), data=(file,), out=tmp_path / "run")
    config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    with pytest.raises(
        DataError, match=r"has no chat template.* as chat_template\.jinja"
    ) as caught:
        open_run_text(settings, config)
    assert len(caught.value.faults) == 1
    (folder / "chat_template.jinja").write_text(CHATML)
    text = open_run_text(settings, config)
    assert (len(text.train), len(text.held_out or ())) == (1, 1)


def test_the_file_is_before_the_setting_and_named_templates_are_chosen(with_template):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    folder = with_template(named)
    chat = chat_of(CHATS["short"])
    tooled = chat_of(CHATS["short"], tools=[TOOL])

    def written(record):
        return rendered_by(TextEncoder(folder), type(record)(**{**vars(record), "learnt": ()})).text

    assert (written(chat), written(tooled)) == ("D", "T")
    (folder / "chat_template.jinja").write_text("F")
    assert (written(chat), written(tooled)) == ("F", "F")


@pytest.mark.parametrize("template", [3, [3], [{"name": "default"}], {"default": 3}])
def test_a_template_that_is_none_is_named(with_template, template):
    with pytest.raises(
        DataError, match=r"tokenizer_config\.json has a chat_template that is no text"
    ):
        TextEncoder(with_template(template))


def test_the_day_is_that_of_the_data(with_template, tmp_path):
    """A run that goes on tomorrow must see the same text; other text is other data."""
    folder = with_template("{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    file = write_chats(tmp_path, CHATS["short"])
    encoder = TextEncoder(folder)
    digests = []
    for day in (datetime.datetime(2024, 2, 29, 12), datetime.datetime(2026, 1, 1, 12)):
        os.utime(file, (day.timestamp(), day.timestamp()))
        corpus = scan([file], VOCAB, encoder.chats)
        assert rendered_by(encoder, corpus.read(0)).text.startswith(f"{day:%Y-%m-%d}<|start|>")
        digests.append(corpus.digest)
    assert digests[0] != digests[1]
    undated = TextEncoder(with_template(CHATML, "undated")).chats
    os.utime(file, (0, 0))
    before = scan([file], VOCAB, undated).digest
    os.utime(file)
    assert scan([file], VOCAB, undated).digest == before


# --- templates that do not fit, and hostile ones


def test_turns_that_are_rendered_otherwise_later_are_refused_and_the_advice_works(with_template):
    """As Qwen3's template does: thoughts stay in the last turn alone."""
    keeps_last = CHATML.replace(
        "m['content']",
        "(m['content'] if loop.last else m['content'].split('</think>')[-1])",
    )
    encoder = TextEncoder(with_template(keeps_last))
    thought = turn("assistant", "<think>x</think>b")
    turns = [turn("user", "a"), thought, turn("user", "c"), thought]
    with pytest.raises(ValueError, match=r"turn 1 is rendered otherwise .* \"prompt\" and it as"):
        encoder.encode(chat_of(turns))
    for number in (1, 3):
        record = {"prompt": turns[:number], "completion": turns[number : number + 1]}
        assert learnt(encoder, parse_record(record)) == ["<think>x</think>b<|end|>"]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{% for", "cannot be used: TemplateSyntaxError"),
        ("{{ raise_exception('Roles must alternate') }}", "says: Roles must alternate"),
        ("{{ messages[7].content }}", "says: UndefinedError"),
        ("{{ messages | length }}", "is rendered otherwise"),
        ("{% for m in messages if m.role == 'user' %}{{ m.role }}{% endfor %}", "writes nothing"),
        ("{% if 0 %}{% generation %}{% endgeneration %}{% endif %}a", "writes nothing"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ dict.__init__ }}{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
        ("{% set ns = namespace(__class__=1) %}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns['_x'] = 1 %}", "cannot be used"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError"),
        ("{{ 'a' * 10 ** 11 }}", "needs more than 1024 MiB"),
        ("{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}"
         "{% endfor %}{{ ns.a }}", "needs more than"),
        ("{% for i in range(99999) %}{{ 'aaaaaaaaaa' * 99 }}{% endfor %}", "writes more than"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    ],
)  # fmt: skip
def test_a_template_that_fails_is_an_error_that_says_so(with_template, tmp_path, template, wanted):
    encoder = TextEncoder(with_template(template))
    with pytest.raises(DataError, match=wanted):
        scan([write_chats(tmp_path, CHATS["short"])], VOCAB, encoder.chats)


@pytest.mark.parametrize(
    "reached",
    [
        "self._TemplateReference__context",
        "lipsum.__globals__",
        "strftime_now.__code__",
        "dict.__class__",
        "''|attr('__class__')",
        "messages|map(attribute='__class__')|join",
    ],
)
def test_a_template_sees_nothing_of_python(reached):
    template = ChatTemplate({"default": "[{{ REACHED }}]".replace("REACHED", reached)}, {}, [])
    assert template.render(parse_record({"messages": [turn("user", "a")]})).text == "[]"


def test_a_template_without_end_is_ended_and_the_next_conversation_is_rendered(monkeypatch):
    endless = "{% if messages | length > 2 %}" + "{% for i in range(99999) %}" * 4
    endless += "{% endfor %}" * 4 + "{% endif %}" + CHATML
    template = ChatTemplate({"default": endless}, {}, SPECIAL)
    short = parse_record({"messages": CHATS["short"][:1]})
    for _ in range(2):
        assert "def first<|end|>" in template.render(short).text
        with monkeypatch.context() as patch:
            patch.setattr(chat_module, "_TIMEOUT_S", 1.0)
            with pytest.raises(ValueError, match="takes longer than 1 s"):
                template.render(parse_record({"messages": CHATS["long"]}))


def test_a_template_that_cannot_be_compiled_in_time_is_ended(monkeypatch):
    monkeypatch.setattr(chat_module, "_TIMEOUT_S", 1.0)
    template = ChatTemplate({"default": "{{ 2 ** (2 ** 99) }}"}, {}, [])
    with pytest.raises(ValueError, match="takes longer than 1 s"):
        template.render(parse_record({"messages": CHATS["short"]}))


def test_an_interrupt_does_not_reach_the_process_that_renders():
    template = ChatTemplate({"default": CHATML}, {}, SPECIAL)
    short = parse_record({"messages": CHATS["short"]})
    before = template.render(short)
    [process] = template._processes.values()
    assert os.getpgid(process.pid) != os.getpgid(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    assert template.render(short) == before
    assert template._processes["default"] is process
    del template
    assert process.wait(10) == -signal.SIGKILL, "it ends with the template"


def test_faults_of_many_conversations_are_reported_together(with_template, tmp_path):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    encoder = TextEncoder(with_template(strict + CHATML))
    bad = [turn("assistant", "hello")]
    file = write_chats(tmp_path, bad, CHATS["short"], bad)
    with pytest.raises(DataError) as caught:
        scan([file], VOCAB, encoder.chats)
    wanted = "the chat template says: user first"
    assert caught.value.faults == [f"{file}:{line} {wanted}" for line in (1, 3)]


def test_conversations_without_an_answer_have_nothing_to_learn(with_template, tmp_path):
    encoder = TextEncoder(with_template(CHATML))
    silent = [[turn("user", "a")], [turn("user", "a"), turn("assistant", "")]]
    with pytest.raises(DataError, match="nothing to learn in any of 2 documents"):
        scan([write_chats(tmp_path, *silent)], VOCAB, encoder.chats)
    corpus = scan([write_chats(tmp_path, *silent, CHATS["short"])], VOCAB, encoder.chats)
    assert corpus.num_idle == 2


def test_tokens_are_those_of_the_file(with_template, tmp_path):
    encoder = TextEncoder(with_template(DEEPSEEK))
    corpus = scan([write_chats(tmp_path, *CHATS.values())], VOCAB, encoder.chats)
    documents = TokenDocuments(corpus, encoder, VOCAB)
    for number, messages in enumerate(CHATS.values()):
        wanted = encoder.encode(chat_of(messages))
        assert documents[number].ids.tolist() == wanted.ids.tolist()
        assert documents[number].loss_mask.tolist() == wanted.loss_mask.tolist()
    assert documents[0].ids[0] == 0, "bos, once: the template writes it"
    assert documents[0].ids[1] != 0


def test_training_goes_on_in_the_middle_of_conversations(with_template, tmp_path):
    encoder = TextEncoder(with_template(DEEPSEEK))
    file = write_chats(tmp_path, *CHATS.values(), *CHATS.values())

    def packer(position=None):
        documents = TokenDocuments(scan([file], VOCAB, encoder.chats), encoder, VOCAB)
        return Packer(documents, rows=2, row_tokens=40, seed=1, epochs=2, position=position)

    whole = list(packer())
    for stop in range(len(whole) - 1):
        rest = list(packer(Position.from_json(json.loads(json.dumps(whole[stop][1].to_json())))))
        assert len(rest) == len(whole) - stop - 1
        for (batch, _), (expected, _) in zip(rest, whole[stop + 1 :], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(batch, expected, strict=True))
    assert len(whole) > 4

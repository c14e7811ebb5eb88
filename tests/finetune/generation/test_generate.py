"""`finetune-deepseek generate`: answers to prompts, whole, resumable, and read by training."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from advice import done, follows
from imported import import_tiny
from trained import SIZES

from finetune import cli, generate
from finetune.data.run_text import open_documents
from finetune.data.tokens import Tokens
from finetune.evaluate import EvaluateSettings, evaluate
from finetune.generate import GenerateSettings, _before_last_answer, _prompt_of, prompts_of
from finetune.generation.answers import AnswersError
from finetune.settings import MeshSettings, SettingsError
from mtp_model import moe
from mtp_model.checkpoint.directory import CheckpointError, open_checkpoint
from tools.make_tiny_checkpoint import BOS, EOS


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_answers_follow_their_prompts(settings, data):
    counts = generate.generate(settings)
    found, asked = records(settings.out), records(data)
    prompts = [4, 6, 5, 1, 6, 11, 2]
    assert [each["loss_mask"].count(0) for each in found] == prompts
    for record, source, length in zip(found, asked, prompts, strict=True):
        assert record["input_ids"][:length] == source["input_ids"][:length]
        assert (
            len(record["input_ids"]) == len(record["loss_mask"]) <= length + settings.max_new_tokens
        )
        assert record["loss_mask"] == sorted(record["loss_mask"])
    assert counts.documents == 7
    assert counts.tokens == sum(sum(each["loss_mask"]) for each in found)
    assert not settings.out.with_name("answers.jsonl.partial").exists()


def test_a_greedy_answer_is_the_main_models_own(settings, checkpoint):
    """As `evaluate` says; a sampled one is not, and is what the main model samples."""
    for temperature, low, high in ((0.0, 1.0, 1.0), (1.0, 0.0, 0.5)):
        made = dataclasses.replace(settings, temperature=temperature, overwrite=True)
        counts = generate.generate(made)
        found = evaluate(
            EvaluateSettings(checkpoint=str(checkpoint), data=(made.out,), row_tokens=64, rows=2)
        )
        assert found.data == generate.as_json(made, counts)["data"], "they name the text alike"
        measured = found.summary
        assert measured.greedy_share is not None
        assert low <= measured.greedy_share <= high


def test_speculation_writes_the_same_greedy_text(settings, monkeypatch):
    """On a mesh too, with as many drafts accepted."""
    plain = dataclasses.replace(settings, temperature=0)
    generate.generate(plain)
    drafted = dataclasses.replace(plain, out=plain.out.with_name("b.jsonl"), speculate=3)
    counts = generate.generate(drafted)
    assert records(drafted.out) == records(plain.out)
    assert len(counts.num_accepted_tokens_per_pos) == 3
    # each round gives one token more than it accepts, but where the text's end is in between
    most = counts.documents + counts.num_drafts + sum(counts.num_accepted_tokens_per_pos)
    assert most - counts.documents <= counts.tokens <= most
    mesh = MeshSettings(data=1, fsdp=1, expert=2, tensor=2)
    spread = dataclasses.replace(drafted, out=plain.out.with_name("c.jsonl"), mesh=mesh)
    assert generate.generate(spread) == counts
    assert spread.out.read_bytes() == drafted.out.read_bytes()

    # negative control: experts whose parts by tensor are not added up
    monkeypatch.setattr(moe.jax.lax, "psum", lambda x, _: x)
    wrong = dataclasses.replace(spread, out=plain.out.with_name("d.jsonl"), max_new_tokens=3)
    generate.generate(dataclasses.replace(wrong, speculate=0))
    assert records(wrong.out)[0]["input_ids"] != records(plain.out)[0]["input_ids"][:7]


def assert_damage_is_said(settings: GenerateSettings, partial: Path) -> None:
    """Of what says how the file was begun, and of the file itself; what is there stays."""
    about = settings.out.with_name("answers.jsonl.about")
    for good, damages in (
        (about, ["", "[]", '{"made_by": {}}', about.read_text().replace('"tokens"', '"token"')]),
        (partial, [partial.read_text().splitlines(keepends=True)[0]]),
    ):
        kept = good.read_bytes()
        for damaged in damages:
            good.write_text(damaged)
            with pytest.raises(
                AnswersError, match=rf"{good.name}.*; give another --out, or --over"
            ):
                generate.generate(settings)
            assert good.read_text() == damaged
        good.write_bytes(kept)


@follows(
    "; give another --out, or --overwrite",
    "was begun with other settings or another checkpoint or data; ",
    "give the same ones to continue it, another --out, or --overwrite",
    " is there already; give another --out, or --overwrite",
)
def test_an_interrupted_file_is_continued(settings, monkeypatch):
    """Stopped in the second batch, with a half-written line behind what was counted."""
    generate.generate(settings)
    whole = settings.out.read_bytes()
    settings = dataclasses.replace(settings, overwrite=True)
    batches = []

    def broken(*args):
        batches.append(args)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return real(*args)

    real = generate.decode
    monkeypatch.setattr(generate, "decode", broken)
    with pytest.raises(KeyboardInterrupt):
        generate.generate(settings)
    monkeypatch.undo()
    partial = settings.out.with_name("answers.jsonl.partial")
    assert not settings.out.exists()
    assert len(records(partial)) == 2
    with partial.open("a") as file:
        file.write('{"input_ids": [1, 2')
    settings = dataclasses.replace(settings, overwrite=False)
    assert_damage_is_said(settings, partial)
    other = dataclasses.replace(settings, seed=1)
    with pytest.raises(AnswersError, match="begun with other settings"):
        generate.generate(other)
    generate.generate(dataclasses.replace(other, out=settings.out.with_name("other.jsonl")))
    generate.generate(settings)
    assert settings.out.read_bytes() == whole
    with pytest.raises(AnswersError, match="is there already; give another --out, or --overwrite"):
        generate.generate(settings)
    assert settings.out.read_bytes() == whole
    generate.generate(dataclasses.replace(other, overwrite=True))
    assert settings.out.read_bytes() != whole


def test_wrong_usage_is_said(settings, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--checkpoint", "c"])
    arguments = ["--checkpoint", settings.checkpoint, "--data", str(settings.data[0])]
    wrong = ["generate", *arguments, "--out", str(tmp_path / "a.txt"), "--rows", "0"]
    assert cli.run(wrong) == 2
    said = capsys.readouterr().err
    assert "--rows is 0, needed 1 or more" in said
    assert "a.txt, needed a name that ends with .jsonl" in said


@pytest.mark.parametrize("overwrite", [False, True])
def test_answers_never_take_the_place_of_their_prompts(settings, data, tmp_path, overwrite):
    """Named by another path, or in a folder that is read."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    prompts = folder / "prompts.jsonl"
    prompts.write_bytes(data.read_bytes())
    (tmp_path / "link.jsonl").symlink_to(prompts)
    mine = dataclasses.replace(settings, data=(folder,), overwrite=overwrite)
    for out in (prompts, tmp_path / "link.jsonl"):
        with pytest.raises(SettingsError, match="which --data reads: needed another file"):
            generate.generate(dataclasses.replace(mine, out=out))
    assert [each.name for each in folder.iterdir()] == ["prompts.jsonl"]
    assert prompts.read_bytes() == data.read_bytes()


def told(settings: GenerateSettings) -> str:
    with pytest.raises(CheckpointError) as error:
        generate.generate(settings)
    assert not settings.out.exists()
    return str(error.value)


@follows(
    "text; import it again with --scope all --overwrite, or to another place",
    "has no MTP module to draft; leave out --speculate",
)
def test_a_checkpoint_without_a_part_says_what_to_do(settings, tmp_path):
    """One without a main model, imported again; one without a module, told not to draft."""
    source, destination = tmp_path / "source", tmp_path / "checkpoint"
    import_tiny(tmp_path, sizes=SIZES, import_options={"scope": "mtp"})
    mine = dataclasses.replace(settings, checkpoint=str(destination), max_documents=2)
    assert "import it again with --scope all --overwrite" in told(mine)
    done("import", source, destination, "--scope", "all", "--overwrite")
    assert generate.generate(mine).documents == 2

    alone = import_tiny(tmp_path / "alone", sizes=SIZES, num_mtp=0, num_files=2)
    without = dataclasses.replace(
        mine, checkpoint=str(alone), speculate=1, out=tmp_path / "alone.jsonl"
    )
    assert "has no MTP module to draft; leave out --speculate" in told(without)
    counts = generate.generate(dataclasses.replace(without, speculate=0))
    assert counts.documents == 2
    assert counts.num_accepted_tokens_per_pos == []


def test_the_prompt_is_all_before_the_last_answer():
    mask = np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int32)
    assert _before_last_answer(mask) == 6
    assert _before_last_answer(mask[:4]) == 2
    assert _before_last_answer(mask[2:4]) == 0
    assert _before_last_answer(mask[:2]) == 2
    document = Tokens(np.arange(8, dtype=np.int32), mask)
    assert _prompt_of(document, 3, (1,)).tolist() == [0, 1, 2, 3, 4, 5]


TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content }}
{%- if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def prompts_as_text(checkpoint: Path, folder: Path, rows: list[dict], prompt_tokens: int) -> list:
    """The prompts of these records, as their tokens read."""
    shutil.copytree(checkpoint, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = open_checkpoint(folder / "model").config
    documents = open_documents(str(folder / "model"), (data,), config, to_learn=False)
    tokenizer = documents.encoder.tokenizer
    assert tokenizer is not None
    return [
        tokenizer.decode(prompt.ids.tolist(), skip_special_tokens=False)
        for prompt in prompts_of(documents, prompt_tokens)
    ]


def test_a_conversation_that_waits_for_its_answer_is_asked_for_it(checkpoint, tmp_path):
    """With the header of the answer, and not for an answer that it has already."""
    question, answer, more = (
        {"role": role, "content": content}
        for role, content in (("user", "print"), ("assistant", "self"), ("user", "import"))
    )
    talks = [[question], [question, answer, more], [question, answer]]
    asked = prompts_as_text(checkpoint, tmp_path, [{"messages": each} for each in talks], 4)
    assert asked == [
        f"{BOS}<user>print<assistant>",
        f"{BOS}<user>print<assistant>self{EOS}<user>import<assistant>",
        f"{BOS}<user>print<assistant>",
    ]


def test_prompts_alone_are_answered(checkpoint, tmp_path):
    """Nothing in them is learnt: they wait for what is."""
    talk = {"messages": [{"role": "user", "content": "print"}]}
    rows = [talk, {"prompt": "import", "completion": ""}]
    asked = prompts_as_text(checkpoint, tmp_path, rows, 4)
    assert asked == [f"{BOS}<user>print<assistant>", f"{BOS}import"]
    out, size = tmp_path / "answers.jsonl", ["--max-new-tokens", "3"]
    words = ["--checkpoint", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--out", out]
    assert cli.run(["generate", *map(str, words), *size]) == 0
    assert len(out.read_text().splitlines()) == 2


def test_a_text_that_is_shorter_than_a_prompt_goes_on(checkpoint, tmp_path):
    """It is no whole document that another one follows; a longer one is cut as it was."""
    rows = [{"text": "print"}, {"text": "print import self"}, {"input_ids": [0, 5, 6, 1]}]
    short, long, ids = prompts_as_text(checkpoint, tmp_path, rows, 10)
    assert short == f"{BOS}print"
    assert f"{BOS}print import self".startswith(long)
    assert EOS not in ids

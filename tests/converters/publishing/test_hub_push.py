"""Checkpoints pushed to the Hub: what is sent, what is sent again, what the card says."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from advice import done, follows
from hub_client import TOKEN, lone_hub
from hub_server import Fault, HubServer, is_large
from roundtrip import make_source, run_import, tree_bytes

from converters.cli.main import main
from converters.publishing import push as push_module
from converters.publishing.measured import read_measured
from converters.publishing.model_card import BEGIN, END, merged_readme
from converters.publishing.push import Pushed, push_folder
from mtp_model.checkpoint.directory import UNFINISHED, CheckpointError, open_checkpoint
from mtp_model.problems import ProblemsError

REPO = "org/Tuned-V3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PUT = "^PUT /[0-9a-f]{64}$"


# How huggingface_hub 2.4 itself calls httpx2 to send a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub of a user who is logged in."""
    with lone_hub(tmp_path, monkeypatch) as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("exported") / "fp8", num_files=5)


@pytest.fixture(scope="module")
def provenance(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    dst = tmp_path_factory.mktemp("ckpt") / "fp8"
    run_import(exported, dst)
    return open_checkpoint(dst).provenance


def push(folder: Path, provenance: Any, repo_id: str = REPO) -> Pushed:
    return push_folder(folder, repo_id, provenance=provenance)


def on_the_hub(hub: HubServer) -> dict[str, bytes]:
    model = hub.models[REPO]
    return model.commits[model.branches["main"]]


def test_every_file_arrives_weights_first_index_and_config_last(
    hub, exported, provenance, monkeypatch
):
    monkeypatch.setattr(push_module, "_MOST_FILES", 2)
    pushed = push(exported, provenance)
    files = tree_bytes(exported)
    found = on_the_hub(hub)
    assert {name: found[name] for name in files} == files
    assert found.keys() == files.keys() | {"README.md", ".gitattributes"}
    assert hub.models[REPO].private
    shards = sorted(name for name in files if is_large(name))
    assert hub.models[REPO].messages == [
        f"Upload {shards[0]} and 1 more",
        f"Upload {shards[2]} and 1 more",
        f"Upload {shards[4]}",
        f"Upload config.json and {len(files) - 5} more",
    ]
    assert pushed.commit == hub.models[REPO].branches["main"]
    assert pushed.url == f"{hub.url}/{REPO}/tree/{pushed.commit}"
    assert pushed.num_files == len(files) + 1
    assert pushed.others == ()


def test_batches_are_bounded_by_bytes(hub, exported, provenance, monkeypatch):
    monkeypatch.setattr(push_module, "_MOST_BYTES", 1)
    push(exported, provenance)
    assert len(hub.models[REPO].messages) == 6


def test_a_push_that_was_interrupted_sends_only_what_is_missing(
    hub, exported, provenance, monkeypatch
):
    monkeypatch.setattr(push_module, "_MOST_FILES", 2)
    hub.fail("^POST .*/commit/", Fault())
    hub.fail("^POST .*/commit/", Fault(status=403, times=9))
    with pytest.raises(ProblemsError, match=r"hub +model-00003-.* and 1 more is forbidden \(403\)"):
        push(exported, provenance)
    assert len(hub.requests(PUT)) == 4
    assert "config.json" not in on_the_hub(hub)
    hub.clear_faults()
    push(exported, provenance)
    assert len(hub.requests(PUT)) == 5
    assert len(hub.models[REPO].messages) == 1 + 3
    before = hub.models[REPO].branches["main"]
    assert push(exported, provenance).commit == before, "nothing to do, nothing is committed"
    assert len(hub.requests(PUT)) == 5


@pytest.mark.parametrize("request_", ["/api/repos/create", "/api/models/.*/commit/", "^GET /api"])
@pytest.mark.parametrize("fault", [Fault(status=503), Fault(status=429), Fault(drop=True)])
def test_failures_that_pass_leave_no_trace(hub, exported, provenance, request_, fault):
    hub.fail(request_, Fault(**{**vars(fault), "times": 2}))
    push(exported, provenance)
    assert {**tree_bytes(exported), **on_the_hub(hub)} == on_the_hub(hub)


def test_a_failure_of_storage_that_passes_leaves_no_trace(hub, exported, provenance, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _s: None)  # of huggingface_hub's own retries
    for fault in (Fault(status=503), Fault(drop=True), Fault(status=500)):
        hub.fail(PUT, fault)
    push(exported, provenance)
    assert {**tree_bytes(exported), **on_the_hub(hub)} == on_the_hub(hub)


@pytest.mark.parametrize(
    ("token", "repo_id", "told"),
    [
        (None, REPO, r"is forbidden \(403\); for access run `hf auth login`"),
        ("hf_other", REPO, r"is forbidden \(403\); for access use a token that has it"),
        (TOKEN, "no-org", "no-org is no place for a model; needed org/name"),
        (TOKEN, "org/name@main", "org/name@main is no place for a model; needed org/name"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_may_not_be_pushed_says_why(exported, provenance, token, repo_id, told, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token or "")
    with pytest.raises(ProblemsError, match=told):
        push(exported, provenance, repo_id)


def test_a_folder_that_is_no_whole_checkpoint_is_not_pushed(hub, tmp_path, provenance):
    src = make_source(tmp_path / "src")
    (src / UNFINISHED).mkdir()
    with pytest.raises(CheckpointError, match="is unfinished; run the export again"):
        push(src, provenance)
    (src / UNFINISHED).rmdir()
    next(src.glob("*.safetensors")).unlink()
    with pytest.raises(ProblemsError, match="is named by the index"):
        push(src, provenance)
    assert hub.seen == []


def test_what_arrived_damaged_is_noticed(hub, exported, provenance):
    def damage() -> None:
        files = dict(on_the_hub(hub))
        name = next(name for name in files if is_large(name))
        files[name] = bytes([files[name][0] ^ 1]) + files[name][1:]
        hub.models[REPO].commit(files)

    hub.after("^POST .*/commit/", damage)
    with pytest.raises(ProblemsError, match=r"is listed with sha256 .*, other bytes were sent"):
        push(exported, provenance)


def test_other_files_in_the_repository_stay_and_are_told(hub, exported, provenance):
    hub.add(REPO, {"old.safetensors": b"12", ".gitattributes": b""})
    assert push(exported, provenance).others == ("old.safetensors",)
    assert on_the_hub(hub)["old.safetensors"] == b"12"


def test_the_token_appears_nowhere(hub, exported, provenance, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    push(exported, provenance)
    assert all("authorization" not in seen.headers for seen in hub.requests(PUT))
    texts = [on_the_hub(hub)["README.md"].decode(), json.dumps(provenance)]
    for repo_id, request in (("org/new", "/create"), (REPO, "/commit/"), (REPO, "^GET")):
        hub.fail(request, Fault(status=401, times=9))
        with pytest.raises(ProblemsError) as error:
            push(exported, {**provenance, "tools": {"a": request}}, repo_id)
        hub.clear_faults()
        texts += [str(error.value), str(error.getrepr(style="long"))]
    for text in (*texts, caplog.text, *capfd.readouterr()):
        assert TOKEN not in text


# The card


def trained(provenance: dict[str, Any], **record: Any) -> dict[str, Any]:
    name = f"deepseek-ai/DeepSeek-V3@{COMMIT}"
    record = {
        "base": {"path": "/home/me/ckpt", "provenance": "0"},
        "changed": ["mtp.eh_proj.weight", "mtp.enorm.weight"],
        "by": "finetune-deepseek train",
        "settings": {"train": "mtp", "steps": 1000, "data": ["/home/me/secret.jsonl"]},
        **record,
    }
    source = provenance["source"] | {"name": name}
    return provenance | {"source": source, "derived": [record]}


def front_matter(readme: str) -> Any:
    return yaml.safe_load(readme.split("---\n")[1])


def test_the_card_says_where_from_what_changed_and_how_to_serve(provenance):
    held_out = {
        "before": {"acceptance": [0.7512, 0.5], "mean_accepted_length": 2.2512},
        "after": {"acceptance": [0.8, None], "mean_accepted_length": None},
    }
    config = {"num_nextn_predict_layers": 1, "quantization_config": {"quant_method": "fp8"}}
    readme = merged_readme(None, REPO, trained(provenance, held_out=held_out), config)
    assert front_matter(readme) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "deepseek-ai/DeepSeek-V3",
        "base_model_relation": "finetune",
        "tags": ["deepseek-mtp", "multi-token-prediction"],
    }
    for line in (
        "# Tuned-V3",
        f"Fine-tuned from `deepseek-ai/DeepSeek-V3` at revision `{COMMIT}` with deepseek-mtp.",
        "| trained | finetune-deepseek train --train mtp, steps 1000 |",
        "| weights | fp8 |",
        "| acceptance of draft 1 | 0.751 | 0.800 |",
        "| acceptance of draft 2 | 0.500 | not measured |",
        "| mean accepted length | 2.251 | not measured |",
        f"vllm serve {REPO} --speculative-config "
        """'{"method": "mtp", "num_speculative_tokens": 1, """
        """"draft_sample_method": "probabilistic"}'""",
        "  --speculative-num-draft-tokens 2 \\",
        "  --speculative-use-rejection-sampling",
    ):
        assert line in readme.splitlines()
    assert "| changed | 2 of " in readme
    assert "unchanged: `dense_layers`, " in readme
    assert "deepseek-mtp " in readme.split("| tools | ")[1].splitlines()[0]
    assert "/home/me" not in readme


DIGEST = "0123"


def evaluation(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    """What `evaluate --json` prints, in part."""
    found = {
        "checkpoint": str(checkpoint),
        "sampling": "greedy",
        "temperature": 1.0,
        "acceptance": [0.8, 0.5, None],
        "mean_accepted_length": 2.5,
        "mean_accepted_length_interval": [2.4, 2.6],
        "num_drafts": 1234,
    }
    return found | changes


def test_the_card_has_the_acceptance_that_was_measured(provenance, tmp_path):
    """By domain, rule and number of drafts; of several sources each."""
    one = evaluation(tmp_path / "run/final")
    source = {**one, "source": "/home/me/texts/law|2.jsonl", "mean_accepted_length": None}
    sampled = {"sampling": "rejection", "temperature": 0.7, "acceptance": [0.9]}
    contents = {
        "code.json": one,
        "mixed.json": evaluation(
            tmp_path / "run/final", sources=[source, {**source, "source": "b"}]
        ),
        "sampled.json": evaluation(tmp_path / "run/final", **sampled),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    words = [str(tmp_path / "code.json"), str(tmp_path / "mixed.json")]
    words.append(f"prose={tmp_path / 'sampled.json'}")
    measured = read_measured(words, str(tmp_path / "run/final"), DIGEST)
    config = {"num_nextn_predict_layers": 1}
    readme = merged_readme(None, REPO, provenance, config, measured=measured)
    rows = [line for line in readme.splitlines() if line.startswith("|") and "%" in line]
    assert rows[1:] == [
        "|code|greedy|0|3|2.50 (2.40 to 2.60)|80.0%, 50.0%, -|1,234|",
        "|mixed: b|greedy|0|3|- (2.40 to 2.60)|80.0%, 50.0%, -|1,234|",
        "|mixed: law\\|2.jsonl|greedy|0|3|- (2.40 to 2.60)|80.0%, 50.0%, -|1,234|",
        "|prose|rejection|0.7|1|2.50 (2.40 to 2.60)|90.0%|1,234|",
    ]
    assert rows[0].startswith("|domain|rule|temperature|drafts a round|")
    assert "/home/me" not in readme


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "cannot be read: "),
        ("[1]", "is no evaluation; needed what `finetune-deepseek evaluate --json` printed"),
        (json.dumps({"documents": 3}), "is no evaluation"),
        ({"checkpoint": "/other"}, "is of /other, not of "),
        ({"sampling": "beam"}, "has sampling beam, needed one of greedy, target, rejection"),
        ({"temperature": "hot"}, "has temperature hot, needed a number"),
        ({"acceptance": [1.5]}, "has acceptance [1.5], needed shares of 0 to 1"),
        ({"acceptance": []}, "has acceptance [], needed shares of 0 to 1"),
        ({"mean_accepted_length": [2]}, "has mean_accepted_length [2], needed a number"),
        ({"mean_accepted_length_interval": [2]}, "needed two numbers"),
        ({"num_drafts": None}, "needed a count"),
        ({"sources": [1]}, "needed a list of objects"),
        ({"sources": [{"acceptance": [2]}]}, "has a source None, needed a name"),
    ],
)
def test_what_is_no_evaluation_of_this_checkpoint_is_told(tmp_path, content, told):
    file = tmp_path / "file.json"
    whole = evaluation(tmp_path)
    file.write_text(content if isinstance(content, str) else json.dumps(whole | content))
    with pytest.raises(ProblemsError) as error:
        read_measured([str(file)], str(tmp_path), DIGEST)
    assert told in str(error.value)
    file.write_text(json.dumps(whole))
    assert read_measured([str(file)], str(tmp_path), DIGEST)


def test_an_evaluation_is_of_a_checkpoint_wherever_it_is(tmp_path):
    """A run that was made longer has another one at the same path; one may be moved."""
    file = tmp_path / "rate=1" / "law.json"  # no NAME=FILE
    file.parent.mkdir()
    file.write_text(json.dumps(evaluation(Path("/before/it/moved"), checkpoint_digest=DIGEST)))
    [found] = read_measured([str(file)], str(tmp_path), DIGEST)
    assert found.domain == "law"
    file.write_text(json.dumps(evaluation(tmp_path, checkpoint_digest=DIGEST)))
    with pytest.raises(ProblemsError, match=r"as it was then, not of .* as it is; evaluate what"):
        read_measured([str(file)], str(tmp_path), "another")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_draft_is_pushed_with_a_card_of_its_own(hub, exported, tmp_path, engine):
    """The module alone, how it is served beside its main model, and what was measured."""
    ckpt = tmp_path / "ckpt"
    run_import(exported, ckpt)
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(evaluation(ckpt)))
    command = ("export", ckpt, tmp_path / "draft", "--draft", engine, "--push", REPO)
    done(*command, "--acceptance", f"law={file}")
    found = on_the_hub(hub)
    assert found.keys() == {"mtp.safetensors", "config.json", "README.md", ".gitattributes"}
    assert found["mtp.safetensors"] == (tmp_path / "draft/mtp.safetensors").read_bytes()
    card = found["README.md"].decode()
    name, other = {"vllm": ("vLLM", "sglang"), "sglang": ("SGLang", "vllm serve")}[engine]
    assert f"The MTP module alone, as {name} loads a draft" in card
    assert "|law|greedy|0|3|" in card
    assert other not in card
    line = {
        "vllm": 'vllm serve MAIN_MODEL --speculative-config \'{"method": "mtp", '
        '"num_speculative_tokens": 1, "model": "org/Tuned-V3", '
        '"draft_sample_method": "probabilistic"}\'',
        "sglang": "  --speculative-draft-model-path org/Tuned-V3 \\",
    }[engine]
    assert line in card.splitlines()
    tensors = "100" if engine == "vllm" else "98"
    assert f"Verified when it was exported: {tensors} tensors, of " in card


@follows("; name both, or leave it out", "writes a module alone; leave out one")
def test_wrong_usage_of_drafts_and_acceptance_is_told(exported, tmp_path, capsys, hub):
    ckpt = tmp_path / "ckpt"
    run_import(exported, ckpt)
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(evaluation(ckpt)))
    command = ["export", str(ckpt), str(tmp_path / "out")]
    for more, message in (
        (["--acceptance", str(file)], "name both, or leave it out"),
        (["--draft", "vllm", "--base", str(exported)], "leave out one"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*command, *more])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    done(*command, "--push", REPO, "--acceptance", file, "--no-verify")
    assert "|evaluation|greedy|0|3|" in on_the_hub(hub)["README.md"].decode()
    done("export", ckpt, tmp_path / "draft", "--draft", "vllm")
    done("export", ckpt, tmp_path / "based", "--base", exported, "--no-verify")


def test_the_card_of_what_nobody_trained_claims_nothing(provenance):
    readme = merged_readme(None, REPO, provenance, {"num_nextn_predict_layers": 0})
    assert "base_model" not in front_matter(readme)
    assert "from a local safetensors checkpoint with deepseek-mtp; nothing was trained" in readme
    assert provenance["source"]["name"] not in readme
    assert "vllm" not in readme
    assert "acceptance" not in readme


def test_every_line_of_an_existing_readme_stays(provenance):
    front = "license: mit # theirs\ntags: [mine]\nbase_model: other/base\n"
    existing = f"---\n{front}---\n\nTheir words.\r\n---\nMore.\n"
    readme = merged_readme(existing, REPO, trained(provenance), {})
    assert readme.startswith(f"---\n{front}library_name: transformers\n")
    assert readme.endswith("\n\nTheir words.\r\n---\nMore.\n")
    assert front_matter(readme)["base_model"] == "other/base"
    assert front_matter(readme)["tags"] == ["mine"]
    assert merged_readme(readme, REPO, trained(provenance), {}) == readme
    edited = f"{readme}\nTheirs again."
    again = merged_readme(edited, REPO, provenance, {})
    assert again.count(BEGIN) == again.count(END) == 1
    assert again.endswith("More.\n\nTheirs again.")
    assert "nothing was trained" in again


@pytest.mark.parametrize("existing", ["---\na: [\n---\nText", "---\n- a\n---\nText", "---\nText"])
def test_front_matter_that_is_none_is_left_alone(provenance, existing):
    readme = merged_readme(existing, REPO, provenance, {})
    assert readme.endswith("Text")
    front = existing.partition("Text")[0]
    assert readme.startswith(front) or front in readme


def test_the_readme_on_the_hub_goes_before_the_folders(hub, exported, provenance):
    push(exported, provenance)
    files = on_the_hub(hub) | {"README.md": on_the_hub(hub)["README.md"] + b"\nEdited there.\n"}
    hub.models[REPO].commit(files)
    push(exported, trained(provenance))
    found = on_the_hub(hub)["README.md"].decode()
    assert "Fine-tuned from" in found
    assert found.endswith("\nEdited there.\n")
    hub.models[REPO].commit(files | {"README.md": b"\xff"})
    with pytest.raises(ProblemsError, match=r"README\.md is not UTF-8, which the Hub needs"):
        push(exported, provenance)

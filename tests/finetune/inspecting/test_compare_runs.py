"""`finetune-deepseek compare`: results side by side, and what in them must not be compared."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from advice import follows
from browser import assert_readable
from rich.console import Console

from finetune import cli
from finetune.inspecting.compare import (
    CompareSettings,
    _same_text,
    as_json,
    compare,
    sections,
)
from finetune.inspecting.results import ResultsError, read_results
from finetune.objective.intervals import Interval
from finetune.run.metrics import Summary
from mtp_model.reporting import show

COUNTS = {
    "num_drafts": 100,
    "num_draft_tokens": 300,
    "num_accepted_tokens": 150,
    "num_accepted_tokens_per_pos": [80, 50, 20],
}
GENERATED = {
    "out": "answers.jsonl",
    "documents": 3,
    "tokens": 260,
    "num_drafts": 100,
    "num_accepted_tokens_per_pos": [80, 50, 20],
    "sampling": "rejection",
    "temperature": 0.7,
    "prompts": "pp",
    "data": "dd",
}
PAGE = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a/b"} 60.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="a/b"} 40.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="a/b"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="a/b"} 180.0
vllm:spec_decode_num_draft_tokens_total{engine="1",model_name="a/b"} 120.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="a/b"} 150.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a/b",position="0"} 80.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a/b",position="2"} 20.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a/b",position="1"} 50.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="a/b"} 9.0
"""


def evaluated(**changes: Any) -> dict[str, Any]:
    """What `evaluate --json` prints, for two drafts."""
    summary = Summary(
        tokens=500,
        main_loss=2.0,
        mtp_loss=[3.0, 4.0],
        acceptance=[0.5, 0.2],
        conditional=[0.5, 0.4],
        agreement=[0.6, 0.3],
        reached=[100, 50],
        accepted=[50, 20],
        greedy_share=0.9,
        acceptance_interval=[Interval(0.4, 0.6), None],
        mean_accepted_length_interval=Interval(1.6, 1.8),
    )
    return {"checkpoint": "v3", **summary.to_json(), "held_out": "aa", "data": "dd"} | changes


def written(folder: Path, **contents: dict[str, Any] | str) -> list[Path]:
    paths = [folder / name for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return paths


def compared(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert cli.run(["compare", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def faults_of(folder: Path, content: dict[str, Any] | str) -> str:
    with pytest.raises(ResultsError) as error:
        read_results(written(folder, file=content))
    return str(error.value)


@pytest.mark.parametrize("form", ["json", "page"])
def test_a_servers_counts_are_read_as_vllm_names_them(tmp_path, form):
    content = json.dumps(COUNTS) if form == "json" else PAGE
    [found] = read_results(written(tmp_path, server=content))
    assert found.kind == "server"
    assert found.acceptance == [0.8, 0.5, 0.2]
    assert found.mean_accepted_length == 2.5
    assert (found.num_drafts, found.draft_tokens) == (100, 3)
    assert (found.sampling, found.temperature, found.texts) == (None, None, {})


def test_what_differs_is_named_not_comparable(tmp_path, capsys):
    """Also what nobody knows: a server says neither its rule nor what it was asked."""
    paths = written(
        tmp_path,
        a=evaluated(),
        b=evaluated(sampling="rejection", temperature=0.7, held_out="bb"),
        c=evaluated(temperature=0.3),
        d=COUNTS,
    )
    found = compared(capsys, *paths)
    assert [each["name"] for each in found["results"].values()] == [str(path) for path in paths]
    assert found["not_comparable"] == [
        {
            "by": "draft_tokens",
            "between": ["A", "B", "C", "D"],
            "values": {"A": 2, "B": 2, "C": 2, "D": 3},
        },
        {
            "by": "sampling",
            "between": ["A", "B", "C"],
            "values": {"A": "greedy", "B": "rejection", "C": "greedy"},
        },
        {
            "by": "temperature",  # of greedy it is 0, whatever distributions are compared at
            "between": ["A", "B", "C"],
            "values": {"A": 0.0, "B": 0.7, "C": 0.0},
        },
        {"by": "text", "between": [["A", "B"], ["B", "C"]]},
    ]
    assert found["not_known"] == [
        {"by": "sampling", "between": ["D"]},
        {"by": "temperature", "between": ["D"]},
        {"by": "text", "between": [["A", "D"], ["B", "D"], ["C", "D"]]},
    ]
    assert cli.run(["compare", *map(str, paths)]) == 0
    out = capsys.readouterr().out
    assert "not comparable, other rule: A greedy, B rejection, C greedy" in out
    assert "not comparable, other text: A and B, B and C" in out
    assert "not known: rule of D" in out


def test_alike_results_have_nothing_said_against_them(tmp_path, capsys):
    paths = written(tmp_path, a=evaluated(), b=evaluated(acceptance=[0.6, 0.3]))
    found = compared(capsys, *paths)
    assert found["not_comparable"] == found["not_known"] == []
    assert found["results"]["A"]["mean_accepted_length"] == pytest.approx(1.7)
    assert found["results"]["A"]["mean_accepted_length_interval"] == [1.6, 1.8]
    assert cli.run(["compare", *map(str, paths)]) == 0
    out = capsys.readouterr().out
    assert "comparable" not in out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "accepted, draft 2 20.0% 30.0%" in rows


def test_a_text_is_the_same_by_what_both_results_say_of_it(tmp_path):
    contents = {"a": evaluated(), "b": evaluated(held_out="bb"), "c": GENERATED}
    a, b, c, d = read_results(written(tmp_path, **contents, d=GENERATED | {"data": "other"}))
    assert _same_text(a, b) is False, "other rows of the same file"
    assert _same_text(a, c) is True, "the answers that were measured"
    assert _same_text(c, d) is True, "the same prompts, answered again"
    assert _same_text(a, d) is False


def test_a_report_is_one_page_with_pictures(tmp_path, capsys):
    paths = written(tmp_path, a=evaluated(), b=COUNTS | {"num_spec_tokens": 3})
    strange = (tmp_path / "a$<b>&$.json").absolute()
    paths[0].rename(strange)
    page = tmp_path / "reports" / "page.html"
    compared(capsys, strange, paths[1], "--report", page)
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert "src=" not in text
    assert "not comparable, other drafts a round: A 2, B 3" in text


def test_a_run_and_its_evaluation_have_the_same_text(finished, data, tmp_path, capsys):
    """Held-out documents evaluated again: the same rows, losses and acceptance."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(data.read_text().splitlines(keepends=True)[19::20]))
    options = ["--rows", "2", "--row-tokens", "32", "--max-rows", "2", "--json"]
    again = ["--checkpoint", str(finished.run.final), "--data", str(held_out)]
    assert cli.run(["evaluate", *again, *options]) == 0
    [again] = written(tmp_path, again=capsys.readouterr().out)
    found = compared(capsys, finished.run.path, again)
    first, last, evaluation = found["results"].values()
    assert (first["kind"], last["name"]) == ("run", f"{finished.run.path} step 7")
    assert found["not_comparable"] == found["not_known"] == []
    assert evaluation["acceptance"] == last["acceptance"]
    assert evaluation["summary"]["mtp_loss"] == pytest.approx(last["summary"]["mtp_loss"])
    assert first["summary"]["mtp_loss"] != pytest.approx(last["summary"]["mtp_loss"])


WRONG = {
    "an unknown key": (COUNTS | {"accepted": 3}, "unknown accepted"),
    "an unknown measure": (evaluated(new=1, more=2), "unknown new, more"),
    "another file": ({"loss": 1}, "has loss; needed a run's folder"),
    "text": ("hello", "has no vllm:spec_decode_num_drafts; needed a run's folder"),
    "half a file": ('{"num_drafts": ', "is not JSON"),
    "a count missing": ({"num_drafts": 3}, "num_accepted_tokens_per_pos is missing"),
    "no count": (COUNTS | {"num_drafts": "many"}, "num_drafts is many, needed a count"),
    "no rounds": (COUNTS | {"num_drafts": 0}, "num_drafts is 0: nothing was drafted"),
    "more than rounds": (COUNTS | {"num_drafts": 70}, "rises, or begins above num_drafts 70"),
    "another sum": (COUNTS | {"num_accepted_tokens": 9}, "is 9, num_accepted_tokens_per_pos gives"),
    "too many drafts": (COUNTS | {"num_draft_tokens": 301}, "is 301, more than 3 in each of 100"),
    "nothing drafted": (
        {"out": "o", "documents": 3, "tokens": 9, "num_drafts": 3}
        | {"num_accepted_tokens_per_pos": []},
        "drafted nothing: `generate` it with --speculate K",
    ),
    "lists of two lengths": (evaluated(mtp_loss=[1.0]), "mtp_loss is [1.0], needed 2 rates"),
    "a rule that is none": (evaluated(sampling="best"), "sampling is best, needed one of greedy"),
    "no interval": (evaluated(acceptance_interval=[1, 2]), "intervals are not pairs"),
    "two models": (PAGE + PAGE.replace("a/b", "c"), "several models together: a/b, c"),
    "a position missing": (
        "\n".join(line for line in PAGE.splitlines() if 'position="1"' not in line),
        "of positions [0, 2]",
    ),
    "a page that is damaged": (PAGE.replace("60.0", "x"), "is no count"),
}


@pytest.mark.parametrize(("content", "said"), WRONG.values(), ids=WRONG)
def test_what_is_not_understood_is_named(tmp_path, content, said):
    found = faults_of(tmp_path, content)
    assert f"{tmp_path / 'file'}" in found
    assert said in found


JUNK = (
    None,
    True,
    -1,
    10**30,
    1e300,
    "x",
    [],
    [None],
    [[1]],
    [1, 2, 3],
    [None, None],
    {},
    {"a": 1},
)


@pytest.mark.parametrize(
    "content", [evaluated(), GENERATED, COUNTS | {"temperature": 1}], ids=["evaluate", "gen", "k"]
)
def test_any_value_of_any_key_is_shown_or_refused(tmp_path, content):
    """Files are from anywhere: whatever is read can be compared, printed and drawn."""
    good, refused = 0, 0
    for key in content:
        for junk in JUNK:
            paths = written(tmp_path, good=content, bad=content | {key: junk})
            page = tmp_path / "page.html" if junk is None else None  # drawing takes its time
            try:
                found = compare(CompareSettings(results=tuple(paths), report=page))
            except ResultsError as error:
                refused += str(paths[1]) in str(error)
            else:
                good += 1
                show(Console(file=io.StringIO()), sections(found))
                json.dumps(as_json(found), allow_nan=False)
    assert good + refused == len(JUNK) * len(content), "an error names its file"
    assert min(good, refused) > 0


@follows("; keep one's lines")
def test_a_page_of_several_models_is_read_without_the_others(tmp_path):
    page = PAGE + PAGE.replace("a/b", "c")
    assert "keep one's lines" in faults_of(tmp_path, page)
    kept = "".join(line for line in page.splitlines(True) if 'model_name="c"' not in line)
    [found] = read_results(written(tmp_path, file=kept))
    assert found.acceptance == [0.8, 0.5, 0.2]


def test_all_that_is_wrong_is_said_together(tmp_path, capsys):
    paths = [*written(tmp_path, a={"x": 1}, b=COUNTS), tmp_path / "c", tmp_path]
    assert cli.run(["compare", *map(str, paths)]) == 1
    said = capsys.readouterr().err
    for each in ("/a has x", "/c cannot be read", "has no evaluations.jsonl"):
        assert each in said
    assert cli.run(["compare", str(paths[1]), str(paths[1]), "--report", "x.png"]) == 2
    said = capsys.readouterr().err
    assert "is given twice" in said
    assert "--report is x.png, needed a folder, or a name that ends with .html" in said


def test_a_run_that_measured_nothing_is_one(tmp_path, capsys):
    """And its result can be measured: the command is said."""
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    assert cli.run(["compare", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "is a run that measured nothing, for it had no held-out text" in said
    assert f"evaluate --checkpoint {tmp_path / 'final'} --data TEXT --json" in " ".join(
        said.split()
    )


def test_a_report_is_a_folder_too(tmp_path, capsys):
    paths = written(tmp_path, a=evaluated(), b=COUNTS)
    found = compared(capsys, *paths, "--report", tmp_path / "report-0.5")
    report = tmp_path / "report-0.5"
    assert json.loads((report / "report.json").read_text()) == {"report_version": 1, **found}
    assert "| mean accepted length | 1.700 | 2.500 |" in (report / "report.md").read_text()
    assert_readable(report / "report.html", tmp_path)


def test_a_report_takes_the_place_of_a_report_only(tmp_path, capsys):
    """What somebody else wrote under its names stays as it is."""
    [path] = written(tmp_path, b=COUNTS)
    folder, page = tmp_path / "folder", tmp_path / "page.html"
    folder.mkdir()
    for own in (folder / "report.md", page):
        own.write_text("my own")
        where = folder if own.parent == folder else page
        assert cli.run(["compare", str(path), "--report", str(where)]) == 2
        assert f"--report is {where}, which" in capsys.readouterr().err
        assert own.read_text() == "my own"
        own.unlink()
        for _ in range(2):  # the second takes the place of the first
            assert cli.run(["compare", str(path), "--report", str(where)]) == 0
        assert own.read_text() != "my own"
    capsys.readouterr()
    (tmp_path / "named.html").mkdir()
    assert cli.run(["compare", str(path), "--report", str(tmp_path / "named.html")]) == 0
    assert (tmp_path / "named.html" / "report.json").is_file()


def test_a_report_needs_a_folder_of_this_machine(tmp_path, capsys, monkeypatch):
    [path] = written(tmp_path, b=COUNTS)
    monkeypatch.chdir(tmp_path)
    for where in ("gs://bucket/report", "gs://bucket/page.html"):
        assert cli.run(["compare", str(path), "--report", where]) == 2
        assert "is an address, needed a place on this machine" in capsys.readouterr().err
    for where in (path / "below", path / "page.html"):
        assert cli.run(["compare", str(path), "--report", str(where)]) == 2
        assert f"but {path} is a file; name another place" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_report_takes_no_runs_place(tmp_path, capsys):
    paths, run = written(tmp_path, b=COUNTS), tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "report.json"):
        (run / name).write_text("of the run")
    assert cli.run(["compare", str(paths[0]), "--report", str(run)]) == 2
    assert "which is a run or a checkpoint with reports of its own" in capsys.readouterr().err
    assert (run / "report.json").read_text() == "of the run"
    assert [path.name for path in sorted(run.iterdir())] == ["config.yaml", "report.json"]

"""Every command that README, docs and manifests show is one that the program understands."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from converters.cli.arguments import parse as parse_converting
from finetune.cli import parse as parse_training

ROOT = Path(__file__).parents[1]
PARSERS = {"convert-deepseek": parse_converting, "finetune-deepseek": parse_training}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BEGIN = re.compile(rf"^(?:\$ )?(?:[A-Z_]+=\S+ )*((?:{'|'.join(PARSERS)}) .*)$")
_ELLIPSIS = re.compile(r"\.\.\.|[\[\]{}|]")  # a form of commands, none to type


def shown_in(text: str) -> Iterator[str]:
    """Commands of code blocks, fenced or indented, with the lines that continue them."""
    joined = text.replace("\\\n", " ")
    fenced = re.findall(r"^```\w*\n(.*?)^```", joined, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    (?! )(.*)$", joined, re.MULTILINE)
    for line in [*"\n".join(fenced).splitlines(), *indented]:
        found = _BEGIN.match(line.strip())
        if found and not _ELLIPSIS.search(found[1]):
            yield found[1]


def understood(command: str) -> None:
    """SystemExit where the command line is none of its program."""
    program, *arguments = shlex.split(re.sub(r" > \S+", "", command), comments=True)
    PARSERS[program](arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page(page: Path):
    for command in shown_in(page.read_text()):
        try:
            understood(command)
        except SystemExit:
            pytest.fail(f"{page.name}: {command}")


def test_a_command_with_another_flag_is_noticed():
    page = "\n```\nfinetune-deepseek train --checkpoint a --data b --out c --no-such-flag 1\n```\n"
    (command,) = shown_in(page)
    with pytest.raises(SystemExit):
        understood(command)
    assert sum(len(list(shown_in(page.read_text()))) for page in PAGES) > 20


def run_as(script: str, environment: dict[str, str]) -> str:
    """The command that a shell makes of a script that ends with `exec COMMAND`."""
    said = subprocess.run(
        ["bash", "-c", script.replace("exec ", "printf '%q ' ")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return said.stdout


@pytest.mark.parametrize("name", ["import.yaml", "train.yaml"])
def test_manifests_run_commands_on_as_many_pods_as_they_say(name: str):
    parts = list(yaml.safe_load_all((ROOT / "docs" / "manifests" / name).read_text()))
    (job,) = [part["spec"] for part in parts if part["kind"] == "Job"]
    assert job["completions"] == job["parallelism"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    last = str(job["completions"] - 1)
    command = run_as(container["args"][0], {"JOB_COMPLETION_INDEX": last})
    understood(command)
    if name == "import.yaml":
        assert f"--worker {job['completions']}/{job['completions']}" in command
    else:
        sizes = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
        chips = job["completions"] * int(container["resources"]["limits"]["google.com/tpu"])
        assert chips == int(sizes[0]) * int(sizes[1]) * int(sizes[2])
        assert {part["kind"]: part["metadata"]["name"] for part in parts} == dict.fromkeys(
            ("Service", "Job"), pod["subdomain"]
        )


def test_the_array_of_slurm_has_every_share():
    script = (ROOT / "docs" / "manifests" / "import.sbatch").read_text()
    (last,) = re.findall(r"--array=0-(\d+)", script)
    count = int(last) + 1
    environment = {"SLURM_ARRAY_TASK_ID": last, "SLURM_ARRAY_TASK_COUNT": str(count)}
    command = run_as(script, environment)
    understood(command)
    assert f"--worker {count}/{count}" in command

"""A folder with a report: report.json for programs, report.md and report.html for people.

`verify`, `compare` and `train` write theirs here, so that one reader reads them all;
docs/reports.md says what is in report.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtp_model.checkpoint.directory import COMPLETE
from mtp_model.files.open import as_place, is_address
from mtp_model.files.place import Place
from mtp_model.files.untrusted_json import JsonError, parse
from mtp_model.problems import UserError
from mtp_model.reporting import Picture, Section, html, is_page, markdown, to_json

REPORT_FILES = REPORT_MD, REPORT_HTML, REPORT_JSON = "report.md", "report.html", "report.json"
RUN_SETTINGS = "config.yaml"  # which makes a folder a run's
RUN_RESOLVED = "resolved.yaml"  # which is beside it
REPORT_VERSION = 1  # of report.json; a key that is new does not change it


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found, once for programs and once for people.

    images: files beside report.md by what they show; report.html holds its pictures in itself.
    """

    title: str
    plain: Mapping[str, Any]
    sections: Sequence[Section]
    pictures: Sequence[Picture] = ()
    images: Mapping[str, str] | None = None

    def page(self, when: str | None = None) -> str:
        """report.html. when: the time that stands above everything else."""
        return html(self.title, [*([when] if when else []), *self.sections, *self.pictures])


def folder_fault(folder: Path) -> str | None:
    """Why no report can be written into a folder, or None.

    What lies there and is no earlier report is somebody's own, and is not written over.
    """
    if (folder / RUN_SETTINGS).is_file() or (folder / COMPLETE).is_file():
        return "is a run or a checkpoint with reports of its own, needed another folder"
    names = [name for name in sorted(REPORT_FILES) if (folder / name).is_file()]
    if names and not is_report(folder / REPORT_JSON):
        return f"has {' and '.join(names)} that no report left there, needed another folder"
    return _fault_of_place(folder)


def page_fault(page: Path) -> str | None:
    """Why no page can be written to a file, or None."""
    if page.is_file() and not is_page(page.read_bytes()):
        return "is there and is no report, needed another name"
    return _fault_of_place(page.parent)


def _fault_of_place(folder: Path) -> str | None:
    if is_address(folder):
        return "is an address, needed a place on this machine"
    above = next(path for path in (folder, *folder.parents) if path.exists())
    return None if above.is_dir() else f"needs a folder, but {above} is a file; name another place"


def is_report(file: Path | Place) -> bool:
    """Whether it is a report.json of ours."""
    try:
        found = parse(file.read_bytes())
    except (OSError, JsonError):
        return False
    return isinstance(found, dict) and "report_version" in found


def make_report_folder(folder: str | Path) -> None:
    """The folder that a report will be in, without an earlier one; UserError where none can be.

    So that it fails now, and not after an hour of computing what it is to say.
    """
    if fault := folder_fault(Path(folder)):
        raise UserError(f"--report is {folder}, which {fault}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    clear_report(folder)


def write_report(folder: str | Path, findings: Findings) -> None:
    """Write the three files into `folder`, which is made when missing, over earlier ones."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = f"# {findings.title}\n\n{when}\n\n" + markdown(findings.sections)
    text += "".join(f"\n![{shows}]({file})\n" for shows, file in (findings.images or {}).items())
    plain = {"report_version": REPORT_VERSION, **findings.plain}
    (folder / REPORT_JSON).write_text(to_json(plain) + "\n", encoding="utf-8")
    (folder / REPORT_MD).write_text(text, encoding="utf-8")
    (folder / REPORT_HTML).write_text(findings.page(when), encoding="utf-8")


def clear_report(folder: str | Path | Place) -> None:
    """Remove an earlier report: while a new one is on its way, nothing there looks finished."""
    for name in REPORT_FILES:  # the last one says whose the others are
        file = as_place(folder) / name
        if file.is_file():
            file.unlink()

"""A folder with a report: report.json for programs, report.md and report.html for people.

`verify`, `compare` and `train` write theirs here, so that one reader reads them all;
docs/reports.md says what is in report.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtp_model.files.open import as_place
from mtp_model.files.place import Place
from mtp_model.reporting import Picture, Section, html, markdown, to_json

REPORT_JSON, REPORT_MD, REPORT_HTML = "report.json", "report.md", "report.html"
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
    for name in (REPORT_JSON, REPORT_MD, REPORT_HTML):
        file = as_place(folder) / name
        if file.is_file():
            file.unlink()

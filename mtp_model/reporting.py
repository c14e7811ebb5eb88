"""How results look: tables for people, Markdown and HTML for files, JSON for
programs."""

import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtp_model.problems import Problem, ProblemsError, group_problems

_MOST_LINES = 60
LEGEND = "upper right"  # of drawings; to look for the best place takes seconds with many points
_PIPED_WIDTH = 120  # a file or a pipe has no width of its own
# Control characters, and those that turn the direction of writing.
_OBEYED = (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SPELT_OUT = {code: ascii(chr(code))[1:-1] for code in _OBEYED if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class Facts:
    """What, and its value, one below the other."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Grid:
    """A table: the first column is text, the others are numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


Section = Facts | Grid | str
"""One piece of a report; a string is text of one or more lines."""


@dataclass(frozen=True)
class Picture:
    """An SVG element for `html`, and its title, which says what is drawn."""

    title: str
    svg: str


def stdout() -> Console:
    """Where results go."""
    return _console(sys.stdout)


def stderr() -> Console:
    """Where progress and diagnostics go."""
    return _console(sys.stderr)


def _console(file: Any) -> Console:
    width = None if file.isatty() else _PIPED_WIDTH
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False)


def show(console: Console, sections: Iterable[Section]) -> None:
    """Print sections, an empty line between two, without spaces at the ends of lines."""
    for number, section in enumerate(sections):
        view = _rich(section)
        with console.capture() as capture:
            console.print(view, soft_wrap=isinstance(view, Text))
        lines = [line.rstrip() for line in capture.get().strip("\n").splitlines()]
        text = "\n".join(line for line in lines if line or isinstance(view, Text))
        console.file.write("\n" * (number > 0) + text + "\n")


def visible(text: str) -> str:
    """The same text without what a terminal obeys: names come from files nobody vouches for."""
    return text.translate(_SPELT_OUT)


def _rich(section: Section) -> Table | Text:
    if isinstance(section, str):
        return Text(visible(section))
    if isinstance(section, Facts):
        width = max((len(name) for name, _ in section.pairs), default=0)
        lines = (f"{name:<{width}}  {value}" for name, value in section.pairs)
        return Text(visible("\n".join(lines)))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(section.columns):
        justify = "right" if number else "left"
        table.add_column(visible(column), justify=justify, overflow="fold")
    for row in section.rows:
        table.add_row(*map(visible, row))
    return table


def markdown(sections: Iterable[Section]) -> str:
    """The same sections as Markdown text."""
    return "\n\n".join(_markdown(section) for section in sections) + "\n"


def _markdown(section: Section) -> str:
    if isinstance(section, str):
        return f"```\n{section}\n```"
    if isinstance(section, Facts):
        return "\n".join(f"* {name}: {value}" for name, value in section.pairs)
    rule = ["---", *("--:" for _ in section.columns[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (section.columns, rule, *section.rows))


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem }}
body {{ margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.4rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0 }}
th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8886 }}
th:first-child, td:first-child {{ text-align: left }}
pre {{ white-space: pre-wrap }}
dt {{ float: left; clear: left; min-width: 7rem; opacity: .7 }}
figure {{ margin: 1.5rem 0; overflow-x: auto }}
svg {{ max-width: 100%; height: auto }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def html(title: str, sections: Iterable[Section | Picture]) -> str:
    """A page of these sections that needs nothing beside it, in the reader's light or dark."""
    return _PAGE.format(title=escape(title), body="\n".join(map(_html, sections)))


def _html(section: Section | Picture) -> str:
    if isinstance(section, str):
        return f"<pre>{escape(section)}</pre>"
    if isinstance(section, Facts):
        pairs = (f"<dt>{escape(n)}</dt><dd>{escape(value)}</dd>" for n, value in section.pairs)
        return f"<dl>{''.join(pairs)}</dl>"
    if isinstance(section, Picture):
        caption = f"<figcaption>{escape(section.title)}</figcaption>"
        return f"<figure>{caption}{section.svg}</figure>"
    head = "".join(f"<th>{escape(column)}</th>" for column in section.columns)
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in section.rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def is_page(content: bytes) -> bool:
    """Whether `html` made it."""
    return content.startswith(_PAGE.partition("<title>")[0].encode())


_INK = "#0b0c0d"  # no other colour of a drawing: becomes the text's, dark on light or the reverse


def drawing(title: str, draw: Callable[[Any], None], size: tuple[float, float]) -> Picture:
    """What `draw` does with the axes of a new figure. size: in inches."""
    import matplotlib as mpl  # takes half a second to import
    from matplotlib.figure import Figure

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(inks, _INK)
    style |= {"svg.fonttype": "none", "svg.hashsalt": "deepseek-mtp", "legend.frameon": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    return Picture(title, text[text.index("<svg") :].replace(_INK, "currentColor"))


def to_json(value: Mapping[str, Any]) -> str:
    """JSON text; numbers that are not finite, which JSON has not, become null."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def human_bytes(count: float) -> str:
    """`688.57 GB`: decimal units."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def human_count(count: float) -> str:
    """`684.49 B`: thousands, millions, billions, trillions."""
    return _scaled(count, ("", "K", "M", "B", "T"))


def human_time(seconds: float) -> str:
    """`28 s`, `35 min` or `12.5 h`."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _scaled(count: float, units: Sequence[str]) -> str:
    power = 0
    while abs(count) >= 999.995 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    digits = 0 if power == 0 else 2
    return f"{count:,.{digits}f} {units[power]}".rstrip()


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """`1 file`, `3,000 files`; `nouns` where an s does not make the plural."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def cut(lines: Sequence[str], most: int = _MOST_LINES) -> list[str]:
    """At most that many lines, and a word on those that are left out."""
    if len(lines) <= most:
        return list(lines)
    return [*lines[:most], f"... and {len(lines) - most:,} more lines; --json lists all"]


def problem_report(where: str, problems: Sequence[Problem]) -> str:
    """The report of problems: alike ones as one line, a screenful or two at most."""
    lines = cut(group_problems(problems))
    return "\n".join(
        [f"{plural(len(problems), 'problem')} in {where}:", *(f"  {x}" for x in lines)]
    )


def problems_as_json(error: ProblemsError) -> dict[str, Any]:
    """A ProblemsError as plain data, every problem of it."""
    return {"where": error.where, "problems": [asdict(problem) for problem in error.problems]}

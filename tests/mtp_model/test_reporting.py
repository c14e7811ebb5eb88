"""A page of results needs nothing beside it, and runs nothing that a name says."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import assert_readable, seen
from rich.console import Console

from mtp_model.reporting import Facts, Grid, drawing, html, show

SPITEFUL = "<script>alert('x')</script><img src=http://example.org>"


class Reader(HTMLParser):
    """Every element of a page with its attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def drawn(axes) -> None:
    axes.plot([0, 1], [2, 3], label="a line")
    axes.legend()


def test_names_are_shown_and_not_run():
    sections = [SPITEFUL, Facts([(SPITEFUL, SPITEFUL)]), Grid((SPITEFUL,), [(SPITEFUL,)])]
    page = Reader(html(SPITEFUL, sections))
    assert page.text.count(SPITEFUL) == 7
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    assert "script" in {tag for tag, _ in Reader(SPITEFUL).elements}  # the control


def test_a_terminal_is_told_nothing_by_a_name():
    name = "\x1b]0;title\x07\x1b[31m\x9b2J\r\u202egpj"
    told = r"\x1b]0;title\x07\x1b[31m\x9b2J\r\u202egpj"
    out = io.StringIO()
    console = Console(file=out, width=120)
    show(console, [f"{name}\né", Facts([(name, name)]), Grid((name,), [(name,)])])
    assert out.getvalue().count(told) == 5
    assert set(out.getvalue()) - {"\n", "é", "─"} <= set(map(chr, range(0x20, 0x7F)))


def test_a_page_asks_for_nothing_from_elsewhere():
    page = Reader(html("page", [drawing("a drawing", drawn, (4, 3))]))
    asked = [
        value
        for tag, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href") and not (value or "").startswith("#")
    ]
    assert not asked
    assert not {tag for tag, _ in page.elements} & {"link", "script", "image", "iframe"}
    policy = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "a line" in page.text


def test_a_drawing_has_the_readers_own_ink():
    """In dark and in light: no black, no white; lines keep their colours."""
    svg = drawing("a drawing", drawn, (4, 3)).svg
    colours = set(re.findall(r"#[0-9a-f]{6}\b", svg))
    assert colours == {"#1f77b4"}
    assert "fill: currentColor" in svg
    assert svg == drawing("a drawing", drawn, (4, 3)).svg


def test_a_browser_shows_what_is_wrong_with_a_page(tmp_path: Path):
    """The control of those tests that open a report: no drawing, and something from elsewhere."""
    page = tmp_path / "page.html"
    page.write_text(html("page", ["a line of text " * 5] * 30))
    with pytest.raises(AssertionError, match="no drawing is seen"):
        assert_readable(page, tmp_path)
    page.write_text(html("page", []) + "<img src='http://127.0.0.1:1/x.png'>")
    assert "Content Security Policy" in seen(page, tmp_path, "light")[1]

"""Advice of the product, and the tests that follow it."""

from collections.abc import Callable
from typing import TypeVar

import pytest

from converters.cli.main import main

Test = TypeVar("Test", bound=Callable)


def follows(*advice: str) -> Callable[[Test], Test]:
    """Says of a test that it does what these messages tell, and that it helps.

    advice: parts of messages as the product's source has them. tests/test_advice.py finds what no
    test follows.
    """
    assert advice
    return lambda test: test


def done(*args: object) -> None:
    """The command succeeds."""
    assert main([str(arg) for arg in args]) == 0


def told(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What the command says as it fails, on one line; `inspect` says it as its result."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 1
    said = "".join(capsys.readouterr())
    assert "Traceback" not in said
    return " ".join(said.split())

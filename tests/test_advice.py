"""Every message that says what to do is followed by a test, and doing it helps.

Messages are found in the product's source: texts within functions that ask for something. Tests say
by `follows` (tests/support/advice.py) which of them they provoke and follow.
"""

import ast
import re
from collections.abc import Iterator, Mapping

from test_architecture import PRODUCT, ROOT, parsed

ASKS = (
    "add ask choose convert copy correct delete download empty end export fetch free give import "
    "install keep leave make mend move name point pull push put raise read remove rename restore "
    "run set start take try undo unset use wait write"
).split()
# The beginning of a text, or of a part of it; an alternative; words that the user is to type.
ASKING = re.compile(rf"(?:^|[;:] |[;,] or )`?(?:{'|'.join(ASKS)}) ")
# What is said of data, of runs and of values in training is tried in their own tests.
OTHER_ROOMS = ("finetune/data/", "finetune/run/")
# What is done, or the name of a thing, and no request.
NO_ADVICE = ("copy in the cloud", "export writes", "import checks", "export does not write it")


def texts(text: str) -> Iterator[tuple[int, str]]:
    """Texts within functions, docstrings aside: line, text."""
    for function in ast.walk(parsed(text)):
        if isinstance(function, ast.FunctionDef):
            docs = ast.get_docstring(function, clean=False)
            for node in ast.walk(function):
                said = node.value if isinstance(node, ast.Constant) else None
                if isinstance(said, str) and said != docs:
                    yield node.lineno, said


def advice(product: Mapping[str, str]) -> dict[str, str]:
    """Texts that ask the user for something: text -> where it is."""
    return {
        said: f"{path}:{line}"
        for path, text in product.items()
        if not path.startswith(OTHER_ROOMS)
        for line, said in texts(text)
        if len(said) > 5 and ASKING.search(said) and not any(part in said for part in NO_ADVICE)
    }


def followed() -> set[str]:
    """What the tests say that they follow."""
    found: set[str] = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "follows":
                found |= {ast.literal_eval(argument) for argument in node.args}
    return found


def not_followed(product: Mapping[str, str]) -> list[str]:
    tried = followed()
    return [
        f"{where}: {said}"
        for said, where in advice(product).items()
        if not any(part in said for part in tried)
    ]


def test_every_advice_is_followed():
    assert not not_followed(PRODUCT)


def test_advice_that_nobody_follows_is_found():
    new = 'def f():\n    raise ValueError(f"{x} is wrong; remove the whole folder")\n'
    assert not_followed({**PRODUCT, "finetune/new.py": new}) == [
        "finetune/new.py:2:  is wrong; remove the whole folder"
    ]


def test_what_tests_follow_is_said_somewhere():
    said = "\n".join(text for source in PRODUCT.values() for _, text in texts(source))
    assert not [part for part in followed() if part not in said]

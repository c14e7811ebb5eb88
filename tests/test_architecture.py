"""Imports point one way, the heavy packages stay out, and layer 61 is never a literal."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mtp_model", "converters", "finetune")
FORBIDDEN = {
    "mtp_model": {"converters", "finetune"},
    "converters": {"finetune"},
    "finetune": {"converters"},
}
TORCH_PACKAGES = {"torch", "transformers", "safetensors"}
TORCH_MODULES = {"converters/verifying/torch_reference.py", "converters/verifying/torch_weights.py"}
STORE_PACKAGES = {"tensorstore", "google", "google_crc32c", "gcsfs"}
STORE_MODULES = {f"mtp_model/{name}.py" for name in ("files/objects", "files/object_place", "load")}
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).glob("**/*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of everything imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield (node.module or "").split(".")[0]


def violations(path: Path, source: str) -> set[str]:
    package = path.relative_to(ROOT).parts[0]
    forbidden = FORBIDDEN[package] | {"tests", "tools", "pickle"}
    if name_of(path) not in TORCH_MODULES:
        forbidden = forbidden | TORCH_PACKAGES
    if name_of(path) not in STORE_MODULES:
        forbidden = forbidden | STORE_PACKAGES
    return set(imported(ast.parse(source))) & forbidden


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    assert not violations(path, path.read_text())


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("mtp_model/model.py", "import converters.format.mapping"),
        ("converters/cli/main.py", "from finetune.train import train"),
        ("finetune/train.py", "def f():\n    import converters"),
        ("mtp_model/load.py", "import torch"),
        ("mtp_model/checkpoint/writer.py", "import tensorstore as ts"),
        ("converters/sources/objects.py", "from google.cloud import storage"),
        ("converters/format/check.py", "from transformers import AutoConfig"),
    ],
)
def test_a_wrong_import_would_be_noticed(module, line):
    assert violations(ROOT / module, line)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_layer_number_is_a_literal(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and node.value == 61:
            pytest.fail(f"{name_of(path)}:{node.lineno} says 61; the config says how many layers")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_for(path):
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(path.read_text()))

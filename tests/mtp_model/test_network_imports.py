"""The network's files know neither how bytes are stored nor the checkpoint directory.

`load` alone joins the two: whoever builds a network needs no files, and whoever writes a checkpoint
directory needs no network.
"""

import ast
from pathlib import Path

import pytest

import mtp_model

FOLDER = Path(next(iter(mtp_model.__path__)))
NETWORK = (
    *("config", "families", "context", "attention", "rope", "moe", "dispatch", "grouped"),
    *("rows", "block", "mtp", "model", "layers", "sharding"),
)
STORAGE = ("files", "checkpoint")


def storage_imports(source: str) -> set[str]:
    """What of the storage rooms, or of `load` that reads them, a file imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    rooms = tuple(f"mtp_model.{room}." for room in (*STORAGE, "load"))
    return {name for name in found if f"{name}.".startswith(rooms)}


@pytest.mark.parametrize("name", NETWORK)
def test_network_files_import_no_storage(name):
    assert not storage_imports((FOLDER / f"{name}.py").read_text())


@pytest.mark.parametrize("room", STORAGE)
def test_storage_imports_no_network(room):
    network = {f"mtp_model.{name}" for name in NETWORK}
    for file in (FOLDER / room).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                assert not (named | {node.module}) & network, file.name


@pytest.mark.parametrize(
    "line",
    [
        "from mtp_model.files.local import digest",
        "from mtp_model.checkpoint import directory",
        "from mtp_model import files",
        "import mtp_model.checkpoint.directory",
        "def f():\n    from mtp_model.load import load",
    ],
)
def test_a_storage_import_would_be_noticed(line):
    assert storage_imports(line)
    assert not storage_imports("from mtp_model.layers import Linear\nimport mtp_model.loads")

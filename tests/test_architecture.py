"""The rules of the house: rooms in a strict order, no circles, one word for one thing.

Every rule is a function from the product's source texts to what breaks it; each is run on the
product, and on a product with one line or file added that it has to find.
"""

import ast
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mtp_model", "converters", "finetune")
# Rooms of the converters, from the ground up; those of one floor never import each other.
FLOORS = (
    {"sources"},
    {"format"},
    {"importing", "exporting", "publishing"},
    {"verifying"},
    {"cli"},
)
MAY_USE = {  # verifying proves what export writes, and nothing else of its floor
    "verifying": {"exporting", "format", "sources"},
}
NETWORK = (
    "attention batched block config context dispatch families grouped layers looped meshes model "
    "moe mtp products rope rows sharding swiglu"
).split()
ONLY_IN = {
    "torch": ("converters/verifying/logits/torch_",),
    "transformers": ("converters/verifying/logits/torch_",),
    "safetensors": ("converters/verifying/logits/torch_",),
    "tensorstore": ("mtp_model/files/", "mtp_model/load.py"),
    "fsspec": ("mtp_model/files/",),
    "google": ("mtp_model/files/",),
    "google_crc32c": ("mtp_model/files/",),
    # Training data comes from the Hub too; finetune may not use the converters' own reader of it.
    "huggingface_hub": (
        *("converters/sources/hub", "converters/publishing/"),
        "finetune/data/files/hub.py",
    ),
    "httpx2": (
        *("converters/sources/hub", "converters/publishing/"),
        *("finetune/generation/server", "finetune/data/files/hub.py"),
    ),
}
NOWHERE = {"tests", "tools", "pickle"}
OPENS_ONLY_IN = "mtp_model/files/"
# Beside that room, the two sources that are a place themselves know which.
SOURCES_THAT_ARE_PLACES = ("converters/sources/local.py", "converters/sources/objects.py")
KINDS_OF_PLACE = {"ObjectPlace", "LocalPlace"}
# Raised and caught within sources/hub*: the user sees what becomes of them.
INTERNAL_ERRORS = {"PassingError", "UnwantedError"}
# The same within generation/server.
INTERNAL_ERRORS |= {"_PassingError"}
# Raised and caught in a process that has nothing of ours: its text is what comes out of it.
INTERNAL_ERRORS |= {"CannotRenderError"}
MOST_FILES = 12
MOST_LINES = 400
FLAT = {"mtp_model"}  # the network stays flat: a layer a file
SMALL_LINES = 80
# Small files with one importer that are files all the same, and why.
SMALL = {
    "converters/cli/__main__.py": "python runs it by this name",
    "converters/cli/main.py": "the entry point: it imports no more than --help needs",
    "converters/cli/inspect_command.py": "a command a file",
    "converters/cli/import_command.py": "a command a file",
    "converters/cli/verify_command.py": "a command a file",
    "converters/cli/new_mtp_command.py": "a command a file",
    "converters/sources/open.py": "what the protocol's users open must not import each source",
    "converters/verifying/files.py": "reads no tensor, the rest of verify reads all",
    "finetune/planning/report.py": "plans know of no tables",
    "finetune/captured/measured_text.py": "what is read, apart from what is measured of it",
    "finetune/run/mirror.py": "copies of files, whatever they are for",
    "finetune/objective/acceptance.py": "a definition, apart from the losses",
    "converters/verifying/logits/torch_weights.py": "the reference gets weights from who has them",
    "finetune/data/draft_vocab.py": "counts and writes, and measures nothing",
    "converters/format/writer.py": "the other half of header.py, for tools and tests too",
    "mtp_model/rope.py": "a part of the network that papers describe on its own",
}
CLAIMS = ("must not know", "knows nothing", "know nothing", "knows no ", "knows not ")

Product = Mapping[str, str]
"""Source texts by path from the root of the checkout."""


def read_product() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


PRODUCT = read_product()
parsed = functools.lru_cache(maxsize=None)(ast.parse)  # the rules read the product forty times


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_names(text: str) -> Iterator[str]:
    """Everything imported, inside functions and under TYPE_CHECKING too: `a.b` or `a.b.name`."""
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph(product: Product) -> dict[str, set[str]]:
    """Paths of the product's files that each file imports."""
    files = {module_name(path): path for path in product}
    graph = {}
    for path, text in product.items():
        found = (files.get(n) or files.get(n.rpartition(".")[0]) for n in imported_names(text))
        graph[path] = {other for other in found if other and other != path}
    return graph


def room_of(path: str) -> tuple[str, str]:
    """Package, and folder in it (empty for a file directly in the package)."""
    package, *rest = path.split("/")
    return package, rest[0] if len(rest) > 1 else ""


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


# --- rules


def upward_imports(product: Product) -> list[str]:
    """Imports that go up, or sideways into a room that must not be used."""
    return [
        f"{path} imports {other}"
        for path, others in import_graph(product).items()
        for other in others
        if not may_import(room_of(path), room_of(other))
    ]


def may_import(ours: tuple[str, str], theirs: tuple[str, str]) -> bool:
    if ours[0] != theirs[0]:
        return theirs[0] == "mtp_model" and ours[0] != "mtp_model"
    if ours[0] != "converters" or ours[1] == theirs[1]:
        return True
    if ours[1] in MAY_USE:
        return theirs[1] in MAY_USE[ours[1]]
    return floor_of(theirs[1]) < floor_of(ours[1])


def circles(product: Product) -> list[str]:
    """Files that import each other, directly or through others."""
    graph = import_graph(product)
    found, done = [], set()

    def visit(path: str, way: tuple[str, ...]) -> None:
        if path in way:
            found.append(" -> ".join((*way[way.index(path) :], path)))
        elif path not in done:
            for other in sorted(graph[path]):
                visit(other, (*way, path))
            done.add(path)

    for path in graph:
        visit(path, ())
    return found


def network_that_knows_files(product: Product) -> list[str]:
    """Files of the network that import where bytes are kept: `load` alone sees both."""
    below = ("mtp_model/files/", "mtp_model/checkpoint/")
    network = {f"mtp_model/{name}.py" for name in NETWORK}
    graph = import_graph(product)
    return [
        f"{path} imports {other}"
        for path in network & graph.keys()
        for other in graph[path]
        if other.startswith(below)
    ]


def ground_that_looks_up(product: Product) -> list[str]:
    """Files of mtp_model/files and mtp_model/checkpoint that import what stands above them."""
    allowed = {
        "files": ("mtp_model/files/", "mtp_model/problems.py"),
        "checkpoint": (
            *("mtp_model/checkpoint/", "mtp_model/files/", "mtp_model/problems.py"),
            *("mtp_model/config.py", "mtp_model/config_keys.py", "mtp_model/families.py"),
            *("mtp_model/cluster.py", "mtp_model/threads.py"),
        ),
    }
    return [
        f"{path} imports {other}"
        for path, others in import_graph(product).items()
        if room_of(path)[0] == "mtp_model" and room_of(path)[1] in allowed
        for other in others
        if not other.startswith(allowed[room_of(path)[1]])
    ]


def packages_out_of_place(product: Product) -> list[str]:
    """Libraries that are known in one place only, imported elsewhere; and what nobody imports."""
    return [
        f"{path} imports {name}"
        for path, text in product.items()
        for name in {name.split(".")[0] for name in imported_names(text)}
        if name in NOWHERE or not path.startswith(ONLY_IN.get(name, (path,)))
    ]


def stores_out_of_place(product: Product) -> list[str]:
    """Files outside mtp_model/files that tell object stores from folders, or open descriptors."""
    found = []
    for path, text in product.items():
        if path.startswith(OPENS_ONLY_IN):
            continue
        for node in ast.walk(parsed(text)):
            text_of = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
            known = path in SOURCES_THAT_ARE_PLACES
            if text_of == "os.open" or (text_of in KINDS_OF_PLACE and not known):
                found.append(f"{path}:{node.lineno} {text_of}")
    return found


def errors_of_their_own(product: Product) -> list[str]:
    """Exception classes that do not come from UserError."""
    bases = {
        node.name: {ast.unparse(base) for base in node.bases}
        for text in product.values()
        for node in ast.walk(parsed(text))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }
    good = {"UserError"}
    while more := {name for name, of in bases.items() if of & good} - good:
        good |= more
    return sorted(bases.keys() - good - INTERNAL_ERRORS)


def words_with_two_meanings(product: Product) -> list[str]:
    """Public class names that are defined twice."""
    places = defaultdict(list)
    for path, text in product.items():
        for node in parsed(text).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path)
    return [f"{name}: {', '.join(of)}" for name, of in places.items() if len(of) > 1]


def crowded(product: Product) -> list[str]:
    """Folders of too many files, files of too many lines, small files that belong elsewhere."""
    folders = Counter(path.rpartition("/")[0] for path in product if "__init__" not in path)
    found = [f"{f}: {n} files" for f, n in folders.items() if n > MOST_FILES and f not in FLAT]
    importers = Counter(other for others in import_graph(product).values() for other in others)
    for path, text in product.items():
        lines = len(text.splitlines())
        if lines > MOST_LINES:
            found.append(f"{path}: {lines} lines")
        if 0 < lines < SMALL_LINES and importers[path] < 2 and path not in SMALL:
            found.append(f"{path}: {lines} lines, one importer")
    return found


def claims_without_proof(product: Product) -> list[str]:
    """Docstrings that say what a file does not know: this file says it, and keeps it."""
    return [
        f"{path}: {claim}"
        for path, text in product.items()
        for claim in CLAIMS
        if claim in " ".join(text.lower().split())
    ]


def layer_numbers(product: Product) -> list[str]:
    """The MTP layer's number in V3: the config says how many layers there are."""
    return [
        f"{path}:{node.lineno}"
        for path, text in product.items()
        for node in ast.walk(parsed(text))
        if isinstance(node, ast.Constant) and node.value == 61
    ]


def files_without_a_word(product: Product) -> list[str]:
    """Files whose first line does not say what they are for."""
    return [path for path, text in product.items() if text and not ast.get_docstring(parsed(text))]


BREAKING = {
    upward_imports: [
        ("mtp_model/model.py", "import converters.format.mapping"),
        ("finetune/train.py", "def f():\n    import converters"),
        ("converters/cli/main.py", "from finetune.train import train"),
        ("converters/sources/local.py", "from converters.format.mapping import slots"),
        ("converters/importing/importer.py", "import converters.exporting.exporter"),
        ("converters/verifying/verify.py", "import converters.importing.importer"),
        ("converters/exporting/plan.py", "if TYPE_CHECKING:\n    import converters.cli.main"),
    ],
    circles: [
        ("mtp_model/rows.py", "def f():\n    import mtp_model.grouped"),
        ("mtp_model/config.py", "import mtp_model.model"),
    ],
    network_that_knows_files: [
        ("mtp_model/model.py", "from mtp_model.files.local import digest"),
        ("mtp_model/mtp.py", "import mtp_model.checkpoint.directory"),
    ],
    ground_that_looks_up: [
        ("mtp_model/files/local.py", "import mtp_model.checkpoint.directory"),
        ("mtp_model/checkpoint/chunks.py", "import mtp_model.model"),
    ],
    packages_out_of_place: [
        ("mtp_model/load.py", "import torch"),
        ("converters/format/listing.py", "from safetensors import safe_open"),
        ("converters/importing/importer.py", "import tensorstore as ts"),
        ("converters/exporting/files.py", "from google.cloud import storage"),
        ("finetune/train.py", "import huggingface_hub"),
        ("finetune/data/files/kinds.py", "from huggingface_hub import HfApi"),
        ("finetune/train.py", "import pickle"),
    ],
    stores_out_of_place: [
        ("mtp_model/load.py", "def f(x):\n    return isinstance(x, ObjectPlace)"),
        ("converters/importing/importer.py", "fd = os.open('x', 0)"),
    ],
    errors_of_their_own: [
        ("finetune/train.py", "class LostError(ValueError):\n    pass"),
        (
            "finetune/train.py",
            "class AError(BError):\n    pass\nclass BError(Exception):\n    pass",
        ),
    ],
    words_with_two_meanings: [("finetune/train.py", "class ModelConfig:\n    pass")],
    crowded: [
        ("finetune/train.py", "\n" * MOST_LINES),
        ("finetune/small.py", '"""Small."""'),
    ],
    claims_without_proof: [("finetune/small.py", '"""Steps. Knows nothing of files."""')],
    layer_numbers: [("finetune/train.py", "layer = 61")],
    files_without_a_word: [("finetune/small.py", "x = 1")],
}
CASES = [(rule, path, line) for rule, cases in BREAKING.items() for path, line in cases]
Rule = Callable[[Product], list[str]]


@pytest.mark.parametrize("rule", BREAKING, ids=lambda rule: rule.__name__)
def test_the_product_keeps_the_rule(rule: Rule):
    assert not rule(PRODUCT), f"{rule.__doc__}\n" + "\n".join(rule(PRODUCT))


@pytest.mark.parametrize(
    ("rule", "path", "line"),
    CASES,
    ids=[f"{rule.__name__}-{number}" for number, (rule, *_) in enumerate(CASES)],
)
def test_what_breaks_a_rule_is_found(rule: Rule, path: str, line: str):
    broken = {**PRODUCT, path: f"{PRODUCT.get(path, '')}\n{line}\n"}
    assert len(rule(broken)) > len(rule(PRODUCT))

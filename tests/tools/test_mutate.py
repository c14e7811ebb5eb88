"""Every damage of tools/mutate.py is caught by who docs/verification.md says."""

from pathlib import Path

import pytest

pytest.importorskip("torch")

from tools.mutate import Bench
from tools.mutations import MUTATIONS, Mutation

DOCS = Path(__file__).parents[2] / "docs" / "verification.md"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("mutate"))


def told() -> dict[str, str]:
    """Who catches what, by the table in the docs."""
    rows = [line.split(" | ") for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    names = {mutation.name for mutation in MUTATIONS}
    return {row[0].removeprefix("| "): row[1] for row in rows if row[0].removeprefix("| ") in names}


def test_no_damage_is_not_called_one(bench: Bench):
    assert bench.sound() is None


def test_the_docs_have_every_damage():
    assert [*told()] == [mutation.name for mutation in MUTATIONS]
    assert len(MUTATIONS) == 40


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_damage_is_caught(bench: Bench, mutation: Mutation):
    catch = bench.caught(mutation)
    assert catch
    assert catch.by == told()[mutation.name]
    assert catch.message

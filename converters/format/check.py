"""Whether a checkpoint can be imported: everything that is wrong, before any byte moves.

Knows the table, headers, scales and copies; must not know how the tree is stored on our side.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from converters.format.fit import compare
from converters.format.listing import Listing
from converters.format.mapping import Slot
from converters.format.values import bytes_to_read, scale_problems, stale_copies
from converters.sources.source import Source
from mtp_model.config import ModelConfig
from mtp_model.files.untrusted_json import JsonError, parse, shown
from mtp_model.model import Scope
from mtp_model.problems import Problem, ProblemsError, raise_if_any

Copies = Literal["check", "main"]

CONFIG_FILE = "config.json"
_LARGEST_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A checkpoint that can be imported."""

    config: ModelConfig
    slots: dict[str, Slot]
    """Of the scope, by name. Copies that the source leaves out are not here."""
    stale_copies: tuple[str, ...]
    """Copies that differ from what they copy and give way to it; empty unless copies="main"."""
    notes: tuple[str, ...]
    """What was decided that the user should know, a line each."""


def read_config(source: Source) -> dict[str, Any]:
    """The parsed config.json of a source; ProblemsError when there is none or it is no object."""
    size = source.files().get(CONFIG_FILE)
    fault, config = None, None
    if size is None:
        fault = "is missing; every size of the network comes from it"
    elif size > _LARGEST_CONFIG_BYTES:
        fault = f"is {size} bytes, more than {_LARGEST_CONFIG_BYTES}"
    else:
        try:
            config = parse(source.read(CONFIG_FILE, 0, size))
        except JsonError as err:
            fault = str(err)
    if not fault and not isinstance(config, dict):
        fault = f"is {shown(config)}, needed an object"
    if fault:
        raise ProblemsError(source.name, [Problem("config", CONFIG_FILE, fault)])
    assert isinstance(config, dict)
    return config


def check(
    listing: Listing,
    config: Mapping[str, Any],
    *,
    scope: Scope = "all",
    copies: Copies = "check",
    progress: Callable[[int, int], None] | None = None,
) -> Checked:
    """Everything that import needs of a checkpoint. Reads scales and copies, in bounded pieces.

    config: the parsed config.json. copies: `main` lets copies that differ from the main model's
    tensors give way to them. progress is told the bytes that are read, and their total.
    Raises one ProblemsError with every problem.
    """
    found = compare(listing, config, scope=scope)
    count = _counter(bytes_to_read(listing, found.slots), progress)
    problems = [*found.problems, *scale_problems(listing, found.slots, count)]
    stale = tuple(stale_copies(listing, found.slots, count))
    if copies == "check":
        advice = "import with --copies main to take the main model's"
        problems += [Problem(p.kind, p.subject, f"{p.detail}; {advice}") for p in stale]
    raise_if_any(listing.source.name, problems)
    assert found.config is not None
    return Checked(
        config=found.config,
        slots=found.slots,
        stale_copies=tuple(problem.subject for problem in stale),
        notes=tuple(f"{p.subject} {p.detail}; the main model's is taken" for p in stale),
    )


def _counter(total: int, progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    return count

"""How results look: tables for people, plain data for programs; must not compute any result."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from converters.grouping import group_problems
from converters.inspection import Inspection, MtpModule, Network
from converters.problems import Problem, ProblemsError

_MOST_LINES = 60
_PIPED_WIDTH = 120  # a file or a pipe has no width of its own


def stdout() -> Console:
    """Where results go."""
    return _console(sys.stdout)


def stderr() -> Console:
    """Where progress and diagnostics go."""
    return _console(sys.stderr)


def _console(file: Any) -> Console:
    width = None if file.isatty() else _PIPED_WIDTH
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False)


def human_bytes(count: float) -> str:
    """`688.57 GB`: decimal units."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def human_count(count: float) -> str:
    """`684.49 B`: thousands, millions, billions, trillions."""
    return _scaled(count, ("", "K", "M", "B", "T"))


def _scaled(count: float, units: Sequence[str]) -> str:
    power = 0
    while abs(count) >= 999.995 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    digits = 0 if power == 0 else 2
    return f"{count:,.{digits}f} {units[power]}".rstrip()


def problem_lines(problems: Iterable[Problem]) -> list[str]:
    """The lines of a report on problems: alike ones as one, a screenful or two at most."""
    lines = group_problems(problems)
    if len(lines) > _MOST_LINES:
        more = len(lines) - _MOST_LINES
        lines[_MOST_LINES:] = [f"... and {more:,} more lines; --json lists every problem"]
    return lines


def problem_report(error: ProblemsError) -> str:
    """The report of a ProblemsError, alike problems as one line."""
    count = len(error.problems)
    head = f"{count:,} problem{'' if count == 1 else 's'} in {error.where}:"
    return "\n".join([head, *(f"  {line}" for line in problem_lines(error.problems))])


def plain_table(*columns: str, title: str | None = None, right: Iterable[int] = ()) -> Table:
    """A table in the one style of this toolkit; `right` numbers the columns of numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        justify = "right" if number in right else "left"
        table.add_column(column, justify=justify, overflow="fold")
    return table


def facts(rows: Iterable[tuple[str, str]]) -> Text:
    """Two columns without a head: what, and its value."""
    pairs = list(rows)
    width = max((len(name) for name, _ in pairs), default=0)
    return Text("\n".join(f"{name:<{width}}  {value}" for name, value in pairs))


def show(console: Console, view: RenderableType) -> None:
    """Print without the spaces that fill lines up to the width, which only a terminal needs."""
    with console.capture() as capture:
        console.print(view, soft_wrap=isinstance(view, Text))
    for line in capture.get().splitlines():
        console.file.write(line.rstrip() + "\n")


def inspection_views(found: Inspection) -> Iterator[RenderableType]:
    """What `inspect` prints, one below the other."""
    yield facts(_source_facts(found))
    if found.network:
        yield _groups_table(found.network)
    if found.problems:
        yield Text(problem_report(ProblemsError(found.source, found.problems)))


def _source_facts(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "checkpoint", found.source
    yield "model type", found.model_type or "unknown"
    yield "files", f"{found.files:,} safetensors, {human_bytes(found.file_bytes)}"
    for dtype, tally in found.dtypes.items():
        yield dtype, f"{tally.tensors:,} tensors, {human_bytes(tally.bytes)}"
    if found.network:
        yield from _network_facts(found.network)
    yield "import", _verdict(found)


def _network_facts(network: Network) -> Iterator[tuple[str, str]]:
    config = network.config
    layers = f"{config.num_dense_layers} dense + {config.num_moe_layers} MoE"
    experts = f"{config.n_routed_experts} experts, {config.num_experts_per_tok} per token"
    yield "layers", f"{layers} ({experts})"
    total, active = human_count(network.parameters), human_count(network.active_parameters)
    yield "parameters", f"{total}, of which one token uses {active} in the main model"
    block = config.weight_block_size
    yield "FP8", f"blocks of {block[0]} x {block[1]}" if block else "not quantised"
    for number, module in enumerate(network.mtp, start=1):
        yield f"MTP module {number}", _mtp_module(module)
    if not network.mtp:
        yield "MTP modules", "none: num_nextn_predict_layers is 0"


def _mtp_module(module: MtpModule) -> str:
    where = f"model.layers.{module.layer}"
    if not module.tensors:
        return f"{where}: absent"
    size = f"{module.tensors:,} tensors, {human_count(module.parameters)} parameters"
    copies = ", ".join(name.removesuffix(".weight") for name in module.copies) or "absent"
    return f"{where}: {size}; copies: {copies}"


def _verdict(found: Inspection) -> str:
    if found.problems:
        return "no, for the reasons below"
    return "yes (from the headers; importing also checks scales and copies)"


def _groups_table(network: Network) -> Table:
    table = plain_table("part", "tensors", "parameters", "bytes", right=(1, 2, 3))
    for group, tally in network.groups.items():
        cells = f"{tally.tensors:,}", human_count(tally.parameters), human_bytes(tally.bytes)
        table.add_row(group, *cells)
    return table

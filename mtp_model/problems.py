"""What a user can mend: the one base of such errors, and many problems as few lines of report."""

from collections.abc import Iterable
from dataclasses import dataclass


class UserError(ValueError):
    """What a user can mend, said for the person who reads it: found, needed, what to do.

    Both commands print these, and OSErrors, as one message; every other exception is a bug of ours
    and shows its traceback.
    """


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: its kind (`missing`, `shape`), what it concerns, the detail."""

    kind: str
    subject: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind:<9} {self.subject}{' ' if self.detail else ''}{self.detail}"


class ProblemsError(UserError):
    """Everything that is wrong with one input, as one report."""

    def __init__(self, where: str, problems: Iterable[Problem]):
        self.where = where
        self.problems = tuple(problems)
        super().__init__(where, self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        lines = [f"{count} problem{'' if count == 1 else 's'} in {self.where}:"]
        lines += [f"  {problem}" for problem in self.problems]
        return "\n".join(lines)


def raise_if_any(where: str, problems: Iterable[Problem]) -> None:
    """Raise one ProblemsError when there is at least one problem."""
    found = tuple(problems)
    if found:
        raise ProblemsError(where, found)


def group_problems(problems: Iterable[Problem]) -> list[str]:
    """The lines of a report, in the order in which their kinds of fault appear."""
    by_fault: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        by_fault.setdefault((problem.kind, problem.detail), []).append(problem.subject)
    lines = []
    for (kind, detail), subjects in by_fault.items():
        for subject, count in group_names(subjects):
            tally = f"({count:,} tensors)" if count > 1 else ""
            text = " ".join(part for part in (detail, tally) if part)
            lines.append(str(Problem(kind, subject, text)))
    return lines


_Group = tuple[tuple[str, ...], int]  # the parts of a name, how many tensors it stands for


def group_names(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names that differ in one number each as one, `layers.{0..3}.x`, with how many it stands for.

    Positions are joined from the right: experts first, then layers that lack the same experts.
    """
    groups: list[_Group] = [(tuple(name.split(".")), 1) for name in dict.fromkeys(names)]
    longest = max((len(parts) for parts, _ in groups), default=0)
    for position in range(longest - 1, -1, -1):
        groups = _join(groups, position)
    return [(".".join(parts), count) for parts, count in groups]


def _join(groups: list[_Group], position: int) -> list[_Group]:
    """Groups that are equal but for a number at `position`, joined."""
    joined: dict[tuple[object, ...], list[_Group]] = {}
    for parts, count in groups:
        numbered = len(parts) > position and parts[position].isdecimal()
        key = (parts[:position], numbered or parts[position:], parts[position + 1 :])
        joined.setdefault(key, []).append((parts, count))
    result = []
    for members in joined.values():
        parts = members[0][0]
        if len(members) > 1:
            numbers = braces(int(parts[position]) for parts, _ in members)
            parts = (*parts[:position], numbers, *parts[position + 1 :])
        result.append((parts, sum(count for _, count in members)))
    return result


def braces(numbers: Iterable[int]) -> str:
    """`7`, `{0..7}` or `{0..2,5}`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [str(a) if a == b else f"{a}..{b}" for a, b in runs]
    if len(runs) == 1 and runs[0][0] == runs[0][1]:
        return parts[0]
    return "{" + ",".join(parts) + "}"

"""What a user can mend: the one base of such errors, and problems that are reported together."""

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
